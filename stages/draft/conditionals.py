"""Conditionals of a tree from one drafter, or from two: each step follows the drafter that knows most about it."""

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

    Where these tokens are the first draft's own, the next token has the mean of both drafters' probabilities. Where one
    of the drafters says nothing (probability 0), the other one's stand alone.

    Args:
        tokens_NBJA: the second drafter's likeliest tokens, best first, as many as the first drafter's.
    """
    first_tokens_NBJA, first_probs_NBJA = (
        table[:, :1].expand_as(tokens_NBJA) for table in (found.tokens_NCJA, found.probs_NCJA)
    )
    is_silent_NBJ1 = probs_NBJA.amax(dim=3, keepdim=True) == 0
    j_J = torch.arange(tokens_NBJA.shape[2], device=tokens_NBJA.device)
    is_shown_NBJ = j_J < visible_len_NB[..., None]
    on_draft_NB1 = ((shown_NBJ == first_tokens_NBJA[..., 0]) | ~is_shown_NBJ).all(dim=2, keepdim=True)
    is_next_NBJ = j_J == visible_len_NB[..., None]
    mean = mean_of_both(first_tokens_NBJA, first_probs_NBJA, tokens_NBJA, probs_NBJA)
    has_mean_NBJ1 = (is_next_NBJ & on_draft_NB1)[..., None] & (first_probs_NBJA > 0).any(dim=3, keepdim=True)
    tokens, probs = (
        torch.where(is_silent_NBJ1, of_first, torch.where(has_mean_NBJ1, of_both, of_second))
        for of_first, of_both, of_second in zip(
            (first_tokens_NBJA, first_probs_NBJA), mean, (tokens_NBJA, probs_NBJA), strict=True
        )
    )
    return Conditionals(
        torch.cat([found.tokens_NCJA, tokens], dim=1),
        torch.cat([found.probs_NCJA, probs], dim=1),
        torch.cat([found.shown_NCJ, shown_NBJ], dim=1),
        torch.cat([found.visible_len_NC, visible_len_NB], dim=1),
    )


def mean_of_both(first: Tensor, first_probs: Tensor, second: Tensor, second_probs: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest tokens [..., A] by the mean of two drafters' probabilities, and these means.

    A token that is not among a drafter's likeliest has probability 0 there.
    """
    same_AA = second[..., :, None] == first[..., None, :]
    agreed = (same_AA * second_probs[..., :, None]).sum(dim=-2)
    alone = second_probs.masked_fill(same_AA.any(dim=-1), 0.0)
    probs = torch.cat([first_probs + agreed, alone], dim=-1) / 2
    order = probs.sort(dim=-1, descending=True, stable=True).indices[..., : first.shape[-1]]
    return torch.cat([first, second], dim=-1).gather(-1, order), probs.gather(-1, order)
