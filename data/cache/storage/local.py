"""A cache in a folder of a file system."""

from __future__ import annotations

import os
import shutil
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from .base import AppendedFile
from .files import fsync_folder, fsync_tree, require_folder, write_bytes_durably
from .locks import LOCK, FolderLock, is_alive

ASIDE = ".writing-"


@contextmanager
def missing_below_a_file() -> Iterator[None]:
    """Where a file lies in place of a folder, what should be in the folder is missing."""
    try:
        yield
    except NotADirectoryError as error:
        raise FileNotFoundError(error.errno, error.strerror, error.filename) from None


class LocalFile:
    """A file open for reading; closed when nothing refers to it any more."""

    is_local = True

    def __init__(self, path: Path):
        with missing_below_a_file():
            self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        count = 0
        for start in range(0, len(buffers), os.sysconf("SC_IOV_MAX")):
            batch = buffers[start : start + os.sysconf("SC_IOV_MAX")]
            found = os.preadv(self._descriptor, batch, offset + count)
            # A read may end early (at 2 GiB, or by a signal) although there are more bytes.
            while 0 < found < sum(map(len, batch)):
                more = os.preadv(self._descriptor, _after(batch, found), offset + count + found)
                if not more:
                    return count + found
                found += more
            count += found
        return count

    def tail(self, length: int) -> tuple[int, bytes]:
        size = os.fstat(self._descriptor).st_size
        start = max(0, size - length)
        return size, os.pread(self._descriptor, size - start, start)


def _after(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """The buffers without their first `count` bytes."""
    rest: list[memoryview] = []
    for buffer in buffers:
        if count < len(buffer):
            rest.append(buffer[count:])
        count = max(0, count - len(buffer))
    return rest


class LocalStorage:
    """A folder of a file system."""

    def __init__(self, root: Path):
        self.root = root
        self.place = str(root)

    def locate(self, name: str) -> str:
        return f"{self.place}/{name}"

    @property
    def local_folder(self) -> Path:
        return self.root

    def identity(self) -> str:
        return str(self.root.resolve())

    def free_bytes(self) -> int:
        folder = self.root.absolute()
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def require_folder(self) -> None:
        require_folder(self.root)

    def read(self, name: str) -> bytes:
        with missing_below_a_file():
            return (self.root / name).read_bytes()

    def read_all(self, names: Sequence[str]) -> list[bytes]:
        return [self.read(name) for name in names]

    def open(self, name: str) -> LocalFile:
        return LocalFile(self.root / name)

    def size(self, name: str) -> int:
        with missing_below_a_file():
            return (self.root / name).stat().st_size

    def exists(self, name: str) -> bool:
        return (self.root / name).exists()

    def list_folder(self, name: str) -> list[str]:
        try:
            return sorted(entry for entry in os.listdir(self.root / name) if not entry.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def walk(self, name: str) -> Iterator[str]:
        for parent, folders, files in os.walk(self.root / name):
            folders.sort()
            for file in sorted(files):
                yield os.path.relpath(os.path.join(parent, file), self.root)

    def write(self, name: str, content: bytes) -> None:
        write_bytes_durably(self.root / name, content)

    def create(self, name: str, content: bytes) -> None:
        path = self.root / name
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        write_bytes_durably(aside, content)
        try:
            os.link(aside, path)
        except FileExistsError:
            # With two links the file was created: a file server got the request twice, and this is the second answer.
            if aside.stat().st_nlink == 1:
                raise
        except OSError:  # a file system without hard links
            if path.exists():
                raise FileExistsError(f"{path} exists") from None
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        fsync_folder(path.parent)

    def write_folder(self, name: str) -> LocalFolderWriter:
        return LocalFolderWriter(self.root / name)

    def move(self, name: str, to: str) -> None:
        target = self.root / to
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.root / name, target)
        fsync_folder(target.parent)
        fsync_folder((self.root / name).parent)

    def remove(self, name: str) -> None:
        path = self.root / name
        while path.is_dir():
            with suppress(FileNotFoundError):  # another process removes the folder at the same time
                shutil.rmtree(path)
        path.unlink(missing_ok=True)

    def remove_leftovers(self, name: str, listed: Callable[[], set[str]]) -> int:
        known = listed()
        unlisted = [path for path in (self.root / name).glob("*") if path.name not in known and path.is_dir()]
        held_by_nobody = [path for path in unlisted if not is_alive(path)]
        kept = listed() if held_by_nobody else known
        dead = [folder for folder in held_by_nobody if folder.name not in kept]
        for folder in dead:
            # Ignore errors: another process may remove the folder too, or its writer may have just published it.
            shutil.rmtree(folder, ignore_errors=True)
        return len(dead)


class LocalFolderWriter:
    """Writes a folder under another name, syncs every file, renames the folder, and syncs its parent."""

    def __init__(self, path: Path):
        self._path = path
        self._aside = path.with_name(f"{ASIDE}{path.name}-{uuid.uuid4().hex[:8]}")
        self._aside.mkdir(parents=True)
        self._lock = FolderLock(self._aside)
        self._published = False

    def open(self, name: str) -> AppendedFile:
        path = self._aside / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "wb")

    def write(self, name: str, content: bytes) -> None:
        path = self._aside / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def publish(self) -> None:
        fsync_tree(self._aside)
        try:
            os.rename(self._aside, self._path)
            self._published = True
        except OSError:
            if self._path.exists():
                raise FileExistsError(f"{self._path} was written by another process meanwhile") from None
            raise
        fsync_folder(self._path.parent)

    def release(self) -> None:
        (self._path / LOCK).unlink(missing_ok=True)
        self._lock.release()

    def abandon(self) -> None:
        self._lock.release()
        shutil.rmtree(self._path if self._published else self._aside, ignore_errors=True)
