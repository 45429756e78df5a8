"""What a second drafter adds to the first drafts of a cycle: branches, and what it expects after their tokens."""

# N anchors, J drafted positions, A alternatives, B branches per anchor
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...data.cache.arrays import NUM_ALTERNATIVES
from ..draft.conditionals import marginals, with_second
from ..draft.passes import completed
from ..draft.posterior import likeliest, reach_probabilities
from ..draft.tree import Conditionals, path_probs
from ..drafter.blocks import NO_TOKEN
from .branches import Branches, CycleFacts, Policy, Shown, show_branches, with_whole_draft

TREE_ALTERNATIVES = 8
"""Tokens at each position that a tree may take, where the drafter is there to give so many."""

Redraft = Callable[[Shown], "tuple[Tensor, Tensor]"]
"""Has the second drafter fill blocks: the likeliest tokens [N, B, J, A] after the visible ones, and their
probabilities."""


class Blocks(NamedTuple):
    """Blocks that the second drafter has filled."""

    shown: Shown
    tokens_NBJA: Tensor
    """The likeliest tokens after the visible ones, `NO_TOKEN` elsewhere."""
    probs_NBJA: Tensor

    def next_tokens(self) -> tuple[Tensor, Tensor]:
        """The likeliest tokens [N, B, A] right after the visible ones, and their probabilities."""
        _, _, J, A = self.tokens_NBJA.shape
        is_past_end_NB1 = (self.shown.visible_len_NB >= J)[..., None]
        at_NB1A = self.shown.visible_len_NB.clamp(max=J - 1)[..., None, None].expand(-1, -1, 1, A)
        tokens_NBA, probs_NBA = (x.gather(2, at_NB1A)[:, :, 0] for x in (self.tokens_NBJA, self.probs_NBJA))
        return tokens_NBA.masked_fill(is_past_end_NB1, NO_TOKEN), probs_NBA.masked_fill(is_past_end_NB1, 0.0)

    def completed(self) -> Tensor:
        """The visible tokens, and after them the likeliest ones that are not excluded: [N, B, J]."""
        return completed(*self.shown, self.tokens_NBJA)

    def at(self, places: list[int]) -> Blocks:
        """The blocks of these columns."""
        return Blocks(
            Shown(*(x[:, places] for x in self.shown)), self.tokens_NBJA[:, places], self.probs_NBJA[:, places]
        )

    def num_rows(self) -> Tensor:
        """Positions [N, B] of each block that need a row of the head."""
        return (self.tokens_NBJA[..., 0] != NO_TOKEN).sum(dim=2)


class SecondDrafts(NamedTuple):
    """A first draft of N cycles, and what the second drafter says of it."""

    tokens_NJA: Tensor
    """The first drafter's likeliest tokens, `NO_TOKEN` past its block, and where it gives fewer of them."""
    probs_NJA: Tensor
    asked: list[Blocks]
    """What the policy asked to choose its branches."""
    branches: Blocks
    """The policy's branches; if the second drafter's block is larger, the whole first draft comes as the last one."""
    has_whole_draft: bool

    @property
    def num_branches(self) -> int:
        """Branches that the policy offers."""
        return self.branches.tokens_NBJA.shape[1] - self.has_whole_draft

    def blocks(self, k: int) -> list[Blocks]:
        """All blocks for the first k branches: those that were asked, the branches, and the whole draft."""
        if not k:
            return []
        whole = [self.num_branches] if self.has_whole_draft else []
        return [*self.asked, self.branches.at([*range(min(k, self.num_branches)), *whole])]

    def candidates(self) -> Tensor:
        """The first draft, the whole draft continued if there is one, and the completed branches: [N, 1 + B, J]."""
        completed_NBJ = self.branches.completed()
        order = [*range(self.num_branches, completed_NBJ.shape[1]), *range(self.num_branches)]
        return torch.cat([self.tokens_NJA[:, None, :, 0], completed_NBJ[:, order]], dim=1)

    def num_candidates(self, k: int) -> int:
        """How many of the candidates come with the first k branches."""
        return 1 + min(k, self.num_branches) + (self.has_whole_draft and k > 0)

    def conditionals(self, k: int) -> Conditionals:
        """The conditionals of a tree from the first draft and the blocks for k branches."""
        found = marginals(self.tokens_NJA, self.probs_NJA)
        J = self.tokens_NJA.shape[1]
        for shown, tokens_NBJA, probs_NBJA in self.blocks(k):
            shown_NBJ = pad(shown.tokens_NBJ, (0, J - shown.tokens_NBJ.shape[2]), value=NO_TOKEN)
            found = with_second(found, shown_NBJ, shown.visible_len_NB, tokens_NBJA, probs_NBJA)
        return found

    def passes(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Passes and blocks of the second drafter, and head rows of both drafters, [N] each, with k branches."""
        num_passes_N = num_blocks_N = torch.zeros_like(self.tokens_NJA[:, 0, 0])
        num_rows_N = (self.tokens_NJA[..., 0] != NO_TOKEN).sum(dim=1)
        for blocks in self.blocks(k):
            rows_NB = blocks.num_rows()
            num_passes_N, num_blocks_N = num_passes_N + 1, num_blocks_N + (rows_NB > 0).sum(dim=1)
            num_rows_N = num_rows_N + rows_NB.sum(dim=1)
        return num_passes_N, num_blocks_N, num_rows_N


def draft_second(facts: CycleFacts, policy: Policy, second_block_size: int, redraft: Redraft) -> SecondDrafts:
    """Lets a policy choose branches, and the second drafter fill them.

    Args:
        facts: with any number of alternatives; the policy sees as many as caches store.
    """
    draft_NJ, asked = facts.tokens_NJA[..., 0], list[Blocks]()

    def ask(branches: Branches) -> tuple[Tensor, Tensor]:
        shown = show_branches(draft_NJ, branches)
        asked.append(Blocks(shown, *redraft(shown)))
        # One more than the alternatives, since the draft's own token may be among them.
        tokens_NBA, probs_NBA = asked[-1].next_tokens()
        return tokens_NBA[..., : NUM_ALTERNATIVES + 1], probs_NBA[..., : NUM_ALTERNATIVES + 1]

    stored = {name: getattr(facts, name)[..., :NUM_ALTERNATIVES] for name in ("tokens_NJA", "probs_NJA")}
    chosen = policy(facts._replace(**stored, next_tokens=ask))
    branches = with_whole_draft(chosen, draft_NJ.shape[1], second_block_size)
    shown = show_branches(draft_NJ, branches)
    tokens_NBJA, probs_NBJA = redraft(shown)
    _, _, J, A = tokens_NBJA.shape
    missing = (0, A - facts.tokens_NJA.shape[2], 0, J - draft_NJ.shape[1])
    return SecondDrafts(
        pad(facts.tokens_NJA, missing, value=NO_TOKEN),
        pad(facts.probs_NJA, missing),
        asked,
        Blocks(shown, tokens_NBJA, probs_NBJA),
        branches.prefix_len_NB.shape[1] > chosen.prefix_len_NB.shape[1],
    )


def show_second_drafts(drafts: SecondDrafts, k: int) -> Shown:
    """What a third level of drafts sees: beginnings of the k completed branches, where these are likeliest to fail.

    Of all pairs of a branch and a number of its tokens, beyond those that the second drafter saw, the k of largest
    r(i) are chosen.
    """
    chosen = drafts.branches.at([*range(min(k, drafts.num_branches))])
    completed_NBJ = chosen.completed()
    N, B, J = completed_NBJ.shape
    probs_NBJ = path_probs(drafts.conditionals(k), completed_NBJ)
    posterior_NBJ = reach_probabilities(probs_NBJ.flatten(0, 1)).view(N, B, J) * (1 - probs_NBJ)
    is_new_NBJ = torch.arange(J, device=probs_NBJ.device) > chosen.shown.visible_len_NB[..., None]
    scores_NBJ = posterior_NBJ.masked_fill(~is_new_NBJ | (completed_NBJ == NO_TOKEN), -1.0)
    pairs_NB = likeliest(scores_NBJ.flatten(1), k)
    branch_NBJ = (pairs_NB // J)[..., None].expand(-1, -1, J)
    # Where there are fewer pairs than k, whole branches stand in, which leave nothing to draft.
    visible_len_NB = (pairs_NB % J).masked_fill(scores_NBJ.flatten(1).gather(1, pairs_NB) < 0, J)
    return Shown(completed_NBJ.gather(1, branch_NBJ), visible_len_NB, torch.full_like(pairs_NB, NO_TOKEN))
