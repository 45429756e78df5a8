"""Rows of a file or a data set by their numbers, so that a reader of some rows need not read the others."""

# R rows

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from crc32c import crc32c

from ..errors import PromptError
from .readers import BOM, DAMAGE, TABLES, Wanted, batch_rows, load_json
from .rows import HUB, HubPart, rows_of_places

BLOCK_BYTES = 1 << 20
NEWLINE = 10
CHUNK_ROWS = 1024
"""Rows whose places are looked up together."""
BLANK = BOM + b" \t\r\n"
"""What may come before the first record."""


IndexedRow = tuple[int, int, Callable[[], object]]
"""A row's index, its number for people, and a call that loads the row. The call raises for a bad row."""


class RowTable(Protocol):
    """The rows of one place; an index counts them from 0."""

    place: str

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> Iterator[IndexedRow]:
        """
        Args:
            indices: ascending.

        Raises:
            PromptError: the place can't be read any more.
        """
        ...

    def checksum(self, unit: int) -> str:
        """Some digits that change if the rows of the unit of this number change; another row may change them too."""
        ...

    def raw(self) -> Iterator[object]:
        """Every row as it is stored, to be hashed."""
        ...


def open_table(place: str, wanted: Wanted, hub: HubPart, unit_rows: int) -> RowTable:
    """
    Args:
        wanted: whether a column of this name is read from tables.
        unit_rows: rows of a unit, for `checksum`.

    Raises:
        PromptError: the place can't be read, or holds no row.
    """
    table = _open_file(Path(place), wanted, unit_rows) if Path(place).is_file() else None
    table = table or StreamTable(place, wanted, hub)
    if not len(table):
        raise PromptError(f"no prompts in {place}: there is no record; remove it from the list")
    return table


def _open_file(path: Path, wanted: Wanted, unit_rows: int) -> RowTable | None:
    """The table of a file with one JSON object a line, or of a Parquet or Arrow file; None for any other file."""
    try:
        with path.open("rb") as file:
            magic = file.read(8)
            file.seek(0)
            first = next((line for line in iter(lambda: file.readline(BLOCK_BYTES), b"") if line.strip(BLANK)), b"")
        if magic.startswith(tuple(TABLES)):
            return BatchTable(str(path), wanted)
        is_lines = first.strip(BLANK).startswith(b"{") and b"\0" not in first[:2]
        return LineTable(str(path), unit_rows) if is_lines else None
    except DAMAGE as error:
        raise PromptError(f"prompt file {path} can't be read; its bytes may be damaged: {error}") from error


class LineTable:
    """A file of lines. Opening finds the ends of all lines; nothing is decoded."""

    def __init__(self, place: str, unit_rows: int):
        """
        Args:
            unit_rows: rows of a unit, for `checksum`.
        """
        self.place = place
        self._checksums: list[int] = []
        try:
            self._scan(unit_rows)
        except OSError as error:
            raise PromptError(f"prompt file {place} can't be read: {error}") from error

    def __len__(self) -> int:
        return self._lines_3R.shape[1]

    def read(self, indices: Sequence[int]) -> Iterator[IndexedRow]:
        for index, number, line in self._lines(indices):
            if line.strip():
                yield index, number, lambda line=line: load_json(line)

    def checksum(self, unit: int) -> str:
        return f"{self._checksums[unit]:08x}"

    def raw(self) -> Iterator[bytes]:
        return (line.strip() for _, _, line in self._lines(range(len(self))))

    def _lines(self, indices: Sequence[int]) -> Iterator[tuple[int, int, bytes]]:
        try:
            with open(self.place, "rb") as file:
                position = 0
                for chunk in (indices[i : i + CHUNK_ROWS] for i in range(0, len(indices), CHUNK_ROWS)):
                    for index, (start, end, number) in zip(
                        chunk, self._lines_3R[:, list(chunk)].T.tolist(), strict=True
                    ):
                        if position != start:
                            file.seek(start)
                        yield index, number, file.read(end - start)
                        position = end
        except OSError as error:
            raise PromptError(f"prompt file {self.place} can't be read: {error}") from error

    def _scan(self, unit_rows: int) -> None:
        """Finds the lines that are not blank, and the checksum of every unit."""
        block = bytearray(BLOCK_BYTES)
        view = memoryview(block)
        found: list[np.ndarray] = []
        base = start = num_lines = num_rows = checksum = 0
        with open(self.place, "rb", buffering=0) as file:
            while size := file.readinto(block):
                ends = _line_ends(block, size)
                is_row = _are_filled(block, ends, base - start)
                numbers = np.arange(num_lines + 1, num_lines + 1 + len(ends))
                starts = np.append(start, base + ends)
                found.append(np.stack([starts[:-1], base + ends, numbers])[:, is_row])
                done = 0
                for end in ends[is_row][unit_rows - 1 - num_rows % unit_rows :: unit_rows].tolist():
                    self._checksums.append(crc32c(view[done:end], checksum))
                    done, checksum = end, 0
                checksum = crc32c(view[done:size], checksum)
                num_lines, num_rows = num_lines + len(ends), num_rows + int(is_row.sum())
                start, base = int(starts[-1]), base + size
        if start < base:
            found.append(np.array([[start], [base], [num_lines + 1]]))
        self._lines_3R = np.concatenate(found, axis=1) if found else np.empty((3, 0), np.int64)
        if len(self) > len(self._checksums) * unit_rows:
            self._checksums.append(checksum)


def _line_ends(block: bytearray, size: int) -> np.ndarray:
    """Where the lines of the first `size` bytes end, the newline included."""
    ends = array("q")
    add, find = ends.append, block.find
    found = find(NEWLINE, 0, size)
    while found >= 0:
        add(found + 1)
        found = find(NEWLINE, found + 1, size)
    return np.frombuffer(ends, np.int64) if ends else np.empty(0, np.int64)


def _are_filled(block: bytearray, ends: np.ndarray, num_before: int) -> np.ndarray:
    """Whether each line holds more than one blank.

    Args:
        num_before: bytes of the first line that came before the block.
    """
    lengths = np.diff(ends, prepend=-num_before)
    is_filled = lengths > 2
    for i in np.flatnonzero(lengths == 2).tolist():
        is_filled[i] = not block[max(0, ends[i] - 2) : ends[i] - 1].isspace()
    return is_filled


class BatchTable:
    """A Parquet or Arrow file. Rows that nobody asks for are passed over before they become objects."""

    def __init__(self, place: str, wanted: Wanted):
        """
        Raises:
            PromptError: the table has no column that is read.
        """
        self.place, self._wanted = place, wanted
        with open(place, "rb") as file:
            magic = file.read(8)
        self._reader = next(reader for first, reader in TABLES.items() if magic.startswith(first))
        self._checksum = _hash_place(place, HubPart())
        self._batches: Iterator[tuple[list[str], pa.RecordBatch]] = iter(())
        self._batch: tuple[list[str], pa.RecordBatch] | None = None
        self._first = 0
        if magic.startswith(b"PAR1"):
            self._num_rows = int(pq.read_metadata(place).num_rows)
            next(self._reader(Path(place), wanted), None)
        else:
            self._num_rows = sum(batch.num_rows for _, batch in self._reader(Path(place), wanted))

    def __len__(self) -> int:
        return self._num_rows

    def read(self, indices: Sequence[int]) -> Iterator[IndexedRow]:
        left = list(indices)
        try:
            while left and (found := self._find_batch(left[0])) is not None:
                names, batch = found
                here = left[: bisect_left(left, self._first + batch.num_rows)]
                left = left[len(here) :]
                for start, stop in _runs(here):  # a slice, because `take` knows fewer of Arrow's types
                    chosen = batch.slice(start - self._first, stop - start)
                    for index, load in zip(range(start, stop), batch_rows(chosen, names), strict=True):
                        yield index, index + 1, load
        except DAMAGE as error:
            raise PromptError(f"prompt file {self.place} can't be read; its bytes may be damaged: {error}") from error

    def checksum(self, unit: int) -> str:
        return f"{self._checksum} {unit}"

    def raw(self) -> Iterator[object]:
        return _raw(self.read(range(len(self))))

    def _find_batch(self, index: int) -> tuple[list[str], pa.RecordBatch] | None:
        """The batch that holds a row, and the names of all columns."""
        if self._batch is None or index < self._first:
            self._batches, self._batch, self._first = self._reader(Path(self.place), self._wanted), None, 0
        while self._batch is None or index >= self._first + self._batch[1].num_rows:
            self._first += 0 if self._batch is None else self._batch[1].num_rows
            self._batch = next(self._batches, None)
            if self._batch is None:
                return None
        return self._batch


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The first number of each run of consecutive numbers, and the number after the run."""
    start = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield numbers[start], numbers[i - 1] + 1
            start = i


class StreamTable:
    """Any other place. It can only be read from its start on, so rows are cheap to read in their order."""

    def __init__(self, place: str, wanted: Wanted, hub: HubPart):
        self.place, self._wanted, self._hub = place, wanted, hub
        self._count = sum(1 for _ in self._open())
        self._rows: Iterator[tuple[str, int, Callable[[], object]]] | None = None
        self._next = 0
        self._checksum = _hash_place(place, hub)

    def __len__(self) -> int:
        return self._count

    def read(self, indices: Sequence[int]) -> Iterator[IndexedRow]:
        for index in indices:
            if self._rows is None or index < self._next:
                self._rows, self._next = self._open(), 0
            for _, number, load in self._rows:
                self._next += 1
                if self._next == index + 1:
                    yield index, number, load
                    break

    def checksum(self, unit: int) -> str:
        return f"{self._checksum} {unit}"

    def raw(self) -> Iterator[object]:
        return _raw(self.read(range(len(self))))

    def _open(self) -> Iterator[tuple[str, int, Callable[[], object]]]:
        return rows_of_places([self.place], self._wanted, self._hub)


def _raw(rows: Iterator[IndexedRow]) -> Iterator[object]:
    """A text for each row; for a bad row its number."""
    for _, number, load in rows:
        try:
            yield repr(load())
        except PromptError:
            yield number


def _hash_place(place: str, hub: HubPart) -> str:
    """A checksum of a file's bytes, or of a data set's name."""
    path = Path(place)
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    if place.startswith(HUB):
        return hashlib.sha256(repr((place, hub)).encode()).hexdigest()[:8]
    checksum = 0
    for each in files:
        with each.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                checksum = crc32c(block, checksum)
    return f"{checksum:08x}"
