"""Progress for people, on standard error: a bar on a terminal, elsewhere a line every few seconds."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class ProgressReport:
    """Counts the finished units of a task, and the work in them (tokens, anchors) for the rate."""

    def __init__(self, task: str, total: int, work: str = "", note: str = "", quiet: bool = False):
        """
        Args:
            task: the task's name.
            total: units of the task.
            work: what the work is counted in; empty: no rate is shown.
            note: shown until the first unit is finished.
            quiet: shows nothing. Of several processes, all but one are quiet.
        """
        self._quiet = quiet
        self._task, self._total, self._work, self._note = task, total, work, note
        self._done = self._amount = 0
        self._started = time.monotonic()
        self._began = self._started
        self._console = Console(stderr=True, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._bar_task = self._bar.add_task(task, total=total, note=note)
        self._end = threading.Event()
        self._lines = threading.Thread(target=self._print_lines, name="vpd-progress", daemon=True)

    def __enter__(self) -> ProgressReport:
        self._bar.start()
        if not (self._quiet or self._console.is_terminal):
            self._lines.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self._lines.is_alive():
            self._end.set()
            self._lines.join()

    def begin(self) -> None:
        """Starts the clock of the rate, after what was only start-up."""
        self._began = time.monotonic()

    def advance(self, amount: int = 0, note: str = "") -> None:
        """One unit is finished, with `amount` of work in it."""
        self._done += 1
        self._amount += amount
        seconds = time.monotonic() - self._began
        rate = f"{self._amount / max(seconds, 1e-9):.0f} {self._work}/s" if self._work else ""
        self._note = "  ".join(part for part in (rate, note) if part)
        self._bar.update(self._bar_task, completed=self._done, note=self._note)

    def line(self) -> str:
        """Finished units, the rate, the time so far and, after the first unit, the time left."""
        elapsed = as_duration(time.monotonic() - self._started)
        left = ""
        if 0 < self._done < self._total:
            seconds = time.monotonic() - self._began
            left = f", {as_duration(seconds / self._done * (self._total - self._done))} left"
        return "  ".join(
            part for part in (f"{self._task}: {self._done}/{self._total}", self._note, elapsed + left) if part
        )

    def _print_lines(self) -> None:
        """Prints a line at the start, every few seconds, and at the end."""
        is_over = False
        while True:
            self._console.print(self.line(), highlight=False)
            if is_over:
                return
            is_over = self._end.wait(SECONDS_BETWEEN_LINES)


def as_duration(seconds: float) -> str:
    """h:mm:ss, after the days if there are any."""
    return str(timedelta(seconds=round(seconds)))
