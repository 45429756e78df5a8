"""Whether the writer of a folder is still alive."""

from __future__ import annotations

import fcntl
import socket
import time
from pathlib import Path

LOCK = "writer.lock"
SECONDS_UNTIL_ABANDONED = 24 * 3600


class FolderLock:
    """Held while a writer lives, so that another process does not take its folder for a dead writer's."""

    def __init__(self, folder: Path):
        self._file = open(folder / LOCK, "w")  # noqa: SIM115 - open for the writer's life
        self._file.write(socket.gethostname())
        self._file.flush()
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def release(self) -> None:
        self._file.close()


def is_alive(folder: Path) -> bool:
    """Whether a writer holds the folder.

    A lock tells on the host that took it. What another host left counts as alive until nothing in it has changed
    for a day, as not every shared file system carries locks between hosts.
    """
    try:
        with open(folder / LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            host = lock.read()
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    if host in ("", socket.gethostname()):
        return False
    latest = max(path.stat().st_mtime for path in folder.rglob("*"))
    return time.time() - latest < SECONDS_UNTIL_ABANDONED
