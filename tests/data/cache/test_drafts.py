"""First drafts: readers get what was written, each drafter has a folder, and a choice of several must be named."""

# T tokens, G block size, A alternatives
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from support.tiny import Damage, chunk_bytes, fill_cache, make_manifest, make_sequence, same_bits, snapshot
from vpd.data.cache.array_spec import ArraySpec
from vpd.data.cache.arrays import NOT_DRAFTED, NUM_ALTERNATIVES, draft_specs, empty_drafts
from vpd.data.cache.cache import CHUNK_TOKENS, Cache
from vpd.data.cache.drafts import LISTING_SHARE, FirstDrafts, list_drafts
from vpd.data.cache.part import committed_parts
from vpd.data.cache.storage.base import Storage
from vpd.data.errors import CacheCorruptError, CacheNotFoundError

LENGTHS = {"a": 40, "b": 70, "c": 64}
FACTS: dict[str, Any] = {"block_size": 4, "stride": 1}
ONE, OTHER = "abcd0001", "abff0002"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "cache"
    sequences = [make_sequence(name, length, 2, 8) for name, length in LENGTHS.items()]
    assert len(fill_cache(folder, sequences, 3 * chunk_bytes(2, 8))) == 2
    return folder


@pytest.fixture
def cache(original: Path, tmp_path: Path) -> Cache:
    """A cache of two parts: a and b, then c."""
    return Cache.open(shutil.copytree(original, tmp_path / "cache"))


def folder_of(cache: Cache) -> Path:
    return Path(cache.place)


def drafts_folder(drafts: FirstDrafts, part: str) -> Path:
    """The part of drafts that belongs to a part of states."""
    return Path(drafts.place) / "parts" / f"{drafts.parts[part]}.zarr"


def random_drafts(num_tokens: int, specs: Mapping[str, ArraySpec], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays = empty_drafts(num_tokens, specs)
    arrays["accept_len"][:] = rng.integers(specs["tokens"].row_shape[0] + 1, size=num_tokens)
    arrays["tokens"][:] = rng.integers(50, size=arrays["tokens"].shape)
    arrays["probs"][:] = rng.random(arrays["probs"].shape)
    return arrays


def write_drafts(cache: Cache, fingerprint: str, block_size: int = 4, num_parts: int = 2) -> dict[str, Any]:
    """Writes drafts of `num_parts` parts; returns the arrays written, by sequence."""
    drafts = FirstDrafts.create_or_open(cache, fingerprint, FACTS | {"block_size": block_size})
    written: dict[str, Any] = {}
    for part in drafts.missing_parts()[:num_parts]:
        writer = drafts.writer(part)
        for row in cache.rows_of_part(part):
            written[row.seq_id] = random_drafts(row.num_tokens, drafts.specs, len(written) + block_size)
            assert writer.append(written[row.seq_id]).first_row == row.first_row
        writer.commit({})
    return written


def check_equal(drafts: FirstDrafts, written: dict[str, Any]) -> None:
    rows = {row.seq_id: row for row in drafts.cache.rows}
    for seq_id, arrays in written.items():
        read = drafts.read(rows[seq_id])
        assert same_bits(read.accept_len_T, torch.from_numpy(arrays["accept_len"]))
        assert same_bits(drafts.accept_lengths(rows[seq_id]), read.accept_len_T)
        assert same_bits(read.tokens_TGA, torch.from_numpy(arrays["tokens"]))
        assert same_bits(read.probs_TGA, torch.from_numpy(arrays["probs"]))


@pytest.mark.parametrize("block_size", [2, 4, 16])
def test_what_was_written_is_what_is_read(block_size: int, cache: Cache):
    written = write_drafts(cache, ONE, block_size)
    assert written.keys() == LENGTHS.keys()
    drafts = FirstDrafts.open(cache)
    assert (drafts.fingerprint, drafts.block_size, drafts.facts["stride"]) == (ONE, block_size, 1)
    assert drafts.missing_parts() == []
    check_equal(drafts, written)
    shape = drafts.read(cache.rows[0]).tokens_TGA.shape
    assert shape == (cache.rows[0].num_tokens, block_size - 1, NUM_ALTERNATIVES)


def test_zarr_reads_the_same_drafts(cache: Cache):
    write_drafts(cache, ONE)
    drafts = FirstDrafts.open(cache)
    for row in cache.rows:
        group = zarr.open_group(drafts_folder(drafts, row.part), mode="r")
        rows = slice(row.first_row, row.first_row + row.num_tokens)
        arrays = {name: torch.from_numpy(np.asarray(array[rows])) for name, array in group.arrays()}
        read = drafts.read(row)
        assert same_bits(arrays["accept_len"], read.accept_len_T)
        assert same_bits(arrays["tokens"], read.tokens_TGA)
        assert same_bits(arrays["probs"], read.probs_TGA)


def test_drafts_leave_the_states_and_their_fingerprint_alone(cache: Cache):
    before, fingerprint = snapshot(folder_of(cache)), cache.fingerprint
    write_drafts(cache, ONE)
    after = snapshot(folder_of(cache))
    assert before.items() <= after.items()
    assert all(path.startswith(f"drafts/{ONE}/") for path in after.keys() - before.keys())
    assert Cache.open(cache.place).fingerprint == fingerprint


def test_drafters_lie_side_by_side(cache: Cache):
    written = {ONE: write_drafts(cache, ONE, 4), OTHER: write_drafts(cache, OTHER, 8)}
    assert list_drafts(cache.storage) == [ONE, OTHER]
    for fingerprint, arrays in written.items():
        check_equal(FirstDrafts.open(cache, fingerprint), arrays)


def test_nothing_is_drafted_until_it_is_written():
    specs = draft_specs(4, CHUNK_TOKENS)
    arrays = empty_drafts(3, specs)
    assert {name: (array.shape, array.dtype) for name, array in arrays.items()} == {
        name: ((3, *spec.row_shape), np.dtype(spec.dtype)) for name, spec in specs.items()
    }
    assert arrays["accept_len"].tolist() == [NOT_DRAFTED] * 3


@pytest.mark.parametrize(("prefix", "found"), [(ONE, ONE), ("abc", ONE), ("abf", OTHER), (OTHER, OTHER)])
def test_a_prefix_of_the_fingerprint_chooses(prefix: str, found: str, cache: Cache):
    for fingerprint in (ONE, OTHER):
        write_drafts(cache, fingerprint)
    assert FirstDrafts.open(cache, prefix).fingerprint == found


@pytest.mark.parametrize(
    ("present", "asked", "words"),
    [
        pytest.param([], None, ["expected the first drafts of one drafter", "none", "vpd draft"], id="none"),
        pytest.param([], "ab", ["expected first drafts ab", "none", "vpd draft"], id="none-of-that-name"),
        pytest.param([ONE, OTHER], None, [f"{ONE}, {OTHER}", "Name one of them"], id="several"),
        pytest.param([ONE, OTHER], "ab", ["first drafts ab", f"{ONE}, {OTHER}", "Name one"], id="several-begin-so"),
        pytest.param([ONE], "ff", ["first drafts ff", f"found {ONE}", "Name one"], id="another-name"),
    ],
)
def test_a_choice_that_is_not_one_is_refused(present: list[str], asked: str | None, words: list[str], cache: Cache):
    for fingerprint in present:
        write_drafts(cache, fingerprint)
    with pytest.raises(CacheNotFoundError) as caught:
        FirstDrafts.open(cache, asked)
    for word in (*words, cache.place):
        assert word in str(caught.value)


def test_a_part_that_was_not_drafted_is_an_error_and_is_listed_as_missing(cache: Cache):
    written = write_drafts(cache, ONE, num_parts=1)
    drafts = FirstDrafts.open(cache)
    (missing,) = drafts.missing_parts()
    check_equal(drafts, written)
    for row in cache.rows_of_part(missing):
        with pytest.raises(CacheNotFoundError, match=f"{ONE} for {missing}, found none.*vpd draft"):
            drafts.read(row)
    written |= write_drafts(cache, ONE)
    check_equal(FirstDrafts.open(cache), written)


def test_two_that_draft_a_part_at_once_leave_one_whole_draft(cache: Cache):
    drafts = FirstDrafts.create_or_open(cache, ONE, FACTS)
    part, *_ = drafts.missing_parts()
    rows, written = list(cache.rows_of_part(part)), {}
    writers = [drafts.writer(part) for _ in range(2)]
    for seed, writer in enumerate(writers):
        written[writer.name] = {row.seq_id: random_drafts(row.num_tokens, drafts.specs, seed) for row in rows}
        for row in rows:
            writer.append(written[writer.name][row.seq_id])
    for writer in writers:
        writer.commit({})
        found = FirstDrafts.open(cache)
        assert part not in found.missing_parts()
        check_equal(found, written[found.parts[part]])


def test_a_part_without_commit_record_is_not_drafted_and_removed(cache: Cache):
    write_drafts(cache, ONE)
    part, drafts = cache.rows[0].part, FirstDrafts.open(cache)
    (Path(drafts.place) / "commits" / f"{drafts.parts[part]}.json").unlink()
    assert FirstDrafts.open(cache).missing_parts() == [part]
    left = drafts_folder(drafts, part)
    for path in (*left.rglob("*"), left):
        os.utime(path, (0, 0))  # else its writer may be about to lock it
    assert FirstDrafts.create_or_open(cache, ONE, FACTS).missing_parts() == [part]
    assert not left.exists()


def test_listings_of_drafted_parts_take_a_small_share_of_the_time(cache: Cache, monkeypatch: pytest.MonkeyPatch):
    now, listings = 0.0, list[float]()

    def slow_listing(storage: Storage, root: str) -> list[str]:
        nonlocal now
        listings.append(now)
        now += 2
        return committed_parts(storage, root)

    monkeypatch.setattr("vpd.data.cache.drafts.time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr("vpd.data.cache.drafts.committed_parts", slow_listing)
    drafts = FirstDrafts.create_or_open(cache, ONE, FACTS)
    write_drafts(cache, ONE, num_parts=1)
    listings.clear()
    begin = now
    found_at = 0.0
    while now < begin + 1000:
        found_at = found_at or now * drafts.is_drafted(cache.parts[0])
        assert not drafts.is_drafted(cache.parts[1])
        now += 3
    assert begin < found_at <= begin + 2 / LISTING_SHARE + 3
    assert LISTING_SHARE / 2 <= 2 * len(listings) / 1000 <= LISTING_SHARE
    listings.clear()
    now += 1000
    assert drafts.is_drafted(cache.parts[0])
    assert listings == []  # the part is known to be drafted


def test_the_facts_of_the_first_run_stay(cache: Cache):
    FirstDrafts.create_or_open(cache, ONE, FACTS | {"stride": 3})
    assert FirstDrafts.create_or_open(cache, ONE, FACTS).facts["stride"] == 3


@pytest.mark.parametrize("name", list(draft_specs(4, CHUNK_TOKENS)))
@pytest.mark.parametrize(
    "damage",
    [Damage("bits-flipped", 0.0), Damage("cut-short", 0.2, cut=True), Damage("missing", None)],
    ids=lambda damage: damage.id,
)
def test_damage_is_an_error_that_names_the_file(damage: Damage, name: str, cache: Cache):
    write_drafts(cache, ONE)
    drafts = FirstDrafts.open(cache)
    row = cache.rows[0]
    path = drafts_folder(drafts, row.part) / drafts.specs[name].shard_name
    damage.apply(path)
    with pytest.raises(CacheCorruptError, match=re.escape(str(path))):
        drafts.read(row)
    cache.read(row)


RECORD_DAMAGE = [
    Damage("first-bits-flipped", 0.0),
    Damage("middle-bits-flipped", 0.5),
    Damage("last-bits-flipped", 0.999),
    Damage("cut-short", 0.5, cut=True),
    Damage("missing", None),
]


@pytest.mark.parametrize("damage", RECORD_DAMAGE, ids=lambda damage: damage.id)
def test_a_damaged_record_of_a_drafter_is_an_error_that_names_it(damage: Damage, cache: Cache):
    write_drafts(cache, ONE)
    path = folder_of(cache) / "drafts" / ONE / "drafter.json"
    damage.apply(path)
    with pytest.raises(CacheCorruptError, match=re.escape(str(path))):
        FirstDrafts.open(cache)


@pytest.mark.parametrize("damage", RECORD_DAMAGE, ids=lambda damage: damage.id)
def test_a_damaged_commit_record_of_drafts_is_an_error_that_names_it(damage: Damage, cache: Cache):
    write_drafts(cache, ONE)
    row, drafts = cache.rows[0], FirstDrafts.open(cache)
    path = Path(drafts.place) / "commits" / f"{drafts.parts[row.part]}.json"
    damage.apply(path)
    with pytest.raises(CacheCorruptError, match=re.escape(str(path))):
        drafts.read(row)
    cache.read(row)


def test_the_facts_come_back_as_they_were(cache: Cache):
    facts = FACTS | {"name": "runs/ü", "mask_token_id": 7}
    assert FirstDrafts.create_or_open(cache, ONE, facts).facts == facts
    assert FirstDrafts.open(cache).facts == facts


def test_drafts_of_a_cache_that_grew_miss_the_new_part(cache: Cache):
    write_drafts(cache, ONE)
    (part,) = fill_cache(folder_of(cache), [make_sequence("d", 5, 2, 8)])
    assert make_manifest() == cache.manifest
    assert FirstDrafts.open(Cache.open(cache.place)).missing_parts() == [part]
