"""Which sequences are held out from training. The ids decide, so that all runs over a cache hold out the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

from ..data.cache.cache import Cache
from ..data.cache.index import SequenceIndex
from ..data.errors import CacheNotFoundError
from ..data.hashing import is_in_share

RUN_CONFIG = "config.yaml"
"""File with a run's settings, in the run's folder."""
DEFAULT_HOLDOUT = 0.05
"""Share held out for drafters that lie in no run's folder."""


def is_held_out(seq_id: str, share: float) -> bool:
    """Whether a sequence belongs to the held-out share; the id alone decides."""
    return is_in_share(seq_id, share)


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


def held_out_rows(cache: Cache, drafters: list[Path], share: float | None = None) -> SequenceIndex:
    """The held-out rows for the evaluation of these drafters.

    Args:
        share: share of sequences held out; None: as in the drafters' runs, else `DEFAULT_HOLDOUT`.
    """
    if share is None:
        share = held_out_share(drafters)
    if share is None:
        share = DEFAULT_HOLDOUT
    return cache.rows.take([i for i, seq_id in enumerate(cache.rows.strings("seq_id")) if is_held_out(seq_id, share)])


def held_out_share(drafters: list[Path]) -> float | None:
    """The share that all of these drafters' runs held out; None if no drafter lies in a run's folder.

    This is the smallest share, since a larger share contains every smaller one.
    """
    shares = []
    for drafter in drafters:
        for folder in (drafter, *drafter.parents[:2]):
            if (folder / RUN_CONFIG).is_file():
                shares.append(float(yaml.safe_load((folder / RUN_CONFIG).read_text())["train"]["holdout"]))
                break
    return min(shares, default=None)
