"""Locks that show whether the writer of a folder is still alive."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import tempfile
from contextlib import suppress
from pathlib import Path

LOCK = "writer.lock"
SECONDS_UNTIL_ABANDONED = 24 * 3600
SECONDS_TO_LOCK = 300.0
"""Time that the writer of a new folder has to take the lock."""
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
"""Errors of a file system that has no locks."""


class FolderLock:
    """A lock that a writer holds while it lives; a folder without it is a dead writer's."""

    def __init__(self, folder: Path):
        self._file = open(folder / LOCK, "w")  # noqa: SIM115 - open for the writer's life
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            host = this_host()
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            host = f"{this_host()} without locks"
        self._file.write(host)
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
            # A shared lock, which does not go together with the writer's either: NFS gives an exclusive one only to
            # those who may write to the file.
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            host = lock.read()
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno not in NO_LOCKS | {errno.EACCES, errno.EPERM, errno.EBADF}:
            raise
        host = "unknown"
    if host == this_host():
        return False
    age_seconds = age_of(folder)
    return age_seconds is None or age_seconds < (SECONDS_UNTIL_ABANDONED if host else SECONDS_TO_LOCK)


def this_host() -> str:
    """The name of this host and of its present start, since several hosts may have one name."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # no Linux
        boot_id = ""
    return f"{socket.gethostname()} {boot_id}"


def age_of(folder: Path) -> float | None:
    """Seconds since the last change in a folder, by the clock of its file system, which may be another host's.

    Returns:
        None if this process may not write beside the folder, and thus can't learn the time there.
    """
    before = last_change(folder)
    try:
        with tempfile.TemporaryFile(dir=folder.parent) as file:  # without a name: nothing stays if this process dies
            file.write(b".")
            file.flush()
            os.fsync(file.fileno())
            return os.stat(file.fileno()).st_mtime - before
    except OSError:
        return None


def last_change(folder: Path) -> float:
    """The time of the last change in a folder, in seconds; 0 if the folder is gone."""
    latest = 0.0
    for parent, _, files in os.walk(folder):  # os.walk ignores folders that disappear
        for name in (".", *files):
            with suppress(FileNotFoundError):
                latest = max(latest, os.stat(os.path.join(parent, name)).st_mtime)
    return latest
