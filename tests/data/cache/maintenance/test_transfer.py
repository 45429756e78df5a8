"""Caches made from caches: only what the command asks for changes, and an interrupted copy continues."""

# T tokens, K layers, H hidden width
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny import chunk_bytes, fill_cache, make_sequence, same_bits, snapshot
from torch import Tensor
from vpd.data.cache.arrays import draft_specs, empty_drafts
from vpd.data.cache.cache import CHUNK_TOKENS, Cache
from vpd.data.cache.codecs import CHANNEL_SCALE, CODECS, Codec, measure_channels, whitened_cosine
from vpd.data.cache.drafts import FirstDrafts, list_drafts
from vpd.data.cache.index import SequenceRow
from vpd.data.cache.maintenance.transfer import merge, recode
from vpd.data.cache.part import part_folder
from vpd.data.cache.target_files import store_target_files
from vpd.data.errors import CacheCorruptError, FingerprintMismatchError

NUM_LAYERS, WIDTH = 2, 40
LENGTHS = {"a": 40, "b": 70, "c": 64, "d": 130, "e": 1}
PART_BYTES = 3 * chunk_bytes(NUM_LAYERS, WIDTH)
"""A raw cache of LENGTHS has three parts: a and b, c and d, e."""
DRAFTER = "abcd0001"
FACTS: dict[str, Any] = {"block_size": 4, "stride": 1, "judged_against": "recorded tokens", "name": "first"}


def sequence(seq_id: str, num_tokens: int, spread: float = 1.0, **changes: Any) -> dict[str, Any]:
    """A sequence with states of this size; one channel is far larger than the others."""
    made = make_sequence(seq_id, num_tokens, NUM_LAYERS, WIDTH, **changes)
    made["hidden_TKH"] = made["hidden_TKH"] * spread
    made["hidden_TKH"][:, :, 3] *= 200
    return made


def make_cache(folder: Path, *sequences: dict[str, Any], **changes: Any) -> Cache:
    """A cache with these sequences and the files of a target; continues a cache that is there."""
    fill_cache(folder, sequences, PART_BYTES, hidden_size=WIDTH, **changes)
    cache = Cache.open(folder)
    if not (folder / "target.json").exists():
        target = folder.with_name(f"{folder.name}-target")
        target.mkdir()
        (target / "config.json").write_text('{"model_type": "tiny"}')
        store_target_files(cache.storage, target)
    return cache


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "source"
    cache = make_cache(folder, *(sequence(*item) for item in LENGTHS.items()))
    assert len(cache.parts) == 3
    draft(cache)
    return folder


@pytest.fixture
def source(original: Path, tmp_path: Path) -> Cache:
    """A raw cache of three parts, all drafted."""
    return Cache.open(shutil.copytree(original, tmp_path / "source"))


def draft(cache: Cache, num_parts: int | None = None, seed: int = 0, **facts: Any) -> None:
    """Random first drafts of some parts, or of all."""
    drafts = FirstDrafts.create_or_open(cache, DRAFTER, FACTS | facts)
    rng = np.random.default_rng(seed)
    for part in drafts.missing_parts()[:num_parts]:
        writer = drafts.writer(part)
        for row in cache.rows_of_part(part):
            arrays = empty_drafts(row.num_tokens, draft_specs(4, CHUNK_TOKENS))
            arrays["accept_len"][row.prompt_len :] = rng.integers(4, size=row.num_tokens - row.prompt_len)
            arrays["tokens"][:] = rng.integers(50, size=arrays["tokens"].shape)
            arrays["probs"][:] = rng.random(arrays["probs"].shape)
            writer.append(arrays)
        writer.commit({})


def by_id(cache: Cache) -> dict[str, Any]:
    return {row.seq_id: row for row in cache.rows}


def states(cache: Cache) -> dict[str, Tensor]:
    return {row.seq_id: cache.read(row).hidden_TKH.clone() for row in cache.rows}


def check_same_tokens(found: Cache, expected: Cache) -> None:
    """Both caches hold the same sequences, each once; only the states and the places of the rows may differ."""
    assert sorted(found.rows.strings("seq_id")) == sorted(expected.rows.strings("seq_id"))
    assert len(found.all_rows) == len(found.rows)
    rows = by_id(expected)
    for row in found.rows:
        one, other = found.read_tokens(row), expected.read_tokens(rows[row.seq_id])
        assert same_bits(one.token_ids_S, other.token_ids_S)
        assert same_bits(one.loss_mask_S, other.loss_mask_S)
        assert same_bits(one.target_argmax_T, other.target_argmax_T)
        for name in ("source", "source_row", "num_tokens", "prompt_len", "num_supervised", "finish_reason"):
            assert getattr(row, name) == getattr(rows[row.seq_id], name)
        assert (row.final_token_id, row.content_hash) == (other.row.final_token_id, other.row.content_hash)


def check_same_drafts(found: Cache, expected: Cache) -> None:
    """The first drafts of the sequences of `found` are the same in both."""
    ours, theirs, rows = FirstDrafts.open(found), FirstDrafts.open(expected), by_id(expected)
    assert (ours.fingerprint, ours.facts, ours.missing_parts()) == (theirs.fingerprint, theirs.facts, [])
    for row in found.rows:
        one, other = ours.read(row), theirs.read(rows[row.seq_id])
        assert same_bits(one.accept_len_T, other.accept_len_T)
        assert same_bits(one.tokens_TGA, other.tokens_TGA)
        assert same_bits(one.probs_TGA, other.probs_TGA)


def decoded(cache: Cache, codec: Codec, originals: dict[str, Tensor]) -> dict[str, Tensor]:
    """The original states, encoded and decoded, with the scales of the parts of this cache."""
    found: dict[str, Tensor] = {}
    for name in cache.parts:
        rows = list(cache.rows_of_part(name))
        scale = measure_channels(originals[rows[0].seq_id])
        for row in rows:
            stored = torch.from_numpy(codec.encode(originals[row.seq_id], scale))
            found[row.seq_id] = codec.decode(stored, WIDTH, scale)
    return found


@pytest.mark.parametrize("name", CODECS)
def test_recode_changes_the_states_alone(name: str, source: Cache, tmp_path: Path):
    report = recode(source, tmp_path / "out", name, PART_BYTES // 4)
    recoded, before = Cache.open(tmp_path / "out"), states(source)
    check_same_tokens(recoded, source)
    check_same_drafts(recoded, source)
    after, expected = states(recoded), decoded(recoded, CODECS[name], before)
    assert all(same_bits(after[seq_id], expected[seq_id]) for seq_id in LENGTHS)
    exact = all(same_bits(after[seq_id], before[seq_id]) for seq_id in LENGTHS)
    assert exact == CODECS[name].is_exact
    cosines = torch.cat([whitened_cosine(before[s], after[s]).flatten() for s in recoded.rows.strings("seq_id")])
    assert report.cosines.tolist() == cosines.tolist()
    assert report.cosine_mean == pytest.approx(float(cosines.mean()), abs=1e-6)
    assert report.cosine_worst == pytest.approx(float(cosines.quantile(0.001)), abs=1e-6)
    assert (report.num_copied, report.num_present, report.num_drafts_missing) == (len(LENGTHS), 0, 0)
    assert report.num_drafts_parts == len(recoded.parts)
    assert recoded.manifest == source.manifest.model_copy(update={"codec": name})
    assert snapshot(tmp_path / "out" / "target") == snapshot(tmp_path / "source" / "target")
    assert {str(record["recoded_from"]) for record in recoded.commits().values()} == {"raw"}


@pytest.mark.parametrize("name", ["round3", "fp8", "int4"])
def test_what_a_codec_gave_back_is_recoded(name: str, source: Cache, tmp_path: Path):
    recode(source, tmp_path / "small", name, PART_BYTES)
    small = Cache.open(tmp_path / "small")
    recode(small, tmp_path / "large", "lossless", PART_BYTES)
    large = Cache.open(tmp_path / "large")
    before, after = states(small), states(large)
    assert all(same_bits(after[seq_id], before[seq_id]) for seq_id in LENGTHS)
    check_same_drafts(large, source)
    (record,) = {str(record["made_by"]) for record in large.commits().values()}
    assert record == str([{"recoded_from": "raw", "made_by": [{}]}])


@pytest.mark.parametrize("name", ["lossless", "fp8", "int4"])
def test_recode_continues_where_it_was_interrupted(name: str, source: Cache, tmp_path: Path):
    seen: list[int] = []

    def interrupt(num_tokens: int) -> None:
        seen.append(num_tokens)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recode(source, tmp_path / "out", name, PART_BYTES, on_sequence=interrupt)
    assert len(Cache.open(tmp_path / "out")) == 3
    assert list_drafts(Cache.open(tmp_path / "out").storage) == []
    calls: list[int] = []
    report = recode(source, tmp_path / "out", name, PART_BYTES, on_sequence=calls.append)
    assert (report.num_copied, report.num_present) == (2, 3)
    assert [count > 0 for count in calls] == [False] * 3 + [True] * 2
    recoded = Cache.open(tmp_path / "out")
    check_same_tokens(recoded, source)
    check_same_drafts(recoded, source)
    after, expected = states(recoded), decoded(recoded, CODECS[name], states(source))
    assert all(same_bits(after[seq_id], expected[seq_id]) for seq_id in LENGTHS)
    done = snapshot(tmp_path / "out")
    assert recode(source, tmp_path / "out", name, PART_BYTES).num_copied == 0
    assert snapshot(tmp_path / "out") == done


def test_recode_of_a_damaged_cache_keeps_what_came_before(source: Cache, tmp_path: Path):
    path = tmp_path / "source" / part_folder("", source.parts[-1]) / "hidden/c/0/0/0"
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)
    with pytest.raises(CacheCorruptError, match="vpd verify --repair"):
        recode(source, tmp_path / "out", "fp8", PART_BYTES)
    kept = [row.seq_id for row in source.rows if row.part != source.parts[-1]]
    assert sorted(Cache.open(tmp_path / "out").rows.strings("seq_id")) == sorted(kept)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({"codec": "fp8"}, "codec: the cache has fp8, this run has round4", id="codec"),
        pytest.param({"codec": "round4", "target_fingerprint": "ffff"}, "target_fingerprint: .* ffff", id="origin"),
    ],
)
def test_recode_adds_to_no_other_cache(changes: dict[str, Any], words: str, source: Cache, tmp_path: Path):
    make_cache(tmp_path / "out", sequence("z", 20), **changes)
    before = snapshot(tmp_path / "out")
    with pytest.raises(FingerprintMismatchError, match=words):
        recode(source, tmp_path / "out", "round4", PART_BYTES)
    assert snapshot(tmp_path / "out") == before


def test_recode_adds_to_what_another_cache_brought(source: Cache, tmp_path: Path):
    """The other cache has its own answer to one prompt: it is not replaced, not measured, and gets no drafts."""
    other = make_cache(tmp_path / "other", sequence("a", 90), sequence("z", 20))
    assert recode(other, tmp_path / "out", "fp8", 1).num_drafts_parts == 0
    report = recode(source, tmp_path / "out", "fp8", 1)
    recoded = Cache.open(tmp_path / "out")
    assert sorted(recoded.rows.strings("seq_id")) == [*LENGTHS, "z"]
    assert by_id(recoded)["a"].num_tokens == 90
    assert len(report.cosines) == NUM_LAYERS * sum(LENGTHS[seq_id] for seq_id in "bcde")
    assert (report.num_present, report.num_drafts_parts, report.num_drafts_missing) == (1, 4, 2)
    assert recode(other, tmp_path / "out", "fp8", 1, num_measured=0).cosine_mean is None


# Merging


def check_same_bytes(found: Cache, original: Cache, seq_ids: Iterable[str]) -> None:
    """The stored bytes and the channel scales of these sequences are the same in both caches."""
    for seq_id in seq_ids:
        one, other = found.read(by_id(found)[seq_id]), original.read(by_id(original)[seq_id])
        assert one.row.hidden_crc == other.row.hidden_crc
        assert same_bits(one.stored_TKW, other.stored_TKW)
        assert (one.channel_scale_KH is None) == (other.channel_scale_KH is None)
        if one.channel_scale_KH is not None and other.channel_scale_KH is not None:
            assert same_bits(one.channel_scale_KH, other.channel_scale_KH)


def same_content(seq_id: str, like: dict[str, Any]) -> dict[str, Any]:
    """A sequence with the tokens and the mask of another sequence, but with other states."""
    length = len(like["token_ids"])
    return sequence(seq_id, length, token_ids=like["token_ids"], loss_mask=like["loss_mask"])


@pytest.mark.parametrize("codec", CODECS)
def test_merged_caches_keep_their_bytes(codec: str, tmp_path: Path):
    a, b, c, d, e = (sequence(*item, spread=10.0**i) for i, item in enumerate(LENGTHS.items()))
    one = make_cache(tmp_path / "one", a, b, c, codec=codec)
    two = make_cache(tmp_path / "two", c, d, e, same_content("f", b), codec=codec, target="/another/machine")
    calls: list[int] = []
    report = merge([one, two], tmp_path / "out", calls.append)
    merged = Cache.open(tmp_path / "out")
    assert (report.num_copied, report.num_present, report.num_same_content) == (5, 1, 1)
    assert sorted(calls) == sorted([*LENGTHS.values(), 0, 0])
    whole = make_cache(tmp_path / "whole", a, b, c, d, e, codec=codec)
    check_same_tokens(merged, whole)
    check_same_bytes(merged, one, "abc")
    check_same_bytes(merged, two, "de")
    scales = [merged.states.open(name, verify=True).resident.get(CHANNEL_SCALE) for name in merged.parts]
    assert len({None if scale is None else scale.tobytes() for scale in scales}) == (
        len(merged.parts) if codec == "int4" else 1
    )
    sources = {record["copied_from"] for record in merged.commits().values()}
    assert sources <= {*one.parts, *two.parts}
    assert merged.manifest == one.manifest
    assert snapshot(tmp_path / "out" / "target") == snapshot(tmp_path / "one" / "target")


@pytest.mark.parametrize(
    "changes",
    [
        {"target_fingerprint": "ffff"},
        {"template_hash": "ffff", "layer_ids": (1, 2)},
        {"codec": "fp8"},
        {"generation": {"mode": "given", "max_len": 512}},
    ],
    ids=lambda changes: "+".join(changes),
)
def test_caches_of_other_origin_are_not_merged(changes: dict[str, Any], source: Cache, tmp_path: Path):
    other = make_cache(tmp_path / "other", sequence("z", 20), **changes)
    with pytest.raises(FingerprintMismatchError) as caught:
        merge([source, other], tmp_path / "out")
    for word in (source.place, other.place, *changes):
        assert word in str(caught.value)
    unnamed = {"tokenizer_hash", "chunk_tokens", "target_fingerprint"} - changes.keys()
    assert not any(f"{word}:" in str(caught.value) for word in unnamed)
    assert not (tmp_path / "out").exists()
    before = snapshot(tmp_path / "other")
    with pytest.raises(FingerprintMismatchError, match="nothing was added"):
        merge([source], tmp_path / "other")
    assert snapshot(tmp_path / "other") == before


def test_few_files_are_open_while_caches_are_merged(source: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        sequences = [make_sequence(f"{folder.name}{i}", 5, NUM_LAYERS, WIDTH) for i in range(7)]
        fill_cache(folder, sequences, 1, hidden_size=WIDTH)
        store_target_files(Cache.open(folder).storage, source.target_folder)
        draft(Cache.open(folder))
    before = len(os.listdir("/proc/self/fd"))
    counts: list[int] = []
    drafts_counts: list[int] = []
    read_drafts = FirstDrafts.read_arrays

    def noted(drafts: FirstDrafts, row: SequenceRow) -> dict[str, np.ndarray]:
        found = read_drafts(drafts, row)
        drafts_counts.append(len(os.listdir("/proc/self/fd")))
        return found

    monkeypatch.setattr(FirstDrafts, "read_arrays", noted)
    caches = [Cache.open(folder) for folder in folders]
    merge(caches, tmp_path / "merged", lambda _: counts.append(len(os.listdir("/proc/self/fd"))))
    assert len(counts) == len(drafts_counts) == 14
    assert max(*counts, *drafts_counts) <= before + 10


def test_merging_again_adds_what_is_new(source: Cache, tmp_path: Path):
    assert merge([source], tmp_path / "out").num_copied == len(LENGTHS)
    done = snapshot(tmp_path / "out")
    report = merge([source], tmp_path / "out")
    assert (report.num_copied, report.num_present, report.num_drafts_parts) == (0, len(LENGTHS), 0)
    assert snapshot(tmp_path / "out") == done
    more = make_cache(tmp_path / "more", sequence("b", 99), sequence("z", 20))
    draft(more)
    report = merge([more], tmp_path / "out")
    assert (report.num_copied, report.num_present, report.num_drafts_parts) == (1, 1, 1)
    merged = Cache.open(tmp_path / "out")
    assert {row.seq_id: row.num_tokens for row in merged.rows} == {**LENGTHS, "z": 20}
    renewed = {name for name in done if name.startswith("index/all-")}
    assert snapshot(tmp_path / "out").items() >= {name: done[name] for name in done.keys() - renewed}.items()
    check_same_bytes(merged, source, LENGTHS)


def test_an_interrupted_merge_continues(source: Cache, tmp_path: Path):
    def interrupt(num_tokens: int) -> None:
        if num_tokens == LENGTHS["d"]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge([source], tmp_path / "out", interrupt)
    (lost,) = {row.part for row in source.rows if row.seq_id == "d"}
    before = [row.seq_id for row in source.rows if row.part < lost]
    cache = Cache.open(tmp_path / "out", allow_empty=True)
    assert sorted(cache.rows.strings("seq_id")) == sorted(before)
    assert merge([source], tmp_path / "out").num_present == len(before)
    merged = Cache.open(tmp_path / "out")
    check_same_tokens(merged, source)
    check_same_bytes(merged, source, LENGTHS)
    check_same_drafts(merged, source)


# First drafts


def test_drafts_are_merged_where_all_are_drafted(source: Cache, tmp_path: Path):
    half = make_cache(tmp_path / "half", *(sequence(name, 100) for name in "uvw"))
    draft(half, num_parts=1, name="another/folder")
    report = merge([source, half], tmp_path / "out")
    merged = Cache.open(tmp_path / "out")
    drafts = FirstDrafts.open(merged)
    assert (report.num_drafts_parts, report.num_drafts_missing) == (4, len(half.parts) - 1)
    assert drafts.facts == FACTS
    drafted = [row.seq_id for row in merged.rows if row.part in drafts.parts]
    assert sorted(drafted) == sorted([*LENGTHS, *(row.seq_id for row in half.rows_of_part(half.parts[0]))])
    draft(half)
    assert merge([source, half], tmp_path / "out").num_drafts_missing == 0
    for original in (source, half):
        rows, theirs = by_id(Cache.open(tmp_path / "out")), FirstDrafts.open(original)
        ours = FirstDrafts.open(Cache.open(tmp_path / "out"))
        for row in original.rows:
            assert same_bits(ours.read(rows[row.seq_id]).tokens_TGA, theirs.read(row).tokens_TGA)


def test_drafts_of_another_stride_or_another_answer_are_left_out(source: Cache, tmp_path: Path):
    strided = make_cache(tmp_path / "strided", sequence("s", 50))
    draft(strided, stride=2)
    plain = make_cache(tmp_path / "plain", sequence("t", 50))
    same_prompt = make_cache(tmp_path / "same", sequence("t", 60))
    draft(same_prompt)
    report = merge([source, strided, plain, same_prompt], tmp_path / "out")
    assert (report.num_drafts_parts, report.num_drafts_missing) == (3, 2)
    merged = Cache.open(tmp_path / "out")
    drafts = FirstDrafts.open(merged)
    assert {row.seq_id for row in merged.rows if row.part not in drafts.parts} == {"s", "t"}
    assert drafts.facts["stride"] == 1
