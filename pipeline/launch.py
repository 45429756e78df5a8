"""Starts a command in several processes on this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_TO_STOP = 60.0
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit codes of a process that a signal has stopped."""


def is_launched() -> bool:
    """Whether a launcher (torchrun, accelerate, SLURM with either, or this one) has started this process and others."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def launch(num_processes: int, arguments: list[str]) -> int:
    """Runs `vpd` with these arguments in processes that work on one thing together; the exit code of `run_all`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
    }
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]
    return run_all([(arguments, shared | rank) for rank in ranks], as_one=True)


def run_all(commands: list[tuple[list[str], dict[str, str]]], as_one: bool) -> int:
    """Runs `vpd` once for each of these arguments and additions to the environment, which share the cores.

    Args:
        as_one: where one fails, the others are asked to stop.

    Returns:
        The exit code of one that failed, else of one that was stopped, else 0.
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
    """Whether a terminal's interrupt reaches this process's children by itself."""
    try:
        with open("/dev/tty") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


def wait_for(processes: list[subprocess.Popen[bytes]], as_one: bool) -> int:
    while True:
        codes = [process.poll() for process in processes]
        # Those that were stopped come to an end one after another.
        failed = [code for code in codes if code and code not in STOPPED]
        if None not in codes or (failed and as_one):
            break
        time.sleep(SECONDS_BETWEEN_LOOKS)
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
