"""Comparisons between runs that were replayed over the same sequences."""

# S sequences
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .report import CONFIDENCE, resamples


class Estimate(NamedTuple):
    """A figure with its 95 % bootstrap interval over sequences."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Lifts:
    """Acceptance lengths over that of the first drafter alone."""

    num_tokens_S: np.ndarray
    first_cycles_S: np.ndarray

    def lift(self, cycles_S: np.ndarray) -> Estimate:
        """alpha of a way of decoding minus the first drafter's; cycles may be means over seeds."""
        return self._estimate(self._lifts(cycles_S))

    def ratio(self, cycles_S: np.ndarray, other_S: np.ndarray) -> Estimate:
        """How many times another way's lift a way lifts, both resampled together."""
        return self._estimate(self._lifts(cycles_S) / self._lifts(other_S))

    def _lifts(self, cycles_S: np.ndarray) -> np.ndarray:
        """The lift over all sequences, then over each resample of them."""
        num_sequences = len(self.num_tokens_S)
        times_drawn = np.concatenate([np.ones((1, num_sequences)), resamples(num_sequences)])
        num_tokens = times_drawn @ self.num_tokens_S
        return num_tokens / (times_drawn @ cycles_S) - num_tokens / (times_drawn @ self.first_cycles_S)

    @staticmethod
    def _estimate(values: np.ndarray) -> Estimate:
        tail = (1 - CONFIDENCE) / 2
        return Estimate(float(values[0]), *np.quantile(values[1:], [tail, 1 - tail]).tolist())
