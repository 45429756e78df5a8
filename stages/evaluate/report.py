"""What a replay has found: acceptance lengths with their uncertainty, and where the second drafter helps."""

# N anchors, S sequences, C ways of decoding, J drafted positions
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .responses import count_cycles

NUM_RESAMPLES, CONFIDENCE = 1000, 0.95
NUM_BINS = 10


class Way(NamedTuple):
    """A way of decoding."""

    setting: str
    """`first`, `first_tree`, `first_as_second` or `d2sd`."""
    policy: str | None
    """Branch policy, for the settings with a second draft."""
    k: int
    """Branches beside the first draft."""


class AnchorFacts(NamedTuple):
    """What is known of the first draft at each of N anchors."""

    first_len_N: np.ndarray
    """Accept length L."""
    confidence_NJ: np.ndarray
    num_recorded_N: np.ndarray
    """Drafted positions that lie within the response."""
    boundary_rank_N: np.ndarray
    """Place of the true boundary among the likeliest prefix lengths; -1: not among them, or there is none."""
    pair_rank_N: np.ndarray
    """Place of the true boundary with the right token among the likeliest pairs; -1 alike."""


@dataclass
class ReplayReport:
    """Sums over all replayed responses."""

    ways: list[Way]
    policy: str
    k: int
    block_size: int
    num_responses: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Sequences without a response that can be replayed, by reason."""
    num_tokens_S: list[int] = field(default_factory=list)
    """Tokens committed by drafting cycles: all of a response but its first, which the prefill gives."""
    cycles_SC: list[np.ndarray] = field(default_factory=list)
    """Cycles that each way needs for them."""
    facts: list[AnchorFacts] = field(default_factory=list)
    final_lens: list[np.ndarray] = field(default_factory=list)
    """Accept lengths of the reported way at the anchors of `facts`."""

    def add(self, accept_lens_NC: np.ndarray, response_lens: Sequence[Sequence[int]], facts: AnchorFacts) -> None:
        """Adds sequences, whose responses' anchors come one after another."""
        start = 0
        for lens in response_lens:
            cycles_C = np.zeros(len(self.ways), int)
            for num_anchors in lens:
                cycles_C += count_cycles(accept_lens_NC[start : start + num_anchors])
                start += num_anchors
            self.num_responses += len(lens)
            self.num_tokens_S.append(sum(lens))
            self.cycles_SC.append(cycles_C)
        self.facts.append(facts)
        self.final_lens.append(accept_lens_NC[:, self.ways.index(self.reported[-1])])

    @property
    def reported(self) -> list[Way]:
        """The way of each setting that the headline shows: the chosen policy and k; the last has the best drafter."""
        wanted = [Way("first", None, 0), Way("first_tree", None, self.k)]
        wanted += [Way(setting, self.policy, self.k) for setting in ("first_as_second", "d2sd")]
        return [way for way in wanted if way in self.ways]

    @property
    def num_tokens(self) -> int:
        return sum(self.num_tokens_S)

    @property
    def num_cycles(self) -> dict[str, int]:
        cycles_C = np.sum(self.cycles_SC, axis=0)
        return {way.setting: int(cycles_C[self.ways.index(way)]) for way in self.reported}

    @property
    def alpha(self) -> dict[str, float]:
        """Mean acceptance length by setting: tokens committed per cycle, the bonus token included."""
        return {setting: self.num_tokens / cycles for setting, cycles in self.num_cycles.items()}

    def to_json(self) -> dict[str, Any]:
        low_C, high_C = self.intervals()
        return {
            "alpha": self.alpha,
            "interval": {
                way.setting: [low_C[self.ways.index(way)], high_C[self.ways.index(way)]] for way in self.reported
            },
            "policy": self.policy,
            "k": self.k,
            "block_size": self.block_size,
            "num_cycles": self.num_cycles,
            "num_tokens": self.num_tokens,
            "num_sequences": len(self.num_tokens_S),
            "num_responses": self.num_responses,
            "skipped": dict(self.skipped),
            "by_way": [
                {**way._asdict(), "alpha": alpha, "interval": [low, high]}
                for way, alpha, low, high in zip(self.ways, self.alphas().tolist(), low_C, high_C, strict=True)
            ],
            "recovery": self.recovery(),
            "calibration": self.calibration(),
            "hits": self.hits(),
            "sequences": {"num_tokens": self.num_tokens_S, "num_cycles": self.cycles_of_reported()},
        }

    def alphas(self) -> np.ndarray:
        """Acceptance length of every way [C]."""
        return self.num_tokens / np.sum(self.cycles_SC, axis=0)

    def cycles_of_reported(self) -> dict[str, list[int]]:
        """Cycles of each sequence, for paired comparisons between runs over the same sequences."""
        cycles_SC = np.stack(self.cycles_SC)
        return {way.setting: cycles_SC[:, self.ways.index(way)].tolist() for way in self.reported}

    def intervals(self) -> tuple[list[float], list[float]]:
        """Bounds [C] of the 95 % bootstrap interval of every alpha, sequences drawn with replacement."""
        times_drawn = resamples(len(self.num_tokens_S))
        alphas = (times_drawn @ np.array(self.num_tokens_S))[:, None] / (times_drawn @ np.stack(self.cycles_SC))
        tail = (1 - CONFIDENCE) / 2
        return np.quantile(alphas, tail, axis=0).tolist(), np.quantile(alphas, 1 - tail, axis=0).tolist()

    def recovery(self) -> list[dict[str, Any]]:
        """By boundary position, over all anchors: how often the reported way commits more tokens, and how many."""
        first_len = np.concatenate([facts.first_len_N for facts in self.facts])
        known = first_len < np.concatenate([facts.num_recorded_N for facts in self.facts])
        gained = np.concatenate(self.final_lens) - first_len
        found = []
        for accept_len in range(self.block_size - 1):
            gained_here = gained[known & (first_len == accept_len)]
            if len(gained_here):
                found.append(
                    {
                        "boundary": accept_len + 1,
                        "num_anchors": len(gained_here),
                        "recovered": float((gained_here > 0).mean()),
                        "gained_tokens": float(gained_here.mean()),
                    }
                )
        return found

    def calibration(self) -> dict[str, Any]:
        """The first drafter's confidence against acceptance at the positions that its draft reaches, over all anchors.

        `ece`: expected calibration error, the mean gap between the two over bins of equal width.
        """
        confidences, accepted = [], []
        for facts in self.facts:
            positions_J = np.arange(facts.confidence_NJ.shape[1])
            reached_NJ = positions_J <= np.minimum(facts.first_len_N, facts.num_recorded_N - 1)[:, None]
            confidences.append(facts.confidence_NJ[reached_NJ])
            accepted.append((positions_J < facts.first_len_N[:, None])[reached_NJ])
        confidence, right = np.concatenate(confidences).astype(float), np.concatenate(accepted)
        bin_of = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
        bins = [
            {
                "num_positions": int((bin_of == b).sum()),
                "confidence": float(confidence[bin_of == b].mean()),
                "accepted": float(right[bin_of == b].mean()),
            }
            for b in range(NUM_BINS)
            if (bin_of == b).any()
        ]
        gaps = [abs(each["confidence"] - each["accepted"]) * each["num_positions"] for each in bins]
        return {"ece": sum(gaps) / len(confidence), "bins": bins}

    def hits(self) -> dict[str, list[float]]:
        """How often the true boundary, and it with the right token, are among the k = 0, 1, ... likeliest.

        Of all anchors where the first draft fails within the response.
        """
        first_len = np.concatenate([facts.first_len_N for facts in self.facts])
        known = first_len < np.concatenate([facts.num_recorded_N for facts in self.facts])
        numbers = range(max(way.k for way in self.ways) + 1)
        ranks = {
            "boundary": np.concatenate([facts.boundary_rank_N for facts in self.facts])[known],
            "pair": np.concatenate([facts.pair_rank_N for facts in self.facts])[known],
        }
        return {
            name: [float(((rank >= 0) & (rank < k)).mean()) if len(rank) else 0.0 for k in numbers]
            for name, rank in ranks.items()
        }


def resamples(num_sequences: int) -> np.ndarray:
    """How often each sequence is in each of `NUM_RESAMPLES` samples, drawn with replacement: [samples, S]."""
    drawn = np.random.default_rng(0).integers(num_sequences, size=(NUM_RESAMPLES, num_sequences))
    return np.stack([np.bincount(row, minlength=num_sequences) for row in drawn])
