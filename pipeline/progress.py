"""Progress for people: a bar on a terminal, a line now and then elsewhere; always on standard error."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class ProgressReport:
    """Counts finished units of a task, and units of work (tokens, anchors) for the rate."""

    def __init__(self, task: str, total: int, work: str = ""):
        self._task, self._total, self._work = task, total, work
        self._done = self._amount = 0
        self._started = self._last_line = time.monotonic()
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._bar_task = self._bar.add_task(task, total=total, note="")

    def __enter__(self) -> ProgressReport:
        self._bar.start()
        if not self._console.is_terminal:
            self._line()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if not self._console.is_terminal and kind is None:
            self._line()

    def advance(self, amount: int = 0, note: str = "") -> None:
        """One unit is finished, with `amount` of work in it."""
        self._done += 1
        self._amount += amount
        seconds = time.monotonic() - self._started
        rate = f"{self._amount / max(seconds, 1e-9):.0f} {self._work}/s" if self._work else ""
        self._note = "  ".join(part for part in (rate, note) if part)
        self._bar.update(self._bar_task, completed=self._done, note=self._note)
        if not self._console.is_terminal and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._line()

    _note = ""

    def _line(self) -> None:
        self._last_line = time.monotonic()
        seconds = self._last_line - self._started
        self._console.print(f"{self._task}: {self._done}/{self._total}  {self._note}  {seconds:.0f} s", highlight=False)
