"""Copies, on the local disk, of the parts of a remote cache. The parts not used for longest make room for new ones."""

from __future__ import annotations

import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from ...hashing import hash_text
from ..part import PARTS
from ..target_files import download
from .base import REQUESTS_AT_ONCE, FolderWriter, RandomAccessFile, Storage
from .local import LocalFile

PLACES = (f"*/{PARTS}/*", f"*/*/*/{PARTS}/*")
"""The places of parts of states and of first drafts, below the folder for all caches."""
TRIES = 4
SLICES = 64
"""To measure the folder is slow (it may hold 100,000 files), so each measurement frees 1/SLICES of its size."""
Used = TypeVar("Used")


class MirroredStorage:
    """A storage whose parts are read from local copies; each file is fetched once.

    Several processes and several caches can share the folder. A file that other processes remove again and again is
    read from the remote storage. Readers verify a copy against the same checksums as the original. A reader that has a
    file of a removed part open can still read the file; the disk space is free when all readers have closed the file.
    """

    def __init__(self, remote: Storage, folder: Path, max_bytes: int):
        """
        Args:
            max_bytes: size of the folder beyond which parts are removed. Files that are being fetched may exceed the
                size, and every process may exceed it by 1/SLICES.
        """
        self.place = remote.place
        self._remote, self._folder, self._max_bytes = remote, folder, max_bytes
        self._copies = folder / hash_text(remote.place)
        self._locks: dict[str, threading.Lock] = {}
        self._in_use: Counter[Path] = Counter()
        """Parts that a thread of this process is about to read."""
        self._lock = threading.Lock()
        self._room = 0
        """Bytes to fetch before the folder is measured again; other processes fill the folder too."""
        self._making_room = threading.Lock()

    def locate(self, name: str) -> str:
        if not is_part_file(name):
            return self._remote.locate(name)
        return f"the local copy (remove it first: the next run fetches it again) {self._copies / name}"

    def read(self, name: str) -> bytes:
        return self._use_copy(name, Path.read_bytes, self._remote.read)

    def read_all(self, names: Sequence[str]) -> list[bytes]:
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            return list(pool.map(self.read, names))

    def open(self, name: str) -> RandomAccessFile:
        return self._use_copy(name, LocalFile, self._remote.open)

    def _use_copy(self, name: str, use: Callable[[Path], Used], directly: Callable[[str], Used]) -> Used:
        """The result of `use` on the local copy of a file; fetches the copy if there is none.

        Args:
            directly: takes the file's name, for a file of no part or one that can't be kept.

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
                    with suppress(FileNotFoundError, FileExistsError):  # another process removes folders at this time
                        download(self._remote, name, path, size)
        finally:
            with self._lock:
                self._in_use[part] -= 1
        return directly(name)

    def _part_of(self, name: str) -> Path:
        names = name.split("/")
        return self._copies.joinpath(*names[: names.index(PARTS) + 2])

    def _make_room(self, num_bytes: int) -> None:
        """Removes the parts not used for longest until `num_bytes` are free; leaves parts in use."""
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
        """Removes parts until 1/SLICES of the folder is free; returns the bytes of the parts that are left."""
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

    @property
    def local_folder(self) -> Path | None:
        return self._remote.local_folder

    def identity(self) -> str:
        return self._remote.identity()

    def free_bytes(self) -> int | None:
        return self._remote.free_bytes()

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
    """The time of a part's last use (ns), and its size in bytes; None if another process has removed the part."""
    try:
        return part.stat().st_mtime_ns, sum(file.stat().st_size for file in part.rglob("*") if file.is_file())
    except FileNotFoundError:
        return None


def is_part_file(name: str) -> bool:
    """Whether a file belongs to a part of states or of first drafts."""
    return PARTS in name.split("/")[:3]
