"""First drafts over a cache: what a first drafter proposed at each anchor, and where it was rejected."""

# T tokens, G block size, A alternatives kept per block position
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CacheNotFoundError
from .files import write_text_durably
from .part import PartWriter, committed_parts, part_path, remove_uncommitted
from .shard import ArraySpec, read_rows
from .store import CHUNK_TOKENS, Cache, SequenceRow

DRAFTS, FACTS = "drafts", "drafter.json"
NUM_ALTERNATIVES = 5
NOT_DRAFTED = 255


@dataclass(frozen=True, slots=True)
class DraftedSequence:
    """The first drafts of a sequence, one row for each of its T tokens taken as the anchor."""

    accept_len_T: Tensor
    """uint8 [T]: leading draft tokens equal to the recorded ones; `NOT_DRAFTED` where the anchor was not drafted."""
    tokens_TGA: Tensor
    """int32 [T, G-1, A]: the most likely tokens of block positions 1..G-1, best first; the first is the draft."""
    probs_TGA: Tensor
    """float16 [T, G-1, A]: their probabilities; the first is the confidence."""


def draft_specs(block_size: int) -> dict[str, ArraySpec]:
    """The arrays of a part of first drafts."""
    shape = (block_size - 1, NUM_ALTERNATIVES)
    specs = [
        ArraySpec("accept_len", (), "uint8", CHUNK_TOKENS),
        ArraySpec("tokens", shape, "int32", CHUNK_TOKENS),
        ArraySpec("probs", shape, "float16", CHUNK_TOKENS),
    ]
    return {spec.name: spec for spec in specs}


class FirstDrafts:
    """The first drafts of one drafter in a cache, below `drafts/<fingerprint>`; rows are those of the states."""

    def __init__(self, cache: Cache, fingerprint: str, facts: Mapping[str, Any]):
        self.cache = cache
        self.fingerprint = fingerprint
        self.facts = dict(facts)
        self.block_size = int(facts["block_size"])
        self.specs = draft_specs(self.block_size)
        self.root = cache.folder / DRAFTS / fingerprint
        self.parts = {record["part"] for record in committed_parts(self.root)}

    @classmethod
    def create_or_open(cls, cache: Cache, fingerprint: str, facts: Mapping[str, Any]) -> FirstDrafts:
        """Opens a drafter's first drafts for adding to them; `facts` describe it and hold `block_size`, `stride`."""
        root = cache.folder / DRAFTS / fingerprint
        if not (root / FACTS).exists():
            write_text_durably(root / FACTS, json.dumps(dict(facts), indent=2) + "\n")
        remove_uncommitted(root)
        return cls(cache, fingerprint, json.loads((root / FACTS).read_text()))

    @classmethod
    def open(cls, cache: Cache, fingerprint: str | None = None) -> FirstDrafts:
        """Opens first drafts for reading: the only ones, or those whose fingerprint begins with `fingerprint`.

        Raises:
            CacheNotFoundError: there are none, none of that name, or several to choose from.
        """
        names = list_drafts(cache.folder)
        found = [name for name in names if name.startswith(fingerprint or "")]
        if len(found) != 1:
            wanted = f"first drafts {fingerprint}" if fingerprint else "the first drafts of one drafter"
            raise CacheNotFoundError(
                f"expected {wanted} in {cache.folder}, found {', '.join(names) or 'none'}. "
                + ("Name one of them." if names else f"Make them: vpd draft {cache.folder} --first-drafter DIR.")
            )
        facts = json.loads((cache.folder / DRAFTS / found[0] / FACTS).read_text())
        return cls(cache, found[0], facts)

    def missing_parts(self) -> list[str]:
        """Parts of the cache that this drafter has not drafted yet."""
        return [name for name in self.cache.commits if name not in self.parts]

    def writer(self, part: str) -> PartWriter:
        return PartWriter(self.root, self.specs.values(), name=part)

    def read(self, row: SequenceRow) -> DraftedSequence:
        """Reads the first drafts of a sequence.

        Raises:
            CacheNotFoundError: its part was not drafted.
            CacheCorruptError: bytes are missing or do not match their checksum.
        """
        if row.part not in self.parts:
            raise CacheNotFoundError(
                f"expected first drafts of {self.fingerprint} for {row.part}, found none. "
                f"Complete them: vpd draft {self.cache.folder} --first-drafter DIR."
            )
        part = part_path(self.root, row.part)
        arrays = [
            torch.from_numpy(read_rows(part, spec, row.first_row, row.num_tokens)) for spec in self.specs.values()
        ]
        return DraftedSequence(*arrays)


def list_drafts(folder: Path) -> list[str]:
    """Fingerprints of the first drafters whose drafts the cache holds."""
    return sorted(path.parent.name for path in (folder / DRAFTS).glob(f"*/{FACTS}"))


def empty_drafts(num_tokens: int, block_size: int) -> dict[str, np.ndarray]:
    """Rows [num_tokens, ...] of a sequence none of whose tokens was drafted."""
    return {
        name: np.full((num_tokens, *spec.row_shape), NOT_DRAFTED if name == "accept_len" else 0, spec.dtype)
        for name, spec in draft_specs(block_size).items()
    }
