"""Block geometry: which tokens a block covers, and which of them carry a label."""

# S tokens of a sequence, N blocks, G block size
from __future__ import annotations

import torch
from torch import Tensor


def anchors_of(loss_mask_S: Tensor, num_context: int) -> Tensor:
    """All anchors [N] of a sequence: an assistant token with a state, whose next token is an assistant token too.

    A block never starts on a turn's last token, nor in the prompt, where decoding never drafts.
    """
    followed = loss_mask_S[:-1] & loss_mask_S[1:]
    return followed[:num_context].nonzero().flatten()


def block_tokens(token_ids_S: Tensor, loss_mask_S: Tensor, anchors_N: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Recorded tokens [N, G] of the blocks, and which of them carry a label (bool [N, G]).

    Position k of a block holds token anchor + k and is labelled while the same assistant turn goes on: labels
    stop at the turn's end and at the sequence's, and position 0 never has one. Unlabelled positions past the
    sequence repeat its last token.
    """
    offsets_G = torch.arange(block_size, device=anchors_N.device)
    positions_NG = anchors_N[:, None] + offsets_G
    inside_NG = positions_NG < len(token_ids_S)
    positions_NG = positions_NG.clamp(max=len(token_ids_S) - 1)
    same_turn_NG = (loss_mask_S[positions_NG] & inside_NG).long().cumprod(dim=1).bool()
    return token_ids_S[positions_NG], same_turn_NG & (offsets_G > 0)


def show_prefix(token_ids_NG: Tensor, prefix_len_N: Tensor, mask_token_id: int) -> Tensor:
    """Block inputs [N, G]: the anchor and `prefix_len_N` further tokens visible, the mask token at the rest."""
    offsets_G = torch.arange(token_ids_NG.shape[1], device=token_ids_NG.device)
    return token_ids_NG.masked_fill(offsets_G > prefix_len_N[:, None], mask_token_id)


def accept_lengths(draft_NG: Tensor, token_ids_NG: Tensor, labelled_NG: Tensor) -> Tensor:
    """Accept length L [N]: leading draft tokens (positions 1..G-1) equal to the recorded ones."""
    right_NG = (draft_NG == token_ids_NG) & labelled_NG
    return right_NG[:, 1:].long().cumprod(dim=1).sum(dim=1)
