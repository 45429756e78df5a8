"""The manifest: a damaged manifest, no cache, and a cache of another origin are errors."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.tiny import fill_cache, make_manifest, make_sequence, snapshot
from vpd.data.cache.cache import CHUNK_TOKENS, Cache
from vpd.data.cache.manifest import CacheManifest
from vpd.data.cache.records import dump_record, parse_record
from vpd.data.cache.storage.local import LocalStorage
from vpd.data.errors import CacheCorruptError, CacheNotFoundError, ConfigError, FingerprintMismatchError


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "cache"
    fill_cache(folder, [make_sequence(name, 40, 2, 8) for name in "abc"])
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "cache")


def rewrite(text: str, **changes: Any) -> str:
    """The manifest with other values and a checksum that holds."""
    return dump_record(parse_record(text.encode(), "here", "a manifest") | changes).decode()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(lambda text: "", "checksum", id="empty"),
        pytest.param(lambda text: text[: len(text) // 2], "checksum", id="cut-short"),
        pytest.param(lambda text: "[]", "checksum", id="no-object"),
        pytest.param(lambda text: text.replace('"layer_ids"', '"layers"', 1), "checksum", id="other-key"),
        pytest.param(lambda text: text.replace('"hidden_size": 8', '"hidden_size": 9'), "checksum", id="other-value"),
        pytest.param(
            lambda text: rewrite(text, hidden_size="wide"), "integer, .* at hidden_size", id="wrong-type-well-recorded"
        ),
        pytest.param(lambda text: rewrite(text, more=1), "not permitted at more", id="other-key-well-recorded"),
        pytest.param(
            lambda text: text.replace('"schema_version": 3', '"schema_version": 4'), "version 4", id="later-schema"
        ),
        pytest.param(lambda text: rewrite(text, schema_version=1), "version 1", id="earlier-schema"),
    ],
)
def test_a_broken_manifest_is_an_error_that_names_it(change, words: str, folder: Path):
    path = folder / "dataset.json"
    path.write_text(change(path.read_text()))
    for opening in (Cache.open, lambda folder: Cache.create_or_open(folder, make_manifest())):
        with pytest.raises(CacheCorruptError, match=words) as caught:
            opening(folder)
        assert str(path) in str(caught.value)
        assert "version 3" in str(caught.value)


# No cache


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda folder: None, id="no-folder"),
        pytest.param(lambda folder: folder.mkdir(), id="empty-folder"),
        pytest.param(lambda folder: folder.write_text("a file"), id="file"),
    ],
)
def test_a_place_without_a_cache_is_reported(make, tmp_path: Path):
    make(tmp_path / "cache")
    with pytest.raises(CacheNotFoundError, match=r"cache, found no dataset\.json there.*vpd extract"):
        Cache.open(tmp_path / "cache")


def test_a_file_is_no_place_for_a_cache(tmp_path: Path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ConfigError, match=r"expected a folder, or nothing yet, at .*cache"):
        Cache.create_or_open(tmp_path / "cache", make_manifest())
    assert (tmp_path / "cache").read_text() == "a file"


def test_a_cache_without_sequences_opens_only_when_that_is_allowed(tmp_path: Path):
    make_manifest().write(LocalStorage(tmp_path))
    with pytest.raises(CacheNotFoundError, match="expected committed sequences in"):
        Cache.open(tmp_path)
    cache = Cache.open(tmp_path, allow_empty=True)
    assert (len(cache), cache.num_tokens, cache.num_bytes, cache.parts) == (0, 0, 0, [])


# Another origin


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_fingerprint", "eeee"),
        ("tokenizer_hash", "eeee"),
        ("template_hash", "eeee"),
        ("layer_ids", (1, 4)),
        ("generation", {"mode": "generate", "max_len": 256}),
        ("codec", "fp8"),
        ("chunk_tokens", 32),
    ],
)
def test_another_origin_is_refused_by_the_name_of_what_differs(field: str, value: Any, folder: Path):
    before = snapshot(folder)
    other = make_manifest(**{field: value})
    with pytest.raises(FingerprintMismatchError) as caught:
        Cache.create_or_open(folder, other)
    assert f"{field}: the cache has {getattr(make_manifest(), field)}, this run has {value}" in str(caught.value)
    assert str(caught.value).count("the cache has") == 1
    assert str(folder) in str(caught.value)
    assert snapshot(folder) == before


def test_all_differences_are_named_at_once(folder: Path):
    with pytest.raises(FingerprintMismatchError, match=r"tokenizer_hash: .*; codec: "):
        Cache.create_or_open(folder, make_manifest(tokenizer_hash="eeee", codec="int4"))


@pytest.mark.parametrize("change", [{"target": "elsewhere"}, {"versions": {"torch": "3"}}, {"rendered_sample": "x"}])
def test_what_does_not_decide_the_states_may_differ(change: dict[str, Any], folder: Path):
    before = snapshot(folder)
    assert len(Cache.create_or_open(folder, make_manifest(**change))) == 3
    assert snapshot(folder) == before


def test_a_manifest_reads_back_to_itself(tmp_path: Path):
    manifest = make_manifest(generation={"temperature": 1e-6, "top_p": 0.95, "seed": None}, rendered_sample="ü 你")
    manifest.write(LocalStorage(tmp_path))
    assert Cache.open(tmp_path, allow_empty=True).manifest == manifest
    record = parse_record((tmp_path / "dataset.json").read_bytes(), "here", "a manifest")
    assert record["schema_version"] == 3
    assert record.keys() == CacheManifest.model_fields.keys()
    assert manifest.chunk_tokens == CHUNK_TOKENS
