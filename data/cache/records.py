"""JSON records that carry their own checksum, so that a flipped bit or a torn write is an error."""

from __future__ import annotations

import json
from typing import Any

from crc32c import crc32c
from xxhash import xxh3_64

from ..errors import CacheCorruptError

CHECKSUM = "crc32c"


def checksum(content: bytes | memoryview, so_far: int = 0) -> int:
    """CRC-32C of the content; other threads run meanwhile.

    Args:
        so_far: the CRC-32C of the content before, if the result shall cover both.
    """
    return crc32c(content, so_far)


class FileDigest:
    """Size and XXH3 (64 bits) of a file, computed while the file is written or read.

    CRC-32C would not do: a shard's chunks are each followed by their CRC-32C, and the CRC-32C of such a shard is the
    same whatever the chunks hold.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._hash = xxh3_64()

    def update(self, content: bytes | memoryview) -> None:
        self.num_bytes += len(content)
        self._hash.update(content)

    def describe(self) -> dict[str, Any]:
        """The description of the file in a record: size and hash."""
        return {"bytes": self.num_bytes, "xxh3": self._hash.hexdigest()}


def describe(content: bytes | memoryview) -> dict[str, Any]:
    """The description, in a record, of a file with this content."""
    digest = FileDigest()
    digest.update(content)
    return digest.describe()


def dump_record(record: dict[str, Any]) -> bytes:
    """The record as JSON; its last key is the CRC-32C of its other keys in canonical form."""
    return (json.dumps({**record, CHECKSUM: _own_checksum(record)}, indent=1) + "\n").encode()


def parse_record(content: bytes, place: str, kind: str) -> dict[str, Any]:
    """Reads a record and checks it.

    Args:
        place: where the content was found.
        kind: what the record should be, such as "the commit record of a part".

    Raises:
        CacheCorruptError: the content is no record, or the record's checksum does not hold.
    """
    try:
        record = json.loads(content)
        if isinstance(record, dict):
            record.pop(CHECKSUM, None)
        # Compare the whole text: some flipped bits change only the spelling (1e-6, 1E-6).
        is_sound = isinstance(record, dict) and dump_record(record) == content
    except (ValueError, RecursionError):  # no JSON, or JSON that is nested too deeply
        record, is_sound = {}, False
    if not is_sound:
        raise CacheCorruptError(f"{place} is not {kind} as it was written: its checksum does not hold.")
    return record


def _own_checksum(record: dict[str, Any]) -> str:
    return f"{checksum(json.dumps(record, sort_keys=True, separators=(',', ':')).encode()):08x}"
