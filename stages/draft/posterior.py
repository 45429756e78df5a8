"""What a first draft's confidences say about the place where the draft fails."""

# N anchors, G block size, J = G - 1 drafted positions
from __future__ import annotations

from typing import TYPE_CHECKING

from ...data.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")


def reach_probabilities(confidence_NJ: Tensor) -> Tensor:
    """c_1 ... c_i for i = 0..G-2, [N, J]: the probability that the first i drafted tokens are right."""
    return torch.cat([torch.ones_like(confidence_NJ[:, :1]), confidence_NJ.cumprod(dim=1)[:, :-1]], dim=1)


def likeliest(scores_NP: Tensor, num: int) -> Tensor:
    """Indices [N, num] of the largest scores of each row, best first; the lower index first among equal scores.

    Equal scores are common, since recorded probabilities are float16.
    """
    return scores_NP.sort(dim=1, descending=True, stable=True).indices[:, :num]


def boundary_posterior(confidence_NJ: Tensor) -> Tensor:
    """r(i) = (c_1 ... c_i) (1 - c_(i+1)) for i = 0..G-2, [N, J]: the probability that the draft fails after i tokens.

    Source: D2SD, arXiv 2606.04446.

    Args:
        confidence_NJ: confidences c_1..c_(G-1), the first drafter's probabilities of its own tokens.
    """
    return reach_probabilities(confidence_NJ) * (1 - confidence_NJ)
