"""Trees of drafts: many paths of tokens that the target verifies in one pass, shared beginnings once.

A path's score is the estimated probability that the target would write it: the product of conditionals, each of them
from the drafter that knows most about the path. Growth takes the nodes of largest score, as in DDTree (arXiv
2604.12989). Scores fall along a path, so the tree of fewer nodes is the beginning of the tree of more nodes.
"""

# N anchors, C tables of conditionals per anchor, J drafted positions, A alternatives, M nodes of a tree
# F nodes of one depth, E = F * A of their children
from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ...data.lazy import LazyModule
from ..drafter.blocks import NO_TOKEN
from .posterior import likeliest

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

ROOT = -1
"""The anchor, as the parent of a node."""
ABSENT = -2
"""Stands for "no node"; equal to no index of a node, and to no parent."""


class Conditionals(NamedTuple):
    """Tables of what may follow at each position, each for paths that begin with certain tokens.

    A path follows the table with the longest beginning that the path has. The first table's beginning is empty.
    """

    tokens_NCJA: Tensor
    """int64: the likeliest tokens at the positions after the anchor, best first; no token twice in a row of A."""
    probs_NCJA: Tensor
    """float32: their probabilities; 0 marks the end of a drafter's block, and tokens that must not come."""
    shown_NCJ: Tensor
    """int64: the tokens that a table was made from; only the first `visible_len_NC` of them count."""
    visible_len_NC: Tensor
    """int64: number of tokens in a table's beginning."""

    @property
    def num_positions(self) -> int:
        """J."""
        return self.tokens_NCJA.shape[2]


class Tree(NamedTuple):
    """The nodes of N trees, the one of largest score first; every node comes after its parent."""

    tokens_NM: Tensor
    """int64; `NO_TOKEN` where a tree has fewer than M nodes."""
    parents_NM: Tensor
    """int64: the index of each node's parent, `ROOT` for a child of the anchor, `ABSENT` where there is no node."""
    depths_NM: Tensor
    """int64: 1 for a child of the anchor."""
    log_scores_NM: Tensor
    """float32: logarithm of the score; -inf where there is no node."""


class _Level(NamedTuple):
    """The nodes of one depth."""

    tokens_NF: Tensor
    parents_NF: Tensor
    """Index of the parent within the level above."""
    log_scores_NF: Tensor
    tables_NF: Tensor
    """The table that gives a node's children."""
    alive_NFC: Tensor
    """Whether the path has followed a table's beginning so far."""


def grow(conditionals: Conditionals, num_nodes: int) -> Tree:
    """The `num_nodes` paths of largest score after each anchor.

    The tree grows depth by depth. No depth has more than `num_nodes` nodes of the tree, and the parents of these are
    in the tree, so the best `num_nodes` of each depth are enough. Of equal scores, the smaller depth comes first.
    """
    level, levels = _root(conditionals), []
    for depth in range(1, conditionals.num_positions + 1):
        level = _next_level(conditionals, level, depth, num_nodes)
        levels.append(level)
    offset, parents = 0, []
    for depth, level in enumerate(levels):
        parents.append(torch.full_like(level.parents_NF, ROOT) if depth == 0 else level.parents_NF + offset)
        offset += levels[depth - 1].tokens_NF.shape[1] if depth else 0
    tokens, log_scores = (
        torch.cat([getattr(level, name) for level in levels], dim=1) for name in ("tokens_NF", "log_scores_NF")
    )
    depths = torch.cat([torch.full_like(level.tokens_NF, depth) for depth, level in enumerate(levels, 1)], dim=1)
    best_NM = likeliest(log_scores, num_nodes)
    log_scores_NM = log_scores.gather(1, best_NM)
    is_absent_NM = log_scores_NM == -torch.inf
    place = torch.full_like(tokens, ABSENT)
    place.scatter_(1, best_NM, torch.arange(best_NM.shape[1], device=best_NM.device).expand_as(best_NM))
    of_parent_NM = torch.cat(parents, dim=1).gather(1, best_NM)
    parents_NM = torch.where(of_parent_NM == ROOT, ROOT, place.gather(1, of_parent_NM.clamp(min=0)))
    return Tree(
        tokens.gather(1, best_NM).masked_fill(is_absent_NM, NO_TOKEN),
        parents_NM.masked_fill(is_absent_NM, ABSENT),
        depths.gather(1, best_NM),
        log_scores_NM,
    )


def best_chain(conditionals: Conditionals) -> Tensor:
    """The path [N, J] that takes the likeliest child at every node; `NO_TOKEN` after its end."""
    level, tokens = _root(conditionals), []
    for depth in range(1, conditionals.num_positions + 1):
        level = _next_level(conditionals, level, depth, 1)
        tokens.append(level.tokens_NF.masked_fill(level.log_scores_NF == -torch.inf, NO_TOKEN))
    return torch.cat(tokens, dim=1)


def path_probs(conditionals: Conditionals, paths_NBJ: Tensor) -> Tensor:
    """The probability [N, B, J] of each token of some paths after the tokens before it; 0 for an unlikely token."""
    root = _root(conditionals)
    N, B, J = paths_NBJ.shape
    tables_NB, alive_NBC = root.tables_NF.expand(N, B), root.alive_NFC.expand(N, B, -1)
    found = []
    for depth in range(1, J + 1):
        at_NBA = tables_NB[..., None].expand(-1, -1, conditionals.tokens_NCJA.shape[3])
        token_NB = paths_NBJ[..., depth - 1]
        is_token_NBA = conditionals.tokens_NCJA[:, :, depth - 1].gather(1, at_NBA) == token_NB[..., None]
        found.append((conditionals.probs_NCJA[:, :, depth - 1].gather(1, at_NBA) * is_token_NBA).sum(dim=2))
        tables_NB, alive_NBC = _follow(conditionals, token_NB, depth, tables_NB, alive_NBC)
    return torch.stack(found, dim=2)


def _follow(
    conditionals: Conditionals, tokens_NF: Tensor, depth: int, tables_NF: Tensor, alive_NFC: Tensor
) -> tuple[Tensor, Tensor]:
    """The table after one more token of each path, and which tables the path still follows.

    Args:
        tables_NF: the table before the token.
    """
    alive_NFC = alive_NFC & (tokens_NF[..., None] == conditionals.shown_NCJ[:, None, :, depth - 1])
    begun_NFC = alive_NFC & (conditionals.visible_len_NC[:, None] == depth)
    return _deepest(begun_NFC, tables_NF), alive_NFC


def _root(conditionals: Conditionals) -> _Level:
    visible_len_NC = conditionals.visible_len_NC
    zeros_N1 = visible_len_NC.new_zeros(len(visible_len_NC), 1)
    tables_N1 = _deepest(visible_len_NC[:, None] == 0, zeros_N1)
    alive_N1C = torch.ones_like(visible_len_NC[:, None], dtype=torch.bool)
    return _Level(zeros_N1, zeros_N1, zeros_N1.to(conditionals.probs_NCJA.dtype), tables_N1, alive_N1C)


def _next_level(conditionals: Conditionals, level: _Level, depth: int, num_nodes: int) -> _Level:
    """The best `num_nodes` children of a level's nodes."""
    _, C, _, A = conditionals.tokens_NCJA.shape
    at_NFA = level.tables_NF[..., None].expand(-1, -1, A)
    tokens_NE = conditionals.tokens_NCJA[:, :, depth - 1].gather(1, at_NFA).flatten(1)
    log_probs_NCA = conditionals.probs_NCJA[:, :, depth - 1].log()
    log_scores_NE = (level.log_scores_NF[..., None] + log_probs_NCA.gather(1, at_NFA)).flatten(1)
    best_NF = likeliest(log_scores_NE, num_nodes)
    tokens_NF, parents_NF = tokens_NE.gather(1, best_NF), best_NF // A
    alive_NFC = level.alive_NFC.gather(1, parents_NF[..., None].expand(-1, -1, C))
    alive_NFC = alive_NFC & (tokens_NF[..., None] == conditionals.shown_NCJ[:, None, :, depth - 1])
    begun_NFC = alive_NFC & (conditionals.visible_len_NC[:, None] == depth)
    inherited_NF = level.tables_NF.gather(1, parents_NF)
    return _Level(tokens_NF, parents_NF, log_scores_NE.gather(1, best_NF), _deepest(begun_NFC, inherited_NF), alive_NFC)


def _deepest(begun_NFC: Tensor, inherited_NF: Tensor) -> Tensor:
    """The last table whose beginning ends at a node; else the parent's table."""
    order_C = torch.arange(1, begun_NFC.shape[2] + 1, device=begun_NFC.device)
    last_NF = (begun_NFC * order_C).amax(dim=2)
    return torch.where(last_NF > 0, last_NF - 1, inherited_NF)
