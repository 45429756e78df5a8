"""Whether the writer of a folder is still alive."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

LOCK = "writer.lock"
SECONDS_UNTIL_ABANDONED = 24 * 3600
SECONDS_TO_LOCK = 300.0
"""How long a new folder may lack its lock: its writer is about to take it."""


class FolderLock:
    """Held while a writer lives, so that another process does not take its folder for a dead writer's."""

    def __init__(self, folder: Path):
        self._file = open(folder / LOCK, "w")  # noqa: SIM115 - open for the writer's life
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._file.write(socket.gethostname())
        self._file.flush()

    def release(self) -> None:
        self._file.close()


def is_alive(folder: Path) -> bool:
    """Whether a writer holds the folder.

    A lock tells on the host that took it. What another host left counts as alive until nothing in it has changed
    for a day, as not every shared file system carries locks between hosts.
    """
    host = ""
    try:
        with open(folder / LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            host = lock.read()
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    if host == socket.gethostname():
        return False
    return time.time() - last_change(folder) < (SECONDS_UNTIL_ABANDONED if host else SECONDS_TO_LOCK)


def last_change(folder: Path) -> float:
    """When anything in a folder has changed last, in seconds; 0 if it has gone meanwhile."""
    latest = 0.0
    for parent, _, files in os.walk(folder):  # which leaves out what goes meanwhile
        for name in (".", *files):
            with suppress(FileNotFoundError):
                latest = max(latest, os.stat(os.path.join(parent, name)).st_mtime)
    return latest
