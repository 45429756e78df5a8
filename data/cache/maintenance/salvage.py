"""Reads the whole chunks of damaged shards."""

# C chunks
from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..array_spec import CRC_BYTES, ArraySpec
from ..index import SequenceRow
from ..records import checksum
from ..storage.base import RandomAccessFile

BLOSC_HEADER_BYTES = 16
BLOSC_LENGTH = slice(12, 16)
"""The bytes of a Blosc header that hold the length of the frame."""


def whole_chunks(content: bytes, spec: ArraySpec, num_chunks: int) -> tuple[np.ndarray, set[int]]:
    """The rows of a small array without compression, with zeros for damaged chunks; and the numbers of these chunks."""
    stride = spec.chunk_bytes + CRC_BYTES
    values = np.zeros((num_chunks, spec.chunk_bytes), np.uint8)
    bad: set[int] = set()
    for i in range(num_chunks):
        chunk = content[i * stride : (i + 1) * stride]
        body, crc = chunk[: spec.chunk_bytes], chunk[spec.chunk_bytes :]
        if len(chunk) < stride or checksum(body).to_bytes(CRC_BYTES, "little") != crc:
            bad.add(i)
        else:
            values[i] = np.frombuffer(body, np.uint8)
    return values.reshape(-1).view(np.dtype(spec.dtype)).reshape(-1, *spec.row_shape), bad


def locate_chunks(file: RandomAccessFile, spec: ArraySpec, rows: Iterable[SequenceRow]) -> np.ndarray:
    """The chunk index, uint64 [C, 2], made from the index of sequences; a chunk that is not found has length 0."""
    chunks: list[tuple[int, int]] = []
    for row in rows:
        offset, end = row.hidden_offset, row.hidden_offset + row.hidden_length
        for _ in range(spec.num_chunks(row.num_tokens)):
            length = min(_chunk_length(file, spec, offset), end - offset)
            chunks.append((offset, length))
            offset += length
    return np.array(chunks, "<u8").reshape(-1, 2)


def _chunk_length(file: RandomAccessFile, spec: ArraySpec, offset: int) -> int:
    """Bytes of the chunk at an offset, its checksum included."""
    if spec.compression is None:
        return spec.chunk_bytes + CRC_BYTES
    header = bytearray(BLOSC_HEADER_BYTES)
    file.read_into([memoryview(header)], offset)
    return int.from_bytes(header[BLOSC_LENGTH], "little") + CRC_BYTES
