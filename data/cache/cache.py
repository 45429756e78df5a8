"""A cache of hidden states: open it, read its sequences, add parts to it."""

# T tokens with a state, K layers, H hidden width
from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..errors import CacheCorruptError, CacheNotFoundError
from ..hashing import hash_text
from .index import INDEX, SNAPSHOT, SequenceIndex, SequenceRow, read_part_index, read_snapshot, write_snapshot
from .manifest import MANIFEST_NAME, CacheManifest
from .open_parts import OpenStates
from .part import PARTS, committed_parts, read_commit, remove_uncommitted
from .reader import CachedSequence, CachedTokens, Slot, read_sequence, read_tokens
from .storage.base import REQUESTS_AT_ONCE, Storage
from .storage.places import open_storage
from .target_files import RECORD_NAME, TARGET, target_folder
from .work import HASHES, PROBE, WORK

CHUNK_TOKENS = 64


class Cache:
    """An open cache: a stable view of the parts that were committed when the cache was opened."""

    def __init__(self, storage: Storage, manifest: CacheManifest):
        """
        Raises:
            CacheCorruptError: a part, or the record of a part, is gone or damaged.
        """
        self.storage, self.manifest = storage, manifest
        self.states = OpenStates(storage, manifest)
        """The open parts, for `read_ahead`."""
        self.codec, self.specs = self.states.codec, self.states.specs
        # Read the snapshot before the listing: all parts in the snapshot were committed before.
        snapshot = read_snapshot(storage)
        self.parts = committed_parts(storage)
        self.all_rows = self._read_index(snapshot)
        """Every row of every part."""
        self.rows = self.all_rows.without_repetitions()
        """Every sequence once."""

    @classmethod
    def open(cls, place: str | Path | Storage, *, allow_empty: bool = False) -> Cache:
        """Opens a cache for reading. If the snapshot holds all parts, this takes three listings and two files.

        Raises:
            CacheNotFoundError: there is no cache, or the cache holds no committed sequence (unless `allow_empty`).
            CacheCorruptError: something that was committed is missing.
        """
        storage = open_storage(place) if isinstance(place, str | Path) else place
        cache = cls(storage, CacheManifest.read(storage))
        if not len(cache.rows) and not allow_empty:
            raise CacheNotFoundError(
                f"expected committed sequences in {cache.place}, found none. Run `vpd extract` until it commits a part."
            )
        return cache

    @classmethod
    def create_or_open(cls, place: str | Path | Storage, manifest: CacheManifest) -> Cache:
        """Opens a cache for writing, or creates the cache; removes what dead writers left.

        Raises:
            FingerprintMismatchError: there is a cache of another origin.
        """
        storage = open_storage(place) if isinstance(place, str | Path) else place
        storage.require_folder()
        try:
            found = CacheManifest.read(storage)
        except CacheNotFoundError:
            manifest.write(storage)
            found = manifest
        manifest.check_same_origin(found, storage.place)
        remove_uncommitted(storage)
        # The order of these listings matters: a living writer publishes the part, then its index, then its record.
        indices = [name for name in storage.list_folder(INDEX) if not SNAPSHOT.fullmatch(name)]
        known = {*storage.list_folder(PARTS), *(f"{name}.zarr" for name in committed_parts(storage))}
        for name in indices:
            if f"{name.removesuffix('.parquet')}.zarr" not in known:
                storage.remove(f"{INDEX}/{name}")
        return cls(storage, found)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[CachedSequence]:
        """Every sequence, each in memory of its own; `read_ahead` is faster."""
        return map(self.read, self.rows)

    @property
    def place(self) -> str:
        return self.storage.place

    @property
    def num_tokens(self) -> int:
        return int(self.rows.column("num_tokens").sum())

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the manifest and of the names of all parts; 16 hex digits. No two parts ever have one name."""
        return hash_text(self.manifest.model_dump_json() + json.dumps(self.parts))

    def commits(self) -> dict[str, dict[str, Any]]:
        """The commit record of every part, by name; takes one request for each part.

        Raises:
            CacheCorruptError: a record is missing or damaged.
        """
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            records = pool.map(lambda name: read_commit(self.storage, "", name), self.parts)
            return dict(zip(self.parts, records, strict=True))

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all committed parts of states."""
        return sum(file["bytes"] for record in self.commits().values() for file in record["files"].values())

    def read(self, row: SequenceRow) -> CachedSequence:
        """Reads one sequence into new memory, and verifies every checksum.

        Raises:
            CacheCorruptError: bytes are missing, or do not match their checksums.
        """
        return read_sequence(self.states, row, Slot(), verify=True)

    def read_tokens(self, row: SequenceRow) -> CachedTokens:
        """Reads one sequence without its states."""
        return read_tokens(self.states.open(row.part, verify=True), self.specs, row)

    @cached_property
    def target_folder(self) -> Path:
        """A local folder with the target's config, tokenizer and pieces, every file verified.

        Raises:
            CacheCorruptError: a file is missing or damaged.
        """
        return target_folder(self.storage)

    def rows_of_part(self, name: str) -> SequenceIndex:
        """The sequences of a part in the order of its arrays."""
        return self.all_rows.of_part(name)

    def write_snapshot(self) -> None:
        """Writes the rows of all parts into one file, for readers that open the cache later."""
        write_snapshot(self.storage, self.all_rows, len(self.parts))

    def _read_index(self, snapshot: pa.Table | None) -> SequenceIndex:
        tables: list[pa.Table] = [] if snapshot is None else [snapshot]
        covered = set() if snapshot is None else set(snapshot["part"].unique().to_pylist())
        committed = set(self.parts)
        present = set(self.storage.list_folder(PARTS)) if self.parts else set()
        for kind, lost in (
            ("the commit record", sorted(covered - committed)),
            ("the folder", sorted(name for name in committed if f"{name}.zarr" not in present)),
        ):
            if lost:
                raise CacheCorruptError(
                    f"{self.place}: {kind} of {len(lost)} committed part{'s' * (len(lost) > 1)} is gone: "
                    f"{', '.join(lost[:5])}{', ...' if len(lost) > 5 else ''}."
                )
        later = [name for name in self.parts if name not in covered]
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            tables += pool.map(self._read_part_index, later)
        return SequenceIndex.concatenate(tables).in_order_of_parts()

    def _read_part_index(self, name: str) -> pa.Table:
        return read_part_index(self.storage, name, read_commit(self.storage, "", name))


def remove_unused(storage: Storage) -> None:
    """Removes a cache that holds no more than its creation left: the manifest, the target's files, notes of these.

    Another worker that has opened the cache meanwhile has a file of its own there, which keeps the cache.
    """
    own = (MANIFEST_NAME, RECORD_NAME, HASHES, PROBE)
    names = [name for name in storage.walk("") if name not in own]
    if any(name.partition("/")[0] != TARGET for name in names):
        return
    for name in (*own, TARGET, WORK):
        storage.remove(name)
    if (folder := storage.local_folder) is not None:
        with suppress(OSError):  # something is in the folder after all
            folder.rmdir()
