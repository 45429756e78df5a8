"""One Zarr v3 array as one shard, written chunk by chunk and read by byte range.

The array is spec-valid: codec `sharding_indexed`, inner chunks of `chunk_tokens` whole tokens, each followed by
its crc32c, and the chunk index (with its own crc32c) at the end of the file. So zarr-python opens it, and a
sequence, whose chunks lie together, is one byte range.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np

from ..errors import CacheCorruptError

CRC_BYTES = 4


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """A per-token array: `row_shape` is the shape of one token's values."""

    name: str
    row_shape: tuple[int, ...]
    dtype: str
    chunk_tokens: int

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one inner chunk without its checksum."""
        return self.chunk_tokens * math.prod(self.row_shape) * np.dtype(self.dtype).itemsize

    def byte_range(self, first_row: int, num_rows: int) -> tuple[int, int]:
        """Offset and length in the shard of the chunks that hold these rows; `first_row` starts a chunk."""
        stride = self.chunk_bytes + CRC_BYTES
        return first_row // self.chunk_tokens * stride, math.ceil(num_rows / self.chunk_tokens) * stride

    def shard_path(self, part: Path) -> Path:
        return part.joinpath(self.name, "c", *["0"] * (1 + len(self.row_shape)))

    def metadata(self, num_rows: int) -> str:
        """The array's `zarr.json`."""
        to_bytes = {"name": "bytes", "configuration": {"endian": "little"}}
        crc = {"name": "crc32c"}
        shape = [num_rows, *self.row_shape]
        sharding = {
            "chunk_shape": [self.chunk_tokens, *self.row_shape],
            "codecs": [to_bytes if np.dtype(self.dtype).itemsize > 1 else {"name": "bytes"}, crc],
            "index_codecs": [to_bytes, crc],
            "index_location": "end",
        }
        return json.dumps(
            {
                "zarr_format": 3,
                "node_type": "array",
                "shape": shape,
                "data_type": self.dtype,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}},
                "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
                "fill_value": 0,
                "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
                "attributes": {},
            },
            indent=2,
        )


class ShardWriter:
    """Appends rows to one array; each append starts a new chunk, its last chunk is padded with zeros."""

    def __init__(self, part: Path, spec: ArraySpec):
        self.spec = spec
        self.num_rows = 0
        self._part = part
        path = spec.shard_path(part)
        path.parent.mkdir(parents=True)
        self._file = open(path, "wb")  # noqa: SIM115 - open for the writer's life, closed by close()

    def append(self, rows: np.ndarray) -> None:
        """Writes rows [n, *row_shape] as ceil(n / chunk_tokens) chunks."""
        spec = self.spec
        if rows.shape[1:] != spec.row_shape or rows.dtype != np.dtype(spec.dtype):
            raise ValueError(
                f"{spec.name}: expected rows {spec.row_shape} {spec.dtype}, got {rows.shape[1:]} {rows.dtype}"
            )
        for start in range(0, len(rows), spec.chunk_tokens):
            chunk = rows[start : start + spec.chunk_tokens].tobytes().ljust(spec.chunk_bytes, b"\0")
            self._file.write(chunk)
            self._file.write(google_crc32c.value(chunk).to_bytes(CRC_BYTES, "little"))
            self.num_rows += spec.chunk_tokens

    def close(self) -> None:
        """Writes the chunk index and the array's metadata."""
        stride = self.spec.chunk_bytes + CRC_BYTES
        offsets = np.arange(self.num_rows // self.spec.chunk_tokens, dtype="<u8") * stride
        index = np.stack([offsets, np.full_like(offsets, stride)], axis=1).tobytes()
        self._file.write(index)
        self._file.write(google_crc32c.value(index).to_bytes(CRC_BYTES, "little"))
        self._file.close()
        (self._part / self.spec.name / "zarr.json").write_text(self.spec.metadata(self.num_rows))

    def abandon(self) -> None:
        self._file.close()


def read_rows(part: Path, spec: ArraySpec, first_row: int, num_rows: int) -> np.ndarray:
    """Reads rows [num_rows, *row_shape] with one byte range, and verifies every chunk's checksum.

    Raises:
        CacheCorruptError: the file is missing or short, or a checksum does not hold.
    """
    path = spec.shard_path(part)
    offset, length = spec.byte_range(first_row, num_rows)
    buffer = bytearray(length)
    try:
        with open(path, "rb") as file:
            count = os.preadv(file.fileno(), [buffer], offset)
    except FileNotFoundError:
        raise CacheCorruptError(f"{path} is missing. Extract its sequences again into a new cache.") from None
    if count != length:
        raise CacheCorruptError(
            f"{path}: expected {length} bytes at offset {offset}, found {count}. Extract its sequences again."
        )
    chunks = np.frombuffer(buffer, np.uint8).reshape(-1, spec.chunk_bytes + CRC_BYTES)
    stored = chunks[:, spec.chunk_bytes :].copy().view("<u4")[:, 0]
    for i, chunk in enumerate(chunks[:, : spec.chunk_bytes]):
        if google_crc32c.value(chunk.tobytes()) != stored[i]:
            raise CacheCorruptError(
                f"{path}: the checksum of rows {first_row + i * spec.chunk_tokens} and on does not hold. "
                "Extract its sequences again."
            )
    rows = chunks[:, : spec.chunk_bytes].reshape(-1).view(np.dtype(spec.dtype))
    return rows.reshape(-1, *spec.row_shape)[:num_rows]
