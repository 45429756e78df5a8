"""Which signals end the engine's processes.

Ctrl+C, `timeout` and SLURM send a signal to all processes of a command at once. vLLM's engine would then give up its
requests. So the engine's processes obey the driver alone: the process that started them, and that lets them finish.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

SIGNALS = {signal.SIGINT, signal.SIGTERM}
POLL_SECONDS = 5.0
"""Time between two checks whether the driver lives."""


@contextmanager
def shielded() -> Iterator[None]:
    """Blocks interrupts and terminations in the processes that the block starts, and in their own child processes."""
    resource_tracker.ensure_running()  # starting this process unblocks the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_driver(driver: int) -> None:
    """Makes a shielded process end when the driver sends a termination, or when the driver is gone.

    Args:
        driver: the driver's process id; the call does nothing in the driver itself.
    """
    is_shielded = signal.pthread_sigmask(signal.SIG_BLOCK, ()) >= SIGNALS
    if is_shielded and os.getpid() != driver:
        obeyed = threading.Event()
        # vLLM has freed what it holds by then. To free all modules as well would take seconds.
        atexit.register(lambda: obeyed.is_set() and os._exit(0))
        threading.Thread(target=_listen, args=(driver, obeyed), name="vpd-signals", daemon=True).start()


def _listen(driver: int, obeyed: threading.Event) -> None:
    while True:
        received = signal.sigtimedwait(SIGNALS, POLL_SECONDS)
        if os.getppid() != driver or (received is not None and received.si_pid == driver):
            obeyed.set()
            handler: Any = signal.getsignal(signal.SIGTERM)
            handler(signal.SIGTERM, None)
            return
