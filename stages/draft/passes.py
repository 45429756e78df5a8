"""Passes of a drafter over blocks of packed sequences: first drafts, and branches of first drafts completed."""

# N anchors, R branches of any anchors, G block size, J = G - 1 drafted positions, A alternatives
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...data.cache.arrays import NUM_ALTERNATIVES
from ..drafter.blocks import NO_TOKEN
from ..drafter.drafting import fill_blocks
from ..drafter.model import Context, Drafter
from ..drafter.target_pieces import TargetPieces


class OpenBranches(NamedTuple):
    """Branches that a drafter completes, of any anchors."""

    anchors_R: Tensor
    """Positions of the anchors in their sequences."""
    anchor_ids_R: Tensor
    """Tokens of the anchors."""
    shown_RJ: Tensor
    """The branch's tokens after the anchor; only the first `visible_len_R` of them are used."""
    visible_len_R: Tensor
    excluded_R: Tensor
    """Token that must not follow the visible ones; `NO_TOKEN`: any may."""


def cut_into_passes(sequence_N: Tensor, num_sequences: int, blocks_per_pass: int) -> Iterator[tuple[slice, list[int]]]:
    """Cuts blocks into passes, and counts each pass's blocks of every sequence.

    Args:
        sequence_N: the number of each block's sequence, ascending.
    """
    for start in range(0, len(sequence_N), blocks_per_pass):
        chunk = slice(start, start + blocks_per_pass)
        yield chunk, torch.bincount(sequence_N[chunk], minlength=num_sequences).tolist()


def draft_all(
    drafter: Drafter,
    pieces: TargetPieces,
    context: Context,
    sequence_N: Tensor,
    anchors_N: Tensor,
    anchor_ids_N: Tensor,
    blocks_per_pass: int,
    num_alternatives: int = NUM_ALTERNATIVES,
) -> tuple[Tensor, Tensor]:
    """First drafts at all anchors, pass by pass: tokens [N, J, A], best first, and their probabilities (float32).

    Args:
        sequence_N: the number of each anchor's sequence in the context, ascending.
    """
    shape = len(anchors_N), drafter.shape.block_size - 1, num_alternatives
    tokens_NJA, probs_NJA = anchor_ids_N.new_zeros(shape), torch.zeros(shape, device=anchor_ids_N.device)
    for chunk, num_blocks in cut_into_passes(sequence_N, len(context.num_tokens), blocks_per_pass):
        tokens_NJA[chunk], probs_NJA[chunk] = draft_pass(
            drafter, pieces, context, num_blocks, anchors_N[chunk], anchor_ids_N[chunk], num_alternatives
        )
    return tokens_NJA, probs_NJA


def draft_pass(
    drafter: Drafter,
    pieces: TargetPieces,
    context: Context,
    num_blocks: Sequence[int] | None,
    anchors_N: Tensor,
    anchor_ids_N: Tensor,
    num_alternatives: int,
) -> tuple[Tensor, Tensor]:
    """First drafts in one pass: tokens [N, J, A], best first, and their probabilities (float32).

    Args:
        num_blocks: anchors of each sequence in the context, one sequence after another; None: one sequence.
    """
    N, G = len(anchors_N), drafter.shape.block_size
    block_ids_NG = anchor_ids_N.new_full((N, G), drafter.shape.mask_token_id)
    block_ids_NG[:, 0] = anchor_ids_N
    wanted_NG = (torch.arange(G, device=anchors_N.device) > 0).expand(N, G)
    tokens_NGA, probs_NGA = fill_blocks(
        drafter, pieces, context, block_ids_NG, anchors_N, wanted_NG, num_alternatives, num_blocks
    )
    return tokens_NGA[:, 1:], probs_NGA[:, 1:]


def complete_branches(
    drafter: Drafter,
    pieces: TargetPieces,
    context: Context,
    num_blocks: Sequence[int] | None,
    branches: OpenBranches,
) -> Tensor:
    """The branches' candidates [R, J]: the visible tokens, the drafter's tokens to its block's end, then `NO_TOKEN`.

    J is the larger one of the branches' J and the drafter's own.

    Args:
        num_blocks: branches of each sequence in the context, one sequence after another; None: one sequence.
    """
    tokens_RJA, _ = redraft(drafter, pieces, context, num_blocks, branches, 2)
    return completed(branches.shown_RJ, branches.visible_len_R, branches.excluded_R, tokens_RJA)


def completed(shown: Tensor, visible_len: Tensor, excluded: Tensor, tokens: Tensor) -> Tensor:
    """Candidates [..., J]: the visible tokens [..., J'], then the likeliest ones of the redraft [..., J, A].

    Right after the visible tokens, the second likeliest token comes if the likeliest one is excluded.
    """
    j_J = torch.arange(tokens.shape[-2], device=tokens.device)
    best, second = tokens[..., 0], tokens[..., 1]
    is_next = j_J == visible_len[..., None]
    ruled_out = is_next & (best == excluded[..., None]) & (excluded[..., None] != NO_TOKEN)
    proposed = torch.where(ruled_out, second, best)
    return torch.where(j_J < visible_len[..., None], _widened(shown, len(j_J)), proposed)


def redraft(
    drafter: Drafter,
    pieces: TargetPieces,
    context: Context,
    num_blocks: Sequence[int] | None,
    branches: OpenBranches,
    num_alternatives: int,
) -> tuple[Tensor, Tensor]:
    """The likeliest tokens [R, J, A] at the positions after the visible ones, best first, and their probabilities.

    J is the larger one of the branches' J and the drafter's own. Visible positions and those past the drafter's block
    hold `NO_TOKEN` with probability 0. Excluded tokens are among the likeliest like any others.

    Args:
        num_blocks: branches of each sequence in the context, one sequence after another; None: one sequence.
    """
    G = drafter.shape.block_size
    shown_RJ = _widened(branches.shown_RJ, G - 1)
    k_J = torch.arange(1, shown_RJ.shape[1] + 1, device=shown_RJ.device)
    masked_RJ = k_J > branches.visible_len_R[:, None]
    wanted_RJ = masked_RJ[:, : G - 1]
    inside_RJ = torch.where(masked_RJ, drafter.shape.mask_token_id, shown_RJ)[:, : G - 1]
    block_ids_RG = torch.cat([branches.anchor_ids_R[:, None], inside_RJ], dim=1)
    wanted_RG = pad(wanted_RJ, (1, 0), value=False)
    tokens_RGA, probs_RGA = fill_blocks(
        drafter, pieces, context, block_ids_RG, branches.anchors_R, wanted_RG, num_alternatives, num_blocks
    )
    past_block = (0, 0, 0, shown_RJ.shape[1] - (G - 1))
    tokens_RJA = tokens_RGA[:, 1:].masked_fill(~wanted_RJ[..., None], NO_TOKEN)
    return pad(tokens_RJA, past_block, value=NO_TOKEN), pad(probs_RGA[:, 1:], past_block)


def _widened(tokens: Tensor, width: int) -> Tensor:
    """At least `width` columns, the new ones filled with `NO_TOKEN`."""
    return pad(tokens, (0, max(0, width - tokens.shape[-1])), value=NO_TOKEN)
