"""Anchor samplers: at which tokens of a sequence the training blocks start."""

# M anchors to choose from, N chosen, G block size
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...data.cache.drafts import NOT_DRAFTED
from .config import AnchorConfig


class AnchorFacts(NamedTuple):
    """All anchors of a sequence, in order; each has at least one label."""

    positions_M: Tensor
    num_labels_M: Tensor
    """Labelled positions of the block that starts there, 1..G-1."""
    accept_len_M: Tensor | None
    """Accept length L of the first draft, `NOT_DRAFTED` where unknown; None without first drafts."""
    block_size: int


def choose_anchors(config: AnchorConfig, facts: AnchorFacts, num_anchors: int, generator: torch.Generator) -> Tensor:
    """Indices [N] into the sequence's anchors, ascending and distinct, at most `num_anchors`."""
    chosen = SAMPLERS[config.sampler](config, facts, num_anchors, generator)
    return chosen.sort().values


def uniform(config: AnchorConfig, facts: AnchorFacts, num_anchors: int, generator: torch.Generator) -> Tensor:
    """Every anchor with the same chance."""
    return torch.randperm(len(facts.positions_M), generator=generator)[:num_anchors]


def chain(config: AnchorConfig, facts: AnchorFacts, num_anchors: int, generator: torch.Generator) -> Tensor:
    """The anchors that decoding with the first draft visits; others, uniformly, for a share `uniform_share`.

    With more visited anchors than fit, a random part of them.
    """
    order = torch.randperm(len(facts.positions_M), generator=generator)
    visited_M = visited_anchors(facts)
    visited, others = order[visited_M[order]], order[~visited_M[order]]
    visited = visited[: max(1, round((1 - config.uniform_share) * num_anchors))]
    num_others = len(visited) * config.uniform_share / (1 - config.uniform_share)
    return torch.cat([visited, others[: min(round(num_others), num_anchors - len(visited))]])


def failure(config: AnchorConfig, facts: AnchorFacts, num_anchors: int, generator: torch.Generator) -> Tensor:
    """Without replacement, with weight (L + 1)^-failure_power; L = G-1 where no rejection is known.

    The keys log(u) / w of Efraimidis and Spirakis (2006) turn weights into such a draw.
    """
    assert facts.accept_len_M is not None
    accept_len_M = facts.accept_len_M.long()
    rejected_M = (accept_len_M != NOT_DRAFTED) & (accept_len_M < facts.num_labels_M)
    accept_len_M = torch.where(rejected_M, accept_len_M, facts.block_size - 1)
    weights_M = (accept_len_M + 1.0) ** -config.failure_power
    keys_M = torch.rand(len(weights_M), generator=generator, dtype=torch.float64).log() / weights_M
    return keys_M.topk(min(num_anchors, len(keys_M))).indices


Sampler = Callable[[AnchorConfig, AnchorFacts, int, torch.Generator], Tensor]
SAMPLERS: dict[str, Sampler] = {"uniform": uniform, "chain": chain, "failure": failure}
READ_BOUNDARIES = frozenset({"chain", "failure"})


def visited_anchors(facts: AnchorFacts) -> Tensor:
    """bool [M]: the anchors of decoding with the first draft alone: a turn's first token, then after each commit.

    A cycle at position p commits L drafted tokens and a bonus token, the next anchor: p + L + 1. An anchor that was
    not drafted commits the bonus token alone.
    """
    assert facts.accept_len_M is not None
    positions_M = facts.positions_M
    accept_len_M = facts.accept_len_M.long()
    accept_len_M = torch.where(accept_len_M == NOT_DRAFTED, 0, accept_len_M)
    size = int(positions_M[-1]) + facts.block_size + 2
    # Positions that are no anchor lead to the last slot, which leads to itself.
    following = torch.full((size,), size - 1)
    following[positions_M] = positions_M + accept_len_M + 1
    visited = torch.zeros(size, dtype=torch.bool)
    first_of_turn_M = torch.cat([torch.ones(1, dtype=torch.bool), positions_M[1:] != positions_M[:-1] + 1])
    visited[positions_M[first_of_turn_M]] = True
    # Every round doubles how many cycles ahead `following` looks, and how many are marked.
    for _ in range(size.bit_length()):
        visited[following[visited]] = True
        following = following[following]
    return visited[positions_M]
