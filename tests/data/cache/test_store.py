"""The cache: what was written is what is read, only what was committed exists, and damage is an error."""

# T tokens, K layers, H hidden width
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Damage, fill_cache, make_manifest, make_sequence, same_bits, snapshot
from vpd.data.cache.files import write_text_durably
from vpd.data.cache.part import PartWriter
from vpd.data.cache.store import CHUNK_TOKENS, Cache, StateWriter, state_specs
from vpd.data.errors import CacheCorruptError, CacheNotFoundError, FingerprintMismatchError

K, H = 2, 8
CHUNK_BYTES = CHUNK_TOKENS * K * H * 2 + 4


SEQUENCES = [make_sequence(name, length, K, H) for name, length in [("a", 40), ("b", 70), ("c", 64)]]
"""Of one chunk, two chunks, and one chunk again."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "cache"
    assert len(fill_cache(folder, SEQUENCES, 3 * CHUNK_BYTES)) == 2
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A cache of two parts: a and b, then c."""
    return shutil.copytree(original, tmp_path / "cache")


def by_id(cache: Cache) -> dict[str, Any]:
    return {row.seq_id: cache.read(row) for row in cache.rows}


def part_of(folder: Path, seq_id: str) -> str:
    return next(row.part for row in Cache.open(folder).rows if row.seq_id == seq_id)


def part_folders(folder: Path) -> set[str]:
    return {path.name for path in (folder / "parts").iterdir()}


# What is read


@given(
    sizes=st.lists(st.tuples(st.integers(1, 150), st.booleans()), min_size=1, max_size=5),
    num_layers=st.integers(1, 4),
    width=st.integers(1, 9),
    part_chunks=st.integers(1, 6),
)
@settings(max_examples=12, deadline=None)
def test_what_was_written_is_what_is_read(sizes, num_layers, width, part_chunks):
    written = {
        f"s{i}": make_sequence(f"s{i}", length, num_layers, width, final_token_id=3 if generated else None)
        for i, (length, generated) in enumerate(sizes)
    }
    manifest = {"layer_ids": tuple(range(num_layers)), "hidden_size": width}
    part_bytes = part_chunks * (CHUNK_TOKENS * num_layers * width * 2 + 4)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "cache"
        fill_cache(folder, list(written.values()), part_bytes, **manifest)
        found = by_id(Cache.open(folder))
        assert found.keys() == written.keys()
        for seq_id, sequence in written.items():
            read, final = found[seq_id], sequence["final_token_id"]
            assert same_bits(read.hidden_TKH, sequence["hidden_TKH"])
            assert read.token_ids_S.tolist() == sequence["token_ids"] + ([] if final is None else [final])
            assert read.loss_mask_S.tolist() == [*map(bool, sequence["loss_mask"])] + ([] if final is None else [True])
            assert read.target_argmax_T.tolist() == sequence["target_argmax"]
            assert (read.token_ids_S.dtype, read.loss_mask_S.dtype) == (torch.int64, torch.bool)
            part = zarr.open_group(folder / "parts" / f"{read.row.part}.zarr", mode="r")
            rows = slice(read.row.first_row, read.row.first_row + read.row.num_tokens)
            states = part["hidden"]
            assert isinstance(states, zarr.Array)
            assert np.asarray(states[rows]).tobytes() == sequence["hidden_TKH"].view(torch.uint16).numpy().tobytes()


def test_index_rows_say_what_was_written(folder: Path):
    expected = [
        {"num_tokens": 40, "first_row": 0, "hidden_offset": 0, "hidden_length": CHUNK_BYTES, "num_supervised": 21},
        {"num_tokens": 70, "first_row": 64, "hidden_offset": CHUNK_BYTES, "hidden_length": 2 * CHUNK_BYTES}
        | {"num_supervised": 36},
        {"num_tokens": 64, "first_row": 0, "hidden_offset": 0, "hidden_length": CHUNK_BYTES, "num_supervised": 33},
    ]
    kept = ["seq_id", "source", "source_row", "prompt_len", "final_token_id", "finish_reason"]
    rows = {row.seq_id: row for row in Cache.open(folder).rows}
    for sequence, more in zip(SEQUENCES, expected, strict=True):
        row = rows[sequence["seq_id"]]
        assert asdict(row) == {name: sequence[name] for name in kept} | more | {"part": row.part}
        assert asdict(row) in pq.read_table(folder / "index" / f"{row.part}.parquet").to_pylist()


def test_the_byte_range_of_the_index_holds_the_states(folder: Path):
    rows = {row.seq_id: row for row in Cache.open(folder).rows}
    for sequence in SEQUENCES:
        row = rows[sequence["seq_id"]]
        with open(folder / "parts" / f"{row.part}.zarr/hidden/c/0/0/0", "rb") as file:
            file.seek(row.hidden_offset)
            content = file.read(row.hidden_length)
        chunks = [content[i : i + CHUNK_BYTES - 4] for i in range(0, len(content), CHUNK_BYTES)]
        states = torch.frombuffer(bytearray(b"".join(chunks)), dtype=torch.bfloat16).view(-1, K, H)
        assert same_bits(states[: row.num_tokens], sequence["hidden_TKH"])
        assert not states[row.num_tokens :].any()


def test_commit_records_describe_every_file_and_count_sequences(folder: Path):
    cache = Cache.open(folder)
    listed: set[str] = set()
    for name, record in cache.commits.items():
        rows = list(cache.rows_of_part(name))
        assert (record["num_sequences"], record["num_tokens"]) == (len(rows), sum(row.num_tokens for row in rows))
        for path, facts in record["files"].items():
            content = (folder / path).read_bytes()
            assert facts == {"bytes": len(content), "crc32c": f"{google_crc32c.value(content):08x}"}
        listed |= record["files"].keys()
    assert listed == {path for path in snapshot(folder) if path.startswith(("parts/", "index/"))}
    assert cache.num_bytes == sum((folder / path).stat().st_size for path in listed)
    assert (len(cache), cache.num_tokens) == (3, 40 + 70 + 64)


def test_a_tiny_cache_made_by_the_command_is_zarr_too(tiny_cache: Path):
    cache = Cache.open(tiny_cache)
    for name in cache.commits:
        group = zarr.open_group(tiny_cache / "parts" / f"{name}.zarr", mode="r")
        arrays = {key: np.asarray(array[:]) for key, array in group.arrays()}
        assert arrays.keys() == cache.specs.keys()
        for row in cache.rows_of_part(name):
            read, rows = cache.read(row), slice(row.first_row, row.first_row + row.num_tokens)
            assert arrays["hidden"][rows].tobytes() == read.hidden_TKH.view(torch.uint16).numpy().tobytes()
            assert arrays["token_ids"][rows].tolist() == read.token_ids_S[: row.num_tokens].tolist()
            assert arrays["loss_mask"][rows].tolist() == read.loss_mask_S[: row.num_tokens].int().tolist()
            assert arrays["target_argmax"][rows].tolist() == read.target_argmax_T.tolist()


# What is written


def test_a_new_part_starts_when_one_is_full(tmp_path: Path):
    chunks = [1, 1, 2, 3, 1, 1]
    writer = StateWriter(Cache.create_or_open(tmp_path, make_manifest()), 3 * CHUNK_BYTES, {})
    committed = [writer.append(**make_sequence(str(i), count * CHUNK_TOKENS, K, H)) for i, count in enumerate(chunks)]
    # 1 + 1 + 2 and 3 reach three chunks; 1 + 1 do not.
    assert [name is not None for name in committed] == [False, False, True, True, False, False]
    assert Cache.open(tmp_path).commits.keys() == {committed[2], committed[3]}
    last = writer.commit()
    assert writer.commit() is None
    cache = Cache.open(tmp_path)
    ids = [sorted(row.seq_id for row in cache.rows_of_part(str(name))) for name in (committed[2], committed[3], last)]
    assert ids == [["0", "1", "2"], ["3"], ["4", "5"]]


def test_an_open_cache_is_a_view_of_what_was_committed_then(folder: Path):
    before = Cache.open(folder)
    fingerprint = before.fingerprint
    assert Cache.open(folder).fingerprint == fingerprint
    fill_cache(folder, [make_sequence("d", 5, K, H)])
    assert (len(before), before.fingerprint) == (3, fingerprint)
    after = Cache.open(folder)
    assert len(after) == 4
    assert after.fingerprint != fingerprint


# What no commit lists


def test_a_part_without_commit_record_is_invisible_and_then_removed(folder: Path):
    """As after a crash between the rename and the commit record."""
    lost, kept = part_of(folder, "c"), part_of(folder, "a")
    (folder / "commits" / f"{lost}.json").unlink()
    assert {row.seq_id for row in Cache.open(folder).rows} == {"a", "b"}
    assert part_folders(folder) == {f"{lost}.zarr", f"{kept}.zarr"}  # readers remove nothing
    cache = Cache.create_or_open(folder, make_manifest())
    assert {row.seq_id for row in cache.rows} == {"a", "b"}
    assert part_folders(folder) == {f"{kept}.zarr"}


def test_after_opening_for_writing_every_file_is_listed(folder: Path):
    (folder / "commits" / f"{part_of(folder, 'c')}.json").unlink()
    shutil.copytree(folder / "parts" / f"{part_of(folder, 'a')}.zarr", folder / "parts/.writing-part-0123-4567")
    cache = Cache.create_or_open(folder, make_manifest())
    listed = {path for record in cache.commits.values() for path in record["files"]}
    listed |= {f"commits/{name}.json" for name in cache.commits} | {"dataset.json"}
    assert snapshot(folder).keys() == listed


def test_the_commit_record_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before: list[dict[str, str]] = []

    def look_then_write(path: Path, content: str) -> None:
        with pytest.raises(CacheNotFoundError):
            Cache.open(tmp_path)
        before.append(snapshot(tmp_path))
        write_text_durably(path, content)

    writer = StateWriter(Cache.create_or_open(tmp_path, make_manifest()), 1 << 20, {})
    writer.append(**make_sequence("a", 10, K, H))
    monkeypatch.setattr("vpd.data.cache.part.write_text_durably", look_then_write)
    name = writer.commit()
    after = snapshot(tmp_path)
    assert len(before) == 1
    assert after.keys() - before[0].keys() == {f"commits/{name}.json"}
    assert after.items() - before[0].items() == {(f"commits/{name}.json", after[f"commits/{name}.json"])}


def test_the_part_of_a_living_writer_of_this_process_is_kept(folder: Path):
    writer = StateWriter(Cache.create_or_open(folder, make_manifest()), 1 << 20, {})
    writer.append(**make_sequence("d", 10, K, H))
    before = part_folders(folder)
    assert len(Cache.create_or_open(folder, make_manifest())) == 3
    assert part_folders(folder) == before
    sequence = make_sequence("e", 20, K, H)
    writer.append(**sequence)
    writer.commit()
    assert same_bits(by_id(Cache.open(folder))["e"].hidden_TKH, sequence["hidden_TKH"])


WRITER = """
import sys
from pathlib import Path
import numpy as np
from vpd.data.cache.files import write_text_durably
from vpd.data.cache.part import PartWriter
from vpd.data.cache.shard import ArraySpec
writer = PartWriter(Path(sys.argv[1]), [ArraySpec("token_ids", (), "int32", 64)], "part-of-child")
writer.append({"token_ids": np.zeros(3, np.int32)})
print("open", flush=True)
sys.stdin.readline()
"""


@contextmanager
def writing_child(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is writing a part."""
    command = [sys.executable, "-c", WRITER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "open\n"
            yield child
        finally:
            child.kill()


def test_the_part_of_another_process_is_kept_while_it_lives(folder: Path):
    committed = part_folders(folder)
    with writing_child(folder) as child:
        (unfinished,) = part_folders(folder) - committed
        Cache.create_or_open(folder, make_manifest())
        assert part_folders(folder) == committed | {unfinished}
        child.kill()
        child.wait()
        assert len(Cache.create_or_open(folder, make_manifest())) == 3
        assert part_folders(folder) == committed


def test_a_part_that_is_abandoned_leaves_nothing(tmp_path: Path):
    Cache.create_or_open(tmp_path, make_manifest())
    writer = PartWriter(tmp_path, state_specs(K, H).values())
    writer.append({name: np.zeros((10, *spec.row_shape), spec.dtype) for name, spec in state_specs(K, H).items()})
    writer.abandon()
    assert snapshot(tmp_path).keys() == {"dataset.json"}


# Damage

DAMAGE = [
    Damage("first-bits-flipped", 0.0),
    Damage("middle-bits-flipped", 0.4),
    Damage("cut-short", 0.2, cut=True),
    Damage("emptied", 0.0, cut=True),
    Damage("missing", None),
]


@pytest.mark.parametrize("name", list(state_specs(K, H)))
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.id)
def test_damaged_states_are_an_error_that_names_the_file(damage: Damage, name: str, folder: Path):
    cache = Cache.open(folder)
    (row,) = (row for row in cache.rows if row.seq_id == "c")
    path = cache.specs[name].shard_path(folder / "parts" / f"{row.part}.zarr")
    damage.apply(path)
    with pytest.raises(CacheCorruptError) as caught:
        cache.read(row)
    assert str(path) in str(caught.value)
    for other in cache.rows_of_part(part_of(folder, "a")):
        cache.read(other)


def test_a_missing_part_is_an_error_that_names_it(folder: Path):
    part = part_of(folder, "c")
    shutil.rmtree(folder / "parts" / f"{part}.zarr")
    cache = Cache.open(folder)
    with pytest.raises(CacheCorruptError, match=part):
        cache.read(next(cache.rows_of_part(part)))


@pytest.mark.parametrize(
    "damage",
    [
        *(Damage(f"bits-flipped-at-{share}", share) for share in (0.04, 0.22, 0.4, 0.55, 0.7, 0.9999)),
        Damage("cut-short", 0.5, cut=True),
        Damage("emptied", 0.0, cut=True),
        Damage("missing", None),
    ],
    ids=lambda damage: damage.id,
)
def test_a_damaged_index_is_an_error_that_names_it(damage: Damage, folder: Path):
    path = folder / "index" / f"{part_of(folder, 'a')}.parquet"
    damage.apply(path)
    with pytest.raises(CacheCorruptError) as caught:
        Cache.open(folder)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda text: "", id="empty"),
        pytest.param(lambda text: text[: len(text) // 2], id="cut-short"),
        pytest.param(lambda text: "[]", id="no-object"),
        pytest.param(lambda text: text.replace('"layer_ids"', '"layers"', 1), id="other-key"),
        pytest.param(lambda text: text.replace('"hidden_size": 8', '"hidden_size": "wide"'), id="wrong-type"),
        pytest.param(lambda text: text.replace('"schema_version": 1', '"schema_version": 2'), id="later-schema"),
    ],
)
def test_a_broken_manifest_is_an_error_that_names_it(change, folder: Path):
    path = folder / "dataset.json"
    path.write_text(change(path.read_text()))
    for opening in (Cache.open, lambda folder: Cache.create_or_open(folder, make_manifest())):
        with pytest.raises(CacheCorruptError) as caught:
            opening(folder)
        assert str(path) in str(caught.value)
        assert "version 1" in str(caught.value)


# No cache


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda folder: None, id="no-folder"),
        pytest.param(lambda folder: folder.mkdir(), id="empty-folder"),
        pytest.param(lambda folder: folder.write_text("a file"), id="file"),
    ],
)
def test_what_is_no_cache_is_said_to_be_none(make, tmp_path: Path):
    make(tmp_path / "cache")
    with pytest.raises(CacheNotFoundError, match=r"cache, found no dataset\.json there.*vpd extract"):
        Cache.open(tmp_path / "cache")


def test_a_cache_without_sequences_opens_only_when_that_is_allowed(tmp_path: Path):
    make_manifest().write(tmp_path)
    with pytest.raises(CacheNotFoundError, match="expected committed sequences in"):
        Cache.open(tmp_path)
    assert len(Cache.open(tmp_path, allow_empty=True)) == 0


# Another origin


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_fingerprint", "eeee"),
        ("tokenizer_hash", "eeee"),
        ("template_hash", "eeee"),
        ("layer_ids", (1, 4)),
        ("prompt_set", "eeee"),
        ("generation", {"mode": "generate", "max_len": 256}),
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
    with pytest.raises(FingerprintMismatchError, match=r"tokenizer_hash: .*; prompt_set: "):
        Cache.create_or_open(folder, make_manifest(tokenizer_hash="eeee", prompt_set="ffff"))


@pytest.mark.parametrize("change", [{"target": "elsewhere"}, {"versions": {"torch": "3"}}, {"rendered_sample": "x"}])
def test_what_does_not_decide_the_states_may_differ(change: dict[str, Any], folder: Path):
    before = snapshot(folder)
    assert len(Cache.create_or_open(folder, make_manifest(**change))) == 3
    assert snapshot(folder) == before


def test_a_manifest_reads_back_to_itself(tmp_path: Path):
    make_manifest().write(tmp_path)
    assert Cache.open(tmp_path, allow_empty=True).manifest == make_manifest()
    assert json.loads((tmp_path / "dataset.json").read_text())["schema_version"] == 1


def test_a_writer_may_have_a_name_of_its_own(tmp_path: Path):
    writer = PartWriter(tmp_path, state_specs(K, H).values(), "part-x")
    writer.abandon()
    assert writer.path == tmp_path / "parts/part-x.zarr"
