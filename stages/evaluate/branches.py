"""Branch policies: from the first draft to the K second drafts that a decoding cycle launches.

Every policy is lossless: whatever is drafted, the target verifies it. Branches come best first, so the K branches of
a policy are the first K of any larger number.
"""

# N anchors, G block size, J = G-1 drafted positions, A alternatives kept per position (the first is the draft),
# B branches
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

NUM_ASKED = 4
"""Prefix lengths at which `reranked` asks the second drafter."""
NONE = -1
"""Stands for "no token": never equal to one."""


class Branches(NamedTuple):
    """What each branch shows the second drafter: the anchor, `prefix_len` draft tokens, perhaps an alternative."""

    prefix_len_NB: Tensor
    """Draft tokens that are kept: i."""
    alternative_NB: Tensor
    """Token put at block position i + 1, visible to the second drafter; `NONE`: it is drafted anew."""
    excluded_NB: Tensor
    """Token that the second drafter must not propose at position i + 1; `NONE`: any."""

    @property
    def visible_len_NB(self) -> Tensor:
        """Visible tokens after the anchor."""
        return self.prefix_len_NB + (self.alternative_NB != NONE)


def boundary_posterior(confidence_NJ: Tensor) -> Tensor:
    """r(i) = (c_1 ... c_i) * (1 - c_(i+1)), i = 0..G-2 (D2SD, arXiv 2606.04446); confidences c_1..c_(G-1)."""
    return _reached(confidence_NJ) * (1 - confidence_NJ)


def paper(tokens_NJA: Tensor, probs_NJA: Tensor, num_branches: int) -> Branches:
    """The prefix lengths of largest r(i) (D2SD, arXiv 2606.04446)."""
    posterior_NJ = boundary_posterior(probs_NJA[..., 0])
    prefix_len_NB = _best(posterior_NJ, num_branches)
    none_NB = torch.full_like(prefix_len_NB, NONE)
    return Branches(prefix_len_NB, none_NB, none_NB)


def exclude(tokens_NJA: Tensor, probs_NJA: Tensor, num_branches: int) -> Branches:
    """As `paper`, and the first draft's token at i + 1, which branch i takes to be wrong, is ruled out there."""
    branches = paper(tokens_NJA, probs_NJA, num_branches)
    return branches._replace(excluded_NB=tokens_NJA[..., 0].gather(1, branches.prefix_len_NB))


def runner_up(tokens_NJA: Tensor, probs_NJA: Tensor, num_branches: int) -> Branches:
    """The likeliest pairs (i, j): i draft tokens hold, and the j-th alternative is right at i + 1.

    A pair's score is (c_1 ... c_i) * p_(i+1)(alternative j); several alternatives may compete at one position.
    """
    scores = (_reached(probs_NJA[..., 0])[..., None] * probs_NJA[..., 1:]).flatten(1)
    pairs_NB = _best(scores, num_branches)
    return Branches(
        prefix_len_NB=pairs_NB // (probs_NJA.shape[2] - 1),
        alternative_NB=tokens_NJA[..., 1:].flatten(1).gather(1, pairs_NB),
        excluded_NB=torch.full_like(pairs_NB, NONE),
    )


Policy = Callable[[Tensor, Tensor, int], Branches]
POLICIES: dict[str, Policy] = {"paper": paper, "exclude": exclude, "runner-up": runner_up}
"""Those that need the first draft alone."""

NextTokens = Callable[[Branches], tuple[Tensor, Tensor]]
"""The second drafter's likeliest tokens [N, B, A] right after each branch's visible tokens, and their probabilities."""


def reranked(tokens_NJA: Tensor, probs_NJA: Tensor, num_branches: int, next_tokens: NextTokens) -> Branches:
    """As `runner_up`, but the second drafter, which sees the i draft tokens, also says what may stand at i + 1.

    It is asked at the `NUM_ASKED` prefix lengths of largest r(i). A pair's score is (c_1 ... c_i) times the mean of
    both drafters' probabilities of the token; the first one's is 0 for a token that is not among its alternatives.
    """
    asked = paper(tokens_NJA, probs_NJA, NUM_ASKED)
    tokens_NBA, second_probs_NBA = next_tokens(asked)
    at_NB1 = asked.prefix_len_NB[..., None]
    first_tokens_NBA = tokens_NJA.gather(1, at_NB1.expand(-1, -1, tokens_NJA.shape[2]))
    first_probs_NBA = probs_NJA.gather(1, at_NB1.expand(-1, -1, probs_NJA.shape[2]))
    same_NBAA = tokens_NBA[..., None] == first_tokens_NBA[:, :, None]
    agreed_NBA = (same_NBAA * first_probs_NBA[:, :, None]).sum(dim=3)
    reached_NB = _reached(probs_NJA[..., 0]).gather(1, asked.prefix_len_NB)
    scores_NBA = reached_NB[..., None] * (agreed_NBA + second_probs_NBA) / 2
    scores_NBA = scores_NBA.masked_fill(tokens_NBA == first_tokens_NBA[..., :1], -1.0)
    pairs_NB = _best(scores_NBA.flatten(1), num_branches)
    return Branches(
        prefix_len_NB=asked.prefix_len_NB.gather(1, pairs_NB // tokens_NBA.shape[2]),
        alternative_NB=tokens_NBA.flatten(1).gather(1, pairs_NB),
        excluded_NB=torch.full_like(pairs_NB, NONE),
    )


def launch(policy: str, tokens_NJA: Tensor, probs_NJA: Tensor, num_branches: int, next_tokens: NextTokens) -> Branches:
    """The branches of a policy, by its name."""
    if policy == "reranked":
        return reranked(tokens_NJA, probs_NJA, num_branches, next_tokens)
    return POLICIES[policy](tokens_NJA, probs_NJA, num_branches)


def show_branches(draft_NJ: Tensor, branches: Branches) -> Tensor:
    """The first draft with each branch's alternative put in, [N, B, J]: what the branch keeps, and what it replaces."""
    shown_NBJ = draft_NJ[:, None, :].repeat(1, branches.prefix_len_NB.shape[1], 1)
    replaced_NB1 = branches.prefix_len_NB[..., None]
    alternative_NB1 = branches.alternative_NB[..., None]
    kept_NB1 = shown_NBJ.gather(2, replaced_NB1)
    return shown_NBJ.scatter(2, replaced_NB1, torch.where(alternative_NB1 == NONE, kept_NB1, alternative_NB1))


def _best(scores: Tensor, num_branches: int) -> Tensor:
    """Places of the largest scores of each row, best first; among equals, as float16 makes them, the first ones."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :num_branches]


def _reached(confidence_NJ: Tensor) -> Tensor:
    """c_1 ... c_i for i = 0..J-1: the probability that the draft holds up to position i."""
    return torch.cat([torch.ones_like(confidence_NJ[:, :1]), confidence_NJ.cumprod(dim=1)[:, :-1]], dim=1)
