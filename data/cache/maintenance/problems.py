"""What can be wrong with a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import REPAIR_ADVICE, CacheCorruptError, CacheNotFoundError
from ..records import FileDigest
from ..storage.base import Storage

BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong."""

    what: str
    part: str | None = None
    """The damaged part of states; None if the problem concerns the whole cache or first drafts."""
    sequences: tuple[str, ...] = ()
    """`seq_id`s of the sequences that nobody can read because of the problem."""
    drafts: str | None = None
    """The fingerprint of the damaged first drafts."""
    drafts_part: str | None = None
    """The damaged part of these first drafts."""
    note: str | None = None
    """The damaged file of an extraction's notes."""


def text_of(error: CacheCorruptError | CacheNotFoundError) -> str:
    """The error's message, without the advice to run `vpd verify`, which is running."""
    if isinstance(error, CacheCorruptError) and error.advice == REPAIR_ADVICE:
        return error.what
    return str(error)


def check_file(storage: Storage, name: str, described: dict[str, Any]) -> str | None:
    """What is wrong with a file; None if the file is what its record says."""
    place = f"{storage.place}/{name}"
    digest = FileDigest()
    try:
        file, size = storage.open(name), storage.size(name)
    except FileNotFoundError:
        return f"{place} is missing"
    block = memoryview(bytearray(min(size, BLOCK_BYTES)))
    while digest.num_bytes < size:
        count = file.read_into([block[: size - digest.num_bytes]], digest.num_bytes)
        if not count:
            break
        digest.update(block[:count])
    found = digest.describe()
    return None if found == described else f"{place} is not what was written: expected {described}, found {found}"
