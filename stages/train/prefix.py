"""Prefix samplers: how many tokens after the anchor a training block shows to the VP-Drafter.

A sampler gives each block weights over the prefix lengths l = 0..G-2, which need not sum to one. Two rules hold for
all samplers. First, a block must keep at least one label to predict, so a length that reaches the block's number of
labels gets probability 0. Second, a block whose weights are all 0 then takes Eq. 6. That happens where the first
draft is not known to fail, because all labels were accepted or because the anchor was not drafted; `topk` and
`past-boundary` name one more case each.

A new sampler is a function here (or anywhere that is imported before the settings are read) under `@prefix_sampler`.
"""

# N blocks, G block size, J = G - 1 prefix lengths, A alternatives
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from ...data.lazy import LazyModule
from ...data.registry import Registry
from ..draft.posterior import boundary_posterior, likeliest
from .samplers import BOUNDARIES, CONFIDENCES, NOTHING, Reads, Sampler, registering

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .config import PrefixConfig
    from .drafted import Drafted
else:
    torch = LazyModule("torch")


class BlockFacts(NamedTuple):
    """What is known of N blocks when their prefixes are chosen."""

    num_labels_N: Tensor
    """int64: labeled positions, at least 1: G-1, or fewer where the turn ends inside the block."""
    block_size: int
    drafted: Drafted | None
    """The first drafts, with what the sampler reads of them; None if no sampler in use reads first drafts."""


PrefixFunction = Callable[["PrefixConfig", BlockFacts], "Tensor"]
PREFIX_SAMPLERS: Registry[Sampler[PrefixFunction]] = Registry("prefix sampler")


def prefix_sampler(name: str, reads: Reads = NOTHING) -> Callable[[PrefixFunction], PrefixFunction]:
    """Registers a prefix sampler: a function from settings and facts to weights [N, J] of the lengths 0..G-2.

    Args:
        reads: how much of the first drafts the function reads.
    """
    return registering(PREFIX_SAMPLERS, name, reads)


def draw_prefixes(config: PrefixConfig, facts: BlockFacts, uniform_N: Tensor) -> Tensor:
    """Prefix lengths (int64 [N]), each below the block's number of labels.

    Args:
        uniform_N: a number in [0, 1) for each block. The draw depends on nothing else that is random, so that every
            device draws the same.
    """
    cumulated_NJ = prefix_distribution(config, facts).cumsum(dim=1)
    return (uniform_N[:, None] * cumulated_NJ[:, -1:] >= cumulated_NJ).sum(dim=1)


def prefix_distribution(config: PrefixConfig, facts: BlockFacts) -> Tensor:
    """The configured sampler's probabilities [N, J] of each block's prefix lengths."""
    return _within_labels(PREFIX_SAMPLERS[config.sampler].function(config, facts), config, facts)


def samplers_in_use(config: PrefixConfig) -> list[str]:
    """The configured sampler, or those of the mixture, by name."""
    return sorted(config.mixture) if config.sampler == "mixture" else [config.sampler]


@prefix_sampler("geometric")
def geometric(config: PrefixConfig, facts: BlockFacts) -> Tensor:
    """Eq. 6 of arXiv 2606.04446: Pr(l = j) proportional to beta^j, j = 0..G-2."""
    return _eq_6(config, facts)


@prefix_sampler("visible-geometric")
def visible_geometric(config: PrefixConfig, facts: BlockFacts) -> Tensor:
    """The public code's rule, which is Eq. 6 without l = 0.

    The code draws visible = l + 1 from 2..G-1 with weight beta^visible. A block with a single label takes l = 0.
    """
    return _eq_6(config, facts) * (_lengths(facts) >= 1)


@prefix_sampler("boundary", reads=BOUNDARIES)
def boundary(config: PrefixConfig, facts: BlockFacts) -> Tensor:
    """l = L, the accept length of the first draft: the prefix ends where the draft fails."""
    return _where_the_draft_fails(facts, 0)


@prefix_sampler("past-boundary", reads=BOUNDARIES)
def past_boundary(config: PrefixConfig, facts: BlockFacts) -> Tensor:
    """l = L + 1: the prefix ends with the right token at the place where the first draft fails.

    A block whose draft fails at its last label takes Eq. 6, since that prefix would leave no label.
    """
    return _where_the_draft_fails(facts, 1)


@prefix_sampler("posterior", reads=CONFIDENCES)
def posterior(config: PrefixConfig, facts: BlockFacts) -> Tensor:
    """Pr(l = i) proportional to r(i) = (c_1 ... c_i) (1 - c_(i+1)): where the first drafter expects to fail."""
    drafted, confidence_NJ = _confidences(facts)
    return boundary_posterior(confidence_NJ) * drafted.has_draft_N[:, None]


@prefix_sampler("topk", reads=CONFIDENCES)
def topk(config: PrefixConfig, facts: BlockFacts) -> Tensor:
    """Uniform over the k lengths of largest r(i), which decoding launches as branches.

    Lengths past L are left out, since their prefix holds a wrong token already. A block whose launched lengths are all
    past L takes Eq. 6, although its rejection is known: decoding launches no right branch there.
    """
    drafted, confidence_NJ = _confidences(facts)
    chosen_NK = likeliest(boundary_posterior(confidence_NJ), config.k)
    launched_NJ = torch.zeros_like(confidence_NJ).scatter(1, chosen_NK, 1.0)
    right_NJ = (_lengths(facts) <= drafted.accept_len_N[:, None]) & drafted.has_draft_N[:, None]
    return launched_NJ * right_NJ


@prefix_sampler("mixture")
def mixture(config: PrefixConfig, facts: BlockFacts) -> Tensor:
    """A weighted mean of other samplers, which `mixture` names with their weights."""
    total = sum(config.mixture.values())
    mixed_NJ = torch.zeros(len(facts.num_labels_N), facts.block_size - 1, device=facts.num_labels_N.device)
    for name, weight in config.mixture.items():
        weights_NJ = PREFIX_SAMPLERS[name].function(config, facts)
        mixed_NJ = mixed_NJ + weight / total * _within_labels(weights_NJ, config, facts)
    return mixed_NJ


def _within_labels(weights_NJ: Tensor, config: PrefixConfig, facts: BlockFacts) -> Tensor:
    """Probabilities [N, J]: 0 for a length that leaves no label; Eq. 6 where all weights are 0 then."""
    leaves_label_NJ = _lengths(facts) < facts.num_labels_N[:, None]
    weights_NJ = weights_NJ * leaves_label_NJ
    nothing_left_N = weights_NJ.sum(dim=1) == 0
    weights_NJ = torch.where(nothing_left_N[:, None], _eq_6(config, facts) * leaves_label_NJ, weights_NJ)
    return weights_NJ / weights_NJ.sum(dim=1, keepdim=True)


def _lengths(facts: BlockFacts) -> Tensor:
    """The prefix lengths 0..G-2, int64 [J]."""
    return torch.arange(facts.block_size - 1, device=facts.num_labels_N.device)


def _eq_6(config: PrefixConfig, facts: BlockFacts) -> Tensor:
    if config.beta <= 1:
        return (config.beta ** _lengths(facts).float()).expand(len(facts.num_labels_N), -1)
    # In proportion to the weight of the longest length that leaves a label, so that no weight is too large for float32.
    below_longest_NJ = (_lengths(facts) - (facts.num_labels_N[:, None] - 1)).clamp(max=0)
    return config.beta ** below_longest_NJ.float()


def _where_the_draft_fails(facts: BlockFacts, num_further: int) -> Tensor:
    """Weight 1 for l = L + `num_further` where the draft is known to fail, float32 [N, J]."""
    assert facts.drafted is not None
    chosen_NJ = _lengths(facts) == facts.drafted.accept_len_N[:, None] + num_further
    return (chosen_NJ & facts.drafted.fails_within(facts.num_labels_N)[:, None]).float()


def _confidences(facts: BlockFacts) -> tuple[Drafted, Tensor]:
    assert facts.drafted is not None
    assert facts.drafted.confidence_NJ is not None
    return facts.drafted, facts.drafted.confidence_NJ
