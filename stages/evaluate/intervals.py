"""Bootstrap intervals of acceptance lengths; sequences are drawn with replacement."""

# E sequences, C ways of decoding
from __future__ import annotations

import warnings

import numpy as np

NUM_RESAMPLES, CONFIDENCE = 1000, 0.95
"""Samples of the bootstrap, and the probability that its intervals cover."""


def alphas(tokens_EC: np.ndarray, cycles_EC: np.ndarray) -> tuple[list[float], list[float], list[float]]:
    """Alpha [C], pooled over all cycles, with the lower and upper bounds [C] of its 95 % interval.

    A resample without a cycle does not count. Without any cycle, the values are NaN.
    """
    times_drawn = resamples(len(tokens_EC))
    with np.errstate(divide="ignore", invalid="ignore"):
        resampled = (times_drawn @ tokens_EC) / (times_drawn @ cycles_EC)
        alpha_C = tokens_EC.sum(axis=0) / cycles_EC.sum(axis=0)
    tail = (1 - CONFIDENCE) / 2
    with warnings.catch_warnings(category=RuntimeWarning, action="ignore"):  # of a column that is all NaN
        low_C, high_C = np.nanquantile(resampled, [tail, 1 - tail], axis=0)
    return alpha_C.tolist(), low_C.tolist(), high_C.tolist()


def resamples(num_sequences: int) -> np.ndarray:
    """How often each sequence occurs in each of `NUM_RESAMPLES` samples drawn with replacement: [samples, E]."""
    drawn = np.random.default_rng(0).integers(num_sequences, size=(NUM_RESAMPLES, num_sequences))
    return np.stack([np.bincount(row, minlength=num_sequences) for row in drawn])
