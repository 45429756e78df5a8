"""Signals and the engine's processes.

Ctrl+C, `timeout` and SLURM signal all processes of a command at once, and vLLM's engine then gives up what it is
working on. So that it can finish while the driver stops, its processes heed the driver alone.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

SIGNALS = {signal.SIGINT, signal.SIGTERM}
SECONDS_BETWEEN_LOOKS = 5.0


@contextmanager
def shielded() -> Iterator[None]:
    """Processes that the block starts, and those that they start, leave interrupts and terminations waiting."""
    resource_tracker.ensure_running()  # whoever starts it unblocks these signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def heed_driver(driver: int) -> None:
    """In a shielded process: a termination reaches its handler if the driver sent it, or once the driver is gone.

    Args:
        driver: process id of the one that started it; in the driver itself nothing is done.
    """
    is_shielded = signal.pthread_sigmask(signal.SIG_BLOCK, ()) >= SIGNALS
    if is_shielded and os.getpid() != driver:
        threading.Thread(target=_listen, args=(driver,), name="vpd-signals", daemon=True).start()


def _listen(driver: int) -> None:
    while True:
        received = signal.sigtimedwait(SIGNALS, SECONDS_BETWEEN_LOOKS)
        if os.getppid() != driver or (received is not None and received.si_pid == driver):
            handler: Any = signal.getsignal(signal.SIGTERM)
            handler(signal.SIGTERM, None)
            return
