"""The second pass: a drafter completes branches of the first draft."""

# R branches of any anchors, N anchors, B branches an anchor, G block size, J drafted positions, A alternatives
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..drafter.drafting import fill_blocks
from ..drafter.model import Context, Drafter
from ..drafter.target_pieces import TargetPieces
from ..evaluate.branches import NONE


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
    """The branches' candidates [R, J]: visible tokens, then what the drafter proposes within its block, then `NONE`.

    J is the larger of the branches' and the drafter's own.

    Args:
        num_blocks: branches of each sequence in the context, which come one sequence after another; None: one sequence.
    """
    G = drafter.shape.block_size
    width = max(branches.shown_RJ.shape[1], G - 1)
    shown_RJ = pad(branches.shown_RJ, (0, width - branches.shown_RJ.shape[1]), value=NONE)
    k_J = torch.arange(1, width + 1, device=shown_RJ.device)
    visible_len_R1 = branches.visible_len_R[:, None]
    masked_RJ = k_J > visible_len_R1
    wanted_RJ = masked_RJ[:, : G - 1]
    tokens_RJA, _ = _fill_branches(drafter, pieces, context, num_blocks, branches, shown_RJ, wanted_RJ, 2)
    best_RJ, second_RJ = tokens_RJA.unbind(dim=2)
    excluded_R1 = branches.excluded_R[:, None]
    ruled_out_RJ = (k_J[: G - 1] == visible_len_R1 + 1) & (best_RJ == excluded_R1) & (excluded_R1 != NONE)
    proposed_RJ = pad(torch.where(ruled_out_RJ, second_RJ, best_RJ), (0, width - (G - 1)), value=NONE)
    return torch.where(masked_RJ, proposed_RJ, shown_RJ)


def rank_next(
    drafter: Drafter,
    pieces: TargetPieces,
    context: Context,
    num_blocks: Sequence[int] | None,
    branches: OpenBranches,
    num_alternatives: int,
) -> tuple[Tensor, Tensor]:
    """The likeliest tokens [R, A] right after the visible ones, best first, and their probabilities.

    Where the visible tokens reach the end of the drafter's block: `NONE` with probability 0.
    """
    k_J = torch.arange(1, drafter.shape.block_size, device=branches.shown_RJ.device)
    wanted_RJ = k_J == branches.visible_len_R[:, None] + 1
    width = max(branches.shown_RJ.shape[1], drafter.shape.block_size - 1)
    shown_RJ = pad(branches.shown_RJ, (0, width - branches.shown_RJ.shape[1]), value=NONE)
    tokens_RJA, probs_RJA = _fill_branches(
        drafter, pieces, context, num_blocks, branches, shown_RJ, wanted_RJ, num_alternatives
    )
    # All other positions hold zeros.
    tokens_RA = tokens_RJA.sum(dim=1).masked_fill(~wanted_RJ.any(dim=1)[:, None], NONE)
    return tokens_RA, probs_RJA.sum(dim=1)


def _fill_branches(
    drafter: Drafter,
    pieces: TargetPieces,
    context: Context,
    num_blocks: Sequence[int] | None,
    branches: OpenBranches,
    shown_RJ: Tensor,
    wanted_RJ: Tensor,
    num_alternatives: int,
) -> tuple[Tensor, Tensor]:
    """Tokens and probabilities [R, G-1, A] at the wanted positions of the drafter's block, zeros elsewhere."""
    G = drafter.shape.block_size
    k_J = torch.arange(1, shown_RJ.shape[1] + 1, device=shown_RJ.device)
    masked_RJ = k_J > branches.visible_len_R[:, None]
    inside_RJ = torch.where(masked_RJ, drafter.shape.mask_token_id, shown_RJ)[:, : G - 1]
    block_ids_RG = torch.cat([branches.anchor_ids_R[:, None], inside_RJ], dim=1)
    wanted_RG = pad(wanted_RJ, (1, 0), value=False)
    tokens_RGA, probs_RGA = fill_blocks(
        drafter, pieces, context, block_ids_RG, branches.anchors_R, wanted_RG, num_alternatives, num_blocks
    )
    return tokens_RGA[:, 1:], probs_RGA[:, 1:]
