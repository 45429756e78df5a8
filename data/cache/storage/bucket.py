"""A cache in a bucket, through obstore: retried requests, multipart uploads, create-if-absent."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError, NotSupportedError, PreconditionError
from obstore.store import from_url

from ...errors import StorageError
from .base import REQUESTS_AT_ONCE
from .locks import SECONDS_UNTIL_ABANDONED

RETRIES = 10
RETRY_TIMEOUT = timedelta(minutes=3)
UPLOAD_BYTES = 10 << 20
"""Size of a piece of a multipart upload; stores take up to 10,000 pieces."""
AZURE_ACCOUNT = "AZURE_STORAGE_ACCOUNT_NAME"
PAST_END = ("416 Range Not Satisfiable", "non-partial response")
"""Texts in a store's answer to a range that begins at the end of an object, or after the end."""
NO_BUCKET = "404 Not Found"
"""Text in a store's answer when the bucket is missing."""
Result = TypeVar("Result")


class ObjectStorage:
    """A bucket with a prefix. Credentials and endpoints come from the environment, as the stores' own tools read
    them."""

    def __init__(self, place: str, max_retries: int = RETRIES, retry_timeout: timedelta = RETRY_TIMEOUT):
        """
        Args:
            retry_timeout: time after the start of a request during which it is tried again.

        Raises:
            StorageError: the place, or the environment's settings for it, are not valid.
        """
        self.place = place.rstrip("/")
        # obstore takes everything but the account's name from the environment.
        azure = self.place.startswith("az://") and AZURE_ACCOUNT in os.environ
        config: Any = {"account_name": os.environ[AZURE_ACCOUNT]} if azure else None
        retry: Any = {"max_retries": max_retries, "retry_timeout": retry_timeout}
        try:
            self._store: Any = from_url(self.place, config=config, retry_config=retry)
        except BaseError as error:
            raise StorageError(f"{place} can't be opened: {_reason(error)}") from None

    def locate(self, name: str) -> str:
        return f"{self.place}/{name}"

    @property
    def local_folder(self) -> None:
        return None

    def identity(self) -> str:
        return self.place

    def free_bytes(self) -> None:
        return None

    def require_folder(self) -> None:
        """Nothing to check: a bucket has no folders."""

    def read(self, name: str) -> bytes:
        return bytes(self._call(name, lambda: obstore.get(self._store, name).bytes()))

    def read_all(self, names: Sequence[str]) -> list[bytes]:
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            return list(pool.map(self.read, names))

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
        found = self._call_bucket(name, lambda: obstore.list_with_delimiter(self._store, f"{name}/"))
        paths = [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]
        names = (path.rstrip("/").rpartition("/")[2] for path in paths)
        return sorted(name for name in names if not name.startswith("."))

    def walk(self, name: str) -> Iterator[str]:
        return iter(sorted(entry["path"] for entry in self._entries(name)))

    def write(self, name: str, content: bytes) -> None:
        self._call_bucket(name, lambda: obstore.put(self._store, name, content))

    def create(self, name: str, content: bytes) -> None:
        try:
            self._call_bucket(name, lambda: obstore.put(self._store, name, content, mode="create"))
        except (AlreadyExistsError, PreconditionError, StorageError) as error:
            # An earlier try may have created the object although its answer was lost.
            with suppress(FileNotFoundError):
                if self.read(name) == content:
                    return
            if isinstance(error, StorageError):
                raise
            raise FileExistsError(f"{self.locate(name)} exists") from None

    def write_folder(self, name: str) -> ObjectFolderWriter:
        return ObjectFolderWriter(self, name)

    def move(self, name: str, to: str) -> None:
        for path in list(self.walk(name)) or [name]:
            target = to + path.removeprefix(name)
            self._call(path, lambda path=path, target=target: obstore.rename(self._store, path, target))

    def remove(self, name: str) -> None:
        for path in list(self.walk(name)) or [name]:
            with suppress(FileNotFoundError):
                self._call(path, lambda path=path: obstore.delete(self._store, path))

    def remove_leftovers(self, name: str, listed: Callable[[], set[str]]) -> int:
        """A bucket has no locks, so a folder counts as a dead writer's when nothing was added to it for a day."""
        latest: dict[str, datetime] = {}
        for entry in self._entries(name):
            folder, slash, _ = entry["path"].removeprefix(f"{name}/").partition("/")
            if slash:
                latest[folder] = max(entry["last_modified"], latest.get(folder, entry["last_modified"]))
        unlisted = latest.keys() - listed() if latest else set()
        oldest_alive = self._now(name) - timedelta(seconds=SECONDS_UNTIL_ABANDONED) if unlisted else None
        dead = {folder for folder in unlisted if oldest_alive is not None and latest[folder] < oldest_alive}
        leftovers = dead - listed() if dead else set()
        for folder in leftovers:
            self.remove(f"{name}/{folder}")
        return len(leftovers)

    def _now(self, name: str) -> datetime:
        """The time by the store's clock, which dates the objects: that of a new object in a folder."""
        clock = f"{name}/.clock-{uuid.uuid4().hex[:8]}"
        self.write(clock, b".")
        now = self._call(clock, lambda: obstore.head(self._store, clock))["last_modified"]
        self.remove(clock)
        return now

    def get_range(self, name: str, start: int, length: int) -> memoryview:
        return memoryview(self._call(name, lambda: obstore.get_range(self._store, name, start=start, length=length)))

    def get_tail(self, name: str, length: int) -> tuple[int, bytes]:
        """The size of an object, and its last `length` bytes.

        Raises:
            NotSupportedError: the store does not support ranges from the end.
        """

        def get() -> tuple[int, bytes]:
            result = obstore.get(self._store, name, options={"range": {"suffix": length}})
            return int(result.meta["size"]), bytes(result.bytes())

        return self._call(name, get)

    def upload(self, name: str) -> Any:
        """A multipart upload to write to; the object appears when the upload is closed."""
        return obstore.open_writer(self._store, name, buffer_size=UPLOAD_BYTES)

    def send(self, name: str, request: Callable[[], object]) -> None:
        """Sends a part of an upload.

        Raises:
            StorageError: the store did not answer, or refused.
        """
        self._call_bucket(name, request)

    def _entries(self, name: str) -> list[Any]:
        return [*self._call_bucket(name, lambda: obstore.list(self._store, f"{name}/").collect())]

    def _call(self, name: str, request: Callable[[], Result]) -> Result:
        """Sends a request.

        Raises:
            FileNotFoundError: there is no such object.
            StorageError: the store did not answer, or refused, after all retries.
        """
        try:
            return request()
        except (NotFoundError, FileNotFoundError):
            raise FileNotFoundError(f"{self.locate(name)} is missing") from None
        except (AlreadyExistsError, PreconditionError, NotSupportedError):
            raise
        except (BaseError, OSError) as error:
            raise StorageError(
                f"{self.locate(name)}: the store refused a request, or did not answer: {_reason(error)}. Check "
                "the credentials, the endpoint (plain http only with AWS_ALLOW_HTTP=true) and the network; the same "
                "command continues."
            ) from None

    def _call_bucket(self, name: str, request: Callable[[], Result]) -> Result:
        """Sends a request that needs no object, so that only the bucket can be missing.

        Raises:
            StorageError: there is no such bucket, or the store did not answer, or refused.
        """
        try:
            return self._call(name, request)
        except (FileNotFoundError, StorageError) as error:
            if isinstance(error, StorageError) and NO_BUCKET not in str(error):
                raise
            raise StorageError(
                f"expected a bucket at {self.place}, found none. Create it, or correct its name."
            ) from None


def _reason(error: Exception) -> str:
    """The part of obstore's error that helps a user."""
    return f"{' '.join(str(error).partition('Debug source:')[0].split()):.300}"


class ObjectFile:
    """An object read by range; each call is one request."""

    is_local = False

    def __init__(self, storage: ObjectStorage, name: str):
        self._storage, self._name = storage, name

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        wanted = sum(map(len, buffers))
        try:
            found = self._storage.get_range(self._name, offset, wanted) if wanted else memoryview(b"")
        except StorageError as error:
            if not self._is_past_end(error, offset):
                raise
            return 0
        position = 0
        for buffer in buffers:
            piece = found[position : position + len(buffer)]
            buffer[: len(piece)] = piece
            position += len(piece)
        return position

    def tail(self, length: int) -> tuple[int, bytes]:
        try:
            return self._storage.get_tail(self._name, length)
        except NotSupportedError:
            size = self._storage.size(self._name)
            content = memoryview(bytearray(min(length, size)))
            found = self.read_into([content], size - len(content))
            return size, bytes(content[:found])
        except StorageError as error:
            if not self._is_past_end(error, 0):
                raise
            return 0, b""

    def _is_past_end(self, error: StorageError, offset: int) -> bool:
        """Whether a store refused a range because the object ends before the range."""
        return any(text in str(error) for text in PAST_END) and self._storage.size(self._name) <= offset


class ObjectFolderWriter:
    """Uploads under the final name, which is unique; readers see nothing of the folder before its commit record."""

    def __init__(self, storage: ObjectStorage, name: str):
        self.storage = storage
        self.failed = False
        """Whether an upload failed; the other uploads are then left incomplete, because all are removed."""
        self._name = name
        self._published = False

    def open(self, name: str) -> ObjectAppender:
        return ObjectAppender(self, f"{self._name}/{name}")

    def write(self, name: str, content: bytes) -> None:
        self.storage.write(f"{self._name}/{name}", content)

    def publish(self) -> None:
        """Every object is durable once its upload is complete."""
        self._published = True

    def release(self) -> None:
        """A bucket has no locks."""

    def abandon(self) -> None:
        """Removes the uploads, unless they are published: if only the answer was lost, a commit record may list them.

        What is left here goes later, in `remove_leftovers`.
        """
        if not self._published:
            with suppress(StorageError):
                self.storage.remove(self._name)


class ObjectAppender:
    """A multipart upload."""

    def __init__(self, folder: ObjectFolderWriter, name: str):
        self._folder, self._name = folder, name
        self._upload = folder.storage.upload(name)

    def write(self, content: bytes | memoryview, /) -> None:
        self._send(lambda: self._upload.write(content))

    def close(self) -> None:
        if not self._folder.failed and not self._upload.closed():
            self._send(self._upload.close)

    def _send(self, request: Callable[[], object]) -> None:
        try:
            self._folder.storage.send(self._name, request)
        except StorageError:
            self._folder.failed = True
            raise
