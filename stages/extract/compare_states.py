"""How alike two captures of the same tokens are."""

# T tokens, K captured layers, H hidden width
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Likeness(NamedTuple):
    """Of states [T, K, H] to those that they should be."""

    relative_error_TK: Tensor
    """Length of the difference over the length of what it should be."""
    cosine_TK: Tensor
    """Cosine after each channel is divided by its RMS: a few massive channels would outshine the others."""


def compare_states(found_TKH: Tensor, expected_TKH: Tensor) -> Likeness:
    found, expected = found_TKH.float(), expected_TKH.float()
    error_TK = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-12)
    scale_KH = expected.pow(2).mean(dim=0).sqrt().clamp(min=1e-12)
    return Likeness(error_TK, torch.cosine_similarity(found / scale_KH, expected / scale_KH, dim=-1))
