"""Where a cache lives: a folder, or a bucket of an object store. Names are relative paths with `/`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

REQUESTS_AT_ONCE = 16
"""Requests that are sent side by side to a store, which answers many at once."""


class RandomAccessFile(Protocol):
    """An open file that is read by byte range."""

    is_local: bool
    """Whether many small ranges are as fast as one large one."""

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fills the buffers one after the other with one byte range; returns the number of bytes found."""
        ...

    def tail(self, length: int) -> tuple[int, bytes]:
        """The size of the file, and its last `length` bytes."""
        ...


class AppendedFile(Protocol):
    """A file that is written from start to end."""

    def write(self, content: bytes | memoryview, /) -> object: ...

    def close(self) -> None: ...


class FolderWriter(Protocol):
    """A folder that appears as a whole, or whose files count only once a commit record lists them."""

    def open(self, name: str) -> AppendedFile: ...

    def write(self, name: str, content: bytes) -> None: ...

    def publish(self) -> None:
        """Makes the folder durable under its final name.

        Raises:
            FileExistsError: another writer has published it.
        """
        ...

    def release(self) -> None:
        """Ends the writer's claim to the folder, once the commit record is there."""
        ...

    def abandon(self) -> None:
        """Removes what was written."""
        ...


class Storage(Protocol):
    """What a cache needs from a place. A name that is not there raises FileNotFoundError."""

    place: str
    """The place as a user would write it."""

    @property
    def local_folder(self) -> Path | None:
        """The folder of this machine that holds the files; None for a bucket."""
        ...

    def identity(self) -> str:
        """A name of the place; two names of one folder have the same identity."""
        ...

    def free_bytes(self) -> int | None:
        """Free space on the disk that holds, or will hold, the place; None for a bucket."""
        ...

    def locate(self, name: str) -> str:
        """The full name of a file or folder, for a message."""
        ...

    def require_folder(self) -> None:
        """Checks that the place is a folder, or free.

        Raises:
            ConfigError: something else is there.
        """
        ...

    def read(self, name: str) -> bytes: ...

    def read_all(self, names: Sequence[str]) -> list[bytes]:
        """Several whole files; a bucket sends the requests side by side."""
        ...

    def open(self, name: str) -> RandomAccessFile: ...

    def size(self, name: str) -> int: ...

    def exists(self, name: str) -> bool: ...

    def list_folder(self, name: str) -> list[str]:
        """Names of the files and folders directly in a folder, sorted; empty if there is no such folder.

        Folders that a writer has not published yet are left out.
        """
        ...

    def walk(self, name: str) -> Iterator[str]:
        """Names of all files below a folder."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Replaces a file as a whole, durably."""
        ...

    def create(self, name: str, content: bytes) -> None:
        """Writes a file that must not exist yet, durably.

        Raises:
            FileExistsError: the file exists.
        """
        ...

    def write_folder(self, name: str) -> FolderWriter: ...

    def move(self, name: str, to: str) -> None:
        """Moves a file or a folder."""
        ...

    def remove(self, name: str) -> None:
        """Removes a file or a folder, if it is there."""
        ...

    def remove_leftovers(self, name: str, listed: Callable[[], set[str]]) -> int:
        """Removes the folders in `name` that are not listed and that no living writer holds; returns their number.

        Args:
            listed: gives the names of the listed folders. It is called after the check for living writers, because a
                writer lists its folder and then releases it.
        """
        ...
