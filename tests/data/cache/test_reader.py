"""Reading ahead: in order, into few buffers, and an error comes at the turn of the damaged sequence."""

# T tokens, K layers, H hidden width, W stored elements per token and layer
import gc
import random
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import fill_cache, make_sequence, same_bits
from torch import Tensor
from vpd.data.cache import reader as reader_module
from vpd.data.cache.cache import Cache
from vpd.data.cache.reader import CachedSequence, Request, Slot, batches, read_ahead
from vpd.data.cache.storage.local import LocalFile
from vpd.data.errors import CacheCorruptError

K, H = 2, 8
PAGE = 4096
LENGTHS = [40, 70, 64, 1, 200, 3, 129, 65, 10, 11, 12, 13]
NAMES = [f"s{i:02d}" for i in range(len(LENGTHS))]


def make_cache(folder: Path, codec: str = "raw", part_bytes: int = 6000) -> Cache:
    sequences = [make_sequence(name, length, K, H) for name, length in zip(NAMES, LENGTHS, strict=True)]
    fill_cache(folder, sequences, part_bytes, codec=codec)
    return Cache.open(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache of several parts, which no test changes."""
    cache = make_cache(tmp_path_factory.mktemp("reader") / "cache")
    assert len(cache.parts) > 3
    return cache


def written(sequence: CachedSequence) -> Tensor:
    return make_sequence(sequence.row.seq_id, sequence.row.num_tokens, K, H)["hidden_TKH"]


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("vpd-read-")]


def shuffled_requests(cache: Cache, times: int = 3) -> list[Request]:
    order = [i % len(cache) for i in range(times * len(cache))]
    random.Random(0).shuffle(order)
    return [Request(cache.rows[i], verify=i % 2 == 0) for i in order]


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read takes a different time, so that threads overtake each other."""
    read_into, chance = LocalFile.read_into, random.Random(0)

    def sleep_then_read(file: LocalFile, buffers: Sequence[memoryview], offset: int) -> int:
        time.sleep(chance.choice([0, 0.001, 0.005]))
        return read_into(file, buffers, offset)

    monkeypatch.setattr(LocalFile, "read_into", sleep_then_read)


# Order and buffers


@pytest.mark.usefixtures("slow_disk")
@pytest.mark.parametrize(("num_threads", "num_buffers"), [(1, 2), (2, 4), (4, 3), (8, 8)])
def test_sequences_come_in_the_order_of_the_requests(num_threads: int, num_buffers: int, cache: Cache):
    requests = shuffled_requests(cache)
    found = []
    for sequence in read_ahead(cache.states, iter(requests), num_threads, num_buffers):
        found.append(sequence.row)
        assert same_bits(sequence.hidden_TKH, written(sequence))
    assert found == [request.row for request in requests]
    assert reading_threads() == []


def test_nothing_asked_for_is_nothing_read(cache: Cache):
    assert list(read_ahead(cache.states, [])) == []
    assert reading_threads() == []


@pytest.mark.parametrize("num_buffers", [2, 3, 5])
def test_buffers_are_page_aligned_and_used_again(num_buffers: int, cache: Cache):
    places = []
    for sequence in read_ahead(cache.states, shuffled_requests(cache, times=5), 2, num_buffers):
        places.append(sequence.stored_TKW.data_ptr())
        assert same_bits(sequence.hidden_TKH, written(sequence))
    assert all(place % PAGE == 0 for place in places)
    assert 1 < len(set(places)) <= num_buffers < len(places)


def test_no_more_buffers_are_made_than_asked_for_and_none_is_filled_while_in_use(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
):
    made: list[Slot] = []

    class CountedSlot(Slot):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr(reader_module, "Slot", CountedSlot)
    taken = 0

    def requests() -> Iterator[Request]:
        nonlocal taken
        for request in shuffled_requests(cache):
            taken += 1
            yield request

    with closing(read_ahead(cache.states, requests(), num_threads=3, num_buffers=3)) as sequences:
        for count, sequence in enumerate(sequences, start=1):
            time.sleep(0.003)  # the threads read as far ahead as they may
            assert taken <= count + 2
            assert same_bits(sequence.hidden_TKH, written(sequence))
    assert len(made) == 3


def test_a_buffer_grows_to_the_longest_sequence(tmp_path: Path):
    lengths = [10, 3000, 20, 9000, 15, 3000]
    sequences = [make_sequence(f"s{i}", length, 2, 256) for i, length in enumerate(lengths)]
    fill_cache(tmp_path, sequences, 1 << 30, hidden_size=256)
    cache = Cache.open(tmp_path)
    for verify in (True, False):
        requests = [Request(row, verify) for row in cache.rows]
        for sequence, expected in zip(read_ahead(cache.states, requests, 1, 2), sequences, strict=True):
            assert same_bits(sequence.hidden_TKH, expected["hidden_TKH"])
            assert sequence.stored_TKW.data_ptr() % PAGE == 0


def test_one_buffer_is_not_enough(cache: Cache):
    with pytest.raises(ValueError, match="at least 2 buffers, got 1"):
        next(read_ahead(cache.states, map(Request, cache.rows), num_buffers=1))
    assert reading_threads() == []


@pytest.mark.parametrize("codec", ["raw", "lossless", "round4"])
def test_states_are_decoded_where_they_were_read(codec: str, tmp_path: Path):
    cache = make_cache(tmp_path, codec)
    for sequence in read_ahead(cache.states, map(Request, cache.rows)):
        assert sequence.hidden_TKH.data_ptr() == sequence.stored_TKW.data_ptr()


def test_an_unverified_sequence_is_one_read(cache: Cache, monkeypatch: pytest.MonkeyPatch):
    read_into, offsets = LocalFile.read_into, []

    def count_then_read(file: LocalFile, buffers: Sequence[memoryview], offset: int) -> int:
        offsets.append(offset)
        return read_into(file, buffers, offset)

    monkeypatch.setattr(LocalFile, "read_into", count_then_read)
    for _ in read_ahead(cache.states, [Request(row, verify=False) for row in cache.rows], num_threads=1):
        pass
    assert offsets == [row.hidden_offset for row in cache.rows]


@pytest.mark.parametrize("lengths", [[], [3], [4, 4, 4], [9, 1, 1, 1, 9, 9], [1] * 11])
def test_batches_cover_all_chunks_and_are_no_larger_than_needed(lengths: list[int]):
    found = list(batches(lengths, 5))
    assert [i for begin, end in found for i in range(begin, end)] == list(range(len(lengths)))
    for begin, end in found:
        assert sum(lengths[begin : end - 1]) < 5
        assert sum(lengths[begin:end]) >= 5 or end == len(lengths)


# Errors


def flip(cache: Cache, name: str, share: float = 0.0) -> Path:
    """Flips a bit in the states of one sequence."""
    (row,) = (row for row in cache.rows if row.seq_id == name)
    path = Path(cache.place) / "parts" / f"{row.part}.zarr" / cache.specs["hidden"].shard_name
    content = bytearray(path.read_bytes())
    content[row.hidden_offset + int(share * row.hidden_length)] ^= 0x10
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("num_threads", [1, 4])
@pytest.mark.parametrize("damaged", [0, 5, len(NAMES) - 1])
def test_an_error_comes_at_the_turn_of_the_damaged_sequence(damaged: int, num_threads: int, tmp_path: Path):
    cache = make_cache(tmp_path)
    rows = sorted(cache.rows, key=lambda row: row.seq_id)
    path = flip(cache, NAMES[damaged])
    sequences = read_ahead(cache.states, map(Request, rows), num_threads)
    for name in NAMES[:damaged]:
        sequence = next(sequences)
        assert sequence.row.seq_id == name
        assert same_bits(sequence.hidden_TKH, written(sequence))
    with pytest.raises(CacheCorruptError, match=f"{path}: the checksum of rows"):
        next(sequences)
    assert reading_threads() == []
    with pytest.raises(StopIteration):
        next(sequences)


@pytest.mark.parametrize("damaged", [0, 3])
def test_an_error_of_the_requests_comes_at_its_turn(damaged: int, cache: Cache):
    class Broken(Exception):
        pass

    def requests() -> Iterator[Request]:
        for row in cache.rows[:damaged]:
            yield Request(row)
        raise Broken

    sequences = read_ahead(cache.states, requests(), 3)
    assert [next(sequences).row for _ in range(damaged)] == list(cache.rows[:damaged])
    with pytest.raises(Broken):
        next(sequences)
    assert reading_threads() == []


def divide_by_zero(sequences: Generator[CachedSequence]) -> None:
    with closing(sequences):
        for sequence in sequences:
            print(sequence.row.num_tokens // 0)


@pytest.mark.usefixtures("slow_disk")
@pytest.mark.parametrize("how", ["closed", "error-of-the-consumer", "forgotten"])
def test_whoever_stops_early_ends_the_threads(how: str, cache: Cache):
    sequences = read_ahead(cache.states, map(Request, cache.rows), 4, 6)
    next(sequences)
    assert len(reading_threads()) == 4
    if how == "closed":
        sequences.close()
    elif how == "forgotten":
        del sequences
        gc.collect()
    else:
        with pytest.raises(ZeroDivisionError):
            divide_by_zero(sequences)
    assert reading_threads() == []


# Verification


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_only_a_verified_sequence_minds_a_flipped_bit(share: float, tmp_path: Path):
    cache = make_cache(tmp_path)
    flip(cache, "s04", share)
    (row,) = (row for row in cache.rows if row.seq_id == "s04")
    (found,) = (sequence.hidden_TKH.clone() for sequence in read_ahead(cache.states, [Request(row, verify=False)]))
    differing = found.view(torch.uint8) != make_sequence("s04", 200, K, H)["hidden_TKH"].view(torch.uint8)
    assert differing.sum() == (1 if share < 0.9 else 0)  # the end is padding, and the last checksum
    for read in (lambda: list(read_ahead(cache.states, [Request(row)])), lambda: cache.read(row)):
        with pytest.raises(CacheCorruptError, match="the checksum of rows"):
            read()
    for other in cache.rows:
        if other != row:
            cache.read(other)


@pytest.mark.parametrize("chunk", [0, 12, 25])
def test_a_long_sequence_is_verified_to_its_end(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The reader takes the sequence in several batches, here of four chunks."""
    sequence = make_sequence("s", 26 * 64 - 5, K, H)
    fill_cache(tmp_path, [sequence])
    monkeypatch.setattr(reader_module, "VERIFY_AT_ONCE", 4 * 64 * K * H * 2)
    cache = Cache.open(tmp_path)
    assert same_bits(cache.read(cache.rows[0]).hidden_TKH, sequence["hidden_TKH"])
    flip(cache, "s", chunk / 26)
    with pytest.raises(CacheCorruptError, match=f"the checksum of rows {chunk * 64} and on"):
        cache.read(cache.rows[0])


@pytest.mark.parametrize("change", [{"hidden_offset": 4}, {"hidden_length": 1}, {"first_row": 64}])
@pytest.mark.parametrize("verify", [True, False])
def test_a_row_that_does_not_fit_the_shard_is_an_error(change: dict[str, Any], verify: bool, cache: Cache):
    row = next(row for row in cache.rows if row.first_row == 0 and row.num_tokens < 64)
    values = {name: getattr(row, name) + more for name, more in change.items()}
    other = type(row)(**{name: getattr(row, name) for name in type(row).__slots__} | values)
    with pytest.raises(CacheCorruptError, match=r"parts/.*hidden"):
        list(read_ahead(cache.states, [Request(other, verify)]))


def test_damaged_compressed_states_are_an_error_or_other_states_but_no_crash(tmp_path: Path):
    cache = make_cache(tmp_path, "lossless")
    (row,) = (row for row in cache.rows if row.seq_id == "s04")
    for position in range(40):  # the first chunk's header and block offsets among them
        flip(cache, "s04", position / row.hidden_length)
        with pytest.raises(CacheCorruptError, match="the checksum of rows"):
            cache.read(row)
        with suppress(CacheCorruptError):
            (found,) = (sequence.hidden_TKH for sequence in read_ahead(cache.states, [Request(row, verify=False)]))
            assert found.shape == (200, K, H)
        flip(cache, "s04", position / row.hidden_length)
    assert same_bits(cache.read(row).hidden_TKH, make_sequence("s04", 200, K, H)["hidden_TKH"])
