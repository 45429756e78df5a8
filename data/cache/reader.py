"""Reads sequences: one byte range each, into reused page-aligned buffers that threads fill ahead of the consumer."""

# S tokens of a sequence, T with a state, K layers, H hidden width, W stored elements per token and layer
from __future__ import annotations

import math
import mmap
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch
from numcodecs import Blosc
from torch import Tensor

from ..errors import CacheCorruptError
from .codecs import CHANNEL_SCALE, HIDDEN, Codec
from .index import SequenceRow
from .part import OpenPart
from .records import checksum
from .shard import CRC_BYTES, WHAT_TO_DO, ArraySpec, corrupt_rows

if TYPE_CHECKING:
    from .cache import Cache

GROWTH = 2 << 20
"""Buffers are multiples of this: a huge page on most machines."""
VERIFY_AT_ONCE = 1 << 20
"""Bytes that are read before their checksums are verified, so that they are still in the processor's cache."""


@dataclass(frozen=True, slots=True)
class CachedTokens:
    """A sequence without its states."""

    row: SequenceRow
    token_ids_S: Tensor
    """int64 [S]: the T tokens, and the last generated one if there is one."""
    loss_mask_S: Tensor
    """bool [S]: tokens that an assistant wrote."""
    target_argmax_T: Tensor
    """int64 [T]: the target's greedy choice for the position after each token."""


@dataclass(frozen=True, slots=True)
class CachedSequence(CachedTokens):
    """A sequence as stage two sees it."""

    stored_TKW: Tensor
    """The states as they are stored; shares memory with the buffer that they were read into."""
    codec: Codec
    hidden_size: int
    channel_scale_KH: Tensor | None

    def hidden(self, device: torch.device | str = "cpu") -> Tensor:
        """bfloat16 [T, K, H]: outputs of the captured layers; what is stored goes to the device and is decoded there.

        With `raw`, `lossless` and the rounding codecs this copies nothing on a CPU.
        """
        stored = self.stored_TKW.to(device)  # waits, as the buffer is filled again soon
        return self.codec.decode(stored, self.hidden_size, self.channel_scale_KH)

    @property
    def hidden_TKH(self) -> Tensor:
        return self.hidden()


class Buffer:
    """Page-aligned memory that grows to what is asked of it; pinned where there is a GPU."""

    def __init__(self) -> None:
        self.tensor = torch.empty(0, dtype=torch.uint8)
        self.view = memoryview(b"")

    def reserve(self, num_bytes: int) -> memoryview:
        """Writable memory of that size; what it held is lost."""
        if len(self.view) < num_bytes:
            size = -(-num_bytes // GROWTH) * GROWTH
            if torch.cuda.is_available():
                self.tensor = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            else:
                self.tensor = torch.frombuffer(allocate(size), dtype=torch.uint8)
            self.view = self.tensor.numpy().data
        return self.view[:num_bytes]


def allocate(size: int) -> mmap.mmap:
    """Page-aligned memory of twice the size, as what is never touched costs nothing.

    What is larger than a huge page is made of such pages, where the system has them: the first read into small ones
    takes four times as long.
    """
    memory = mmap.mmap(-1, 2 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size > GROWTH:
        with suppress(AttributeError, OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class Slot:
    """The buffers of one sequence."""

    def __init__(self) -> None:
        self.rows, self.compressed = Buffer(), Buffer()

    def fill(self, part: OpenPart, spec: ArraySpec, row: SequenceRow, verify: bool) -> Tensor:
        """Reads the states [T, *spec.row_shape] of a sequence.

        Raises:
            CacheCorruptError: bytes are missing, or do not match their checksums.
        """
        chunks = part.chunks_of(spec, row.first_row, row.num_tokens)
        place = f"{part.place}/{spec.shard_name}"
        begin, end = int(chunks[0, 0]), int(chunks[-1].sum())
        if (begin, end - begin) != (row.hidden_offset, row.hidden_length):
            raise CacheCorruptError(
                f"{place}: the index has the states of {row.seq_id} at byte {row.hidden_offset}, the shard at "
                f"{begin}. {WHAT_TO_DO}"
            )
        crc = read_chunks(part, spec, row.first_row, chunks, self, verify)
        if verify and crc != row.hidden_crc:
            raise CacheCorruptError(f"{place}: the states of {row.seq_id} are not those of the index. {WHAT_TO_DO}")
        words = self.rows.tensor.view(torch.uint16 if spec.dtype == "uint16" else torch.uint8)
        return words[: row.num_tokens * math.prod(spec.row_shape)].view(row.num_tokens, *spec.row_shape)


def read_chunks(
    part: OpenPart, spec: ArraySpec, first_row: int, chunks: np.ndarray, slot: Slot, verify: bool = True
) -> int:
    """Fills `slot.rows` with these chunks; returns the CRC-32C over the checksums stored with them.

    Args:
        chunks: their entries in the chunk index, one after the other in the shard.
    """
    lengths = (chunks[:, 1] - CRC_BYTES).tolist()
    offset = int(chunks[0, 0])
    rows = slot.rows.reserve(len(lengths) * spec.chunk_bytes)
    contents = split(rows if spec.compression is None else slot.compressed.reserve(sum(lengths)), lengths)
    all_crcs = memoryview(bytearray(CRC_BYTES * len(lengths)))
    crcs = split(all_crcs, [CRC_BYTES] * len(lengths))
    place = f"{part.place}/{spec.shard_name}"
    file = part.files[spec.name]
    for begin, end in batches(lengths, VERIFY_AT_ONCE) if verify and file.is_local else [(0, len(lengths))]:
        buffers = [buffer for pair in zip(contents[begin:end], crcs[begin:end], strict=True) for buffer in pair]
        wanted = sum(map(len, buffers))
        if (found := file.read_into(buffers, offset)) != wanted:
            raise CacheCorruptError(f"{place}: expected {wanted} bytes at offset {offset}, found {found}. {WHAT_TO_DO}")
        offset += wanted
        for i in range(begin, end) if verify else ():
            if checksum(contents[i]).to_bytes(CRC_BYTES, "little") != crcs[i]:
                raise corrupt_rows(place, first_row + i * spec.chunk_tokens)
    if spec.compression is not None:
        decompress(contents, rows, spec.chunk_bytes, place)
    return checksum(all_crcs)


def split(memory: memoryview, lengths: list[int]) -> list[memoryview]:
    """The memory in pieces of these lengths."""
    ends = accumulate(lengths)
    return [memory[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def batches(lengths: list[int], num_bytes: int) -> Iterator[tuple[int, int]]:
    """Runs of chunks (begin, end) of at least `num_bytes` each, but for the last."""
    begin, total = 0, 0
    for i, length in enumerate(lengths):
        total += length
        if total >= num_bytes:
            yield begin, i + 1
            begin, total = i + 1, 0
    if begin < len(lengths):
        yield begin, len(lengths)


def decompress(contents: list[memoryview], rows: memoryview, chunk_bytes: int, place: str) -> None:
    for i, content in enumerate(contents):
        try:
            Blosc().decode(content, rows[i * chunk_bytes : (i + 1) * chunk_bytes])
        except (RuntimeError, ValueError):
            raise CacheCorruptError(f"{place}: a compressed chunk can't be decoded. {WHAT_TO_DO}") from None


def read_tokens(part: OpenPart, row: SequenceRow) -> CachedTokens:
    """A sequence's tokens, from the arrays that the opened part holds."""
    rows = slice(row.first_row, row.first_row + row.num_tokens)
    final = np.array([] if row.final_token_id is None else [row.final_token_id], np.int64)
    token_ids = np.concatenate([part.resident["token_ids"][rows], final])
    loss_mask = np.concatenate([part.resident["loss_mask"][rows].astype(bool), np.ones(len(final), bool)])
    argmax = part.resident["target_argmax"][rows].astype(np.int64)
    return CachedTokens(row, *map(torch.from_numpy, (token_ids, loss_mask, argmax)))


def read_sequence(cache: Cache, row: SequenceRow, slot: Slot, verify: bool) -> CachedSequence:
    """Reads one sequence into the slot, which it uses from then on.

    Raises:
        CacheCorruptError: bytes are missing or do not match their checksum.
    """
    return add_tokens(cache, row, *read_states(cache, row, slot, verify))


def read_states(cache: Cache, row: SequenceRow, slot: Slot, verify: bool) -> tuple[OpenPart, Tensor]:
    """What `read_sequence` needs the disk for: the opened part and the stored states [T, K, W], in the slot."""
    part = cache.open_part(row.part, verify)
    return part, slot.fill(part, cache.specs[HIDDEN], row, verify)


def add_tokens(cache: Cache, row: SequenceRow, part: OpenPart, stored_TKW: Tensor) -> CachedSequence:
    """The sequence of these states; its tokens come from the arrays that the opened part holds."""
    tokens = read_tokens(part, row)
    scale = part.resident.get(CHANNEL_SCALE)
    return CachedSequence(
        row=row,
        token_ids_S=tokens.token_ids_S,
        loss_mask_S=tokens.loss_mask_S,
        target_argmax_T=tokens.target_argmax_T,
        stored_TKW=stored_TKW,
        codec=cache.codec,
        hidden_size=cache.manifest.hidden_size,
        channel_scale_KH=None if scale is None else torch.from_numpy(scale),
    )


@dataclass(frozen=True, slots=True)
class Request:
    """A sequence to read, and whether its checksums are verified."""

    row: SequenceRow
    verify: bool = True


def read_ahead(
    cache: Cache, requests: Iterable[Request], num_threads: int = 2, num_buffers: int = 4
) -> Generator[CachedSequence]:
    """Yields the sequences in the order of the requests while threads read the next ones.

    A sequence is valid until the next is asked for: its buffer is then filled again. Closing the generator ends the
    threads.

    Args:
        num_buffers: sequences in memory, the one in use included; >= 2.

    Raises:
        CacheCorruptError: when the damaged sequence's turn comes.
    """
    if num_buffers < 2:
        raise ValueError(f"expected at least 2 buffers, got {num_buffers}")
    ring = _Ring(cache, requests, num_threads, num_buffers)
    try:
        while (slot_and_sequence := ring.take()) is not None:
            slot, sequence = slot_and_sequence
            yield sequence
            ring.give_back(slot)
    finally:
        ring.close()


class _Ring:
    """Free slots go to threads with the next request; filled ones come back in the requests' order."""

    def __init__(self, cache: Cache, requests: Iterable[Request], num_threads: int, num_buffers: int):
        self._cache, self._requests = cache, iter(requests)
        self._free: queue.SimpleQueue[Slot | None] = queue.SimpleQueue()
        for _ in range(num_buffers):
            self._free.put(Slot())
        self._lock = threading.Lock()
        self._in_order: queue.SimpleQueue[queue.SimpleQueue[_Outcome]] = queue.SimpleQueue()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, name=f"vpd-read-{i}") for i in range(num_threads)]
        for thread in self._threads:
            thread.daemon = True
            thread.start()

    def take(self) -> tuple[Slot, CachedSequence] | None:
        outcome = self._in_order.get().get()
        return outcome()

    def give_back(self, slot: Slot) -> None:
        self._free.put(slot)

    def close(self) -> None:
        self._closed = True
        for _ in self._threads:
            self._free.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (slot := self._free.get()) is not None and not self._closed:
            promise: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()
            with self._lock:
                try:
                    request = next(self._requests, None)
                except BaseException as error:
                    request = error
                self._in_order.put(promise)
            promise.put(self._outcome(request, slot))

    def _outcome(self, request: Request | BaseException | None, slot: Slot) -> _Outcome:
        if request is None:
            return lambda: None
        try:
            if isinstance(request, BaseException):
                raise request
            row = request.row
            part, stored_TKW = read_states(self._cache, row, slot, request.verify)
        except BaseException as error:
            return _raising(error)
        # The tokens are the consumer's work: after states larger than the processor's cache it takes as long as a
        # tenth of reading, and the thread can read on meanwhile.
        return lambda: (slot, add_tokens(self._cache, row, part, stored_TKW))


_Outcome = Callable[[], tuple[Slot, CachedSequence] | None]


def _raising(error: BaseException) -> _Outcome:
    def fail() -> None:
        raise error

    return fail
