"""One Zarr v3 array as one shard, written chunk by chunk and read by byte range.

The array is spec-valid: codec `sharding_indexed`, inner chunks of `chunk_tokens` whole tokens, each followed by
its crc32c, and the chunk index (with its own crc32c) at the end of the file. So any Zarr library opens it, and a
sequence, whose chunks lie together, is one byte range.
"""

# C chunks
from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

import numpy as np
from numcodecs import Blosc

from ..errors import CacheCorruptError
from .records import FileDigest, checksum
from .storage.base import FolderWriter

CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16
METADATA = "zarr.json"


@dataclass(frozen=True, slots=True)
class BloscSettings:
    """Zarr's `blosc` codec."""

    typesize: int
    cname: str
    clevel: int
    shuffle: str
    blocksize: int

    def compressor(self) -> Blosc:
        return Blosc(self.cname, self.clevel, Blosc.SHUFFLE, self.blocksize)


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """A per-token array: `row_shape` is the shape of one token's values."""

    name: str
    row_shape: tuple[int, ...]
    dtype: str
    chunk_tokens: int
    compression: BloscSettings | None = None

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one inner chunk, not compressed and without its checksum."""
        return self.chunk_tokens * math.prod(self.row_shape) * np.dtype(self.dtype).itemsize

    def num_chunks(self, num_rows: int) -> int:
        return math.ceil(num_rows / self.chunk_tokens)

    def footer_bytes(self, num_rows: int) -> int:
        """Bytes of the chunk index at the end of the shard, its checksum included."""
        return self.num_chunks(num_rows) * INDEX_ENTRY_BYTES + CRC_BYTES

    @property
    def shard_name(self) -> str:
        """The shard's name within the part."""
        return "/".join([self.name, "c", *["0"] * (1 + len(self.row_shape))])

    @property
    def metadata_name(self) -> str:
        return f"{self.name}/{METADATA}"

    def metadata(self, num_rows: int) -> bytes:
        """The array's `zarr.json`."""
        to_bytes = {"name": "bytes", "configuration": {"endian": "little"}}
        crc = {"name": "crc32c"}
        shape = [num_rows, *self.row_shape]
        compress = [] if self.compression is None else [{"name": "blosc", "configuration": asdict(self.compression)}]
        sharding = {
            "chunk_shape": [self.chunk_tokens, *self.row_shape],
            "codecs": [to_bytes if np.dtype(self.dtype).itemsize > 1 else {"name": "bytes"}, *compress, crc],
            "index_codecs": [to_bytes, crc],
            "index_location": "end",
        }
        metadata = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": shape,
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": {},
        }
        return json.dumps(metadata, indent=2).encode()


class ShardWriter:
    """Appends rows to one array; each append starts a new chunk, its last chunk is padded with zeros."""

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
            # One dimension, as a memoryview of several is not a buffer of bytes to everybody.
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
        try:
            self._file.close()
        except OSError:
            # Of what could not be written, nothing is wanted any more.
            return

    def _write(self, content: memoryview | bytes) -> None:
        self._file.write(content)
        self.digest.update(content)


def parse_footer(footer: bytes, place: str) -> np.ndarray:
    """The chunk index, uint64 [C, 2]: offset and length (checksum included) of every chunk.

    Raises:
        CacheCorruptError: its checksum does not hold, or its chunks do not lie one after the other.
    """
    index, crc = footer[:-CRC_BYTES], footer[-CRC_BYTES:]
    chunks = np.frombuffer(index, "<u8").reshape(-1, 2) if len(index) % INDEX_ENTRY_BYTES == 0 else None
    if chunks is None or checksum(index).to_bytes(CRC_BYTES, "little") != crc:
        raise CacheCorruptError(f"{place}: the checksum of its chunk index does not hold. {WHAT_TO_DO}")
    if (chunks[1:, 0] != chunks[:-1].sum(axis=1)).any() or (chunks[:, 1] <= CRC_BYTES).any():
        raise CacheCorruptError(f"{place}: its chunks do not lie one after the other. {WHAT_TO_DO}")
    return chunks


def decode_whole(content: bytes, spec: ArraySpec, place: str) -> np.ndarray:
    """All rows [C * chunk_tokens, *row_shape] of an array that is not compressed, from its whole shard, verified.

    Raises:
        CacheCorruptError: it is too short or too long, or a checksum does not hold.
    """
    stride = spec.chunk_bytes + CRC_BYTES
    num_chunks = (len(content) - CRC_BYTES) // (stride + INDEX_ENTRY_BYTES)
    index = parse_footer(content[max(0, num_chunks) * stride :], place)
    if not np.array_equal(index, [(i * stride, stride) for i in range(num_chunks)]):
        raise CacheCorruptError(f"{place}: its chunk index does not fit its {len(content)} bytes. {WHAT_TO_DO}")
    chunks = np.frombuffer(content, np.uint8, num_chunks * stride).reshape(num_chunks, stride)
    crcs = chunks[:, spec.chunk_bytes :].copy().view("<u4")[:, 0]
    values = chunks[:, : spec.chunk_bytes].copy()
    for i, chunk in enumerate(values):
        if checksum(memoryview(chunk)) != crcs[i]:
            raise corrupt_rows(place, i * spec.chunk_tokens)
    return values.reshape(-1).view(np.dtype(spec.dtype)).reshape(-1, *spec.row_shape)


WHAT_TO_DO = "Find all that is affected, and have it extracted again, with vpd verify --repair."


def corrupt_rows(place: str, first_row: int) -> CacheCorruptError:
    return CacheCorruptError(f"{place}: the checksum of rows {first_row} and on does not hold. {WHAT_TO_DO}")
