"""Adds sequences to a cache, part by part."""

# T tokens with a state, K layers, H hidden width, W stored elements per token and layer
from __future__ import annotations

from dataclasses import asdict, replace
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor

from .cache import TOKEN_ARRAYS, Cache, channel_scale_spec, state_specs
from .codecs import HIDDEN, measure_channels
from .index import (
    INDEX,
    SNAPSHOT,
    SNAPSHOT_LAG,
    SequenceRow,
    hash_content,
    part_index_file,
    rows_to_table,
    write_rows,
)
from .manifest import CacheManifest
from .part import PartWriter, committed_parts
from .storage.base import Storage


class StatePartWriter:
    """Writes one part of states and its index; as a context manager it drops the part if an exception leaves it."""

    def __init__(self, storage: Storage, manifest: CacheManifest, channel_scale_KH: np.ndarray | None):
        """
        Args:
            channel_scale_KH: float32 [K, H], for a codec that needs it.
        """
        constants = {} if channel_scale_KH is None else {channel_scale_spec(manifest): channel_scale_KH}
        self._part = PartWriter(storage, "", state_specs(manifest).values(), constants=constants)
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

    def append(
        self,
        row: SequenceRow,
        stored_TKW: np.ndarray,
        token_ids: np.ndarray,
        target_argmax: np.ndarray,
        loss_mask: np.ndarray,
    ) -> SequenceRow:
        """Writes a sequence; returns its row with the place that it was given.

        Raises:
            StorageError: no more can be written.
        """
        arrays = {"token_ids": token_ids, "target_argmax": target_argmax, "loss_mask": loss_mask}
        tokens = {name: np.asarray(arrays[name], dtype) for name, dtype in TOKEN_ARRAYS.items()}
        where = self._part.append({HIDDEN: stored_TKW, **tokens})
        placed = replace(
            row,
            part=self.name,
            first_row=where.first_row,
            hidden_offset=where.offsets[HIDDEN],
            hidden_length=where.lengths[HIDDEN],
            hidden_crc=where.crcs[HIDDEN],
        )
        self._rows.append(placed)
        return placed

    def commit(self, facts: dict[str, Any]) -> str:
        """Publishes the part; returns its name.

        Raises:
            StorageError: no more can be written; the part is then dropped.
        """
        table = rows_to_table([asdict(row) for row in self._rows])
        counts = {"num_sequences": len(self._rows), "num_tokens": sum(row.num_tokens for row in self._rows)}
        self._part.commit({**facts, **counts}, {part_index_file(self.name): write_rows(table)})
        return self.name

    def abandon(self) -> None:
        self._part.abandon()


COMMITS_UNSEEN = 128
"""A writer looks at what others have committed, which lists all parts, for each of its own in so many that it knows."""


class StateWriter:
    """Adds sequences to a cache; starts a new part when one is full."""

    def __init__(self, cache: Cache, part_bytes: int, facts: dict[str, Any]):
        """
        Args:
            part_bytes: size of a part's stored hidden states at which it is committed.
            facts: what made the states; goes into every commit record.
        """
        self.cache = cache
        self._part_bytes = part_bytes
        self._facts = facts
        self._part: StatePartWriter | None = None
        self._channel_scale_KH: Tensor | None = None
        self._num_parts = self._num_unseen = 0

    def append(
        self,
        *,
        seq_id: str,
        source: str,
        source_row: int,
        hidden_TKH: Tensor,
        token_ids: list[int],
        loss_mask: list[int],
        target_argmax: list[int],
        prompt_len: int,
        final_token_id: int | None,
        finish_reason: str,
    ) -> str | None:
        """Writes a sequence of T tokens; returns the part's name if it was full and has been committed.

        Raises:
            StorageError: no more can be written; what was committed before is whole.
        """
        part = self._part or self._begin_part(hidden_TKH)
        row = SequenceRow(
            seq_id=seq_id,
            source=source,
            source_row=source_row,
            part=part.name,
            first_row=0,
            num_tokens=len(token_ids),
            prompt_len=prompt_len,
            num_supervised=sum(loss_mask) + (final_token_id is not None),
            final_token_id=final_token_id,
            finish_reason=finish_reason,
            hidden_offset=0,
            hidden_length=0,
            hidden_crc=0,
            content_hash=hash_content(token_ids, loss_mask, final_token_id),
        )
        stored_TKW = self.cache.codec.encode(hidden_TKH, self._channel_scale_KH)
        try:
            placed = part.append(row, stored_TKW, np.array(token_ids), np.array(target_argmax), np.array(loss_mask))
        except BaseException:
            part.abandon()  # its arrays are no longer of one length
            self._part = None
            raise
        return self.commit() if placed.hidden_offset + placed.hidden_length >= self._part_bytes else None

    def commit(self) -> str | None:
        """Publishes what was appended since the last commit; returns the part's name."""
        if self._part is None:
            return None
        part, self._part = self._part, None
        name = part.commit(self._facts)
        self._num_unseen += 1
        if self._num_unseen * COMMITS_UNSEEN > self._num_parts:
            self._num_parts, self._num_unseen = renew_snapshot(self.cache.storage, self.cache.manifest), 0
        return name

    def finish(self) -> None:
        """Commits, and puts all that the cache holds into one snapshot."""
        self.commit()
        renew_snapshot(self.cache.storage, self.cache.manifest, lag=0)

    def _begin_part(self, hidden_TKH: Tensor) -> StatePartWriter:
        self._channel_scale_KH = measure_channels(hidden_TKH) if self.cache.codec.needs_channel_scale else None
        scale = None if self._channel_scale_KH is None else self._channel_scale_KH.numpy()
        self._part = StatePartWriter(self.cache.storage, self.cache.manifest, scale)
        return self._part


def renew_snapshot(storage: Storage, manifest: CacheManifest, lag: int = SNAPSHOT_LAG) -> int:
    """Renews the snapshot once it lacks too many parts: more than one in `lag` of all, or any at all with 0.

    Returns:
        The number of parts.
    """
    listed = [name for name in storage.list_folder(INDEX) if SNAPSHOT.fullmatch(name)]
    num_covered = max((int(name.split("-")[1]) for name in listed), default=0)
    num_parts = len(committed_parts(storage))
    if (num_parts - num_covered) * (lag or num_parts + 1) > num_parts:
        Cache(storage, manifest).write_snapshot()
    return num_parts
