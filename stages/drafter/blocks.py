"""Block geometry: which tokens a block covers, and which of them carry a label."""

# S tokens of a sequence, N blocks, G block size, J = G - 1 positions after the anchor
from __future__ import annotations

from typing import TYPE_CHECKING

from ...data.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

NO_TOKEN = -1
"""Stands for "no token" where a token id may be absent; equal to no token id."""


def anchors_of(loss_mask_S: Tensor, num_context: int) -> Tensor:
    """All anchors [N] of a sequence: assistant tokens with a state, whose next token is an assistant token too.

    A turn's last token and the prompt's tokens are no anchors, since decoding never drafts there.

    Args:
        num_context: number of tokens that have a state, from the first on.
    """
    followed = loss_mask_S[:-1] & loss_mask_S[1:]
    return followed[:num_context].nonzero().flatten()


def block_tokens(token_ids_S: Tensor, loss_mask_S: Tensor, anchors_N: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Recorded tokens [N, G] of the blocks, and which of them carry a label (bool [N, G]).

    Position k of a block holds token anchor + k. The position has a label if its token belongs to the anchor's turn;
    position 0, the anchor itself, has none. Positions past the sequence repeat the sequence's last token.
    """
    offsets_G = torch.arange(block_size, device=anchors_N.device)
    positions_NG = anchors_N[:, None] + offsets_G
    inside_NG = positions_NG < len(token_ids_S)
    positions_NG = positions_NG.clamp(max=len(token_ids_S) - 1)
    same_turn_NG = (loss_mask_S[positions_NG] & inside_NG).long().cumprod(dim=1).bool()
    return token_ids_S[positions_NG], same_turn_NG & (offsets_G > 0)


def show_prefix(token_ids_NG: Tensor, prefix_len_N: Tensor, mask_token_id: int) -> Tensor:
    """Block inputs [N, G]: the anchor and the next `prefix_len_N` tokens are visible, the rest is the mask token."""
    offsets_G = torch.arange(token_ids_NG.shape[1], device=token_ids_NG.device)
    return token_ids_NG.masked_fill(offsets_G > prefix_len_N[:, None], mask_token_id)


def accept_lengths(draft_NJ: Tensor, token_ids_NG: Tensor, labeled_NG: Tensor) -> Tensor:
    """Accept length L [N]: number of leading draft tokens that equal the recorded ones.

    Replay counts accepted tokens by code of its own (`evaluate.replay.leading_right`): replay checks training, so the
    two share no code for acceptance.
    """
    right_NJ = (draft_NJ == token_ids_NG[:, 1:]) & labeled_NG[:, 1:]
    return right_NJ.long().cumprod(dim=1).sum(dim=1)
