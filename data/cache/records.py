"""JSON records that carry their own checksum, so that a flipped bit or a torn write is an error."""

from __future__ import annotations

import json
from typing import Any

from crc32c import crc32c
from xxhash import xxh3_64

from ..errors import CacheCorruptError

CHECKSUM = "crc32c"


def checksum(content: bytes | memoryview, so_far: int = 0) -> int:
    """CRC-32C of the content, or of what gave `so_far` and the content after it. Other threads go on meanwhile."""
    return crc32c(content, so_far)


class FileDigest:
    """Size and XXH3 (64 bits) of a file, as it is written or read.

    Not CRC-32C: a shard's chunks are each followed by their own, and the CRC-32C of the whole is then the same
    whatever they hold.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._hash = xxh3_64()

    def update(self, content: bytes | memoryview) -> None:
        self.num_bytes += len(content)
        self._hash.update(content)

    def describe(self) -> dict[str, Any]:
        """What a record says of the file."""
        return {"bytes": self.num_bytes, "xxh3": self._hash.hexdigest()}


def describe(content: bytes | memoryview) -> dict[str, Any]:
    """What a record says of a file with this content."""
    digest = FileDigest()
    digest.update(content)
    return digest.describe()


def dump_record(record: dict[str, Any]) -> bytes:
    """The record as JSON; its last key is the CRC-32C of its other keys in canonical form."""
    return (json.dumps({**record, CHECKSUM: _own_checksum(record)}, indent=1) + "\n").encode()


def parse_record(content: bytes, place: str, kind: str) -> dict[str, Any]:
    """Reads a record and checks it.

    Args:
        place: where it was found.
        kind: what it should be, such as "the commit record of a part".

    Raises:
        CacheCorruptError: it is no record, or its checksum does not hold.
    """
    try:
        record = json.loads(content)
    except ValueError:
        record = None
    if isinstance(record, dict):
        record.pop(CHECKSUM, None)
    # Compared as a whole: some flipped bits change the spelling alone (1e-6, 1E-6).
    if not isinstance(record, dict) or dump_record(record) != content:
        raise CacheCorruptError(
            f"{place} is not {kind} as it was written: its checksum does not hold. See what is affected, and mend it, "
            "with vpd verify --repair."
        )
    return record


def _own_checksum(record: dict[str, Any]) -> str:
    return f"{checksum(json.dumps(record, sort_keys=True, separators=(',', ':')).encode()):08x}"
