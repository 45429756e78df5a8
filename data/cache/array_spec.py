"""What a stored array looks like: dtype, shape, chunks, compression. The command line imports this at its start."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ..lazy import LazyModule

if TYPE_CHECKING:
    import numpy as np
    from numcodecs import Blosc
else:
    np = LazyModule("numpy")

CRC_BYTES = 4
"""Bytes of the checksum after every chunk."""
INDEX_ENTRY_BYTES = 16
"""Bytes of a chunk's entry in the chunk index: offset and length."""
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
        from numcodecs import Blosc

        return Blosc(self.cname, self.clevel, Blosc.SHUFFLE, self.blocksize)


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """A stored array: `row_shape` is the shape of one row, which holds one token's values as a rule."""

    name: str
    row_shape: tuple[int, ...]
    dtype: str
    chunk_tokens: int
    compression: BloscSettings | None = None

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk, not compressed and without its checksum."""
        return self.chunk_tokens * math.prod(self.row_shape) * np.dtype(self.dtype).itemsize

    def num_chunks(self, num_rows: int) -> int:
        return math.ceil(num_rows / self.chunk_tokens)

    def padded(self, num_rows: int) -> int:
        """The number of rows that a sequence of `num_rows` takes, with its padding to whole chunks."""
        return self.num_chunks(num_rows) * self.chunk_tokens

    def footer_bytes(self, num_rows: int) -> int:
        """Bytes of the chunk index at the end of the shard, its checksum included."""
        return self.num_chunks(num_rows) * INDEX_ENTRY_BYTES + CRC_BYTES

    @property
    def shard_name(self) -> str:
        """The shard's name within the part."""
        return "/".join([self.name, "c", *["0"] * (1 + len(self.row_shape))])

    @property
    def metadata_name(self) -> str:
        """The name of the array's metadata within the part."""
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
