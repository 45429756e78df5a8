"""Branch policies: from the first draft to the second drafts that a decoding cycle launches.

No policy changes the decoded text, since the target verifies every draft. A policy lists its branches best first, so
the branches for K are the first K of those for any larger number.

A new policy is a function here (or anywhere that is imported before the settings are read) under `@policy`.
"""

# N anchors, G block size, J = G - 1 drafted positions, A alternatives (the first is the draft), B branches per anchor
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from ...data.lazy import LazyModule
from ...data.registry import Registry
from ..draft.posterior import boundary_posterior, likeliest, reach_probabilities
from ..drafter.blocks import NO_TOKEN

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

NUM_ASKED = 4
"""Prefix lengths at which `reranked` asks the second drafter."""


class Branches(NamedTuple):
    """What each branch shows to the second drafter: the anchor, `prefix_len` draft tokens, perhaps an alternative."""

    prefix_len_NB: Tensor
    """int64: number of draft tokens that are kept, i."""
    alternative_NB: Tensor
    """int64: token that takes block position i + 1 and is visible; `NO_TOKEN`: the second drafter fills i + 1."""
    excluded_NB: Tensor
    """int64: token that the second drafter must not propose at position i + 1; `NO_TOKEN`: any token may come."""

    @property
    def visible_len_NB(self) -> Tensor:
        """Number of visible tokens after the anchor."""
        return self.prefix_len_NB + (self.alternative_NB != NO_TOKEN)


NextTokens = Callable[[Branches], "tuple[Tensor, Tensor]"]
"""Asks the second drafter for the likeliest tokens [N, B, A] after each branch's visible tokens, best first, and their
probabilities; `NO_TOKEN` with probability 0 where its block ends."""


class CycleFacts(NamedTuple):
    """What a policy may use to choose the branches of N cycles."""

    tokens_NJA: Tensor
    """int64: the first drafter's likeliest tokens, best first."""
    probs_NJA: Tensor
    """float32: their probabilities; the first is the confidence."""
    num_branches: int
    """Largest number of branches."""
    next_tokens: NextTokens | None = None
    """Costs a pass of the second drafter when it is called; None if there is no second drafter."""

    @property
    def confidence_NJ(self) -> Tensor:
        return self.probs_NJA[..., 0]


Policy = Callable[[CycleFacts], Branches]
POLICIES: Registry[Policy] = Registry("branch policy")


def policy(name: str) -> Callable[[Policy], Policy]:
    """Registers a policy: a function from what is known in a cycle to the branches, best first."""

    def register(function: Policy) -> Policy:
        POLICIES.add(name, function)
        return function

    return register


@policy("paper")
def paper(facts: CycleFacts) -> Branches:
    """The k likeliest prefix lengths by r(i) (D2SD, arXiv 2606.04446)."""
    prefix_len_NB = likeliest(boundary_posterior(facts.confidence_NJ), facts.num_branches)
    none_NB = torch.full_like(prefix_len_NB, NO_TOKEN)
    return Branches(prefix_len_NB, none_NB, none_NB)


@policy("exclude")
def exclude(facts: CycleFacts) -> Branches:
    """As `paper`, and branch i excludes the first draft's token at i + 1, which the branch assumes to be wrong."""
    branches = paper(facts)
    return branches._replace(excluded_NB=facts.tokens_NJA[..., 0].gather(1, branches.prefix_len_NB))


@policy("runner-up")
def runner_up(facts: CycleFacts) -> Branches:
    """The k likeliest pairs of a prefix length i and an alternative token at i + 1, which the second drafter sees.

    The score of alternative j is (c_1 ... c_i) p_(i+1)(j). Several alternatives of one position may be chosen.
    """
    scores_NP = (reach_probabilities(facts.confidence_NJ)[..., None] * facts.probs_NJA[..., 1:]).flatten(1)
    pairs_NB = likeliest(scores_NP, facts.num_branches)
    return Branches(
        prefix_len_NB=pairs_NB // (facts.probs_NJA.shape[2] - 1),
        alternative_NB=facts.tokens_NJA[..., 1:].flatten(1).gather(1, pairs_NB),
        excluded_NB=torch.full_like(pairs_NB, NO_TOKEN),
    )


@policy("reranked")
def reranked(facts: CycleFacts) -> Branches:
    """As `runner-up`, with alternatives of the second drafter, which takes one more pass of the second drafter.

    The second drafter is asked at the `NUM_ASKED` prefix lengths of largest r(i). A pair's score is (c_1 ... c_i)
    times the mean of both drafters' probabilities of the token; the first drafter's is 0 for a token that is not
    among its alternatives.
    """
    assert facts.next_tokens is not None
    asked = paper(facts._replace(num_branches=NUM_ASKED))
    tokens_NBA, second_probs_NBA = facts.next_tokens(asked)
    at_NB1 = asked.prefix_len_NB[..., None]
    first_tokens_NBA = facts.tokens_NJA.gather(1, at_NB1.expand(-1, -1, facts.tokens_NJA.shape[2]))
    first_probs_NBA = facts.probs_NJA.gather(1, at_NB1.expand(-1, -1, facts.probs_NJA.shape[2]))
    same_NBAA = tokens_NBA[..., None] == first_tokens_NBA[:, :, None]
    agreed_NBA = (same_NBAA * first_probs_NBA[:, :, None]).sum(dim=3)
    reached_NB = reach_probabilities(facts.confidence_NJ).gather(1, asked.prefix_len_NB)
    scores_NBA = reached_NB[..., None] * (agreed_NBA + second_probs_NBA) / 2
    scores_NBA = scores_NBA.masked_fill(tokens_NBA == first_tokens_NBA[..., :1], -1.0)
    pairs_NB = likeliest(scores_NBA.flatten(1), facts.num_branches)
    return Branches(
        prefix_len_NB=asked.prefix_len_NB.gather(1, pairs_NB // tokens_NBA.shape[2]),
        alternative_NB=tokens_NBA.flatten(1).gather(1, pairs_NB),
        excluded_NB=torch.full_like(pairs_NB, NO_TOKEN),
    )


def with_whole_draft(branches: Branches, num_positions: int, second_block_size: int) -> Branches:
    """The branches, and one more if the second drafter's block is larger: it keeps the whole first draft.

    The second drafter then continues the first draft to the end of its own block, as the public code has it.

    Args:
        num_positions: J.
    """
    if not branches.prefix_len_NB.shape[1] or second_block_size <= num_positions + 1:
        return branches
    return Branches(
        torch.nn.functional.pad(branches.prefix_len_NB, (0, 1), value=num_positions),
        torch.nn.functional.pad(branches.alternative_NB, (0, 1), value=NO_TOKEN),
        torch.nn.functional.pad(branches.excluded_NB, (0, 1), value=NO_TOKEN),
    )


class Shown(NamedTuple):
    """Tokens that the second drafter sees after the anchor, for blocks that it fills."""

    tokens_NBJ: Tensor
    """Only the first `visible_len_NB` of them are seen."""
    visible_len_NB: Tensor
    excluded_NB: Tensor
    """Token that must not follow the visible ones; `NO_TOKEN`: any may."""


def show_branches(draft_NJ: Tensor, branches: Branches) -> Shown:
    """The first draft with each branch's alternative in place."""
    shown_NBJ = draft_NJ[:, None, :].repeat(1, branches.prefix_len_NB.shape[1], 1)
    # A branch that keeps the whole draft has no alternative.
    replaced_NB1 = branches.prefix_len_NB[..., None].clamp(max=draft_NJ.shape[1] - 1)
    alternative_NB1 = branches.alternative_NB[..., None]
    kept_NB1 = shown_NBJ.gather(2, replaced_NB1)
    tokens_NBJ = shown_NBJ.scatter(2, replaced_NB1, torch.where(alternative_NB1 == NO_TOKEN, kept_NB1, alternative_NB1))
    return Shown(tokens_NBJ, branches.visible_len_NB, branches.excluded_NB)
