"""Where a cache lives: a folder, or a bucket of an object store. Names are relative paths with `/`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

REQUESTS_AT_ONCE = 16
"""Requests side by side, where a store answers many at once."""


class RandomAccessFile(Protocol):
    """An opened file that is read by byte range."""

    is_local: bool
    """Whether many small ranges are as fast as one large one."""

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fills the buffers one after the other with one byte range; returns the number of bytes there were."""
        ...

    def tail(self, length: int) -> tuple[int, bytes]:
        """Size of the file, and its last `length` bytes."""
        ...


class AppendedFile(Protocol):
    """A file being written from start to end."""

    def write(self, content: bytes | memoryview, /) -> object: ...

    def close(self) -> None: ...


class FolderWriter(Protocol):
    """A folder that appears as a whole, or whose files nothing lists until a commit record does."""

    def open(self, name: str) -> AppendedFile: ...

    def write(self, name: str, content: bytes) -> None: ...

    def publish(self) -> None:
        """Makes the folder durable under its final name.

        Raises:
            FileExistsError: another writer has published it.
        """
        ...

    def release(self) -> None:
        """Ends the writer's claim to the folder, after its commit record is there."""
        ...

    def abandon(self) -> None: ...


class Storage(Protocol):
    """What the cache needs of a place. A name that is not there raises FileNotFoundError."""

    place: str
    """The place as a user would write it."""

    def locate(self, name: str) -> str:
        """Where a file or folder is, for a message."""
        ...

    def require_folder(self) -> None:
        """
        Raises:
            ConfigError: there is something else than a folder.
        """
        ...

    def read(self, name: str) -> bytes: ...

    def read_all(self, names: Sequence[str]) -> list[bytes]:
        """Several whole files, side by side where each is a request."""
        ...

    def open(self, name: str) -> RandomAccessFile: ...

    def size(self, name: str) -> int: ...

    def exists(self, name: str) -> bool: ...

    def list_folder(self, name: str) -> list[str]:
        """Names of the files and folders directly in a folder, sorted, without what is being written; none if it is
        not there."""
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
            FileExistsError: it exists.
        """
        ...

    def write_folder(self, name: str) -> FolderWriter: ...

    def move(self, name: str, to: str) -> None:
        """Moves a file or a folder."""
        ...

    def remove(self, name: str) -> None:
        """Removes a file or a folder; nothing happens if it is not there."""
        ...

    def remove_leftovers(self, name: str, listed: Callable[[], set[str]]) -> int:
        """Removes the folders in `name` that are not listed and that no living writer holds; returns their number.

        Args:
            listed: called once it is known which folders nobody holds, as a writer lets go of what it has listed.
        """
        ...
