"""The process that `forks.Forks` asks for others."""

import gc
import json
import os
import signal
import sys
from typing import Any

from vpd.pipeline.cli import main


def serve() -> None:
    """Answers requests, one a line: to start a process, with its id; whether it has ended, with its exit code."""
    gc.freeze()  # what is imported is never collected, which would take each process a second
    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            running.discard(pid)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        elif pid := os.fork():
            running.add(pid)
            print(pid, flush=True)
        else:
            become(request)
            main()
    for pid in running:
        os.killpg(pid, signal.SIGKILL)


def become(request: dict[str, Any]) -> None:
    """Makes a forked process the one that was asked for."""
    os.setsid()
    files = os.devnull, request["out"], request["err"]
    for number, path in enumerate(files):
        os.dup2(os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT), number)
    os.environ |= request["environment"]
    sys.argv = ["vpd", *request["arguments"]]


if __name__ == "__main__":
    serve()
