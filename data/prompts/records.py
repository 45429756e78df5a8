"""Prompt records with ids, read from files (JSON Lines, gzip, Parquet) and from data sets of the hub.

`forms.py` says which keys a record may have.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PromptError
from ..hashing import hash_text
from .forms import Content, known_keys, parse_record
from .messages import Message
from .rows import HubPart, find_places, rows_of_places


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """One conversation or plain text, and where it came from."""

    seq_id: str
    """Content hash; the k-th repetition of a content gets "-k" appended, k from 1."""
    source: str
    """The file or data set, as it was given."""
    row: int
    """Line number, or row number of a table; both count from 1."""
    messages: tuple[Message, ...]
    """Empty for a plain text."""
    text: str | None
    """None for a conversation."""
    tools: tuple[dict[str, Any], ...] = ()
    """Functions that the conversation may call, as the chat template takes them."""

    @property
    def content_hash(self) -> str:
        """16 hex digits that depend on the messages, the tools and the text alone."""
        return _hash_content(Content(self.messages, self.text, self.tools))


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The records of all places, in the order in which they were read, or in the order of the seed."""

    records: tuple[PromptRecord, ...]
    num_skipped: int
    """Bad records that were left out."""
    num_duplicates: int
    """Records that were left out because an earlier record has the same content."""
    fingerprint: str
    """16 hex digits over the sorted `seq_id`s; the order of the records does not matter."""


def read_prompts(
    places: Sequence[str | Path],
    *,
    skip_bad: bool = False,
    limit: int | None = None,
    shuffle_seed: int | None = None,
    keep_duplicates: bool = True,
    columns: Mapping[str, str] | None = None,
    hub: HubPart | None = None,
) -> PromptSet:
    """Reads the records of files, patterns and data sets.

    Args:
        skip_bad: whether bad records are counted and left out; otherwise the first bad record is an error.
        limit: number of records to take over all places, >= 1; None = all.
        shuffle_seed: seed of the records' order. The order, and so what `limit` takes, depends on the seed and the
            records' contents alone.
        keep_duplicates: whether a repeated content is a record of its own, with another id.
        columns: key of a record -> its name in the data, such as {"prompt": "question"}.
        hub: which rows of data sets are read.

    Raises:
        PromptError: a place is missing, can't be read or holds no record; a record is bad; no record is left.
    """
    if limit is not None and limit < 1:
        raise PromptError(f"limit must be at least 1, got {limit}; leave it out to read every record")
    columns = columns or {}
    names = {key: columns.get(key, key) for key in known_keys()}
    records: list[PromptRecord] = []
    repetitions: Counter[str] = Counter()
    num_skipped = num_duplicates = 0
    for source, row, load in rows_of_places(find_places(places), set(names.values()), hub or HubPart()):
        try:
            content = parse_record(_rename(load(), names) if columns else load())
        except PromptError as error:
            if not skip_bad:
                raise PromptError(f"{source}:{row}: {error}") from None
            num_skipped += 1
            continue
        digest = _hash_content(content)
        repetitions[digest] += 1
        number = repetitions[digest] - 1
        if number and not keep_duplicates:
            num_duplicates += 1
            continue
        records.append(PromptRecord(f"{digest}-{number}" if number else digest, source, row, *content))
        if len(records) == limit and shuffle_seed is None:
            break
    if not records:
        found = ", ".join(map(str, places)) or "an empty list of files"
        raise PromptError(f"no prompts in {found} ({num_skipped} bad records skipped)")
    if shuffle_seed is not None:
        records = sorted(records, key=lambda record: _shuffle_key(shuffle_seed, record.seq_id))[:limit]
    fingerprint = hash_text("\n".join(sorted(record.seq_id for record in records)))
    return PromptSet(tuple(records), num_skipped, num_duplicates, fingerprint)


def _shuffle_key(seed: int, seq_id: str) -> bytes:
    """A record's place in the order of a seed. Neither the record's file nor the other records matter."""
    return hashlib.sha256(f"{seed} {seq_id}".encode()).digest()


def _rename(record: object, names: Mapping[str, str]) -> object:
    if not isinstance(record, dict):
        return record
    return {key: record[name] for key, name in names.items() if name in record}


def _hash_content(content: Content) -> str:
    messages = [[m.role, m.content, *([dict(m.extra)] if m.extra else [])] for m in content.messages]
    tools = [list(content.tools)] if content.tools else []
    return hash_text(json.dumps([messages, content.text, *tools], separators=(",", ":")))
