"""Parts of a remote cache kept on the local disk, up to a size; those not used for longest make room."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from ..part import PARTS
from ..target_files import download
from .base import REQUESTS_AT_ONCE, FolderWriter, RandomAccessFile, Storage
from .local import LocalFile

PLACES = (f"*/{PARTS}/*", f"*/*/*/{PARTS}/*")
"""Where parts of states and of first drafts are, below the folder for all caches."""
TRIES = 4
SLICES = 64
"""Room is made, and the folder measured, for one in so many of its bytes at a time: it may hold 100,000 files."""
Used = TypeVar("Used")


class MirroredStorage:
    """A storage whose parts are read from local copies, each file fetched once.

    Several processes and several caches can share the folder; a file that other processes remove again and again is
    read from the storage itself. A copy's bytes are verified against the same checksums as those that it was made
    from. Whoever has a file of a removed part open reads on, and its space comes back when all have closed it.
    """

    def __init__(self, remote: Storage, folder: Path, max_bytes: int):
        """
        Args:
            max_bytes: size of the folder beyond which parts are removed; what is being fetched may exceed it, and
                each process by one in `SLICES`.
        """
        self.place = remote.place
        self._remote, self._folder, self._max_bytes = remote, folder, max_bytes
        self._copies = folder / hashlib.sha256(remote.place.encode()).hexdigest()[:16]
        self._locks: dict[str, threading.Lock] = {}
        self._in_use: Counter[Path] = Counter()
        """Parts that a thread of this process is about to read."""
        self._lock = threading.Lock()
        self._room = 0
        """Bytes that may still be fetched before the folder is measured again: other processes fill it too."""
        self._making_room = threading.Lock()

    def locate(self, name: str) -> str:
        if not is_part_file(name):
            return self._remote.locate(name)
        return f"the local copy (remove it first: the next run fetches it anew) {self._copies / name}"

    def read(self, name: str) -> bytes:
        return self._use_copy(name, Path.read_bytes, self._remote.read)

    def read_all(self, names: Sequence[str]) -> list[bytes]:
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            return list(pool.map(self.read, names))

    def open(self, name: str) -> RandomAccessFile:
        return self._use_copy(name, LocalFile, self._remote.open)

    def _use_copy(self, name: str, use: Callable[[Path], Used], directly: Callable[[str], Used]) -> Used:
        """What `use` makes of the local copy of a file, which is fetched if it is not there.

        Args:
            directly: used for what belongs to no part.

        Raises:
            FileNotFoundError: the storage has no such file.
        """
        if not is_part_file(name):
            return directly(name)
        path, part = self._copies / name, self._part_of(name)
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
            self._in_use[part] += 1
        try:
            with lock:
                for _ in range(TRIES):
                    with suppress(FileNotFoundError):
                        used = use(path)
                        os.utime(part)
                        return used
                    size = self._remote.size(name)
                    self._make_room(size)
                    with suppress(FileNotFoundError, FileExistsError):  # another process has just made room
                        download(self._remote, name, path, size)
        finally:
            with self._lock:
                self._in_use[part] -= 1
        return directly(name)

    def _part_of(self, name: str) -> Path:
        names = name.split("/")
        return self._copies.joinpath(*names[: names.index(PARTS) + 2])

    def _make_room(self, num_bytes: int) -> None:
        """Removes the parts not used for longest, but none in use, until there is room for this many bytes."""
        with self._making_room:
            self._room -= num_bytes
            if self._room >= 0:
                return
            parts = [part for where in PLACES for part in self._folder.glob(where)]
            measured = [(part, found) for part in parts if (found := _last_use_and_size(part)) is not None]
            total = num_bytes + sum(size for _, (_, size) in measured)
            if total > self._max_bytes:
                total = self._remove_oldest(measured, total)
            self._room = min(self._max_bytes - total, self._max_bytes // SLICES)

    def _remove_oldest(self, measured: list[tuple[Path, tuple[int, int]]], total: int) -> int:
        """Removes parts until a slice is free; returns the number of bytes that are left."""
        for part, (_, size) in sorted(measured, key=lambda entry: entry[1]):
            if total <= self._max_bytes - self._max_bytes // SLICES:
                break
            with self._lock:
                if not self._in_use[part]:
                    shutil.rmtree(part, ignore_errors=True)
                    total -= size
        return total

    def _forget(self, name: str) -> None:
        """Removes the local copies of a file, or of all files below a folder."""
        path = self._copies / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def require_folder(self) -> None:
        self._remote.require_folder()

    def size(self, name: str) -> int:
        return self._remote.size(name)

    def exists(self, name: str) -> bool:
        return self._remote.exists(name)

    def list_folder(self, name: str) -> list[str]:
        return self._remote.list_folder(name)

    def walk(self, name: str) -> Iterator[str]:
        return self._remote.walk(name)

    def write(self, name: str, content: bytes) -> None:
        self._remote.write(name, content)
        self._forget(name)

    def create(self, name: str, content: bytes) -> None:
        self._remote.create(name, content)

    def write_folder(self, name: str) -> FolderWriter:
        self._forget(name)
        return self._remote.write_folder(name)

    def move(self, name: str, to: str) -> None:
        self._remote.move(name, to)
        self._forget(name)
        self._forget(to)

    def remove(self, name: str) -> None:
        self._remote.remove(name)
        self._forget(name)

    def remove_leftovers(self, name: str, listed: Callable[[], set[str]]) -> int:
        return self._remote.remove_leftovers(name, listed)


def _last_use_and_size(part: Path) -> tuple[int, int] | None:
    """When a part was used last (ns), and its size in bytes; None if another process removes it."""
    try:
        return part.stat().st_mtime_ns, sum(file.stat().st_size for file in part.rglob("*") if file.is_file())
    except FileNotFoundError:
        return None


def is_part_file(name: str) -> bool:
    """Whether a file belongs to a part of states or of first drafts."""
    return PARTS in name.split("/")[:3]
