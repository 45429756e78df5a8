"""What a run was trained on: recorded in its folder, and compared with the sequences that an evaluation replays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.cache.cache import Cache
from ..data.cache.index import SequenceRow
from .holdout import is_held_out

PROVENANCE = "provenance.json"
"""File in a run's folder that says what the run was made from."""
KEY = "trained_on"
RULE = "held out: the first 8 bytes of the SHA-256 of seq_id, as a little-endian number, are below holdout * 2^64"
YES, NO, UNKNOWN = "yes", "no", "unknown"


def training_record(cache: Cache, holdout: float, init: Path | None) -> list[dict[str, Any]]:
    """Which sequences a run reads: those of these parts that the rule does not hold out.

    Args:
        init: the drafter that the run starts from, if any; its own records follow.
    """
    own = {
        "cache": cache.place,
        "cache_fingerprint": cache.fingerprint,
        "holdout": holdout,
        "rule": RULE,
        "parts": list(cache.parts),
    }
    if init is None:
        return [own]
    return [own, *(read_record(init) or [{UNKNOWN: str(init)}])]


def read_record(drafter: Path) -> list[dict[str, Any]] | None:
    """The records of a drafter's run; None if the drafter lies in no run's folder, or the run has no record."""
    for folder in (drafter, *drafter.parents[:2]):
        if (folder / PROVENANCE).is_file():
            try:
                return json.loads((folder / PROVENANCE).read_text()).get(KEY)
            except ValueError:
                return None
    return None


def was_trained_on(row: SequenceRow, records: Sequence[dict[str, Any]] | None) -> str:
    """Whether a run has read this sequence: `YES`, `NO` or `UNKNOWN`.

    A part has its name for itself, in all caches. So a sequence of another part, which the run's rule would not hold
    out, is of another extraction, and the run may have read the same prompt: that is unknown.
    """
    if records is None:
        return UNKNOWN
    found = NO
    for record in records:
        if UNKNOWN in record:
            found = UNKNOWN
        elif not is_held_out(row.seq_id, record["holdout"]):
            if row.part in record["parts"]:
                return YES
            found = UNKNOWN
    return found
