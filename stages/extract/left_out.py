"""Rows that give no sequence, counted by reason, with the first row of each kind of error."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

DETAILS = re.compile(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|[0-9.]+")
"""What differs between two messages about the same kind of error."""
MAX_KINDS = 20
"""Kinds of errors whose first row is kept."""


@dataclass(slots=True)
class LeftOut:
    """Rows that are left out."""

    counts: Counter[str] = field(default_factory=Counter)
    """Reason -> number of rows."""
    firsts: dict[str, str] = field(default_factory=dict)
    """Reason and kind of error -> message of the first row, which names the row."""

    def add(self, reason: str, where: str = "", what: str = "") -> None:
        """Counts a row.

        Args:
            where: the row, for people.
            what: what is wrong with the row; nothing for a duplicate, which is no example.
        """
        self.counts[reason] += 1
        if what:
            self._keep(f"{reason}: {DETAILS.sub('', what)}", f"{where}: {what}")

    def update(self, other: LeftOut) -> None:
        self.counts.update(other.counts)
        for kind, message in other.firsts.items():
            self._keep(kind, message)

    def _keep(self, kind: str, message: str) -> None:
        if len(self.firsts) < MAX_KINDS:
            self.firsts.setdefault(kind, message)
