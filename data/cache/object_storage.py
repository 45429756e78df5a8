"""A cache in a bucket, through obstore: retried requests, multipart uploads, create-if-absent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError, PreconditionError
from obstore.store import from_url

from ..errors import StorageError
from .locks import SECONDS_UNTIL_ABANDONED

RETRIES = 10
TIMEOUT = timedelta(minutes=3)
Result = TypeVar("Result")


class ObjectStorage:
    """A bucket with a prefix. Credentials and endpoints come from the environment, as the stores' own tools read
    them."""

    def __init__(self, place: str):
        self.place = place.rstrip("/")
        try:
            self._store: Any = from_url(self.place, retry_config={"max_retries": RETRIES, "retry_timeout": TIMEOUT})
        except BaseError as error:
            raise StorageError(f"{place} can't be opened: {error}") from None

    def require_folder(self) -> None:
        """A bucket knows no files in place of folders."""

    def read(self, name: str) -> bytes:
        return bytes(self._call(name, lambda: obstore.get(self._store, name).bytes()))

    def open(self, name: str) -> ObjectFile:
        return ObjectFile(self, name)

    def size(self, name: str) -> int:
        return int(self._call(name, lambda: obstore.head(self._store, name))["size"])

    def exists(self, name: str) -> bool:
        try:
            self.size(name)
        except FileNotFoundError:
            return bool(self.list_folder(name))
        return True

    def list_folder(self, name: str) -> list[str]:
        found = self._call(name, lambda: obstore.list_with_delimiter(self._store, f"{name}/"))
        paths = [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)

    def walk(self, name: str) -> Iterator[str]:
        return iter(sorted(entry["path"] for entry in self._entries(name)))

    def write(self, name: str, content: bytes) -> None:
        self._call(name, lambda: obstore.put(self._store, name, content))

    def create(self, name: str, content: bytes) -> None:
        try:
            self._call(name, lambda: obstore.put(self._store, name, content, mode="create"))
        except (AlreadyExistsError, PreconditionError):
            raise FileExistsError(f"{self.place}/{name} exists") from None

    def write_folder(self, name: str) -> ObjectFolderWriter:
        return ObjectFolderWriter(self, name)

    def move(self, name: str, to: str) -> None:
        for path in list(self.walk(name)) or [name]:
            target = to + path.removeprefix(name)
            self._call(path, lambda path=path, target=target: obstore.rename(self._store, path, target))

    def remove(self, name: str) -> None:
        for path in list(self.walk(name)) or [name]:
            try:
                self._call(path, lambda path=path: obstore.delete(self._store, path))
            except FileNotFoundError:
                continue

    def remove_leftovers(self, name: str, listed: set[str]) -> int:
        """A bucket has no locks: a folder is a dead writer's once nothing was added to it for a day."""
        latest: dict[str, datetime] = {}
        for entry in self._entries(name):
            folder = entry["path"].removeprefix(f"{name}/").partition("/")[0]
            latest[folder] = max(entry["last_modified"], latest.get(folder, entry["last_modified"]))
        oldest_alive = datetime.now(UTC) - timedelta(seconds=SECONDS_UNTIL_ABANDONED)
        dead = [folder for folder, when in latest.items() if folder not in listed and when < oldest_alive]
        for folder in dead:
            self.remove(f"{name}/{folder}")
        return len(dead)

    def open_writer(self, name: str) -> Any:
        return obstore.open_writer(self._store, name)

    def get(self, name: str, wanted: Any) -> Any:
        return self._call(name, lambda: obstore.get(self._store, name, options={"range": wanted}))

    def get_range(self, name: str, start: int, length: int) -> memoryview:
        return memoryview(self._call(name, lambda: obstore.get_range(self._store, name, start=start, length=length)))

    def _entries(self, name: str) -> list[Any]:
        return self._call(name, lambda: [entry for page in obstore.list(self._store, f"{name}/") for entry in page])

    def _call(self, name: str, request: Callable[[], Result]) -> Result:
        """Sends a request.

        Raises:
            FileNotFoundError: there is no such object.
            StorageError: the store did not answer, or refused, after all retries.
        """
        try:
            return request()
        except (NotFoundError, FileNotFoundError):
            raise FileNotFoundError(f"{self.place}/{name} is missing") from None
        except (AlreadyExistsError, PreconditionError):
            raise
        except (BaseError, OSError) as error:
            reason = " ".join(str(error).split())
            raise StorageError(
                f"{self.place}/{name}: the store did not do what was asked after {RETRIES} retries: {reason:.300}. "
                "Check credentials, endpoint and network; the same command continues."
            ) from None


class ObjectFile:
    """An object read by range; each call is one request."""

    is_local = False

    def __init__(self, storage: ObjectStorage, name: str):
        self._storage, self._name = storage, name

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        found = self._storage.get_range(self._name, offset, sum(map(len, buffers)))
        position = 0
        for buffer in buffers:
            piece = found[position : position + len(buffer)]
            buffer[: len(piece)] = piece
            position += len(piece)
        return position

    def tail(self, length: int) -> tuple[int, bytes]:
        result = self._storage.get(self._name, {"suffix": length})
        return int(result.meta["size"]), bytes(result.bytes())


class ObjectFolderWriter:
    """Uploads under the final name, which is unique; readers see nothing of it before its commit record."""

    def __init__(self, storage: ObjectStorage, name: str):
        self._storage, self._name = storage, name

    def open(self, name: str) -> ObjectAppender:
        return ObjectAppender(self._storage, f"{self._name}/{name}")

    def write(self, name: str, content: bytes) -> None:
        self._storage.write(f"{self._name}/{name}", content)

    def publish(self) -> None:
        """Every object is durable once its upload is complete."""

    def release(self) -> None:
        """A bucket has no locks."""

    def abandon(self) -> None:
        self._storage.remove(self._name)


class ObjectAppender:
    """A multipart upload."""

    def __init__(self, storage: ObjectStorage, name: str):
        self._name, self._call = name, storage._call
        self._writer = storage.open_writer(name)

    def write(self, content: bytes | memoryview, /) -> None:
        self._call(self._name, lambda: self._writer.write(content))

    def close(self) -> None:
        self._call(self._name, lambda: self._writer.close())
