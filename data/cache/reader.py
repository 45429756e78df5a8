"""Reads sequences: one byte range each, into page-aligned buffers that threads fill ahead of the consumer."""

# S tokens of a sequence, T with a state, K layers, H hidden width, W stored elements per token and layer
from __future__ import annotations

import math
import mmap
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from ..errors import CacheCorruptError
from ..lazy import LazyModule
from .array_spec import CRC_BYTES, ArraySpec
from .arrays import LOSS_MASK, TARGET_ARGMAX, TOKEN_ARRAYS, TOKEN_IDS
from .codecs import CHANNEL_SCALE, HIDDEN, Codec
from .index import SequenceRow
from .open_parts import OpenStates
from .part import OpenPart
from .records import checksum
from .sequence import NewSequence
from .shard import corrupt_rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

GROWTH = 2 << 20
"""The size of a buffer is a multiple of this, the size of a huge page on most machines."""
VERIFY_AT_ONCE = 1 << 20
"""Bytes to read before their checksums are verified; so few are still in the processor's cache then."""
NUM_BUFFERS = 4
"""Sequences that `read_ahead` keeps in memory, the one in use included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedTokens:
    """A sequence without its states."""

    row: SequenceRow
    arrays: Mapping[str, np.ndarray]
    """Every array of `TOKEN_ARRAYS` as it is stored, by name: T rows each."""
    token_ids_S: Tensor
    """int64 [S]: the T tokens, then the final token if there is one."""
    loss_mask_S: Tensor
    """bool [S]: tokens that an assistant wrote."""
    target_argmax_T: Tensor
    """int64 [T]: the target's greedy choice for the position after each token."""

    def as_new(self) -> NewSequence:
        """The same sequence, to be written into another part."""
        return NewSequence(
            seq_id=self.row.seq_id,
            source=self.row.source,
            source_row=self.row.source_row,
            arrays=self.arrays,
            prompt_len=self.row.prompt_len,
            final_token_id=self.row.final_token_id,
            finish_reason=self.row.finish_reason,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedSequence(CachedTokens):
    """A sequence with its states."""

    stored_TKW: Tensor
    """The states as they are stored; shares memory with the buffer that they were read into."""
    codec: Codec
    hidden_size: int
    channel_scale_KH: Tensor | None
    """float32 [K, H], for a codec that scales every channel."""

    def hidden(self, device: torch.device | str = "cpu") -> Tensor:
        """bfloat16 [T, K, H]: outputs of the captured layers. The device gets the stored bytes and decodes them.

        Codecs that store bfloat16 copy nothing on a CPU.
        """
        stored = self.stored_TKW.to(device)  # waits for the copy, because a thread fills the buffer again soon
        return self.codec.decode(stored, self.hidden_size, self.channel_scale_KH)

    @property
    def hidden_TKH(self) -> Tensor:
        return self.hidden()


class Buffer:
    """Page-aligned memory that grows when somebody reserves more; pinned where there is a GPU."""

    def __init__(self) -> None:
        self.tensor = torch.empty(0, dtype=torch.uint8)
        self.view = memoryview(b"")

    def reserve(self, num_bytes: int) -> memoryview:
        """Writable memory of that size; earlier content is lost."""
        if len(self.view) < num_bytes:
            size = -(-num_bytes // GROWTH) * GROWTH
            if torch.cuda.is_available():
                self.tensor = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            else:
                self.tensor = torch.frombuffer(allocate(size), dtype=torch.uint8)
            self.view = self.tensor.numpy().data
        return self.view[:num_bytes]


def allocate(size: int) -> mmap.mmap:
    """Page-aligned memory of twice the size: memory that nobody touches costs nothing.

    Memory larger than a huge page consists of huge pages, where the system has them: the first read into small pages
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
                f"{place}: the index says that the states of {row.seq_id} begin at byte {row.hidden_offset}, the "
                f"shard says {begin}."
            )
        crc = read_chunks(part, spec, row.first_row, chunks, self, verify)
        if verify and crc != row.hidden_crc:
            raise CacheCorruptError(f"{place}: the states of {row.seq_id} are not those of the index.")
        values = self.rows.tensor.view(getattr(torch, spec.dtype))
        return values[: row.num_tokens * math.prod(spec.row_shape)].view(row.num_tokens, *spec.row_shape)


def read_chunks(
    part: OpenPart, spec: ArraySpec, first_row: int, chunks: np.ndarray, slot: Slot, verify: bool = True
) -> int:
    """Fills `slot.rows` with these chunks; returns the CRC-32C over the checksums stored with them.

    Args:
        chunks: entries [C, 2] of the chunk index; the chunks lie one after the other in the shard.
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
            raise CacheCorruptError(f"{place}: expected {wanted} bytes at offset {offset}, found {found}.")
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
    from numcodecs import Blosc

    codec = Blosc()
    for i, content in enumerate(contents):
        try:
            codec.decode(content, rows[i * chunk_bytes : (i + 1) * chunk_bytes])
        except (RuntimeError, ValueError):
            raise CacheCorruptError(f"{place}: a compressed chunk can't be decoded.") from None


def read_rows(part: OpenPart, spec: ArraySpec, row: SequenceRow, verify: bool = True) -> np.ndarray:
    """A sequence's rows [T, *row_shape] of an array: a view of the array in memory, or read by byte range.

    Raises:
        CacheCorruptError: bytes are missing, or do not match their checksums.
    """
    if spec.name in part.resident:
        return part.resident[spec.name][row.first_row : row.first_row + row.num_tokens]
    chunks, slot = part.chunks_of(spec, row.first_row, row.num_tokens), Slot()
    read_chunks(part, spec, row.first_row, chunks, slot, verify)
    values = slot.rows.tensor[: len(chunks) * spec.chunk_bytes].numpy().view(spec.dtype)
    return values.reshape(-1, *spec.row_shape)[: row.num_tokens]


def read_tokens(part: OpenPart, specs: Mapping[str, ArraySpec], row: SequenceRow, verify: bool = True) -> CachedTokens:
    """A sequence's tokens.

    Args:
        specs: the arrays of the part, by name.
    """
    arrays = {name: read_rows(part, specs[name], row, verify) for name in TOKEN_ARRAYS}
    final = np.array([] if row.final_token_id is None else [row.final_token_id], np.int64)
    return CachedTokens(
        row=row,
        arrays=arrays,
        token_ids_S=torch.from_numpy(np.concatenate([arrays[TOKEN_IDS], final])),
        loss_mask_S=torch.from_numpy(np.concatenate([arrays[LOSS_MASK].astype(bool), np.ones(len(final), bool)])),
        target_argmax_T=torch.from_numpy(arrays[TARGET_ARGMAX].astype(np.int64)),
    )


def read_sequence(states: OpenStates, row: SequenceRow, slot: Slot, verify: bool) -> CachedSequence:
    """Reads one sequence into the slot, whose buffers the sequence uses from then on.

    Raises:
        CacheCorruptError: bytes are missing, or do not match their checksums.
    """
    return add_tokens(states, row, *read_states(states, row, slot, verify), verify)


def read_states(states: OpenStates, row: SequenceRow, slot: Slot, verify: bool) -> tuple[OpenPart, Tensor]:
    """The slow half of `read_sequence`: the opened part and the stored states [T, K, W], in the slot."""
    part = states.open(row.part, verify)
    return part, slot.fill(part, states.specs[HIDDEN], row, verify)


def add_tokens(
    states: OpenStates, row: SequenceRow, part: OpenPart, stored_TKW: Tensor, verify: bool
) -> CachedSequence:
    """The other half of `read_sequence`: the sequence with these states."""
    tokens = read_tokens(part, states.specs, row, verify)
    scale = part.resident.get(CHANNEL_SCALE)
    return CachedSequence(
        row=row,
        arrays=tokens.arrays,
        token_ids_S=tokens.token_ids_S,
        loss_mask_S=tokens.loss_mask_S,
        target_argmax_T=tokens.target_argmax_T,
        stored_TKW=stored_TKW,
        codec=states.codec,
        hidden_size=states.hidden_size,
        channel_scale_KH=None if scale is None else torch.from_numpy(scale),
    )


@dataclass(frozen=True, slots=True)
class Request:
    """A sequence to read, and whether to verify its checksums."""

    row: SequenceRow
    verify: bool = True


def read_ahead(
    states: OpenStates, requests: Iterable[Request], num_threads: int = 2, num_buffers: int = NUM_BUFFERS
) -> Generator[CachedSequence]:
    """Yields the sequences in the order of the requests while threads read the next ones.

    A sequence is valid until the caller takes the next one: a thread then fills its buffer again. Closing the
    generator ends the threads.

    Args:
        states: `Cache.states`.
        num_buffers: sequences in memory, the one in use included; >= 2.

    Raises:
        CacheCorruptError: bytes of a sequence are missing, or do not match their checksums. The sequences before it
            come first.
    """
    if num_buffers < 2:
        raise ValueError(f"expected at least 2 buffers, got {num_buffers}")
    ring = _Ring(states, requests, num_threads, num_buffers)
    try:
        while (slot_and_sequence := ring.take()) is not None:
            slot, sequence = slot_and_sequence
            yield sequence
            ring.give_back(slot)
    finally:
        ring.close()


class _Ring:
    """Each free slot goes to a thread with the next request; filled slots come back in the order of the requests."""

    def __init__(self, states: OpenStates, requests: Iterable[Request], num_threads: int, num_buffers: int):
        self._states, self._requests = states, iter(requests)
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
            part, stored_TKW = read_states(self._states, row, slot, request.verify)
        except BaseException as error:
            return _raising(error)
        # The consumer adds the tokens, which takes a tenth of the time of reading; this thread can read on meanwhile.
        verify = request.verify
        return lambda: (slot, add_tokens(self._states, row, part, stored_TKW, verify))


_Outcome = Callable[[], tuple[Slot, CachedSequence] | None]


def _raising(error: BaseException) -> _Outcome:
    def fail() -> None:
        raise error

    return fail
