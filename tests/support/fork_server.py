"""The process that `forks.Forks` asks to start others."""

import gc
import json
import os
import signal
import sys
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from vpd.pipeline import commands
from vpd.pipeline.cli import main


def serve() -> None:
    """Answers requests, one a line: to start a process (answer: its id), or for its end (answer: the exit code)."""
    for module in iter_modules(commands.__path__):  # The command line imports a command at its first use.
        import_module(f"{commands.__name__}.{module.name}")
    gc.freeze()  # The collection of what is imported would take each process a second.
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
    """Gives a forked process its files, environment and arguments."""
    os.setsid()
    files = os.devnull, request["out"], request["err"]
    for number, path in enumerate(files):
        os.dup2(os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT), number)
    os.environ |= request["environment"]
    if "PYTHONPATH" in request["environment"]:
        sys.path.insert(0, request["environment"]["PYTHONPATH"])
    sys.argv = ["vpd", *request["arguments"]]


if __name__ == "__main__":
    serve()
