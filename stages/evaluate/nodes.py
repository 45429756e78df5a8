"""How much a cycle commits that may verify a limited number of nodes, and how many nodes the cycle verifies.

A node is one draft token that the target verifies. Shared beginnings count once, and the anchor does not count.

Training counts accepted tokens by code of its own (`drafter.blocks.accept_lengths`). Replay checks training, so the two
share no code for acceptance.
"""

# N anchors, J drafted positions, B candidates per anchor, P = B * J, M nodes of a tree
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..draft.tree import ROOT, Tree
from ..drafter.blocks import NO_TOKEN


def leading_right(candidates: Tensor, recorded: Tensor) -> Tensor:
    """Accept length of candidates [..., J]: number of leading tokens that equal the recorded ones."""
    return (candidates == recorded[..., : candidates.shape[-1]]).long().cumprod(dim=-1).sum(dim=-1)


def chain_within(chain_NJ: Tensor, recorded_NJ: Tensor, nodes: int | None) -> tuple[Tensor, Tensor]:
    """Accept length and nodes [N] of a single path that is cut off after `nodes` tokens."""
    if nodes is not None:
        chain_NJ = chain_NJ[:, :nodes]
    return leading_right(chain_NJ, recorded_NJ), (chain_NJ != NO_TOKEN).sum(dim=1)


class TreeOutcomes:
    """A tree against the recorded continuation; the best nodes of a tree are a tree."""

    def __init__(self, tree: Tree, recorded_NJ: Tensor):
        self._num_nodes_N = (tree.tokens_NM != NO_TOKEN).sum(dim=1)
        self._ranks_NJ = torch.stack(list(ranks_on_path(tree, recorded_NJ)), dim=1)

    def within(self, nodes: int) -> tuple[Tensor, Tensor]:
        """Accept length and nodes [N] of the tree's best `nodes` nodes."""
        return (self._ranks_NJ < nodes).sum(dim=1), self._num_nodes_N.clamp(max=nodes)


def ranks_on_path(tree: Tree, path_NJ: Tensor) -> Iterator[Tensor]:
    """The index [N] of the node that each token of a path leads to; beyond all nodes where the tree lacks the node."""
    missing = tree.tokens_NM.shape[1]
    node_N = torch.full_like(path_NJ[:, 0], ROOT)
    for token_N in path_NJ.unbind(dim=1):
        is_next_NM = (tree.parents_NM == node_N[:, None]) & (tree.tokens_NM == token_N[:, None])
        node_N = torch.where(is_next_NM.any(dim=1), is_next_NM.long().argmax(dim=1), missing)
        yield node_N


class UnitedOutcomes:
    """Candidates, united to a tree, against the recorded continuation.

    The nodes come candidate by candidate: those of the first one, then those that the second one adds, and so on.
    """

    def __init__(self, candidates_NBJ: Tensor, recorded_NJ: Tensor):
        """
        Args:
            candidates_NBJ: `NO_TOKEN` past a candidate's end.
        """
        self._shape = candidates_NBJ.shape
        length_J = torch.arange(1, self._shape[2] + 1, device=candidates_NBJ.device)
        same_NBBJ = candidates_NBJ[:, :, None] == candidates_NBJ[:, None]
        shared_NBB = same_NBBJ.long().cumprod(dim=3).sum(dim=3).tril(diagonal=-1)
        is_node_NBJ = (length_J > shared_NBB.amax(dim=2)[..., None]) & (candidates_NBJ != NO_TOKEN)
        is_right_NBJ = length_J <= leading_right(candidates_NBJ, recorded_NJ[:, None])[..., None]
        self._ranks_NP = is_node_NBJ.flatten(1).cumsum(dim=1) - 1
        self._is_node_NP = is_node_NBJ.flatten(1)
        self._right_len_NP = (length_J * (is_node_NBJ & is_right_NBJ)).flatten(1)

    def within(self, num_candidates: int, nodes: int | None) -> tuple[Tensor, Tensor]:
        """Accept length and nodes [N] of the first candidates, cut off after `nodes` nodes."""
        size = num_candidates * self._shape[2]
        verified_NP = self._is_node_NP[:, :size]
        if nodes is not None:
            verified_NP = verified_NP & (self._ranks_NP[:, :size] < nodes)
        return (self._right_len_NP[:, :size] * verified_NP).amax(dim=1), verified_NP.sum(dim=1)
