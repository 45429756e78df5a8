"""Parts of a remote cache kept on the local disk, up to a size; those not used for longest make room."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from .part import PARTS
from .storage import FolderWriter, LocalFile, RandomAccessFile, Storage
from .target_files import download

PART_DEPTH = 2


class MirroredStorage:
    """A storage whose parts are read from local copies, each file fetched once.

    Several processes can share the folder. A copy is as trustworthy as what it was made from: its bytes are verified
    against the same checksums.
    """

    def __init__(self, remote: Storage, folder: Path, max_bytes: int):
        self.place = remote.place
        self._remote, self._folder, self._max_bytes = remote, folder, max_bytes
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def read(self, name: str) -> bytes:
        return self._local(name).read_bytes() if is_part_file(name) else self._remote.read(name)

    def open(self, name: str) -> RandomAccessFile:
        return LocalFile(self._local(name)) if is_part_file(name) else self._remote.open(name)

    def _local(self, name: str) -> Path:
        """The local copy of a file of a part, made if it is not there."""
        path = self._folder / name
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            if not path.exists():
                download(self._remote, name, path)
                self._make_room(path)
        self._part_of(path).touch()
        return path

    def _part_of(self, path: Path) -> Path:
        names = path.relative_to(self._folder).parts
        return self._folder.joinpath(*names[: names.index(PARTS) + PART_DEPTH])

    def _make_room(self, path: Path) -> None:
        """Removes the parts not used for longest, but never the one of `path`. Who has their files open reads on."""
        with self._lock:
            parts = [part for part in self._folder.rglob(f"{PARTS}/*") if part.is_dir()]
            sizes = {part: sum(file.stat().st_size for file in part.rglob("*") if file.is_file()) for part in parts}
            total = sum(sizes.values())
            for part in sorted(parts, key=lambda part: part.stat().st_mtime):
                if total <= self._max_bytes:
                    return
                if part != self._part_of(path):
                    shutil.rmtree(part, ignore_errors=True)
                    total -= sizes[part]

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

    def create(self, name: str, content: bytes) -> None:
        self._remote.create(name, content)

    def write_folder(self, name: str) -> FolderWriter:
        return self._remote.write_folder(name)

    def move(self, name: str, to: str) -> None:
        self._remote.move(name, to)

    def remove(self, name: str) -> None:
        self._remote.remove(name)

    def remove_leftovers(self, name: str, listed: set[str]) -> int:
        return self._remote.remove_leftovers(name, listed)


def is_part_file(name: str) -> bool:
    return PARTS in name.split(os.sep)[:3]
