"""Prefix samplers: how many tokens after the anchor a training block shows to the VP-Drafter."""

# N blocks, G block size
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...data.cache.drafts import NOT_DRAFTED
from ..config import PrefixConfig


def sample_prefixes(
    config: PrefixConfig, num_labels_N: Tensor, accept_len_N: Tensor | None, block_size: int, generator: torch.Generator
) -> Tensor:
    """Prefix lengths [N], each below the block's number of labels, so that at least one position is predicted.

    Args:
        num_labels_N: labelled positions of each block, at least 1: G-1, or fewer where the turn ends inside it.
        accept_len_N: accept length of the first draft, `NOT_DRAFTED` where unknown; None without first drafts.
    """
    return SAMPLERS[config.sampler](config, num_labels_N, accept_len_N, block_size, generator)


def geometric(
    config: PrefixConfig, num_labels_N: Tensor, accept_len_N: Tensor | None, block_size: int, generator: torch.Generator
) -> Tensor:
    """Eq. 6 of arXiv 2606.04446: Pr(l = j) proportional to beta^j, j = 0..G-2, within the block's labels."""
    return _draw(_prior(config, block_size).expand(len(num_labels_N), -1), num_labels_N, generator)


def visible_geometric(
    config: PrefixConfig, num_labels_N: Tensor, accept_len_N: Tensor | None, block_size: int, generator: torch.Generator
) -> Tensor:
    """The public code's rule: visible = l + 1 from 2..G-1 with weight beta^visible, so l = 0 is never drawn.

    A block with a single label leaves no other choice than l = 0.
    """
    weights_NJ = _prior(config, block_size).repeat(len(num_labels_N), 1)
    weights_NJ[num_labels_N > 1, 0] = 0
    return _draw(weights_NJ, num_labels_N, generator)


def boundary(
    config: PrefixConfig, num_labels_N: Tensor, accept_len_N: Tensor | None, block_size: int, generator: torch.Generator
) -> Tensor:
    """l = L, the accept length of the first draft, for a share 1 - prior_share of the blocks; Eq. 6 for the rest.

    A block without a known rejection also falls back to Eq. 6: one that was accepted to its last label (whole, or
    cut by the end of the turn), or whose anchor was not drafted.
    """
    assert accept_len_N is not None
    prior_N = geometric(config, num_labels_N, None, block_size, generator)
    rejected_N = (accept_len_N != NOT_DRAFTED) & (accept_len_N < num_labels_N)
    from_prior_N = torch.rand(len(prior_N), generator=generator) < config.prior_share
    return torch.where(rejected_N & ~from_prior_N, accept_len_N.long(), prior_N)


Sampler = Callable[[PrefixConfig, Tensor, Tensor | None, int, torch.Generator], Tensor]
SAMPLERS: dict[str, Sampler] = {
    "geometric": geometric,
    "visible-geometric": visible_geometric,
    "boundary": boundary,
}
NEED_FIRST_DRAFTS = frozenset({"boundary"})


def _prior(config: PrefixConfig, block_size: int) -> Tensor:
    return config.beta ** torch.arange(block_size - 1, dtype=torch.float32)


def _draw(weights_NJ: Tensor, num_labels_N: Tensor, generator: torch.Generator) -> Tensor:
    lengths_J = torch.arange(weights_NJ.shape[1])
    weights_NJ = weights_NJ.masked_fill(lengths_J >= num_labels_N[:, None], 0.0)
    return torch.multinomial(weights_NJ, 1, generator=generator).squeeze(1)
