"""The tables of arrays: an entry is enough for an array to be written, read, checked and copied."""

# T tokens, A alternatives
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from support.buckets import FINGERPRINT, write_drafts
from support.tiny import chunk_bytes, fill_cache, make_sequence
from vpd.data.cache import arrays
from vpd.data.cache.arrays import DRAFT_ARRAYS, NO_CHOICE, NUM_ALTERNATIVES, TOKEN_ARRAYS, TokenArray, empty_drafts
from vpd.data.cache.cache import Cache
from vpd.data.cache.drafts import FirstDrafts
from vpd.data.cache.maintenance.repair import repair
from vpd.data.cache.maintenance.transfer import merge, recode
from vpd.data.cache.maintenance.verify import verify
from vpd.data.cache.reader import Request, read_ahead
from vpd.data.cache.target_files import store_target_files
from vpd.data.errors import CacheCorruptError

K, H = 2, 8
LENGTHS = {"a": 40, "b": 70, "c": 64}
PART_BYTES = 3 * chunk_bytes(K, H)
"""a and b fill a part, and c is in another."""
EXTRA = "extra"
PAGE = Path(__file__).parents[3] / "docs/cache-format.md"
KINDS = [
    pytest.param(TokenArray(dtype="uint8", fill=9, about="something"), id="in-memory"),
    pytest.param(TokenArray(dtype="float16", row_shape=("A",), by_range=True, about="something"), id="by-range"),
]


def values(seq_id: str, num_tokens: int, kind: TokenArray) -> np.ndarray:
    """The new array's rows of a sequence."""
    shape = (num_tokens, *[NUM_ALTERNATIVES] * len(kind.row_shape))
    return np.random.default_rng(ord(seq_id)).integers(1, 200, shape).astype(kind.dtype)


def make_cache(folder: Path, kind: TokenArray, seq_ids: str = "abc") -> Cache:
    sequences: list[dict[str, Any]] = []
    for seq_id in seq_ids:
        made = make_sequence(seq_id, LENGTHS[seq_id], K, H)
        sequences.append(made | {EXTRA: values(seq_id, LENGTHS[seq_id], kind)})
    fill_cache(folder, sequences, PART_BYTES)
    cache, pieces = Cache.open(folder), folder.with_name(f"{folder.name}-pieces")
    pieces.mkdir()
    (pieces / "config.json").write_text("{}")
    store_target_files(cache.storage, pieces)
    return cache


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> TokenArray:
    """A new entry of the table of per-token arrays."""
    monkeypatch.setitem(TOKEN_ARRAYS, EXTRA, request.param)
    return request.param


def check_values(cache: Cache, kind: TokenArray, seq_ids: str = "abc") -> None:
    """The new array holds what was written, by every way of reading and by zarr-python."""
    assert sorted(cache.rows.strings("seq_id")) == sorted(seq_ids)
    with closing(read_ahead(cache.states, map(Request, cache.rows))) as ahead:
        for sequence in ahead:
            row = sequence.row
            group = zarr.open_group(Path(cache.place) / f"parts/{row.part}.zarr", mode="r")
            array = group[EXTRA]
            assert isinstance(array, zarr.Array)
            found = [sequence.arrays, cache.read(row).arrays, cache.read_tokens(row).arrays]
            found.append({EXTRA: np.asarray(array[row.first_row : row.first_row + row.num_tokens])})
            expected = values(row.seq_id, row.num_tokens, kind)
            for each in found:
                assert (each[EXTRA].dtype, each[EXTRA].tolist()) == (expected.dtype, expected.tolist())


def test_a_new_array_is_written_and_read(kind: TokenArray, tmp_path: Path):
    cache = make_cache(tmp_path / "cache", kind)
    check_values(cache, kind)
    assert verify(cache.storage).problems == []


def test_a_sequence_without_an_array_is_refused(kind: TokenArray, tmp_path: Path):
    make_cache(tmp_path / "cache", kind)
    with pytest.raises(KeyError, match=EXTRA):
        fill_cache(tmp_path / "cache", [make_sequence("d", 5, K, H)])
    with pytest.raises((ValueError, TypeError)):
        fill_cache(tmp_path / "cache", [make_sequence("d", 5, K, H) | {EXTRA: values("d", 4, kind)}])


def test_a_flipped_bit_in_a_new_array_is_found_and_repaired(kind: TokenArray, tmp_path: Path):
    cache = make_cache(tmp_path / "cache", kind)
    row = next(row for row in cache.rows if row.seq_id == "b")
    spec = cache.specs[EXTRA]
    path = tmp_path / "cache/parts" / f"{row.part}.zarr" / spec.shard_name
    content = bytearray(path.read_bytes())
    content[(spec.chunk_bytes + 4) * (row.first_row // spec.chunk_tokens) + 3] ^= 1
    path.write_bytes(content)
    found = verify(cache.storage)
    assert {seq_id for problem in found.problems for seq_id in problem.sequences} == {"b"}
    with pytest.raises(CacheCorruptError, match=f"{EXTRA}/c/0"):
        Cache.open(tmp_path / "cache").read(row)
    report = repair(cache.storage, found)
    assert (report.num_kept, report.lost) == (1, ["b"])
    check_values(Cache.open(tmp_path / "cache"), kind, "ac")
    assert verify(cache.storage).problems == []


def test_a_new_array_is_copied(kind: TokenArray, tmp_path: Path):
    one, two = make_cache(tmp_path / "one", kind, "ab"), make_cache(tmp_path / "two", kind, "c")
    merge([one, two], tmp_path / "merged")
    merged = Cache.open(tmp_path / "merged")
    check_values(merged, kind)
    recode(merged, tmp_path / "recoded", "fp8", 1)
    check_values(Cache.open(tmp_path / "recoded"), kind)
    for name in ("merged", "recoded"):
        assert verify(Cache.open(tmp_path / name).storage).problems == []


# First drafts


@pytest.fixture(params=KINDS)
def drafts_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> TokenArray:
    """A new entry of the table of first drafts' arrays."""
    monkeypatch.setitem(DRAFT_ARRAYS, EXTRA, request.param)
    return request.param


def test_a_new_array_of_first_drafts_is_written_read_checked_and_copied(drafts_kind: TokenArray, tmp_path: Path):
    """`write_drafts` leaves the new array at its fill value."""
    fill_cache(tmp_path / "cache", [make_sequence(*item, K, H) for item in LENGTHS.items()], PART_BYTES)
    cache = Cache.open(tmp_path / "cache")
    (tmp_path / "pieces").mkdir()
    (tmp_path / "pieces/config.json").write_text("{}")
    store_target_files(cache.storage, tmp_path / "pieces")
    write_drafts(cache, seed=0)
    recode(cache, tmp_path / "recoded", "fp8", PART_BYTES)
    for place in ("cache", "recoded"):
        drafts = FirstDrafts.open(Cache.open(tmp_path / place), FINGERPRINT)
        for row in drafts.cache.rows:
            found, expected = drafts.read_arrays(row), empty_drafts(row.num_tokens, drafts.specs)[EXTRA]
            assert found.keys() == DRAFT_ARRAYS.keys()
            assert expected.flatten().tolist() == [drafts_kind.fill] * expected.size
            assert (found[EXTRA].dtype, found[EXTRA].tolist()) == (expected.dtype, expected.tolist())
        assert verify(drafts.cache.storage).problems == []
    folder = shutil.copytree(tmp_path / "recoded", tmp_path / "damaged")
    path = next(path for path in (folder / "drafts").rglob(f"{EXTRA}/c/**/0") if path.is_file())
    path.write_bytes(path.read_bytes()[:-1])
    assert any(EXTRA in problem.what for problem in verify(Cache.open(folder).storage).problems)


# The tables


def test_the_page_on_the_format_lists_every_array():
    lines = PAGE.read_text().splitlines()
    for table in (arrays.TOKEN_ARRAYS, arrays.DRAFT_ARRAYS):
        for name, array in table.items():
            assert f"| `{name}` | {array.dtype} [{', '.join(('rows', *array.row_shape))}] | {array.about} |" in lines


def test_fill_values_fit_their_arrays():
    for array in (*TOKEN_ARRAYS.values(), *DRAFT_ARRAYS.values()):
        assert np.full(1, array.fill, array.dtype).tolist() == [array.fill]
    assert TOKEN_ARRAYS["target_argmax"].fill == NO_CHOICE
