"""Locks that show whether the writer of a folder is still alive."""

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
"""Time that the writer of a new folder has to take the lock."""


class FolderLock:
    """A lock that a writer holds while it lives; a folder without it is a dead writer's."""

    def __init__(self, folder: Path):
        self._file = open(folder / LOCK, "w")  # noqa: SIM115 - open for the writer's life
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._file.write(socket.gethostname())
        self._file.flush()

    def release(self) -> None:
        self._file.close()


def is_alive(folder: Path) -> bool:
    """Whether a living writer holds the folder.

    On the writer's host, the lock answers. Not every shared file system passes locks on to other hosts, so a folder of
    another host counts as alive until nothing in it has changed for a day.
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
    """The time of the last change in a folder, in seconds; 0 if the folder is gone."""
    latest = 0.0
    for parent, _, files in os.walk(folder):  # os.walk ignores folders that disappear
        for name in (".", *files):
            with suppress(FileNotFoundError):
                latest = max(latest, os.stat(os.path.join(parent, name)).st_mtime)
    return latest
