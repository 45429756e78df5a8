"""The engine's processes obey their driver alone: signals of other processes change nothing."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from vpd.stages.extract.vllm.signals import obey_driver, shielded

FORK = get_context("fork")
ENDED_BY_HANDLER = 7
"""Exit code of a process whose handler was called."""


def work(driver: int, connection: Connection) -> None:
    """An engine that answers until it obeys a termination."""
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(ENDED_BY_HANDLER))
    obey_driver(driver)
    while True:
        connection.send(os.getpid())
        connection.recv()


def drive(connection: Connection) -> None:
    """A driver that starts an engine and then ends."""
    with shielded():
        FORK.Process(target=work, args=(os.getpid(), connection)).start()
    os._exit(0)


def has_waiting_signals(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return any(int(line.split()[1], 16) for line in status if line.startswith(("SigPnd", "ShdPnd")))


def test_only_the_driver_ends_a_shielded_process():
    ours, theirs = FORK.Pipe()
    with shielded():
        process = FORK.Process(target=work, args=(os.getpid(), theirs))
        process.start()
    pid = ours.recv()
    for name in ("TERM", "INT"):
        subprocess.run(["sh", "-c", f"kill -{name} {pid}"], check=True)
        while has_waiting_signals(pid):
            pass
        ours.send(None)
        assert ours.recv() == pid
    process.terminate()
    process.join()
    assert process.exitcode == ENDED_BY_HANDLER


def test_a_process_whose_driver_is_gone_ends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vpd.stages.extract.vllm.signals.POLL_SECONDS", 0.05)
    ours, theirs = FORK.Pipe()
    driver = FORK.Process(target=drive, args=(theirs,))
    driver.start()
    theirs.close()
    ours.recv()
    driver.join()
    with pytest.raises(EOFError):  # the engine held the other end
        ours.recv()


def test_signals_are_let_through_again_after_the_start():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with suppress(RuntimeError), shielded():
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before | {signal.SIGINT, signal.SIGTERM}
        raise RuntimeError("the engine does not start")
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


ENGINE = """
import atexit, os, signal, sys, threading
from vpd.stages.extract.vllm.signals import SIGNALS, obey_driver
atexit.register(os.write, 1, b"all modules freed")
signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
is_over = threading.Event()
signal.signal(signal.SIGTERM, lambda number, frame: None)
obey_driver(os.getppid())
signal.signal(signal.SIGTERM, lambda number, frame: is_over.set())
atexit.register(os.write, 1, b"engine freed ")
os.write(1, b"ready ")
if sys.argv[1] == "waits":
    is_over.wait()
"""
"""An engine's process; the handlers of its end stand for what vLLM frees, and for what the interpreter frees."""


@pytest.mark.parametrize(
    ("way", "freed"), [("waits", "engine freed "), ("ends by itself", "engine freed all modules freed")]
)
def test_a_process_that_has_obeyed_frees_no_modules(way: str, freed: str):
    with subprocess.Popen([sys.executable, "-c", ENGINE, way], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(6) == b"ready "
        if way == "waits":
            process.terminate()
        assert process.stdout.read().decode() == freed
    assert process.returncode == 0
