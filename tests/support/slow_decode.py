"""Decoding with two drafts as the method describes it: one block, one branch and one cycle at a time.

The context is cut off before the anchor, so that a drafter can't see more than it should. Every branch is completed.
"""

# G block size, D context features (K layers x H), V vocabulary
from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from vpd.stages.drafter.model import Drafter

NUM_ALTERNATIVES = 5
POLICIES = ("paper", "exclude", "runner-up", "reranked")
NUM_ASKED = 4

Ranked = list[list[tuple[float, int]]]
"""For every position, probabilities and tokens, best first."""


class Branch(NamedTuple):
    prefix_len: int
    alternative: int | None = None
    excluded: int | None = None


class SlowDrafter:
    def __init__(self, drafter: Drafter, pieces: dict[str, Tensor], features_TD: Tensor):
        self.drafter, self.features_TD = drafter, features_TD
        self.block_size = drafter.shape.block_size
        self.embed_VH, self.head_VH = pieces["embed_tokens.weight"], pieces["lm_head.weight"]
        self.ranked = cache(self._ranked)
        self.context = cache(self._context)

    def _context(self, anchor: int):
        return self.drafter.context(self.features_TD[:anchor])

    @torch.no_grad()
    def _ranked(self, anchor: int, visible: tuple[int, ...]) -> Ranked:
        """All tokens of the vocabulary for every masked position; the first visible token is the anchor's."""
        ids = [*visible, *[self.drafter.shape.mask_token_id] * (self.block_size - len(visible))]
        states_GH = self.drafter(self.embed_VH[ids][None], torch.tensor([anchor]), self.context(anchor))[0]
        probs_GV = (states_GH[len(visible) :] @ self.head_VH.T).double().softmax(dim=1)
        return [
            sorted(((prob, token) for token, prob in enumerate(probs)), reverse=True) for probs in probs_GV.tolist()
        ]

    def complete(self, anchor: int, visible: tuple[int, ...], excluded: int | None = None) -> list[int]:
        """The tokens after the anchor: the visible ones, then drafted ones to the end of the block."""
        if len(visible) >= self.block_size:
            return [*visible[1:]]
        ranked = self.ranked(anchor, visible)
        drafted = [best[0][1] for best in ranked]
        if drafted[0] == excluded:
            drafted[0] = ranked[0][1][1]
        return [*visible[1:], *drafted]


def slow_posterior(confidences: list[float]) -> list[float]:
    """r(i): the first i draft tokens are right and the next one is wrong."""
    return [math.prod(confidences[:i]) * (1 - confidences[i]) for i in range(len(confidences))]


Ask = Callable[[int], list[tuple[float, int]]]
"""The second drafter's tokens after a number of draft tokens, best first; none past its block."""


def slow_branches(policy: str, ranked: Ranked, ask: Ask | None = None) -> list[Branch]:
    """All branches that a policy can launch, best first; among equals, what comes earlier in the block."""
    draft = [best[0][1] for best in ranked]
    confidences = [best[0][0] for best in ranked]
    if policy == "reranked":
        assert ask is not None
        asked = sorted(range(len(draft)), key=lambda i: -slow_posterior(confidences)[i])[:NUM_ASKED]
        scored = []
        for i in asked:
            of_first = {token: prob for prob, token in ranked[i][:NUM_ALTERNATIVES]}
            for prob, token in ask(i)[: NUM_ALTERNATIVES + 1]:
                if token != draft[i]:
                    score = math.prod(confidences[:i]) * (of_first.get(token, 0.0) + prob) / 2
                    scored.append((score, Branch(i, alternative=token)))
    elif policy == "runner-up":
        scored = [
            (math.prod(confidences[:i]) * prob, Branch(i, alternative=token))
            for i, best in enumerate(ranked)
            for prob, token in best[1:NUM_ALTERNATIVES]
        ]
    else:
        excluded = draft if policy == "exclude" else [None] * len(draft)
        scored = [(r, Branch(i, excluded=excluded[i])) for i, r in enumerate(slow_posterior(confidences))]
    return [branch for _, branch in sorted(scored, key=lambda pair: -pair[0])]


def slow_candidates(
    ranked: Ranked, second: SlowDrafter | None, policy: str, anchor: int, token: int
) -> list[list[int]]:
    """The first draft and the candidate of every branch; without a second drafter, the draft's other tokens stay."""
    draft = [best[0][1] for best in ranked]
    candidates = [draft]

    def ask(num_kept: int) -> list[tuple[float, int]]:
        assert second is not None
        visible = (token, *draft[:num_kept])
        return second.ranked(anchor, visible)[0] if len(visible) < second.block_size else []

    for i, alternative, excluded in slow_branches(policy, ranked, ask):
        kept = draft[:i] if alternative is None else [*draft[:i], alternative]
        if second is None:
            candidates.append([*kept, *draft[len(kept) :]])
        else:
            candidates.append(second.complete(anchor, (token, *kept), excluded))
    return candidates


def slow_resampled(ranked: Ranked, anchor: int, num_drafts: int) -> list[list[int]]:
    """Drafts drawn token by token among the alternatives, by the random numbers of the anchor's position."""
    uniform = np.random.default_rng(anchor).random((num_drafts, len(ranked))).tolist()
    drafts = []
    for row in uniform:
        draft = []
        for best, number in zip(ranked, row, strict=True):
            stored = best[:NUM_ALTERNATIVES]
            left = number * sum(prob for prob, _ in stored)
            while left >= stored[0][0]:
                left -= stored.pop(0)[0]
            draft.append(stored[0][1])
        drafts.append(draft)
    return drafts


def slow_continued(draft: list[int], second: SlowDrafter | None, anchor: int, token: int) -> list[list[int]]:
    """The whole first draft, continued by a second drafter whose block is larger; nothing if it is not."""
    if second is None or second.block_size <= len(draft) + 1:
        return []
    return [second.complete(anchor, (token, *draft))]


def slow_accept_length(candidates: list[list[int]], continuation: list[int]) -> int:
    """Length of the longest common beginning of a candidate and the target's continuation."""
    best = 0
    for candidate in candidates:
        length = 0
        while length < min(len(candidate), len(continuation)) and candidate[length] == continuation[length]:
            length += 1
        best = max(best, length)
    return best


def slow_count(accept_len_at: Callable[[int], int], num_tokens: int) -> int:
    """Cycles that decode a response token by token; its first token comes from the prefill."""
    num_written, cycles = 1, 0
    while num_written < num_tokens:
        cycles += 1
        drafted = accept_len_at(num_written - 1)
        for _ in range(drafted):
            num_written += 1
        num_written += 1  # the bonus token
    return cycles
