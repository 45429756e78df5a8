"""Comparisons of replays over the same sequences."""

# E sequences
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from vpd.stages.evaluate.intervals import CONFIDENCE, resamples


class Estimate(NamedTuple):
    """A value with its 95 % bootstrap interval over sequences."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Lifts:
    """Differences of acceptance lengths to that of the first drafter alone."""

    num_tokens_E: np.ndarray
    first_cycles_E: np.ndarray

    def lift(self, cycles_E: np.ndarray) -> Estimate:
        """Alpha of a way of decoding minus the first drafter's; cycles may be means over seeds."""
        return self._estimate(self._lifts(cycles_E))

    def ratio(self, cycles_E: np.ndarray, other_E: np.ndarray) -> Estimate:
        """A way's lift divided by another way's; both are resampled together."""
        return self._estimate(self._lifts(cycles_E) / self._lifts(other_E))

    def _lifts(self, cycles_E: np.ndarray) -> np.ndarray:
        """The lift over all sequences, then over each resample of the sequences."""
        num_sequences = len(self.num_tokens_E)
        times_drawn = np.concatenate([np.ones((1, num_sequences)), resamples(num_sequences)])
        num_tokens = times_drawn @ self.num_tokens_E
        return num_tokens / (times_drawn @ cycles_E) - num_tokens / (times_drawn @ self.first_cycles_E)

    @staticmethod
    def _estimate(values: np.ndarray) -> Estimate:
        tail = (1 - CONFIDENCE) / 2
        return Estimate(float(values[0]), *np.quantile(values[1:], [tail, 1 - tail]).tolist())
