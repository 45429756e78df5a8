"""Prompt records with ids, read from files and from data sets of the hub when somebody asks for them.

`forms.py` says which keys a record may have, and `tables.py` how the rows of a place are found.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import PromptError
from ..hashing import hash_text
from .forms import Content, ReadingFacts, is_wanted, parse_record
from .messages import Message
from .reading import DEFAULT_READING, Reading
from .rows import HubPart, find_places
from .spool import Spool
from .tables import LineTable, RowTable, open_table

UNIT_ROWS = 256
"""Rows of a slice, unless a setting says otherwise."""


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """One conversation or plain text, and where it came from."""

    seq_id: str
    """Content hash; the k-th repetition of a row gets "-k" appended, k from 1, if repetitions are kept."""
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
    facts: ReadingFacts = field(default_factory=ReadingFacts)
    """How the record was read."""

    @property
    def content_hash(self) -> str:
        """16 hex digits that depend on the messages, the tools and the text alone."""
        return hash_content(Content(self.messages, self.text, self.tools))


class RowSlice(NamedTuple):
    """Some of the rows."""

    key: str
    """16 hex digits over all that decides what the rows give: their bytes, their place, and how they are read."""
    rows: Sequence[int]
    """Numbers of the rows over all places, from 0, in the order in which the rows are taken."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that gives no record."""

    source: str
    row: int
    reason: str

    @property
    def message(self) -> str:
        return f"{self.source}:{self.row}: {self.reason}"


class PromptSource:
    """The rows of files, patterns and data sets. Opening reads each file once, and decodes nothing."""

    def __init__(
        self,
        places: Sequence[str | Path],
        *,
        unit_rows: int = UNIT_ROWS,
        limit: int | None = None,
        shuffle_seed: int | None = None,
        keep_duplicates: bool = False,
        reading: Reading = DEFAULT_READING,
        hub: HubPart | None = None,
    ):
        """
        Args:
            unit_rows: greatest number of rows of a slice.
            limit: number of rows to take over all places, >= 1; None = all.
            shuffle_seed: seed of the rows' order, which depends on the seed and the number of rows alone.
            keep_duplicates: whether the k-th repetition of a row gets an id of its own. This takes a hash of each row.
            reading: what keys and roles are called, and which keys are left out.
            hub: which rows of data sets are read.

        Raises:
            PromptError: a place is missing, can't be read or holds no row.
        """
        if limit is not None and limit < 1:
            raise PromptError(f"limit must be at least 1, got {limit}; leave it out to read every record")
        self._reading, self._hub = reading, hub or HubPart()
        self._unit_rows = unit_rows
        self.described = ", ".join(map(str, places))
        """The places for messages, as they were given."""
        found = find_places(places)
        if not found:
            raise PromptError("no prompts in an empty list of files")
        wanted = partial(is_wanted, reading=reading)
        self._tables = [open_table(place, wanted, self._hub, unit_rows) for place in found]
        self._firsts = np.cumsum([0, *(len(table) for table in self._tables)])
        """Number of each place's first row, and the number of all rows."""
        total = int(self._firsts[-1])
        self._order = None if shuffle_seed is None else shuffled(total, shuffle_seed)[:limit]
        self._spools: dict[int, Spool] = {}
        self._num_rows = total if limit is None else min(total, limit)
        self._is_repeating = keep_duplicates
        self._repetitions = self._find_repetitions() if keep_duplicates else {}

    def __len__(self) -> int:
        """Number of rows, bad ones included."""
        return self._num_rows

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over the keys of all slices: over the rows' bytes, their choice, and how they are read."""
        return hash_text("\n".join(sorted(each.key for each in self.slices())))

    def slices(self) -> list[RowSlice]:
        """All rows, in slices of up to `unit_rows` of them. Without a seed, a slice has the rows of one place."""
        size = self._unit_rows
        if self._order is not None:
            every = (table.checksum(i) for table in self._tables for i in range(-(-len(table) // size)))
            checksum = hash_text(" ".join(every))
            orders = [self._order[start : start + size] for start in range(0, len(self._order), size)]
            return [RowSlice(self._key(checksum, order.tolist()), order.tolist()) for order in orders]
        found: list[RowSlice] = []
        for table, first in zip(self._tables, self._firsts.tolist(), strict=False):
            for unit, start in enumerate(range(first, min(first + len(table), self._num_rows), size)):
                rows = range(start, min(start + size, first + len(table), self._num_rows))
                found.append(RowSlice(self._key(table.checksum(unit), [rows.start, rows.stop]), rows))
        return found

    def read(self, rows: Sequence[int] | None = None) -> Iterator[PromptRecord | BadRow]:
        """The records of these rows, in this order; of all rows if none are named.

        Raises:
            PromptError: a place can't be read.
        """
        if rows is None:
            for each in self.slices():
                yield from self.read(each.rows)
            return
        found = dict(self._read_ascending(sorted(rows)))
        yield from (found[row] for row in rows if row in found)

    def _read_ascending(self, rows: Sequence[int]) -> Iterator[tuple[int, PromptRecord | BadRow]]:
        owners = np.searchsorted(self._firsts, np.asarray(rows, np.int64), side="right") - 1
        for owner in np.unique(owners).tolist():
            table, first = self._tables[owner], int(self._firsts[owner])
            chosen = [row for row, each in zip(rows, owners.tolist(), strict=True) if each == owner]
            for index, number, load in self._reader(owner).read([row - first for row in chosen]):
                row = first + index
                try:
                    content = parse_record(load(), self._reading)
                except PromptError as error:
                    yield row, BadRow(table.place, number, str(error))
                    continue
                digest, repetition = hash_content(content), self._repetitions.get(row, 0)
                seq_id = f"{digest}-{repetition}" if repetition else digest
                yield row, PromptRecord(seq_id, table.place, number, *content)

    def _reader(self, owner: int) -> RowTable | Spool:
        """What reads a place's rows. In the order of a seed, rows that can only be read forward are copied first."""
        table = self._tables[owner]
        if self._order is None or isinstance(table, LineTable):
            return table
        if owner not in self._spools:
            first, end = self._firsts[owner], self._firsts[owner + 1]
            chosen = np.sort(self._order[(self._order >= first) & (self._order < end)] - first)
            self._spools[owner] = Spool(table, chosen.tolist())
        return self._spools[owner]

    def _key(self, checksum: str, rows: list[int]) -> str:
        return hash_text(repr((checksum, rows, self._reading, self._is_repeating)))

    def _find_repetitions(self) -> dict[int, int]:
        """Row -> how many earlier rows are the same, for the rows where this is not 0."""
        hashes = np.fromiter((hash(row) for table in self._tables for row in table.raw()), np.int64)
        order = np.argsort(hashes, kind="stable")
        is_new = np.diff(hashes[order], prepend=0) != 0
        is_new[:1] = True
        starts = np.flatnonzero(is_new)
        places = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
        repeated = np.flatnonzero(places)
        return dict(zip(order[repeated].tolist(), places[repeated].tolist(), strict=True))


def shuffled(number: int, seed: int) -> np.ndarray:
    """The numbers below `number`, in an order that depends on the seed and on `number` alone.

    The sort keys are those of the generator SplitMix64, so that no library's version changes the order.
    """
    keys = np.arange(1, number + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    keys += np.uint64(int(hash_text(f"shuffle {seed}"), 16))
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(keys ^ (keys >> np.uint64(31)), kind="stable")


def hash_content(content: Content) -> str:
    messages = [[m.role, m.content, *([dict(m.extra)] if m.extra else [])] for m in content.messages]
    tools = [list(content.tools)] if content.tools else []
    return hash_text(json.dumps([messages, content.text, *tools], separators=(",", ":")))
