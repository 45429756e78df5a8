"""Starts a command in several processes on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import FrameType

from .signals import STOPPED_CODES

SECONDS_BETWEEN_POLLS = 0.1
SECONDS_TO_STOP = 60.0
HOST = "127.0.0.1"


def is_launched() -> bool:
    """Whether a launcher, such as torchrun, accelerate or `launch`, has started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def launch(num_processes: int, arguments: list[str]) -> int:
    """Runs `vpd` with these arguments in processes that work on one thing together; the exit code of `run_all`."""
    _store, shared = open_group(num_processes)
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]
    return run_all([(arguments, shared | rank) for rank in ranks], as_one=True)


def open_group(num_processes: int) -> tuple[object, dict[str, str]]:
    """Opens the store at which processes meet, as in `torchrun --standalone`: the system chooses its port.

    torchrun itself is not used, since it ends with code 1 and a traceback on a signal.

    Returns:
        The store, which must stay alive while the processes run, and what they need in their environment beside RANK
        and LOCAL_RANK.
    """
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    return store, {
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": str(True),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
    }


def run_all(commands: list[tuple[list[str], dict[str, str]]], as_one: bool) -> int:
    """Runs `vpd` once per command: its arguments, and what is added to the environment. The processes share the cores.

    Args:
        as_one: when one process fails, the others are terminated.

    Returns:
        The exit code of a process that failed, else of a process that a signal stopped, else 0.
    """
    threads = max(1, (os.cpu_count() or 1) // len(commands))
    inherited = {"OMP_NUM_THREADS": str(threads)} | os.environ
    processes = [
        subprocess.Popen([sys.executable, "-m", "vpd.pipeline.cli", *arguments], env=inherited | added)
        for arguments, added in commands
    ]

    def forward(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and is_in_foreground():
            return
        for process in processes:
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return wait_for(processes, as_one)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_in_foreground() -> bool:
    """Whether the terminal itself sends its interrupt to this process's children."""
    try:
        with open("/dev/tty") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


def wait_for(processes: list[subprocess.Popen[bytes]], as_one: bool) -> int:
    """Waits until all processes have ended; the arguments and the result are those of `run_all`."""
    while True:
        codes = [process.poll() for process in processes]
        # Processes that a signal has stopped end one after another.
        failed = [code for code in codes if code and code not in STOPPED_CODES]
        if None not in codes or (failed and as_one):
            break
        time.sleep(SECONDS_BETWEEN_POLLS)
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + SECONDS_TO_STOP
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
    return next((code if code > 0 else 128 - code for code in [*failed, *filter(None, codes)]), 0)
