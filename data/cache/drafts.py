"""First drafts over a cache: what a first drafter proposed at each anchor, and how many tokens were accepted."""

# T tokens, G block size, A alternatives kept per block position
from __future__ import annotations

import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CacheCorruptError, CacheNotFoundError
from ..lazy import LazyModule
from .arrays import ACCEPT_LEN, DRAFT_ARRAYS, PROBS, TOKENS, draft_specs, names_by_range
from .cache import Cache
from .index import SequenceRow
from .open_parts import OpenParts
from .part import OpenPart, PartWriter, committed_parts, remove_uncommitted
from .reader import read_rows
from .records import dump_record, parse_record
from .storage.base import Storage

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

DRAFTS, FACTS = "drafts", "drafter.json"
FINGERPRINT = re.compile("[0-9a-f]+")
MAX_OPEN_DRAFTS = 64
LISTING_SHARE = 0.05
"""Share of the time that may go into listing the parts that others have drafted."""


@dataclass(frozen=True, slots=True)
class DraftedSequence:
    """The first drafts of a sequence: one row for each of its T tokens, with the token as the anchor."""

    accept_len_T: Tensor
    """uint8 [T]: leading draft tokens equal to the recorded ones; `NOT_DRAFTED` where the anchor was not drafted."""
    tokens_TGA: Tensor
    """int32 [T, G-1, A]: the most likely tokens of block positions 1..G-1, best first; the first is the draft."""
    probs_TGA: Tensor
    """float16 [T, G-1, A]: the probabilities of these tokens; the first is the confidence."""


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
        """Part of the cache -> its part of drafts, for the parts that are drafted."""
        self.renew()
        self._open_parts = OpenParts(
            cache.storage, self.root, self.specs.values(), names_by_range(DRAFT_ARRAYS), MAX_OPEN_DRAFTS
        )

    @property
    def place(self) -> str:
        return f"{self.cache.place}/{self.root}".rstrip("/")

    @classmethod
    def create_or_open(cls, cache: Cache, fingerprint: str, facts: Mapping[str, Any]) -> FirstDrafts:
        """Opens a drafter's first drafts for writing.

        Args:
            facts: what describes the drafter, `block_size` and `stride` among them.
        """
        if not cache.storage.exists(f"{drafts_root(fingerprint)}{FACTS}"):
            cache.storage.write(f"{drafts_root(fingerprint)}{FACTS}", dump_record(dict(facts)))
        remove_uncommitted(cache.storage, drafts_root(fingerprint))
        return cls(cache, fingerprint, read_facts(cache.storage, fingerprint))

    @classmethod
    def open(cls, cache: Cache, fingerprint: str | None = None) -> FirstDrafts:
        """Opens first drafts for reading: the only ones, or those whose fingerprint begins with `fingerprint`.

        Raises:
            CacheNotFoundError: there are no such drafts, or the drafts of several drafters.
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
        """Looks for parts that others have drafted since."""
        began = time.monotonic()
        self.parts |= {part_of(name): name for name in committed_parts(self.cache.storage, self.root)}
        self._next_listing = began + (time.monotonic() - began) / LISTING_SHARE

    def is_drafted(self, part: str) -> bool:
        """Whether anyone has drafted a part. Others' parts are listed only now and then, so the answer may be late."""
        if part not in self.parts and time.monotonic() >= self._next_listing:
            self.renew()
        return part in self.parts

    def missing_parts(self) -> list[str]:
        """Parts of the cache that this drafter has not drafted yet."""
        return [name for name in self.cache.parts if name not in self.parts]

    def writer(self, part: str) -> PartWriter:
        """A writer of a part's drafts. The name is new, so that two drafters of one part do not disturb each other."""
        return PartWriter(self.cache.storage, self.root, self.specs.values(), f"{part}.{uuid.uuid4().hex[:8]}")

    def read(self, row: SequenceRow) -> DraftedSequence:
        """Reads the first drafts of a sequence, every checksum verified.

        Raises:
            CacheNotFoundError: the sequence's part was not drafted.
            CacheCorruptError: bytes are missing, or do not match their checksums.
        """
        found = {name: torch.from_numpy(rows) for name, rows in self.read_arrays(row).items()}
        return DraftedSequence(found[ACCEPT_LEN], found[TOKENS], found[PROBS])

    def read_arrays(self, row: SequenceRow) -> dict[str, np.ndarray]:
        """The same as it is stored: T rows for each array of `DRAFT_ARRAYS`, by name."""
        return {name: self.read_array(row, name) for name in self.specs}

    def read_array(self, row: SequenceRow, name: str) -> np.ndarray:
        """One of these arrays alone. `accept_len` needs no read from the disk, once the part is open."""
        return read_rows(self._open(row), self.specs[name], row)

    def accept_lengths(self, row: SequenceRow) -> Tensor:
        """`DraftedSequence.accept_len_T` alone; no read from the disk, once the part is open."""
        return torch.from_numpy(self.read_array(row, ACCEPT_LEN))

    def close_parts(self) -> None:
        """Closes the files of all parts; a later read opens them again."""
        self._open_parts.close()

    def _open(self, row: SequenceRow) -> OpenPart:
        if row.part not in self.parts:
            raise CacheNotFoundError(
                f"expected first drafts of {self.fingerprint} for {row.part}, found none. "
                f"Complete them: vpd draft {self.cache.place} --first-drafter DIR."
            )
        return self._open_parts.open(self.parts[row.part], verify=True)


def drafts_root(fingerprint: str) -> str:
    return f"{DRAFTS}/{fingerprint}/"


def part_of(name: str) -> str:
    """The part of states that a part of drafts belongs to."""
    return name.partition(".")[0]


def list_drafts(storage: Storage) -> list[str]:
    """Fingerprints of the first drafters whose drafts the cache holds."""
    return [name for name in storage.list_folder(DRAFTS) if FINGERPRINT.fullmatch(name)]


def read_facts(storage: Storage, fingerprint: str) -> dict[str, Any]:
    """The description of a first drafter whose drafts the cache holds.

    Raises:
        CacheCorruptError: the record is missing or damaged.
    """
    name = f"{drafts_root(fingerprint)}{FACTS}"
    place = f"{storage.place}/{name}"
    try:
        return parse_record(storage.read(name), place, "the record of a first drafter")
    except FileNotFoundError:
        raise CacheCorruptError(f"the record {place} of a first drafter is missing.") from None
