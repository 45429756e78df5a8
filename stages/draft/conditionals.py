"""Conditionals of a tree from one drafter, or from two: each step follows the drafter that knows most of the path."""

# N anchors, J drafted positions, A alternatives, B tables of a second drafter per anchor, C tables per anchor
from __future__ import annotations

from typing import TYPE_CHECKING

from ...data.lazy import LazyModule
from ..drafter.blocks import NO_TOKEN
from .tree import Conditionals

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")


def marginals(tokens_NJA: Tensor, probs_NJA: Tensor) -> Conditionals:
    """One table: a first draft, whose positions do not know of each other."""
    none_N1 = tokens_NJA.new_zeros(len(tokens_NJA), 1)
    shown_N1J = torch.full_like(tokens_NJA[:, None, :, 0], NO_TOKEN)
    return Conditionals(tokens_NJA[:, None], probs_NJA[:, None], shown_N1J, none_N1)


def with_second(
    found: Conditionals, shown_NBJ: Tensor, visible_len_NB: Tensor, tokens_NBJA: Tensor, probs_NBJA: Tensor
) -> Conditionals:
    """Adds what a second drafter expects after the first `visible_len_NB` tokens of `shown_NBJ`.

    Where the second drafter says nothing (probability 0), past its block, the first drafter's probabilities stand.

    Args:
        tokens_NBJA: the second drafter's likeliest tokens, best first, as many as the first drafter's.
    """
    is_silent_NBJ1 = probs_NBJA.amax(dim=3, keepdim=True) == 0
    return Conditionals(
        torch.cat([found.tokens_NCJA, torch.where(is_silent_NBJ1, found.tokens_NCJA[:, :1], tokens_NBJA)], dim=1),
        torch.cat([found.probs_NCJA, torch.where(is_silent_NBJ1, found.probs_NCJA[:, :1], probs_NBJA)], dim=1),
        torch.cat([found.shown_NCJ, shown_NBJ], dim=1),
        torch.cat([found.visible_len_NC, visible_len_NB], dim=1),
    )
