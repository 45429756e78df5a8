"""What a second drafter adds to the first drafts of a cycle: branches, and what it expects after their tokens."""

# N anchors, J drafted positions, A alternatives, B branches per anchor
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..draft.conditionals import marginals, with_second
from ..draft.passes import completed
from ..draft.tree import Conditionals
from ..drafter.blocks import NO_TOKEN
from .branches import Branches, CycleFacts, NextTokens, Policy, show_branches, with_whole_draft

Redraft = Callable[[Branches], "tuple[Tensor, Tensor]"]
"""Has the second drafter fill the blocks of branches: likeliest tokens [N, B, J, A] and their probabilities."""


class Asked(NamedTuple):
    """The second drafter's answers to a policy's question."""

    branches: Branches
    tokens_NBA: Tensor
    probs_NBA: Tensor


class SecondDrafts(NamedTuple):
    """A first draft of N cycles, and what the second drafter says of it."""

    tokens_NJA: Tensor
    """The first drafter's likeliest tokens, `NO_TOKEN` past its block."""
    probs_NJA: Tensor
    asked: list[Asked]
    """What the policy asked to choose its branches."""
    branches: Branches
    """The policy's branches; if the second drafter's block is larger, the whole first draft comes as the last one."""
    has_whole_draft: bool
    second_tokens_NBJA: Tensor
    """The second drafter's likeliest tokens after each branch's visible ones, `NO_TOKEN` elsewhere."""
    second_probs_NBJA: Tensor

    @property
    def num_branches(self) -> int:
        """Branches that the policy offers."""
        return self.branches.prefix_len_NB.shape[1] - self.has_whole_draft

    def places(self, k: int) -> list[int]:
        """The columns of the first k branches and of the whole draft, which goes with any number of them."""
        return [*range(min(k, self.num_branches)), *([self.num_branches] if self.has_whole_draft and k else [])]

    def candidates(self) -> Tensor:
        """The first draft, the whole draft continued if there is one, and the completed branches: [N, 1 + B, J]."""
        draft_NJ = self.tokens_NJA[..., 0]
        shown_NBJ = show_branches(draft_NJ, self.branches)
        completed_NBJ = completed(shown_NBJ, self.branches.visible_len_NB, self.second_tokens_NBJA)
        order = [*range(self.num_branches, completed_NBJ.shape[1]), *range(self.num_branches)]
        return torch.cat([draft_NJ[:, None], completed_NBJ[:, order]], dim=1)

    def num_candidates(self, k: int) -> int:
        """How many of the candidates come with the first k branches."""
        return 1 + len(self.places(k))

    def conditionals(self, k: int) -> Conditionals:
        """The conditionals of a tree from the first draft and k branches."""
        found = marginals(self.tokens_NJA, self.probs_NJA)
        places = self.places(k)
        if not places:
            return found
        draft_NJ, A = self.tokens_NJA[..., 0], self.tokens_NJA.shape[2]
        for branches, tokens_NBA, probs_NBA in self.asked:
            shape = (*branches.prefix_len_NB.shape, *self.tokens_NJA.shape[1:])
            at_NB = branches.visible_len_NB.clamp(max=draft_NJ.shape[1] - 1)
            at_NB1A = at_NB[..., None, None].expand(-1, -1, 1, A)
            none_NBJA = tokens_NBA.new_full(shape, NO_TOKEN)
            found = with_second(
                found,
                show_branches(draft_NJ, branches),
                branches.visible_len_NB,
                none_NBJA.scatter(2, at_NB1A, tokens_NBA[:, :, None, :A]),
                probs_NBA.new_zeros(shape).scatter(2, at_NB1A, probs_NBA[:, :, None, :A]),
            )
        return with_second(
            found,
            show_branches(draft_NJ, self.branches)[:, places],
            self.branches.visible_len_NB[:, places],
            self.second_tokens_NBJA[:, places],
            self.second_probs_NBJA[:, places],
        )

    def passes(self, k: int) -> tuple[Tensor, Tensor]:
        """Blocks of the second drafter and head rows of both drafters [N] with k branches."""
        places = self.places(k)
        rows_NB = (self.second_tokens_NBJA[:, places, :, 0] != NO_TOKEN).sum(dim=2)
        for _, tokens_NBA, _ in self.asked if places else ():
            rows_NB = torch.cat([rows_NB, (tokens_NBA[..., 0] != NO_TOKEN).long()], dim=1)
        first_rows_N = (self.tokens_NJA[..., 0] != NO_TOKEN).sum(dim=1)
        return (rows_NB > 0).sum(dim=1), first_rows_N + rows_NB.sum(dim=1)


def draft_second(
    facts: CycleFacts, policy: Policy, second_block_size: int, next_tokens: NextTokens, redraft: Redraft
) -> SecondDrafts:
    """Lets a policy choose branches, and the second drafter fill them."""
    asked: list[Asked] = []

    def ask(branches: Branches) -> tuple[Tensor, Tensor]:
        asked.append(Asked(branches, *next_tokens(branches)))
        return asked[-1][1:]

    chosen = policy(facts._replace(next_tokens=ask))
    num_positions = facts.tokens_NJA.shape[1]
    branches = with_whole_draft(chosen, num_positions, second_block_size)
    tokens_NBJA, probs_NBJA = redraft(branches)
    past_block = (0, 0, 0, tokens_NBJA.shape[2] - num_positions)
    return SecondDrafts(
        pad(facts.tokens_NJA, past_block, value=NO_TOKEN),
        pad(facts.probs_NJA, past_block),
        asked,
        branches,
        branches.prefix_len_NB.shape[1] > chosen.prefix_len_NB.shape[1],
        tokens_NBJA,
        probs_NBJA,
    )
