"""The second pass: a drafter completes branches of the first draft."""

# R branches of any anchors, N anchors, B branches an anchor, G block size, J drafted positions, A alternatives
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..drafter.drafting import fill_blocks
from ..drafter.model import Context, Drafter
from ..drafter.target_pieces import TargetPieces
from .branches import NONE


class OpenBranches(NamedTuple):
    """Branches to complete, of whatever anchors."""

    anchors_R: Tensor
    """Positions of the anchors in their sequences."""
    anchor_ids_R: Tensor
    shown_RJ: Tensor
    """The branch's tokens after the anchor; those past its visible ones don't count."""
    visible_len_R: Tensor
    excluded_R: Tensor
    """Token that must not come right after the visible ones; `NONE`: any."""


def draft_anew(
    drafter: Drafter,
    pieces: TargetPieces,
    context: Context,
    num_blocks: Sequence[int] | None,
    anchors_N: Tensor,
    anchor_ids_N: Tensor,
    num_alternatives: int,
) -> tuple[Tensor, Tensor]:
    """First drafts: tokens [N, J, A], best first, and their probabilities."""
    N, G = len(anchors_N), drafter.shape.block_size
    block_ids_NG = anchor_ids_N.new_full((N, G), drafter.shape.mask_token_id)
    block_ids_NG[:, 0] = anchor_ids_N
    wanted_NG = (torch.arange(G, device=anchors_N.device) > 0).expand(N, G)
    tokens, probs = fill_blocks(
        drafter, pieces, context, block_ids_NG, anchors_N, wanted_NG, num_alternatives, num_blocks
    )
    return tokens[:, 1:], probs[:, 1:]


def complete_branches(
    drafter: Drafter,
    pieces: TargetPieces,
    context: Context,
    num_blocks: Sequence[int] | None,
    branches: OpenBranches,
) -> Tensor:
    """The branches' candidates [R, J] for the drafter's own J: visible tokens, then what the drafter proposes.

    Args:
        num_blocks: branches of each sequence in the context, which come one sequence after another; None: one sequence.
    """
    R, G = len(branches.anchors_R), drafter.shape.block_size
    visible_len_R = branches.visible_len_R.clamp(max=G - 1)
    shown_RJ = branches.shown_RJ[:, : G - 1]
    shown_RJ = torch.cat([shown_RJ, shown_RJ.new_zeros(R, G - 1 - shown_RJ.shape[1])], dim=1)
    k_J = torch.arange(1, G, device=shown_RJ.device)
    masked_RJ = k_J > visible_len_R[:, None]
    block_ids_RG = torch.cat(
        [branches.anchor_ids_R[:, None], shown_RJ.masked_fill(masked_RJ, drafter.shape.mask_token_id)], dim=1
    )
    wanted_RG = torch.cat([torch.zeros_like(masked_RJ[:, :1]), masked_RJ], dim=1)
    tokens_RGA, _ = fill_blocks(drafter, pieces, context, block_ids_RG, branches.anchors_R, wanted_RG, 2, num_blocks)
    best_RJ, second_RJ = tokens_RGA[:, 1:, 0], tokens_RGA[:, 1:, 1]
    first_masked_RJ = k_J == visible_len_R[:, None] + 1
    excluded_R1 = branches.excluded_R[:, None]
    is_excluded_RJ = first_masked_RJ & (best_RJ == excluded_R1) & (excluded_R1 != NONE)
    proposed_RJ = torch.where(is_excluded_RJ, second_RJ, best_RJ)
    return torch.where(masked_RJ, proposed_RJ, shown_RJ)
