"""A clean stop on a signal."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import click

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """A signal has stopped the command in good order; the same command continues.

    The exit code is the one that a shell reports for a process that the signal has ended.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


STOPPED_CODES = tuple(Stopped(number).exit_code for number in SIGNALS)
"""Exit codes of a process that a signal has stopped."""


class StopSignals:
    """Notes the first interrupt or termination, so that the work can end in good order.

    A second interrupt raises KeyboardInterrupt. Outside a process's main thread nothing is noted, since Python hands
    signals to the main thread alone.
    """

    def __init__(self, when: str):
        """
        Args:
            when: where the run stops, for the message.
        """
        self._when = when
        self.received: int | None = None
        self._before: list[object] = []

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = [signal.signal(number, self._note) for number in SIGNALS]
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in zip(SIGNALS, self._before, strict=False):
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        click.echo(f"vpd: stopping {self._when}; a second interrupt stops at once.", err=True)
