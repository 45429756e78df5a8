"""Further drafts that are drawn from the first drafter's probabilities, without a second pass: a baseline."""

# N anchors, J = G - 1 drafted positions, A alternatives, B drafts per anchor
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def resampled_drafts(tokens_NJA: Tensor, probs_NJA: Tensor, anchors_N: Tensor, num_drafts: int) -> Tensor:
    """Drafts whose tokens are drawn position by position, each in proportion to its probability: [N, B, J].

    Only the stored alternatives are drawn. The random numbers depend on the anchor's position alone, and the first k
    drafts are the same whatever `num_drafts` is.
    """
    positions, place_N = np.unique(anchors_N.cpu().numpy(), return_inverse=True)
    shape = (num_drafts, tokens_NJA.shape[1])
    uniform = np.stack([np.random.default_rng(position).random(shape) for position in positions])
    uniform_NBJ1 = torch.from_numpy(uniform[place_N]).to(probs_NJA)[..., None]
    cumulated_N1JA = probs_NJA.cumsum(dim=2)[:, None]
    drawn_NBJ = (uniform_NBJ1 * cumulated_N1JA[..., -1:] >= cumulated_N1JA[..., :-1]).sum(dim=3)
    return tokens_NJA[:, None].expand(-1, num_drafts, -1, -1).gather(3, drawn_NBJ[..., None])[..., 0]
