"""Runs of `vpd` in processes that are forked from one that has imported everything, since imports take seconds."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vpd.pipeline.launch import open_group

from support.tiny import Outcome

SECONDS = 60.0
"""Time after which a process that has not ended is killed."""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONFAULTHANDLER": "1"}
"""Any number of processes fits on the CPU; a process that aborts shows where."""


class Process:
    """A run of the command in a session of its own; files hold what it prints."""

    def __init__(self, ask: Callable[..., Any], pid: int, out: Path, err: Path):
        self._ask, self.pid, self._out, self._err = ask, pid, out, err

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> Outcome:
        """Waits for the end. The exit code is the signal's number, negative, if a signal has killed the process."""
        deadline = time.monotonic() + SECONDS
        while (code := self._ask(poll=self.pid)) is None:
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                raise AssertionError(f"not ended after {SECONDS} s: {self._err.read_text()}")
            time.sleep(0.01)
        return Outcome(code, self._out.read_text(), self._err.read_text())

    def result(self) -> dict[str, Any]:
        """What a run has printed with `--json`; the run must succeed."""
        outcome = self.wait()
        assert outcome.code == 0, outcome.err
        return outcome.result


class Forks:
    """Starts processes; what they print goes to files in `folder`."""

    def __init__(self, folder: Path):
        self._folder, self._count = folder, 0
        self._stores: list[object] = []
        self._server = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("fork_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )

    def start(self, arguments: Sequence[object], environment: Mapping[str, str] | None = None) -> Process:
        """`vpd` with these arguments, and additions to the environment."""
        self._count += 1
        out, err = (self._folder / f"{self._count}.{name}" for name in ("out", "err"))
        pid = self._ask(
            arguments=[*map(str, arguments)], environment={**(environment or {})}, out=str(out), err=str(err)
        )
        return Process(self._ask, pid, out, err)

    def start_ranks(self, arguments: Sequence[object], num_processes: int = 2) -> list[Process]:
        """`vpd` in processes that work on one thing together, as a launcher starts them."""
        store, shared = open_group(num_processes)
        self._stores.append(store)
        ranks = map(str, range(num_processes))
        return [self.start(arguments, shared | {"RANK": rank, "LOCAL_RANK": rank}) for rank in ranks]

    def close(self) -> None:
        self._server.communicate(timeout=SECONDS)

    def _ask(self, **request: Any) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


def wait_for_lines(path: Path, count: int, process: Process | None = None) -> None:
    """Waits until a file has that many lines."""
    deadline = time.monotonic() + SECONDS
    while not path.is_file() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline, process and process.wait()
        time.sleep(0.002)
