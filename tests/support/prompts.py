"""All records of prompt files at once, as tests compare them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpd.data.errors import PromptError
from vpd.data.prompts.records import BadRow, PromptRecord, PromptSource


@dataclass(frozen=True, slots=True)
class PromptSet:
    """All records of a source, read at once."""

    records: tuple[PromptRecord, ...]
    num_skipped: int
    """Bad records that were left out."""
    num_duplicates: int
    """Records that were left out because an earlier record has the same id."""
    fingerprint: str
    """That of the source."""


def read_prompts(
    places: Sequence[str | Path], *, skip_bad: bool = False, keep_duplicates: bool = True, **settings: Any
) -> PromptSet:
    """Reads all records at once, which suits small prompt sets.

    Args:
        skip_bad: whether bad records are counted and left out; otherwise the first bad record is an error.
        settings: further arguments of `PromptSource`.

    Raises:
        PromptError: a place is missing, can't be read or holds no record; a record is bad; no record is left.
    """
    source = PromptSource(places, keep_duplicates=keep_duplicates, **settings)
    records: list[PromptRecord] = []
    seen: set[str] = set()
    num_skipped = num_duplicates = 0
    for found in source.read():
        if isinstance(found, BadRow):
            if not skip_bad:
                raise PromptError(found.message)
            num_skipped += 1
        elif found.seq_id in seen and not keep_duplicates:
            num_duplicates += 1
        else:
            seen.add(found.seq_id)
            records.append(found)
    if not records:
        raise PromptError(f"no prompts in {source.described} ({num_skipped} bad records skipped)")
    return PromptSet(tuple(records), num_skipped, num_duplicates, source.fingerprint)
