"""A cache of hidden states on disk: open it, read its sequences, add parts to it."""

# T tokens with a state, S tokens of the sequence (T, or T+1 with the last generated one), K layers, H hidden width
from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ..errors import CacheCorruptError, CacheNotFoundError
from .files import require_folder
from .manifest import CacheManifest
from .part import PartWriter, commit_path, committed_parts, describe_file, part_path, remove_uncommitted
from .shard import ArraySpec, read_rows

CHUNK_TOKENS = 64
INDEX = "index"


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceRow:
    """One row of the index."""

    seq_id: str
    source: str
    source_row: int
    part: str
    first_row: int
    """Row of the sequence's first token in the part's arrays."""
    num_tokens: int
    """T, the tokens that entered the target and have a state."""
    prompt_len: int
    num_supervised: int
    final_token_id: int | None
    """The last generated token: the target never saw it, so it has no state. None if the response was given."""
    finish_reason: str
    """`stop`, `length` (cut by a limit) or `given`."""
    hidden_offset: int
    hidden_length: int
    """Byte range of the sequence's chunks in the shard of `hidden`."""


INDEX_SCHEMA = pa.schema(
    [
        pa.field(
            field.name,
            {"str": pa.string(), "int": pa.int64(), "int | None": pa.int64()}[str(field.type)],
            nullable="None" in str(field.type),
        )
        for field in fields(SequenceRow)
    ]
)


@dataclass(frozen=True, slots=True)
class CachedSequence:
    """A sequence as stage two sees it."""

    row: SequenceRow
    hidden_TKH: Tensor
    """bfloat16 [T, K, H]: outputs of the captured layers."""
    token_ids_S: Tensor
    """int64 [S]: the T tokens, and the last generated one if there is one."""
    loss_mask_S: Tensor
    """bool [S]: tokens that an assistant wrote."""
    target_argmax_T: Tensor
    """int64 [T]: the target's greedy choice for the position after each token."""


def state_specs(num_layers: int, hidden_size: int) -> dict[str, ArraySpec]:
    """The arrays of a part of states."""
    specs = [
        ArraySpec("hidden", (num_layers, hidden_size), "uint16", CHUNK_TOKENS),
        ArraySpec("token_ids", (), "int32", CHUNK_TOKENS),
        ArraySpec("target_argmax", (), "int32", CHUNK_TOKENS),
        ArraySpec("loss_mask", (), "uint8", CHUNK_TOKENS),
    ]
    return {spec.name: spec for spec in specs}


class Cache:
    """An opened cache: a stable view of what was committed when it was opened."""

    def __init__(self, folder: Path, manifest: CacheManifest):
        self.folder = folder
        self.manifest = manifest
        self.specs = state_specs(len(manifest.layer_ids), manifest.hidden_size)
        self.commits = {record["part"]: record for record in committed_parts(folder)}
        self.rows = [row for name in self.commits for row in self._read_index(name)]

    @classmethod
    def open(cls, folder: str | Path, *, allow_empty: bool = False) -> Cache:
        """Opens a cache for reading.

        Raises:
            CacheNotFoundError: there is no cache, or it holds no committed sequence (unless `allow_empty`).
        """
        folder = Path(folder)
        cache = cls(folder, CacheManifest.read(folder))
        if not cache.rows and not allow_empty:
            raise CacheNotFoundError(
                f"expected committed sequences in {folder}, found none. Run `vpd extract` until it commits a part."
            )
        return cache

    @classmethod
    def create_or_open(cls, folder: Path, manifest: CacheManifest) -> Cache:
        """Opens a cache for adding to it, or creates it; removes what a dead writer left.

        Raises:
            FingerprintMismatchError: the folder holds a cache of another origin.
        """
        require_folder(folder)
        try:
            found = CacheManifest.read(folder)
        except CacheNotFoundError:
            folder.mkdir(parents=True, exist_ok=True)
            manifest.write(folder)
            found = manifest
        manifest.check_same_origin(found, folder)
        remove_uncommitted(folder)
        for path in (folder / INDEX).glob("*.parquet"):
            # A living writer's part is there before its index, and its commit record after.
            if not part_path(folder, path.stem).exists() and not commit_path(folder, path.stem).exists():
                path.unlink()
        return cls(folder, found)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)

    @property
    def fingerprint(self) -> str:
        """Hash of the manifest and of every commit record; 16 hex digits."""
        content = self.manifest.model_dump_json() + json.dumps(self.commits, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def num_bytes(self) -> int:
        """Bytes of all committed parts of states."""
        return sum(file["bytes"] for record in self.commits.values() for file in record["files"].values())

    def read(self, row: SequenceRow) -> CachedSequence:
        """Reads one sequence, each chunk verified.

        Raises:
            CacheCorruptError: bytes are missing or do not match their checksum.
        """
        part = part_path(self.folder, row.part)
        arrays = {
            name: torch.from_numpy(read_rows(part, spec, row.first_row, row.num_tokens))
            for name, spec in self.specs.items()
        }
        token_ids, loss_mask = arrays["token_ids"].long(), arrays["loss_mask"].bool()
        if row.final_token_id is not None:
            token_ids = torch.cat([token_ids, torch.tensor([row.final_token_id])])
            loss_mask = torch.cat([loss_mask, torch.tensor([True])])
        hidden_TKH = arrays["hidden"].view(torch.bfloat16)
        return CachedSequence(row, hidden_TKH, token_ids, loss_mask, arrays["target_argmax"].long())

    def rows_of_part(self, name: str) -> Iterator[SequenceRow]:
        """The sequences of a part in the order of their rows."""
        return (row for row in self.rows if row.part == name)

    def _read_index(self, name: str) -> list[SequenceRow]:
        path = index_path(self.folder, name)
        found = describe_file(path) if path.is_file() else None
        expected = self.commits[name]["files"].get(f"{INDEX}/{name}.parquet")
        if found is None or found != expected:
            raise CacheCorruptError(
                f"the index {path} of a committed part is not what was written: expected {expected}, found {found}. "
                f"Restore it, or remove the part's commit record {commit_path(self.folder, name)} and extract again."
            )
        table = pq.read_table(path, schema=INDEX_SCHEMA)
        return [SequenceRow(**values) for values in table.to_pylist()]


class StateWriter:
    """Adds sequences to a cache; starts a new part when one is full."""

    def __init__(self, cache: Cache, part_bytes: int, facts: dict[str, Any]):
        """
        Args:
            part_bytes: size of a part's hidden states at which it is committed.
            facts: what made the states; goes into every commit record.
        """
        self.cache = cache
        self._part_bytes = part_bytes
        self._facts = facts
        self._part: PartWriter | None = None
        self._rows: list[dict[str, Any]] = []

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
        """Writes a sequence of T tokens; returns the part's name if it was full and has been committed."""
        if self._part is None:
            self._part = PartWriter(self.cache.folder, self.cache.specs.values())
        first_row = self._part.append(
            {
                "hidden": hidden_TKH.contiguous().view(torch.uint16).numpy(),
                "token_ids": np.asarray(token_ids, np.int32),
                "target_argmax": np.asarray(target_argmax, np.int32),
                "loss_mask": np.asarray(loss_mask, np.uint8),
            }
        )
        offset, length = self.cache.specs["hidden"].byte_range(first_row, len(token_ids))
        row = SequenceRow(
            seq_id=seq_id,
            source=source,
            source_row=source_row,
            part=self._part.name,
            first_row=first_row,
            num_tokens=len(token_ids),
            prompt_len=prompt_len,
            num_supervised=sum(loss_mask) + (final_token_id is not None),
            final_token_id=final_token_id,
            finish_reason=finish_reason,
            hidden_offset=offset,
            hidden_length=length,
        )
        self._rows.append(asdict(row))
        return self.commit() if offset + length >= self._part_bytes else None

    def commit(self) -> str | None:
        """Publishes what was appended since the last commit; returns the part's name."""
        if self._part is None:
            return None
        part, rows, self._part, self._rows = self._part, self._rows, None, []
        index = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, INDEX_SCHEMA), index)
        counts = {"num_sequences": len(rows), "num_tokens": sum(row["num_tokens"] for row in rows)}
        part.commit({**self._facts, **counts}, {f"{INDEX}/{part.name}.parquet": index.getvalue()})
        return part.name


def index_path(folder: Path, part: str) -> Path:
    return folder / INDEX / f"{part}.parquet"
