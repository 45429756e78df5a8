"""A cache of hidden states: open it, read its sequences, add parts to it."""

# T tokens with a state, K layers, H hidden width
from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..errors import CacheCorruptError, CacheNotFoundError
from .codecs import CHANNEL_SCALE, HIDDEN, Codec
from .index import INDEX, SNAPSHOT, SequenceIndex, SequenceRow, read_part_index, read_snapshot, write_snapshot
from .manifest import CacheManifest
from .part import PARTS, OpenPart, committed_parts, open_part, read_commit, remove_uncommitted
from .reader import CachedSequence, CachedTokens, Slot, read_sequence, read_tokens
from .shard import WHAT_TO_DO, ArraySpec
from .storage.base import REQUESTS_AT_ONCE, Storage
from .storage.places import open_storage
from .target_files import target_folder

CHUNK_TOKENS = 64
OPEN_PARTS = 256
TOKEN_ARRAYS = {"token_ids": "int32", "target_argmax": "int32", "loss_mask": "uint8"}
NO_CHOICE = -1
"""In `target_argmax`: nobody asked for it, since the token after it is not supervised."""


def state_specs(manifest: CacheManifest) -> dict[str, ArraySpec]:
    """The per-token arrays of a part of states."""
    codec, tokens = Codec(manifest.codec), manifest.chunk_tokens
    specs = [codec.spec(len(manifest.layer_ids), manifest.hidden_size, tokens)]
    specs += [ArraySpec(name, (), dtype, tokens) for name, dtype in TOKEN_ARRAYS.items()]
    return {spec.name: spec for spec in specs}


def channel_scale_spec(manifest: CacheManifest) -> ArraySpec:
    """The array float32 [K, H] of a part whose codec divides every channel by a scale."""
    return ArraySpec(CHANNEL_SCALE, (manifest.hidden_size,), "float32", len(manifest.layer_ids))


class Cache:
    """An opened cache: a stable view of what was committed when it was opened."""

    def __init__(self, storage: Storage, manifest: CacheManifest):
        """
        Raises:
            CacheCorruptError: a part, or a record of one, is gone or damaged.
        """
        self.storage, self.manifest = storage, manifest
        self.codec = Codec(manifest.codec)
        self.specs = state_specs(manifest)
        # The snapshot first: whatever it lists was committed before.
        snapshot = read_snapshot(storage)
        self.parts = committed_parts(storage)
        self.all_rows = self._read_index(snapshot)
        """Every row of every part."""
        self.rows = self.all_rows.without_repetitions()
        self._open_parts: OrderedDict[str, OpenPart] = OrderedDict()
        self._verified: set[str] = set()
        self._opening: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, place: str | Path | Storage, *, allow_empty: bool = False) -> Cache:
        """Opens a cache for reading: three listings and two files where the snapshot holds all parts.

        Raises:
            CacheNotFoundError: there is no cache, or it holds no committed sequence (unless `allow_empty`).
            CacheCorruptError: it lacks something that was committed.
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
        """Opens a cache for adding to it, or creates it; removes what a dead writer left.

        Raises:
            FingerprintMismatchError: it is there, and of another origin.
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
        # Listed in this order: a living writer's part is there before its index, and its commit record after.
        indices = [name for name in storage.list_folder(INDEX) if not SNAPSHOT.fullmatch(name)]
        known = {*storage.list_folder(PARTS), *(f"{name}.zarr" for name in committed_parts(storage))}
        for name in indices:
            if f"{name.removesuffix('.parquet')}.zarr" not in known:
                storage.remove(f"{INDEX}/{name}")
        return cls(storage, found)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def place(self) -> str:
        return self.storage.place

    @property
    def num_tokens(self) -> int:
        return int(self.rows.column("num_tokens").sum())

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the manifest and of the names of all parts, which are never reused; 16 hex digits."""
        content = self.manifest.model_dump_json() + json.dumps(self.parts)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def commits(self) -> dict[str, dict[str, Any]]:
        """The commit record of every part, by name: one request a part.

        Raises:
            CacheCorruptError: one is missing or damaged.
        """
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            records = pool.map(lambda name: read_commit(self.storage, "", name), self.parts)
            return dict(zip(self.parts, records, strict=True))

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all committed parts of states."""
        return sum(file["bytes"] for record in self.commits().values() for file in record["files"].values())

    def read(self, row: SequenceRow) -> CachedSequence:
        """Reads one sequence into memory of its own, every checksum verified.

        Raises:
            CacheCorruptError: bytes are missing or do not match their checksum.
        """
        return read_sequence(self, row, Slot(), verify=True)

    def read_tokens(self, row: SequenceRow) -> CachedTokens:
        """Reads one sequence without its states."""
        return read_tokens(self.open_part(row.part, verify=True), row)

    @cached_property
    def target_folder(self) -> Path:
        """A local folder with the target's config, tokenizer and pieces, every file verified.

        Raises:
            CacheCorruptError: one is missing or damaged.
        """
        return target_folder(self.storage)

    def open_part(self, name: str, verify: bool) -> OpenPart:
        """A part, opened once for many sequences; verified at the first time that `verify` asks for it."""
        with self._lock:
            opening = self._opening.setdefault(name, threading.Lock())
        with opening:  # so that threads that need the same part open it once
            with self._lock:
                must_verify = verify and name not in self._verified
                if name in self._open_parts and not must_verify:
                    self._open_parts.move_to_end(name)
                    return self._open_parts[name]
            ranged = [self.specs[HIDDEN]]
            resident = [spec for spec in self.specs.values() if spec.name != HIDDEN]
            if self.codec.needs_channel_scale:
                resident.append(channel_scale_spec(self.manifest))
            part = open_part(self.storage, "", name, ranged, resident, must_verify)
            with self._lock:
                self._open_parts[name] = part
                self._verified |= {name} if must_verify else set()
                while len(self._open_parts) > OPEN_PARTS:
                    self._open_parts.popitem(last=False)
            return part

    def close_parts(self) -> None:
        """Lets go of the files of all parts; what is read of them later opens them again."""
        with self._lock:
            self._open_parts.clear()

    def rows_of_part(self, name: str) -> SequenceIndex:
        """The sequences of a part in the order of its arrays."""
        return self.all_rows.of_part(name)

    def write_snapshot(self) -> None:
        """Puts the rows of all parts into one file, for those who open the cache later."""
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
                    f"{', '.join(lost[:5])}{', ...' if len(lost) > 5 else ''}. {WHAT_TO_DO}"
                )
        later = [name for name in self.parts if name not in covered]
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            tables += pool.map(self._read_part_index, later)
        return SequenceIndex.concatenate(tables).in_order_of_parts()

    def _read_part_index(self, name: str) -> pa.Table:
        return read_part_index(self.storage, name, read_commit(self.storage, "", name))
