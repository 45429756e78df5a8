"""Which sequences are held out from training: a property of their ids, so that every run over a cache agrees."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import yaml

from ..data.cache.cache import Cache
from ..data.cache.index import SequenceIndex
from ..data.errors import CacheNotFoundError

RUN_CONFIG = "config.yaml"
"""The settings of a run, in its folder."""
HASH_RANGE = 1 << 64


def is_held_out(seq_id: str, share: float) -> bool:
    """Whether a sequence belongs to the held-out share: a property of its id, the same in every run."""
    return int.from_bytes(hashlib.sha256(seq_id.encode()).digest()[:8], "little") < share * HASH_RANGE


def split_rows(cache: Cache, share: float) -> tuple[SequenceIndex, SequenceIndex]:
    """Training rows and held-out rows, each in the cache's order.

    Raises:
        CacheNotFoundError: nothing is left for training.
    """
    held_out = np.array([is_held_out(seq_id, share) for seq_id in cache.rows.strings("seq_id")], bool)
    usable = cache.rows.column("num_supervised") > 1
    training = cache.rows.take(np.flatnonzero(~held_out & usable))
    if not len(training):
        raise CacheNotFoundError(
            f"expected sequences to train on in {cache.place}, found none: {len(cache.rows)} sequences, of which "
            f"{held_out.sum()} are held out at {share}. Extract more, or lower train.holdout."
        )
    return training, cache.rows.take(np.flatnonzero(held_out))


def held_out_share(drafters: list[Path]) -> float | None:
    """The share that all of these drafters' runs held out: the smallest, as the smaller is part of the larger.

    None if none of them lies in a run's folder.
    """
    shares = []
    for drafter in drafters:
        for folder in (drafter, *drafter.parents[:2]):
            if (folder / RUN_CONFIG).is_file():
                shares.append(float(yaml.safe_load((folder / RUN_CONFIG).read_text())["train"]["holdout"]))
                break
    return min(shares, default=None)
