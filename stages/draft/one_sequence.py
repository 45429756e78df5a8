"""Drafts of one cached sequence, for use from Python:

    cache = Cache.open(place)
    sequence = cache.read(cache.rows[0])
    drafter = load_drafter(folder)
    pieces = TargetPieces.load(cache.target_folder)
    anchors = anchors_of(sequence.loss_mask_S, sequence.row.num_tokens)
    tokens_NJA, probs_NJA = draft_blocks(drafter, pieces, sequence, anchors)
    candidates_NJ = redraft_blocks(vp_drafter, pieces, sequence, anchors, tokens_NJA[..., 0], prefix_len_N)

The stages draft with the same code (`passes`). Drafter and pieces must have one device and dtype.
"""

# N anchors, G block size, J = G - 1 drafted positions, A alternatives
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...data.cache.reader import CachedSequence
from ..drafter.blocks import NO_TOKEN
from ..drafter.model import Context, Drafter
from ..drafter.target_pieces import TargetPieces
from .passes import OpenBranches, complete_branches, cut_into_passes, draft_all

BLOCKS_PER_PASS = 256


@torch.inference_mode()
def draft_blocks(
    drafter: Drafter, pieces: TargetPieces, sequence: CachedSequence, anchors: Sequence[int] | Tensor
) -> tuple[Tensor, Tensor]:
    """First drafts at these anchors, each from the states before its anchor.

    Args:
        anchors: N positions in the sequence; each must have a state.

    Returns:
        The likeliest tokens of each block position after the anchor, best first (int64 [N, J, A]), and their
        probabilities (float32 [N, J, A]). A is `NUM_ALTERNATIVES`; the draft itself is `tokens[..., 0]`.

    Raises:
        ValueError: an anchor lies outside the sequence's states.
    """
    context, anchors_N, anchor_ids_N = _prepare(drafter, pieces, sequence, anchors)
    return draft_all(drafter, pieces, context, torch.zeros_like(anchors_N), anchors_N, anchor_ids_N, BLOCKS_PER_PASS)


@torch.inference_mode()
def redraft_blocks(
    drafter: Drafter,
    pieces: TargetPieces,
    sequence: CachedSequence,
    anchors: Sequence[int] | Tensor,
    shown_NJ: Tensor,
    visible_len_N: Tensor,
) -> Tensor:
    """Second drafts: blocks of which the drafter sees the anchor and the first tokens of `shown_NJ`.

    Args:
        anchors: N positions in the sequence; each must have a state.
        shown_NJ: tokens after each anchor, such as the first draft.
        visible_len_N: how many of these the drafter sees, 0..J.

    Returns:
        Candidates (int64 [N, J]): the visible tokens, then the drafter's own to the end of its block. Where the
        drafter's block is shorter than `shown_NJ`, the rest is `NO_TOKEN`.

    Raises:
        ValueError: an anchor lies outside the sequence's states.
    """
    context, anchors_N, anchor_ids_N = _prepare(drafter, pieces, sequence, anchors)
    shown_NJ, visible_len_N = shown_NJ.to(anchors_N.device), visible_len_N.to(anchors_N.device)
    branches = OpenBranches(anchors_N, anchor_ids_N, shown_NJ, visible_len_N, torch.full_like(anchors_N, NO_TOKEN))
    found = [shown_NJ.new_zeros(0, max(shown_NJ.shape[1], drafter.shape.block_size - 1))]
    for chunk, num_blocks in cut_into_passes(torch.zeros_like(anchors_N), 1, BLOCKS_PER_PASS):
        some = OpenBranches(*(field[chunk] for field in branches))
        found.append(complete_branches(drafter, pieces, context, num_blocks, some))
    return torch.cat(found)


def _prepare(
    drafter: Drafter, pieces: TargetPieces, sequence: CachedSequence, anchors: Sequence[int] | Tensor
) -> tuple[Context, Tensor, Tensor]:
    """The sequence's context, and the anchors' positions and tokens (int64 [N]) on the drafter's device."""
    device, dtype = pieces.embed_VH.device, pieces.embed_VH.dtype
    anchors_N = torch.as_tensor(anchors, dtype=torch.int64)
    num_states = sequence.row.num_tokens
    if len(anchors_N) and not 0 <= int(anchors_N.min()) <= int(anchors_N.max()) < num_states:
        raise ValueError(f"expected anchors in 0..{num_states - 1}, found {anchors_N.tolist()}.")
    context = drafter.context(sequence.hidden(device).flatten(1).to(dtype))
    return context, anchors_N.to(device), sequence.token_ids_S[anchors_N.cpu()].to(device)
