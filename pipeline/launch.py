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
    return run_all([(arguments, shared | rank) for rank in ranks])


def run_all(commands: list[tuple[list[str], dict[str, str]]]) -> int:
    """Runs `vpd` once for each of these arguments and additions to the environment, which share the cores.

    Returns the exit code of the first to fail, else 0. Where one fails, the others are asked to stop.
    """
    threads = max(1, (os.cpu_count() or 1) // len(commands))
    inherited = {"OMP_NUM_THREADS": str(threads)} | os.environ
    processes = [
        subprocess.Popen([sys.executable, "-m", "vpd.pipeline.cli", *arguments], env=inherited | added)
        for arguments, added in commands
    ]

    def forward(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    # A terminal's interrupt reaches the processes by itself.
    before = signal.signal(signal.SIGTERM, forward), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return wait_for(processes)
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


def wait_for(processes: list[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [process.poll() for process in processes]
        failed = [code for code in codes if code]
        if failed or all(code == 0 for code in codes):
            break
        time.sleep(SECONDS_BETWEEN_LOOKS)
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
    return next((code if code > 0 else 128 - code for code in failed), 0)
