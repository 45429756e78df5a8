"""The index of a cache: one row for each sequence, kept in columns.

Every part has its own Parquet file, `index/<part>.parquet`. A snapshot, `index/all-<parts>-<hash>.parquet`, holds the
rows of many parts, so that a reader opens one file for all of them. The snapshot's name ends with the hash of the file.
Parts that were committed after the snapshot are read from their own files.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike

from ..errors import CacheCorruptError
from .records import describe
from .storage.base import Storage

INDEX = "index"
SNAPSHOT = re.compile(r"all-(\d{8})-([0-9a-f]{16})\.parquet")
REPEATED = ["source", "part", "finish_reason"]
"""Columns whose values recur; kept in memory as a dictionary of values and one number for each row."""
BATCH_ROWS = 4096
SNAPSHOT_TRIES = 5
SNAPSHOT_LAG = 8
"""A writer renews the snapshot when more than 1/SNAPSHOT_LAG of the parts are not in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceRow:
    """One row of the index."""

    seq_id: str
    source: str
    source_row: int
    part: str
    first_row: int
    """Row of the sequence's first token in the part's arrays."""
    num_tokens: int
    """T, the number of tokens that entered the target and have a state."""
    prompt_len: int
    num_supervised: int
    final_token_id: int | None
    """The last generated token, which has no state because it never entered the target; None for a given response."""
    finish_reason: str
    """`stop`, `length` (cut by a limit), `given`, or `given, cut`."""
    hidden_offset: int
    hidden_length: int
    """Byte range of the sequence's chunks in the shard of `hidden`."""
    hidden_crc: int
    """CRC-32C over the CRC-32Cs of these chunks, each 4 bytes little-endian."""
    content_hash: str
    """Hash of the token ids and the loss mask; 16 hex digits."""


ARROW_TYPES = {"str": pa.string(), "int": pa.int64(), "int | None": pa.int64()}
INDEX_SCHEMA = pa.schema(
    [
        pa.field(field.name, ARROW_TYPES[str(field.type)], nullable="None" in str(field.type))
        for field in fields(SequenceRow)
    ]
)
MEMORY_SCHEMA = pa.schema(
    [
        pa.field(field.name, pa.dictionary(pa.int32(), pa.string())) if field.name in REPEATED else field
        for field in INDEX_SCHEMA
    ]
)


def hash_content(token_ids: ArrayLike, loss_mask: ArrayLike, final_token_id: int | None) -> str:
    """The value of `SequenceRow.content_hash`."""
    ids = np.append(np.asarray(token_ids, "<i8"), -1 if final_token_id is None else final_token_id).astype("<i8")
    return hashlib.sha256(ids.tobytes() + np.asarray(loss_mask, np.uint8).tobytes()).hexdigest()[:16]


class SequenceIndex(Sequence[SequenceRow]):
    """Rows of the index, about 120 bytes each; a `SequenceRow` is made when somebody asks for the row."""

    def __init__(self, table: pa.Table):
        self._table = table.combine_chunks()

    @classmethod
    def concatenate(cls, tables: list[pa.Table]) -> SequenceIndex:
        tables = [table.cast(MEMORY_SCHEMA) for table in tables]
        return cls(pa.concat_tables(tables).unify_dictionaries() if tables else MEMORY_SCHEMA.empty_table())

    def __len__(self) -> int:
        return self._table.num_rows

    @overload
    def __getitem__(self, index: int) -> SequenceRow: ...
    @overload
    def __getitem__(self, index: slice) -> SequenceIndex: ...
    def __getitem__(self, index: int | slice) -> SequenceRow | SequenceIndex:
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        (values,) = self._table.slice(index % len(self), 1).to_pylist()
        return SequenceRow(**values)

    def __iter__(self) -> Iterator[SequenceRow]:
        for batch in self._table.to_batches(max_chunksize=BATCH_ROWS):
            for values in batch.to_pylist():
                yield SequenceRow(**values)

    def take(self, indices: Sequence[int] | np.ndarray) -> SequenceIndex:
        """The rows at these indices."""
        return SequenceIndex(self._table.take(pa.array(np.asarray(indices, np.int64))))

    def column(self, name: str) -> np.ndarray:
        """All values of a column without nulls."""
        return self._table[name].to_numpy()

    def strings(self, name: str) -> list[str]:
        return self._table[name].to_pylist()

    @property
    def nbytes(self) -> int:
        return self._table.nbytes

    def of_part(self, name: str) -> SequenceIndex:
        """The rows of a part, in the order of its arrays."""
        found = self._rows_by_part.get(name, np.empty(0, np.int64))
        return self.take(found[np.argsort(self.column("first_row")[found], kind="stable")])

    @cached_property
    def _rows_by_part(self) -> dict[str, np.ndarray]:
        if not len(self):
            return {}
        column = self._table["part"].chunk(0)
        numbers = column.indices.to_numpy()
        order = np.argsort(numbers, kind="stable")
        starts = np.searchsorted(numbers[order], np.arange(len(column.dictionary) + 1))
        names = column.dictionary.to_pylist()
        return {part: order[starts[i] : starts[i + 1]] for i, part in enumerate(names)}

    def in_order_of_parts(self) -> SequenceIndex:
        """The rows, sorted by the names of their parts: the order does not depend on the files that were read."""
        rows = self._rows_by_part
        order = np.concatenate([rows[name] for name in sorted(rows)]) if rows else np.empty(0, np.int64)
        return self if np.array_equal(order, np.arange(len(self))) else self.take(order)

    @property
    def parts(self) -> list[str]:
        return [name for name, rows in self._rows_by_part.items() if len(rows)]

    def without_repetitions(self) -> SequenceIndex:
        """The rows without those whose `seq_id` came before: two writers at once can write the same sequence."""
        ids = self._table["seq_id"]
        if len(ids.unique()) == len(ids):
            return self
        first: dict[str, int] = {}
        for i, seq_id in enumerate(ids.to_pylist()):
            first.setdefault(seq_id, i)
        return self.take(list(first.values()))

    def to_parquet(self) -> bytes:
        return write_rows(self._table)


def write_rows(table: pa.Table) -> bytes:
    """The rows as a Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table.cast(INDEX_SCHEMA), sink, compression="zstd", write_statistics=False)
    return sink.getvalue()


def rows_to_table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, INDEX_SCHEMA)


def part_index_file(part: str) -> str:
    return f"{INDEX}/{part}.parquet"


def read_part_index(storage: Storage, part: str, commit: dict[str, Any]) -> pa.Table:
    """A part's own rows, checked against its commit record.

    Raises:
        CacheCorruptError: the rows are missing, or not what was written.
    """
    file = part_index_file(part)
    try:
        content = storage.read(file)
    except FileNotFoundError:
        content = None
    expected = commit["files"].get(file)
    found = None if content is None else describe(content)
    if content is None or found != expected:
        raise CacheCorruptError(
            f"the index {storage.place}/{file} of a committed part is not what was written: expected {expected}, found "
            f"{found}."
        )
    return parse_rows(content, f"{storage.place}/{file}")


def parse_rows(content: bytes, place: str) -> pa.Table:
    """The rows in the content of a Parquet file.

    Raises:
        CacheCorruptError: the content is not an index of this schema.
    """
    try:
        table = pq.read_table(io.BytesIO(content), read_dictionary=REPEATED)
        return table.cast(MEMORY_SCHEMA)
    except (pa.ArrowException, OSError, ValueError):
        raise CacheCorruptError(f"{place} is not an index of sequences.") from None


def find_snapshot(storage: Storage) -> str | None:
    """Name of the snapshot with the most parts."""
    names = [name for name in storage.list_folder(INDEX) if SNAPSHOT.fullmatch(name)]
    return max(names, default=None)


def read_snapshot(storage: Storage) -> pa.Table | None:
    """The rows of the latest snapshot; None if there is none.

    Raises:
        CacheCorruptError: the snapshot is not what was written.
    """
    for _ in range(SNAPSHOT_TRIES):
        if (name := find_snapshot(storage)) is None:
            return None
        try:
            content = storage.read(f"{INDEX}/{name}")
        except FileNotFoundError:
            continue  # a writer has renewed the snapshot meanwhile
        place = f"{storage.place}/{INDEX}/{name}"
        if not name.endswith(f"{_hash(content)}.parquet"):
            raise CacheCorruptError(f"{place} is not what was written: its hash does not match its name.")
        return parse_rows(content, place)
    return None


def write_snapshot(storage: Storage, rows: SequenceIndex, num_parts: int) -> None:
    """Writes a snapshot of these rows, and removes the snapshots with fewer parts."""
    content = rows.to_parquet()
    name = f"all-{num_parts:08d}-{_hash(content)}.parquet"
    storage.write(f"{INDEX}/{name}", content)
    for other in storage.list_folder(INDEX):
        if SNAPSHOT.fullmatch(other) and other < name:
            storage.remove(f"{INDEX}/{other}")


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
