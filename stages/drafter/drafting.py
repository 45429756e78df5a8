"""Fills blocks with a drafter: the likeliest tokens of each masked position."""

# N blocks, G block size, A alternatives, P wanted positions, H hidden width, V vocabulary
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .model import Context, Drafter
from .target_pieces import TargetPieces, linear, positions_per_chunk


@torch.inference_mode()
def fill_blocks(
    drafter: Drafter,
    pieces: TargetPieces,
    context: Context,
    block_ids_NG: Tensor,
    anchors_N: Tensor,
    wanted_NG: Tensor,
    num_alternatives: int,
    num_blocks: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Likeliest tokens (int64 [N, G, A], best first) and their probabilities (float32) at the wanted positions.

    Args:
        block_ids_NG: visible tokens, and the mask token elsewhere.
        wanted_NG: bool; other positions come back as token 0 with probability 0.
        num_blocks: blocks of each sequence in the context, one sequence after another; None: one sequence.
    """
    wanted_P = wanted_NG.flatten().nonzero().flatten()
    states_PH = drafter(pieces.embed_VH[block_ids_NG], anchors_N, context, num_blocks, wanted_P)
    tokens_NGA = block_ids_NG.new_zeros(*block_ids_NG.shape, num_alternatives)
    probs_NGA = torch.zeros(tokens_NGA.shape, device=tokens_NGA.device)
    found = [
        _most_likely(some_PH, pieces, num_alternatives)
        for some_PH in states_PH.split(positions_per_chunk(pieces.head_VH))
    ]
    if found:
        tokens_NGA[wanted_NG] = torch.cat([tokens for tokens, _ in found])
        probs_NGA[wanted_NG] = torch.cat([probs for _, probs in found])
    return tokens_NGA, probs_NGA


def _most_likely(states_PH: Tensor, pieces: TargetPieces, num_alternatives: int) -> tuple[Tensor, Tensor]:
    logits_PV = linear(states_PH, pieces.head_VH).float()
    if (cap := pieces.logits_soft_cap) is not None:
        logits_PV.div_(cap).tanh_().mul_(cap)
    top_PA, tokens_PA = logits_PV.topk(num_alternatives, dim=-1)
    largest_P1 = top_PA[:, :1]
    sums_P1 = logits_PV.sub_(largest_P1).exp_().sum(dim=-1, keepdim=True)  # in place, since the logits are large
    return tokens_PA, (top_PA - largest_P1).exp() / sums_P1
