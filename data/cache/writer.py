"""Adds sequences to a cache, part by part."""

# T tokens with a state, K layers, H hidden width, W stored elements per token and layer
from __future__ import annotations

from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from .arrays import TOKEN_ARRAYS, constant_specs, state_specs
from .cache import Cache
from .codecs import CHANNEL_SCALE, HIDDEN
from .index import INDEX, SNAPSHOT, SNAPSHOT_LAG, SequenceRow, part_index_file, rows_to_table, write_rows
from .manifest import CacheManifest
from .part import PartWriter, committed_parts
from .sequence import NewSequence
from .storage.base import Storage

if TYPE_CHECKING:
    from torch import Tensor


class StatePartWriter:
    """Writes one part of states and the part's index.

    As a context manager, a writer drops the part if an exception leaves the context.
    """

    def __init__(self, storage: Storage, manifest: CacheManifest, channel_scale_KH: np.ndarray | None):
        """
        Args:
            channel_scale_KH: float32 [K, H], for a codec that needs a scale for each channel.
        """
        self._specs = state_specs(manifest)
        scales = {} if channel_scale_KH is None else {constant_specs(manifest)[CHANNEL_SCALE]: channel_scale_KH}
        self._part = PartWriter(storage, "", self._specs.values(), constants=scales)
        self._rows: list[SequenceRow] = []

    def __enter__(self) -> StatePartWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._part.__exit__(kind, error, trace)

    @property
    def name(self) -> str:
        return self._part.name

    def append(self, sequence: NewSequence, stored_TKW: np.ndarray) -> SequenceRow:
        """Writes a sequence with these stored states; returns its row in the index.

        Raises:
            ValueError: the sequence lacks an array, or has one of another length or shape.
            StorageError: the disk takes no more.
        """
        if sequence.arrays.keys() != TOKEN_ARRAYS.keys():
            raise ValueError(f"expected the arrays {sorted(TOKEN_ARRAYS)}, got {sorted(sequence.arrays)}")
        tokens = {name: np.asarray(values, self._specs[name].dtype) for name, values in sequence.arrays.items()}
        where = self._part.append({HIDDEN: stored_TKW, **tokens})
        self._rows.append(sequence.row(self.name, where))
        return self._rows[-1]

    def commit(self, facts: dict[str, Any]) -> str:
        """Publishes the part; returns its name.

        Args:
            facts: how the states were made; the commit record holds them.

        Raises:
            StorageError: the disk takes no more; the part is dropped.
        """
        table = rows_to_table([asdict(row) for row in self._rows])
        counts = {"num_sequences": len(self._rows), "num_tokens": sum(row.num_tokens for row in self._rows)}
        self._part.commit({**facts, **counts}, {part_index_file(self.name): write_rows(table)})
        return self.name

    def abandon(self) -> None:
        """Drops the part."""
        self._part.abandon()


COMMITS_PER_LISTING = 128
"""A listing of all parts is slow when they are many, so a writer lists them only when its own commits since the last
listing are more than 1/COMMITS_PER_LISTING of the parts it knows."""


class StateWriter:
    """Adds sequences to a cache; starts a new part when a part is full."""

    def __init__(self, cache: Cache, part_bytes: int, facts: dict[str, Any]):
        """
        Args:
            part_bytes: size of a part's stored hidden states at which the part is full.
            facts: how the states are made; every commit record holds them.
        """
        self.cache = cache
        self._part_bytes = part_bytes
        self._facts = facts
        self._part: StatePartWriter | None = None
        self._channel_scale_KH: Tensor | None = None
        self._num_known_parts = self._num_commits = 0

    def append(self, sequence: NewSequence, hidden_TKH: Tensor) -> str | None:
        """Writes a sequence with these states, bfloat16 [T, K, H].

        Returns:
            The part's name if the part is full, and thus committed; else None.

        Raises:
            StorageError: the disk takes no more; earlier commits are whole.
        """
        part = self._part or self._begin_part(hidden_TKH)
        stored_TKW = self.cache.codec.encode(hidden_TKH, self._channel_scale_KH)
        try:
            row = part.append(sequence, stored_TKW)
        except BaseException:
            part.abandon()  # its arrays may differ in length now
            self._part = None
            raise
        return self.commit() if row.hidden_offset + row.hidden_length >= self._part_bytes else None

    def commit(self) -> str | None:
        """Publishes the sequences since the last commit; returns the part's name, or None without a sequence."""
        if self._part is None:
            return None
        part, self._part = self._part, None
        name = part.commit(self._facts)
        self._num_commits += 1
        if self._num_commits * COMMITS_PER_LISTING > self._num_known_parts:
            self._num_known_parts = renew_snapshot(self.cache.storage, self.cache.manifest)
            self._num_commits = 0
        return name

    def finish(self) -> None:
        """Commits, and writes a snapshot of the index with all parts."""
        self.commit()
        renew_snapshot(self.cache.storage, self.cache.manifest, lag=0)

    def _begin_part(self, hidden_TKH: Tensor) -> StatePartWriter:
        self._channel_scale_KH = self.cache.codec.channel_scale(hidden_TKH)
        scale = None if self._channel_scale_KH is None else self._channel_scale_KH.numpy()
        self._part = StatePartWriter(self.cache.storage, self.cache.manifest, scale)
        return self._part


def renew_snapshot(storage: Storage, manifest: CacheManifest, lag: int = SNAPSHOT_LAG) -> int:
    """Renews the snapshot of the index if more than 1/lag of all parts are not in it; with lag 0, if any is not in it.

    Returns:
        The number of parts.
    """
    listed = [name for name in storage.list_folder(INDEX) if SNAPSHOT.fullmatch(name)]
    num_covered = max((int(name.split("-")[1]) for name in listed), default=0)
    num_parts = len(committed_parts(storage))
    if (num_parts - num_covered) * (lag or num_parts + 1) > num_parts:
        Cache(storage, manifest).write_snapshot()
    return num_parts
