"""Rows of a place that can only be read from its start on, copied to be read in any order."""

from __future__ import annotations

import pickle
import tempfile
import weakref
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from ..errors import PromptError
from .tables import IndexedRow, RowTable


class Spool:
    """Some rows of a table in a temporary file of this process."""

    def __init__(self, table: RowTable, indices: Sequence[int]):
        """
        Args:
            indices: ascending.

        Raises:
            PromptError: the place can't be read.
        """
        self._indices, self._numbers, self._starts = array("q"), array("q"), array("q", [0])
        self._file = tempfile.TemporaryFile(prefix="vpd-rows-")  # noqa: SIM115 - closed with the spool
        weakref.finalize(self, self._file.close)
        for index, number, load in table.read(indices):
            try:
                content = load(), None
            except PromptError as error:
                content = None, str(error)
            self._file.write(pickle.dumps(content, pickle.HIGHEST_PROTOCOL))
            self._indices.append(index)
            self._numbers.append(number)
            self._starts.append(self._file.tell())

    def read(self, indices: Sequence[int]) -> Iterator[IndexedRow]:
        """The copied rows among these."""
        for index in indices:
            place = bisect_left(self._indices, index)
            if place < len(self._indices) and self._indices[place] == index:
                self._file.seek(self._starts[place])
                row, reason = pickle.loads(self._file.read(self._starts[place + 1] - self._starts[place]))
                yield index, self._numbers[place], lambda row=row, reason=reason: _give(row, reason)


def _give(row: object, reason: str | None) -> object:
    """
    Raises:
        PromptError: the row was bad.
    """
    if reason is not None:
        raise PromptError(reason)
    return row
