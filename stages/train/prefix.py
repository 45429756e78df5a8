"""Prefix samplers: how many tokens after the anchor a training block shows to the VP-Drafter.

A sampler gives each block a distribution over prefix lengths l = 0..G-2, as weights that need not sum to one.
Two rules hold for all of them: at least one label must be left to predict, so a length that reaches the block's
number of labels has no chance; and a block for which a sampler leaves no length at all takes Eq. 6. That is so
where the first draft is not known to fail: it was accepted to the block's last label (whole, or cut by the end of
the turn), or the anchor was not drafted.
"""

# N blocks, G block size, J = G-1 prefix lengths
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...data.cache.drafts import NOT_DRAFTED
from .config import PrefixConfig


class BlockFacts(NamedTuple):
    """What is known of each block when its prefix is chosen."""

    num_labels_N: Tensor
    """Labelled positions, at least 1: G-1, or fewer where the turn ends inside the block."""
    accept_len_N: Tensor | None
    """Accept length L of the first draft, `NOT_DRAFTED` where unknown; None without first drafts."""
    confidence_NJ: Tensor | None
    """Confidences c_1..c_(G-1) of the first draft; None if no sampler asks for them."""


def draw_prefixes(config: PrefixConfig, facts: BlockFacts, block_size: int, uniform_N: Tensor) -> Tensor:
    """Prefix lengths [N], each below the block's number of labels.

    Args:
        uniform_N: a number in [0, 1) for each block, which alone decides the draw: so it is the same on every device.
    """
    cumulated_NJ = prefix_distribution(config, facts, block_size).cumsum(dim=1)
    return (uniform_N[:, None] * cumulated_NJ[:, -1:] >= cumulated_NJ).sum(dim=1)


def prefix_distribution(config: PrefixConfig, facts: BlockFacts, block_size: int) -> Tensor:
    """The configured sampler's probabilities [N, G-1] of each block's prefix lengths."""
    return _within_labels(SAMPLERS[config.sampler](config, facts, block_size), config, facts)


def geometric(config: PrefixConfig, facts: BlockFacts, block_size: int) -> Tensor:
    """Eq. 6 of arXiv 2606.04446: Pr(l = j) proportional to beta^j, j = 0..G-2."""
    return _eq_6(config, facts, block_size - 1)


def visible_geometric(config: PrefixConfig, facts: BlockFacts, block_size: int) -> Tensor:
    """The public code's rule: visible = l + 1 from 2..G-1 with weight beta^visible, so l = 0 is never drawn.

    A block with a single label leaves no other choice than l = 0.
    """
    lengths_J = torch.arange(block_size - 1, device=facts.num_labels_N.device)
    return _eq_6(config, facts, block_size - 1) * (lengths_J >= 1)


def boundary(config: PrefixConfig, facts: BlockFacts, block_size: int) -> Tensor:
    """l = L, the accept length of the first draft: the place where decoding is rescued."""
    rejected_N, accept_len_N = _rejections(facts)
    return _one_hot(accept_len_N, rejected_N, block_size - 1)


def past_boundary(config: PrefixConfig, facts: BlockFacts, block_size: int) -> Tensor:
    """l = L + 1: the prefix ends with the right token at the place where the draft was wrong."""
    rejected_N, accept_len_N = _rejections(facts)
    return _one_hot(accept_len_N + 1, rejected_N, block_size - 1)


def posterior(config: PrefixConfig, facts: BlockFacts, block_size: int) -> Tensor:
    """Pr(l = i) proportional to r(i) = (c_1 ... c_i) (1 - c_(i+1)): where the first drafter believes it fails."""
    accept_len_N, confidence_NJ = _drafted(facts)
    return _boundary_posterior(confidence_NJ) * (accept_len_N != NOT_DRAFTED)[:, None]


def topk(config: PrefixConfig, facts: BlockFacts, block_size: int) -> Tensor:
    """Uniform over the k lengths of largest r(i), the branches that decoding launches, but for those past L.

    Their prefix holds a wrong token already.
    """
    accept_len_N, confidence_NJ = _drafted(facts)
    chosen = _boundary_posterior(confidence_NJ).topk(min(config.k, block_size - 1), dim=1).indices
    launched_NJ = torch.zeros_like(confidence_NJ).scatter(1, chosen, 1.0)
    lengths_J = torch.arange(block_size - 1, device=accept_len_N.device)
    right_NJ = (lengths_J <= accept_len_N[:, None]) & (accept_len_N != NOT_DRAFTED)[:, None]
    return launched_NJ * right_NJ


def mixture(config: PrefixConfig, facts: BlockFacts, block_size: int) -> Tensor:
    """A weighted mean of other samplers, of which a share `floor` is spread evenly over all lengths."""
    num_blocks, device = len(facts.num_labels_N), facts.num_labels_N.device
    even_NJ = _within_labels(torch.ones(num_blocks, block_size - 1, device=device), config, facts)
    total = sum(config.mixture.values())
    mixed_NJ = config.floor * even_NJ
    for name, weight in config.mixture.items():
        weights_NJ = SAMPLERS[name](config, facts, block_size)
        mixed_NJ = mixed_NJ + (1 - config.floor) * weight / total * _within_labels(weights_NJ, config, facts)
    return mixed_NJ


Sampler = Callable[[PrefixConfig, BlockFacts, int], Tensor]
SAMPLERS: dict[str, Sampler] = {
    "geometric": geometric,
    "visible-geometric": visible_geometric,
    "boundary": boundary,
    "past-boundary": past_boundary,
    "posterior": posterior,
    "topk": topk,
    "mixture": mixture,
}
READ_BOUNDARIES = frozenset({"boundary", "past-boundary", "posterior", "topk"})
READ_CONFIDENCES = frozenset({"posterior", "topk"})


def samplers_in_use(config: PrefixConfig) -> frozenset[str]:
    """The configured sampler, or those of the mixture."""
    return frozenset(config.mixture if config.sampler == "mixture" else [config.sampler])


def _within_labels(weights_NJ: Tensor, config: PrefixConfig, facts: BlockFacts) -> Tensor:
    """Probabilities [N, J]: no length that leaves no label, Eq. 6 where nothing is left."""
    lengths_J = torch.arange(weights_NJ.shape[1], device=weights_NJ.device)
    leaves_label_NJ = lengths_J < facts.num_labels_N[:, None]
    weights_NJ = weights_NJ * leaves_label_NJ
    nothing_left_N = weights_NJ.sum(dim=1) == 0
    prior_NJ = _eq_6(config, facts, weights_NJ.shape[1]) * leaves_label_NJ
    weights_NJ = torch.where(nothing_left_N[:, None], prior_NJ, weights_NJ)
    return weights_NJ / weights_NJ.sum(dim=1, keepdim=True)


def _eq_6(config: PrefixConfig, facts: BlockFacts, num_lengths: int) -> Tensor:
    lengths_J = torch.arange(num_lengths, dtype=torch.float32, device=facts.num_labels_N.device)
    return (config.beta**lengths_J).expand(len(facts.num_labels_N), -1)


def _rejections(facts: BlockFacts) -> tuple[Tensor, Tensor]:
    """Which blocks have a known boundary, and the accept lengths (int64)."""
    assert facts.accept_len_N is not None
    accept_len_N = facts.accept_len_N.long()
    return (accept_len_N != NOT_DRAFTED) & (accept_len_N < facts.num_labels_N), accept_len_N


def _drafted(facts: BlockFacts) -> tuple[Tensor, Tensor]:
    assert facts.accept_len_N is not None
    assert facts.confidence_NJ is not None
    return facts.accept_len_N.long(), facts.confidence_NJ.float()


def _one_hot(lengths_N: Tensor, known_N: Tensor, num_lengths: int) -> Tensor:
    lengths_J = torch.arange(num_lengths, device=lengths_N.device)
    return ((lengths_J == lengths_N[:, None]) & known_N[:, None]).float()


def _boundary_posterior(confidence_NJ: Tensor) -> Tensor:
    reached_NJ = torch.cat([torch.ones_like(confidence_NJ[:, :1]), confidence_NJ.cumprod(dim=1)[:, :-1]], dim=1)
    return reached_NJ * (1 - confidence_NJ)
