"""First drafts over a cache: what a first drafter proposed at each anchor, and where it was rejected."""

# T tokens, G block size, A alternatives kept per block position
from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CacheCorruptError, CacheNotFoundError
from .cache import Cache
from .index import SequenceRow
from .part import OpenPart, PartWriter, committed_parts, open_part, remove_uncommitted
from .reader import Slot, read_chunks
from .records import dump_record, parse_record
from .shard import WHAT_TO_DO, ArraySpec
from .storage.base import Storage

DRAFTS, FACTS = "drafts", "drafter.json"
ACCEPT_LEN, TOKENS, PROBS = "accept_len", "tokens", "probs"
NUM_ALTERNATIVES = 5
NOT_DRAFTED = 255
OPEN_PARTS = 64
LOOKING_SHARE = 0.05
"""Share of the time that may go into looking at what others have drafted, which lists all parts."""


@dataclass(frozen=True, slots=True)
class DraftedSequence:
    """The first drafts of a sequence, one row for each of its T tokens taken as the anchor."""

    accept_len_T: Tensor
    """uint8 [T]: leading draft tokens equal to the recorded ones; `NOT_DRAFTED` where the anchor was not drafted."""
    tokens_TGA: Tensor
    """int32 [T, G-1, A]: the most likely tokens of block positions 1..G-1, best first; the first is the draft."""
    probs_TGA: Tensor
    """float16 [T, G-1, A]: their probabilities; the first is the confidence."""


def draft_specs(block_size: int, chunk_tokens: int) -> dict[str, ArraySpec]:
    """The arrays of a part of first drafts."""
    shape = (block_size - 1, NUM_ALTERNATIVES)
    specs = [
        ArraySpec(ACCEPT_LEN, (), "uint8", chunk_tokens),
        ArraySpec(TOKENS, shape, "int32", chunk_tokens),
        ArraySpec(PROBS, shape, "float16", chunk_tokens),
    ]
    return {spec.name: spec for spec in specs}


class FirstDrafts:
    """The first drafts of one drafter in a cache, below `drafts/<fingerprint>`; rows are those of the states."""

    def __init__(self, cache: Cache, fingerprint: str, facts: Mapping[str, Any]):
        self.cache = cache
        self.fingerprint = fingerprint
        self.facts = dict(facts)
        self.block_size = int(facts["block_size"])
        self.specs = draft_specs(self.block_size, cache.manifest.chunk_tokens)
        self.root = drafts_root(fingerprint)
        self.parts: dict[str, str] = {}
        """Parts of the cache that are drafted, and the names of their parts of drafts."""
        self.renew()
        self._open_parts: dict[str, OpenPart] = {}

    @property
    def place(self) -> str:
        return f"{self.cache.place}/{self.root}".rstrip("/")

    @classmethod
    def create_or_open(cls, cache: Cache, fingerprint: str, facts: Mapping[str, Any]) -> FirstDrafts:
        """Opens a drafter's first drafts for adding to them; `facts` describe it and hold `block_size`, `stride`."""
        if not cache.storage.exists(f"{drafts_root(fingerprint)}{FACTS}"):
            cache.storage.write(f"{drafts_root(fingerprint)}{FACTS}", dump_record(dict(facts)))
        remove_uncommitted(cache.storage, drafts_root(fingerprint))
        return cls(cache, fingerprint, read_facts(cache.storage, fingerprint))

    @classmethod
    def open(cls, cache: Cache, fingerprint: str | None = None) -> FirstDrafts:
        """Opens first drafts for reading: the only ones, or those whose fingerprint begins with `fingerprint`.

        Raises:
            CacheNotFoundError: there are none, none of that name, or several to choose from.
        """
        names = list_drafts(cache.storage)
        found = [name for name in names if name.startswith(fingerprint or "")]
        if len(found) != 1:
            wanted = f"first drafts {fingerprint}" if fingerprint else "the first drafts of one drafter"
            raise CacheNotFoundError(
                f"expected {wanted} in {cache.place}, found {', '.join(names) or 'none'}. "
                + ("Name one of them." if names else f"Make them: vpd draft {cache.place} --first-drafter DIR.")
            )
        return cls(cache, found[0], read_facts(cache.storage, found[0]))

    def renew(self) -> None:
        """Finds what others have drafted since."""
        began = time.monotonic()
        self.parts |= {part_of(name): name for name in committed_parts(self.cache.storage, self.root)}
        self._next_look = began + (time.monotonic() - began) / LOOKING_SHARE

    def is_drafted(self, part: str) -> bool:
        """Whether anyone has drafted a part, as far as is known: what others draft is looked for now and then."""
        if part not in self.parts and time.monotonic() >= self._next_look:
            self.renew()
        return part in self.parts

    def missing_parts(self) -> list[str]:
        """Parts of the cache that this drafter has not drafted yet."""
        return [name for name in self.cache.parts if name not in self.parts]

    def writer(self, part: str) -> PartWriter:
        """Writes a part's drafts, under a name of their own: two that draft at once write nothing over each other."""
        return PartWriter(self.cache.storage, self.root, self.specs.values(), f"{part}.{uuid.uuid4().hex[:8]}")

    def read(self, row: SequenceRow) -> DraftedSequence:
        """Reads the first drafts of a sequence, every checksum verified.

        Raises:
            CacheNotFoundError: its part was not drafted.
            CacheCorruptError: bytes are missing or do not match their checksum.
        """
        ranged = [self._read_range(row, self.specs[name]) for name in (TOKENS, PROBS)]
        return DraftedSequence(self.accept_lengths(row), *ranged)

    def accept_lengths(self, row: SequenceRow) -> Tensor:
        """`DraftedSequence.accept_len_T` alone, which is kept in memory for whole parts."""
        accept_len = self._open(row).resident[ACCEPT_LEN]
        return torch.from_numpy(accept_len[row.first_row : row.first_row + row.num_tokens])

    def close_parts(self) -> None:
        """Lets go of the files of all parts; what is read of them later opens them again."""
        self._open_parts.clear()

    def _read_range(self, row: SequenceRow, spec: ArraySpec) -> Tensor:
        part = self._open(row)
        chunks = part.chunks_of(spec, row.first_row, row.num_tokens)
        slot = Slot()
        read_chunks(part, spec, row.first_row, chunks, slot)
        rows = slot.rows.tensor[: len(chunks) * spec.chunk_bytes].view(getattr(torch, spec.dtype))
        return rows.view(-1, *spec.row_shape)[: row.num_tokens]

    def _open(self, row: SequenceRow) -> OpenPart:
        if row.part not in self.parts:
            raise CacheNotFoundError(
                f"expected first drafts of {self.fingerprint} for {row.part}, found none. "
                f"Complete them: vpd draft {self.cache.place} --first-drafter DIR."
            )
        if row.part not in self._open_parts:
            ranged = [self.specs[TOKENS], self.specs[PROBS]]
            part = open_part(
                self.cache.storage, self.root, self.parts[row.part], ranged, [self.specs[ACCEPT_LEN]], verify=True
            )
            while len(self._open_parts) >= OPEN_PARTS:
                del self._open_parts[next(iter(self._open_parts))]
            self._open_parts[row.part] = part
        return self._open_parts[row.part]


def drafts_root(fingerprint: str) -> str:
    return f"{DRAFTS}/{fingerprint}/"


def part_of(name: str) -> str:
    """The part of states that a part of drafts belongs to."""
    return name.partition(".")[0]


def list_drafts(storage: Storage) -> list[str]:
    """Fingerprints of the first drafters whose drafts the cache holds."""
    return storage.list_folder(DRAFTS)


def read_facts(storage: Storage, fingerprint: str) -> dict[str, Any]:
    """What is known of a first drafter whose drafts the cache holds.

    Raises:
        CacheCorruptError: the record is missing or damaged.
    """
    name = f"{drafts_root(fingerprint)}{FACTS}"
    place = f"{storage.place}/{name}"
    try:
        return parse_record(storage.read(name), place, "the record of a first drafter")
    except FileNotFoundError:
        raise CacheCorruptError(f"the record {place} of a first drafter is missing. {WHAT_TO_DO}") from None


def empty_drafts(num_tokens: int, specs: Mapping[str, ArraySpec]) -> dict[str, np.ndarray]:
    """Rows [num_tokens, ...] of a sequence none of whose tokens was drafted."""
    return {
        name: np.full((num_tokens, *spec.row_shape), NOT_DRAFTED if name == ACCEPT_LEN else 0, spec.dtype)
        for name, spec in specs.items()
    }
