"""One Zarr v3 array as one shard, written chunk by chunk and read by byte range.

The array follows Zarr's specification, so that any Zarr library opens it: codec `sharding_indexed`, inner chunks of
`chunk_tokens` whole tokens, each followed by its crc32c, and the chunk index (with its own crc32c) at the end of the
file. The chunks of a sequence lie together, so a sequence is one byte range.
"""

# C chunks
from __future__ import annotations

import numpy as np

from ..errors import CacheCorruptError
from .array_spec import CRC_BYTES, INDEX_ENTRY_BYTES, ArraySpec
from .records import FileDigest, checksum
from .storage.base import FolderWriter


class ShardWriter:
    """Appends rows to one array; each append starts a new chunk, and zeros pad the append's last chunk."""

    def __init__(self, folder: FolderWriter, spec: ArraySpec):
        self.spec = spec
        self.num_rows = 0
        self.digest = FileDigest()
        self._folder = folder
        self._compressor = None if spec.compression is None else spec.compression.compressor()
        self._ends: list[int] = []
        self._file = folder.open(spec.shard_name)

    def append(self, rows: np.ndarray) -> int:
        """Writes rows [n, *row_shape] as ceil(n / chunk_tokens) chunks; returns the CRC-32C of their checksums."""
        spec = self.spec
        if rows.shape[1:] != spec.row_shape or rows.dtype != np.dtype(spec.dtype):
            raise ValueError(
                f"{spec.name}: expected rows {spec.row_shape} {spec.dtype}, got {rows.shape[1:]} {rows.dtype}"
            )
        over_chunks = 0
        for start in range(0, len(rows), spec.chunk_tokens):
            chunk = np.ascontiguousarray(rows[start : start + spec.chunk_tokens])
            if len(chunk) < spec.chunk_tokens:
                padding = np.zeros((spec.chunk_tokens - len(chunk), *spec.row_shape), spec.dtype)
                chunk = np.concatenate([chunk, padding])
            # One dimension: some libraries do not take a memoryview of several as bytes.
            content = chunk.reshape(-1).view(np.uint8).data
            if self._compressor is not None:
                content = memoryview(self._compressor.encode(chunk))
            crc = checksum(content).to_bytes(CRC_BYTES, "little")
            over_chunks = checksum(crc, over_chunks)
            self._write(content)
            self._write(crc)
            self._ends.append(self.digest.num_bytes)
            self.num_rows += spec.chunk_tokens
        return over_chunks

    def close(self) -> None:
        """Writes the chunk index and the array's metadata."""
        ends = np.array(self._ends, "<u8")
        starts = np.concatenate([np.zeros(1, "<u8"), ends[:-1]])[: len(ends)]
        index = np.stack([starts, ends - starts], axis=1).astype("<u8").tobytes()
        self._write(memoryview(index))
        self._write(checksum(index).to_bytes(CRC_BYTES, "little"))
        self._file.close()
        self._folder.write(self.spec.metadata_name, self.spec.metadata(self.num_rows))

    def abandon(self) -> None:
        """Closes the file without an index."""
        try:
            self._file.close()
        except OSError:
            return  # the file is dropped in any case

    def _write(self, content: memoryview | bytes) -> None:
        self._file.write(content)
        self.digest.update(content)


def parse_footer(footer: bytes, place: str) -> np.ndarray:
    """The chunk index, uint64 [C, 2]: offset and length (checksum included) of every chunk.

    Raises:
        CacheCorruptError: the checksum of the chunk index does not hold, or the chunks do not lie one after the other.
    """
    index, crc = footer[:-CRC_BYTES], footer[-CRC_BYTES:]
    chunks = np.frombuffer(index, "<u8").reshape(-1, 2) if len(index) % INDEX_ENTRY_BYTES == 0 else None
    if chunks is None or checksum(index).to_bytes(CRC_BYTES, "little") != crc:
        raise CacheCorruptError(f"{place}: the checksum of its chunk index does not hold.")
    if (chunks[1:, 0] != chunks[:-1].sum(axis=1)).any() or (chunks[:, 1] <= CRC_BYTES).any():
        raise CacheCorruptError(f"{place}: its chunks do not lie one after the other.")
    return chunks


def decode_whole(content: bytes, spec: ArraySpec, place: str) -> np.ndarray:
    """All rows [C * chunk_tokens, *row_shape] of an array without compression, from the whole shard, verified.

    Raises:
        CacheCorruptError: the shard is too short or too long, or a checksum does not hold.
    """
    stride = spec.chunk_bytes + CRC_BYTES
    num_chunks = (len(content) - CRC_BYTES) // (stride + INDEX_ENTRY_BYTES)
    index = parse_footer(content[max(0, num_chunks) * stride :], place)
    if not np.array_equal(index, [(i * stride, stride) for i in range(num_chunks)]):
        raise CacheCorruptError(f"{place}: its chunk index does not fit its {len(content)} bytes.")
    chunks = np.frombuffer(content, np.uint8, num_chunks * stride).reshape(num_chunks, stride)
    crcs = chunks[:, spec.chunk_bytes :].copy().view("<u4")[:, 0]
    values = chunks[:, : spec.chunk_bytes].copy()
    for i, chunk in enumerate(values):
        if checksum(memoryview(chunk)) != crcs[i]:
            raise corrupt_rows(place, i * spec.chunk_tokens)
    return values.reshape(-1).view(np.dtype(spec.dtype)).reshape(-1, *spec.row_shape)


def corrupt_rows(place: str, first_row: int) -> CacheCorruptError:
    """The error for a chunk whose checksum does not hold."""
    return CacheCorruptError(f"{place}: the checksum of rows {first_row} and on does not hold.")
