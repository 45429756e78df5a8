"""The result of a replay: acceptance lengths with their uncertainty, and where the second drafter helps."""

# N anchors, E sequences, C ways of decoding, X kinds of cost, J = G - 1 drafted positions
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..trained_on import NO, UNKNOWN, YES
from .config import EvalConfig
from .intervals import alphas
from .outcomes import COSTS
from .responses import visited_anchors
from .slices import Response, SliceCounts
from .ways import Way

NUM_BINS = 10
"""Bins of the calibration."""


class FirstDraftOutcomes(NamedTuple):
    """How the first drafts at N anchors turned out."""

    first_len_N: np.ndarray
    """Accept length L."""
    confidence_NJ: np.ndarray
    """The first drafter's probabilities of its own tokens."""
    num_recorded_N: np.ndarray
    """Drafted positions that lie within the response."""
    boundary_rank_N: np.ndarray
    """Rank of the true boundary among the likeliest prefix lengths; -1: not among them, or no boundary."""
    pair_rank_N: np.ndarray
    """Rank of the true boundary with the right token among the likeliest pairs; -1: not among them, or no boundary."""


@dataclass
class ReplayReport:
    """Sums over all replayed responses."""

    ways: list[Way]
    reported: dict[str, Way]
    """The ways that the headline shows, by name; the last is the best one."""
    config: EvalConfig
    block_size: int
    num_responses: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Sequences without a response that can be replayed, by reason."""
    num_tokens_E: list[int] = field(default_factory=list)
    """Tokens that cycles commit: all tokens of the responses except each first one, which the prefill gives."""
    cycles_EC: list[np.ndarray] = field(default_factory=list)
    """Cycles that each way needs for these tokens."""
    costs_EC: list[np.ndarray] = field(default_factory=list)
    """Costs [C, X] of these cycles, see `COSTS`."""
    seq_ids: list[str] = field(default_factory=list)
    trained_on: dict[str, list[str]] = field(default_factory=dict)
    """For `first` and `second`: whether that drafter was trained on each sequence, `yes`, `no` or `unknown`."""
    warnings: list[str] = field(default_factory=list)
    """What speaks against the choice of the drafters."""
    answer_alphas: list[np.ndarray] = field(default_factory=list)
    """Alpha [C] of each response alone."""
    slices: SliceCounts = field(default_factory=SliceCounts)
    """Counts of the reported ways."""
    outcomes: list[FirstDraftOutcomes] = field(default_factory=list)
    final_lens: list[np.ndarray] = field(default_factory=list)
    """Accept lengths of the last reported way at the anchors of `outcomes`."""

    def add(
        self,
        accept_lens_NC: np.ndarray,
        costs_NCX: np.ndarray,
        responses: Sequence[Sequence[Response]],
        outcomes: FirstDraftOutcomes,
    ) -> None:
        """Adds several sequences; the anchors of their responses come one after another.

        Args:
            responses: the responses of each sequence.
        """
        start, reported = 0, list(self.columns.values())
        for of_sequence in responses:
            cycles_C, costs_CX = np.zeros(len(self.ways), int), np.zeros((len(self.ways), len(COSTS)), int)
            for response in of_sequence:
                here = slice(start, start + response.num_anchors)
                visited_NC = visited_anchors(accept_lens_NC[here])
                self.slices.add(len(self.num_tokens_E), response, visited_NC[:, reported])
                of_response_C = visited_NC.sum(axis=0)
                cycles_C += of_response_C
                costs_CX += (visited_NC[..., None] * costs_NCX[here]).sum(axis=0)
                self.answer_alphas.append(response.num_anchors / of_response_C)
                start += response.num_anchors
            self.num_responses += len(of_sequence)
            self.num_tokens_E.append(sum(response.num_anchors for response in of_sequence))
            self.cycles_EC.append(cycles_C)
            self.costs_EC.append(costs_CX)
        self.outcomes.append(outcomes)
        self.final_lens.append(accept_lens_NC[:, self.columns[list(self.reported)[-1]]])

    @property
    def columns(self) -> dict[str, int]:
        """The place of each reported way among all."""
        return {name: self.ways.index(way) for name, way in self.reported.items()}

    @property
    def num_tokens(self) -> int:
        return sum(self.num_tokens_E)

    @property
    def num_cycles(self) -> dict[str, int]:
        cycles_C = np.sum(self.cycles_EC, axis=0)
        return {name: int(cycles_C[column]) for name, column in self.columns.items()}

    @property
    def alpha(self) -> dict[str, float]:
        """Mean acceptance length by way: tokens committed per cycle, the bonus token included.

        It is pooled over the cycles of all responses (Eq. 1 of arXiv 2606.04446), so long responses count more.
        """
        return {name: self.num_tokens / cycles for name, cycles in self.num_cycles.items()}

    @property
    def alpha_mean_of_answers(self) -> dict[str, float]:
        """The mean over responses of each response's own alpha, by way; every response counts alike."""
        mean_C = np.mean(self.answer_alphas, axis=0)
        return {name: float(mean_C[column]) for name, column in self.columns.items()}

    @property
    def best_alpha(self) -> float:
        """Alpha of the replayed drafter: as the second drafter (`d2sd`), or alone (`first`) if there is no second."""
        return self.alpha["d2sd" if "d2sd" in self.alpha else "first"]

    def to_json(self) -> dict[str, Any]:
        low_C, high_C = self.intervals()
        return {
            "alpha": self.alpha,
            "interval": {name: [low_C[column], high_C[column]] for name, column in self.columns.items()},
            "alpha_mean_of_answers": self.alpha_mean_of_answers,
            **self.config.model_dump(include={"way", "k", "nodes"}),
            "policy": self.config.policies[0],
            "block_size": self.block_size,
            "num_cycles": self.num_cycles,
            "num_tokens": self.num_tokens,
            "num_sequences": len(self.num_tokens_E),
            "num_responses": self.num_responses,
            "skipped": dict(self.skipped),
            "trained_on": {
                drafter: {answer: found.count(answer) for answer in (YES, NO, UNKNOWN)}
                for drafter, found in self.trained_on.items()
            },
            "warnings": self.warnings,
            "by_nodes": self.by_nodes(low_C, high_C),
            "slices": self.slices.to_json(list(self.reported)),
            "recovery": self.recovery(),
            "calibration": self.calibration(),
            "hits": self.hits(),
            "sequences": {
                "seq_ids": self.seq_ids,
                "trained_on": self.trained_on,
                "num_tokens": self.num_tokens_E,
                "num_cycles": self.cycles_of_reported(),
            },
        }

    def by_nodes(self, low_C: Sequence[float], high_C: Sequence[float]) -> list[dict[str, Any]]:
        """Every way with its acceptance length and what its mean cycle costs."""
        costs_CX = np.sum(self.costs_EC, axis=0) / np.sum(self.cycles_EC, axis=0)[:, None]
        return [
            {
                "way": way.name,
                "second": way.second,
                "policy": way.policy,
                "k": way.k,
                "nodes": way.nodes,
                "verified": verified,
                "passes": {"first_drafts": 1, **dict(zip(COSTS[1:], passes, strict=True))},
                "alpha": alpha,
                "interval": [low, high],
            }
            for way, (verified, *passes), alpha, low, high in zip(
                self.ways, costs_CX.tolist(), self.alphas().tolist(), low_C, high_C, strict=True
            )
        ]

    def alphas(self) -> np.ndarray:
        """Acceptance length of every way [C]."""
        return self.num_tokens / np.sum(self.cycles_EC, axis=0)

    def cycles_of_reported(self) -> dict[str, list[int]]:
        """Cycles of each sequence, by way, for paired comparisons between replays of the same sequences."""
        cycles_EC = np.stack(self.cycles_EC)
        return {name: cycles_EC[:, column].tolist() for name, column in self.columns.items()}

    def intervals(self) -> tuple[list[float], list[float]]:
        """Bounds [C] of the 95 % bootstrap interval of every alpha; sequences are drawn with replacement."""
        num_tokens_EC = np.array(self.num_tokens_E)[:, None].repeat(len(self.ways), axis=1)
        _, low_C, high_C = alphas(num_tokens_EC, np.stack(self.cycles_EC))
        return low_C, high_C

    def recovery(self) -> list[dict[str, Any]]:
        """By boundary position, over all anchors: how often the last reported way commits more, and how many tokens."""
        first_len = np.concatenate([outcomes.first_len_N for outcomes in self.outcomes])
        known = first_len < np.concatenate([outcomes.num_recorded_N for outcomes in self.outcomes])
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
        """The first drafter's confidence against acceptance, at all positions that its drafts reach.

        `ece` is the expected calibration error: the mean gap between the two over bins of equal width.
        """
        confidences, accepted = [], []
        for outcomes in self.outcomes:
            positions_J = np.arange(outcomes.confidence_NJ.shape[1])
            reached_NJ = positions_J <= np.minimum(outcomes.first_len_N, outcomes.num_recorded_N - 1)[:, None]
            confidences.append(outcomes.confidence_NJ[reached_NJ])
            accepted.append((positions_J < outcomes.first_len_N[:, None])[reached_NJ])
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
        """How often the true boundary is among the k = 0, 1, ... likeliest, alone and as a pair with the right token.

        The shares are those of the anchors where the first draft fails within the response.
        """
        first_len = np.concatenate([outcomes.first_len_N for outcomes in self.outcomes])
        known = first_len < np.concatenate([outcomes.num_recorded_N for outcomes in self.outcomes])
        numbers = range(max(way.k for way in self.ways) + 1)
        ranks = {
            "boundary": np.concatenate([outcomes.boundary_rank_N for outcomes in self.outcomes])[known],
            "pair": np.concatenate([outcomes.pair_rank_N for outcomes in self.outcomes])[known],
        }
        return {
            name: [float(((rank >= 0) & (rank < k)).mean()) if len(rank) else 0.0 for k in numbers]
            for name, rank in ranks.items()
        }
