"""A part: a Zarr group with one writer, published as a whole by its commit record."""

from __future__ import annotations

import errno
import json
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from ..errors import CacheCorruptError, StorageError
from .array_spec import METADATA, ArraySpec
from .records import describe, dump_record, parse_record
from .shard import ShardWriter, decode_whole, parse_footer
from .storage.base import RandomAccessFile, Storage

PARTS, COMMITS = "parts", "commits"
RECORD = ".json"


def part_folder(root: str, name: str) -> str:
    """The folder of a part; `root` is empty for states, and `drafts/<fingerprint>/` for first drafts."""
    return f"{root}{PARTS}/{name}.zarr"


def commit_file(root: str, name: str) -> str:
    return f"{root}{COMMITS}/{name}{RECORD}"


def committed_parts(storage: Storage, root: str = "") -> list[str]:
    """Names of all committed parts, sorted; one listing, no commit record is read."""
    names = storage.list_folder(f"{root}{COMMITS}")
    return [name.removesuffix(RECORD) for name in names if name.endswith(RECORD)]


def read_commit(storage: Storage, root: str, name: str) -> dict[str, Any]:
    """The commit record of a part.

    Raises:
        CacheCorruptError: the record is missing, or not what was written.
    """
    file = commit_file(root, name)
    place = f"{storage.place}/{file}"
    try:
        record = parse_record(storage.read(file), place, "the commit record of a part")
    except FileNotFoundError:
        raise CacheCorruptError(f"the commit record {place} is missing.") from None
    if record.get("part") != name or not isinstance(record.get("files"), dict):
        raise CacheCorruptError(f"{place} is not the commit record of the part {name}.")
    return record


def remove_uncommitted(storage: Storage, root: str = "") -> int:
    """Removes the parts without a commit record that no living writer holds; returns their number."""
    return storage.remove_leftovers(
        f"{root}{PARTS}", lambda: {f"{name}.zarr" for name in committed_parts(storage, root)}
    )


class PartWriter:
    """Writes arrays of the same rows, then publishes them: first the folder as a whole, then the commit record.

    As a context manager, a writer drops what it wrote if an exception leaves the context.
    """

    def __init__(
        self,
        storage: Storage,
        root: str,
        specs: Iterable[ArraySpec],
        name: str | None = None,
        constants: Mapping[ArraySpec, np.ndarray] | None = None,
    ):
        """
        Args:
            specs: arrays with one row for each token; `append` adds rows.
            constants: arrays that belong to the part as a whole, and their rows.
        """
        self.name = name or f"part-{uuid.uuid4().hex[:12]}"
        self.num_rows = 0
        self._storage, self._root = storage, root
        self._path = part_folder(root, self.name)
        self._folder = storage.write_folder(self._path)
        self._is_published = False
        self._is_over = False
        """Committed or abandoned."""
        self._writers: dict[str, ShardWriter] = {}
        self._constants: list[ShardWriter] = []
        try:
            for spec in specs:
                self._writers[spec.name] = ShardWriter(self._folder, spec)
            for spec, rows in (constants or {}).items():
                self._constants.append(ShardWriter(self._folder, spec))
                self._constants[-1].append(rows)
        except BaseException:
            self.abandon()
            raise

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not self._is_over:
            self.abandon()

    def append(self, arrays: Mapping[str, np.ndarray]) -> Appended:
        """Appends the same number of rows to every array."""
        if arrays.keys() != self._writers.keys() or len({len(rows) for rows in arrays.values()}) != 1:
            raise ValueError(f"expected rows for {sorted(self._writers)} of one length, got {sorted(arrays)}")
        first_row = self.num_rows
        with reporting_full_disk(self._storage.place):
            return self._append(first_row, arrays)

    def _append(self, first_row: int, arrays: Mapping[str, np.ndarray]) -> Appended:
        offsets = {name: writer.digest.num_bytes for name, writer in self._writers.items()}
        crcs = {name: self._writers[name].append(rows) for name, rows in arrays.items()}
        lengths = {name: writer.digest.num_bytes - offsets[name] for name, writer in self._writers.items()}
        (self.num_rows,) = {writer.num_rows for writer in self._writers.values()}
        return Appended(first_row, offsets, lengths, crcs)

    def commit(self, facts: Mapping[str, Any], extra_files: Mapping[str, bytes] | None = None) -> None:
        """Publishes the part.

        Args:
            facts: what the commit record says besides the files.
            extra_files: name in the storage -> content; written before the commit record.

        Raises:
            FileExistsError: another writer has published a part of this name.
            StorageError: the disk is full; nothing of the part is left.
        """
        try:
            with reporting_full_disk(self._storage.place):
                self._commit(facts, extra_files or {})
        except BaseException:
            # A part with a commit record is whole, even if an interruption came right after the record.
            if self._is_published and self._storage.exists(commit_file(self._root, self.name)):
                self._is_over = True
                self._folder.release()
            else:
                self.abandon()
            raise
        self._is_over = True
        self._folder.release()

    def _commit(self, facts: Mapping[str, Any], extra_files: Mapping[str, bytes]) -> None:
        files: dict[str, Any] = {}
        for writer in [*self._writers.values(), *self._constants]:
            writer.close()
            files[f"{self._path}/{writer.spec.shard_name}"] = writer.digest.describe()
            files[f"{self._path}/{writer.spec.metadata_name}"] = describe(writer.spec.metadata(writer.num_rows))
        group = json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}, indent=2).encode()
        self._folder.write(METADATA, group)
        files[f"{self._path}/{METADATA}"] = describe(group)
        self._folder.publish()
        self._is_published = True
        for name, content in extra_files.items():
            self._storage.write(name, content)
            files[name] = describe(content)
        record = {"part": self.name, **facts, "num_rows": self.num_rows, "files": files}
        self._storage.create(commit_file(self._root, self.name), dump_record(record))

    def abandon(self) -> None:
        """Drops what was written."""
        self._is_over = True
        for writer in [*self._writers.values(), *self._constants]:
            writer.abandon()
        self._folder.abandon()


@contextmanager
def reporting_full_disk(place: str) -> Iterator[None]:
    """Reports a full disk in plain words.

    Raises:
        StorageError: in place of an OSError that says that the disk takes no more.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise StorageError(
            f"{place} can't be written to: {error.strerror}. What was committed before is whole and can be used. Make "
            "room; the same command continues."
        ) from error


@dataclass(frozen=True, slots=True)
class Appended:
    """Where appended rows are: the number of the first row, which starts a chunk; and for each array the byte offset,
    the byte length and the CRC-32C over the checksums of the chunks."""

    first_row: int
    offsets: dict[str, int]
    lengths: dict[str, int]
    crcs: dict[str, int]


@dataclass(frozen=True, slots=True)
class OpenPart:
    """A part opened for reading."""

    place: str
    num_rows: int
    resident: dict[str, np.ndarray]
    """Small arrays, kept in memory."""
    files: dict[str, RandomAccessFile]
    """Shards that are read by byte range."""
    chunks: dict[str, np.ndarray]
    """The chunk index of each of these shards, uint64 [C, 2]: offset and length (checksum included) of every chunk."""

    def chunks_of(self, spec: ArraySpec, first_row: int, num_rows: int) -> np.ndarray:
        """Entries uint64 [C, 2] of the chunk index for these rows; `first_row` starts a chunk.

        Raises:
            CacheCorruptError: the part has no such rows.
        """
        first = first_row // spec.chunk_tokens
        chunks = self.chunks[spec.name][first : first + spec.num_chunks(num_rows)]
        if len(chunks) < spec.num_chunks(num_rows):
            raise CacheCorruptError(
                f"{self.place}: expected rows {first_row} to {first_row + num_rows} of {spec.name}, found "
                f"{self.num_rows} rows."
            )
        return chunks


def open_part(
    storage: Storage,
    root: str,
    name: str,
    specs: Collection[ArraySpec],
    resident: Collection[ArraySpec],
    verify: bool,
) -> OpenPart:
    """Opens a part.

    Args:
        specs: arrays that are read by byte range later.
        resident: arrays that are read whole now.
        verify: whether to check every file of the part now: the size, and the content of all files but the shards of
            `specs`, whose chunks are checked when they are read.

    Raises:
        CacheCorruptError: a file is missing, or not what the commit record says.
    """
    record = read_commit(storage, root, name)
    described, path = record["files"], part_folder(root, name)
    part = OpenPart(storage.locate(path), int(record["num_rows"]), {}, {}, {})
    try:
        small = {f"{path}/{spec.shard_name}": spec for spec in resident}
        wanted = [*small]
        if verify:
            wanted += sorted(described.keys() - small.keys() - {f"{path}/{spec.shard_name}" for spec in specs})
        for file, content in zip(wanted, storage.read_all(wanted), strict=True):
            check_described(content, described.get(file), storage.locate(file), verify)
            if file in small:
                part.resident[small[file].name] = decode_whole(content, small[file], storage.locate(file))
        for spec in specs:
            file = f"{path}/{spec.shard_name}"
            part.files[spec.name] = storage.open(file)
            size, footer = part.files[spec.name].tail(spec.footer_bytes(part.num_rows))
            check_size(size, described.get(file), storage.locate(file))
            part.chunks[spec.name] = parse_footer(footer, storage.locate(file))
    except FileNotFoundError as error:
        raise CacheCorruptError(f"a file of the committed part {name} is gone: {error}.") from None
    return part


def check_size(size: int, described: dict[str, Any] | None, place: str) -> None:
    """Checks the size of a file.

    Raises:
        CacheCorruptError: the size is not what the commit record says.
    """
    expected = (described or {}).get("bytes")
    if size != expected:
        raise CacheCorruptError(f"{place}: expected {expected} bytes, found {size}.")


def check_described(content: bytes, described: dict[str, Any] | None, place: str, verify: bool) -> None:
    """Checks the size of a file, and the content if `verify`.

    Raises:
        CacheCorruptError: the size or the content is not what the commit record says.
    """
    check_size(len(content), described, place)
    if verify and described != (found := describe(content)):
        raise CacheCorruptError(f"{place} is not what was written: expected {described}, found {found}.")
