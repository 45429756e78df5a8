"""How much two captures of the same tokens differ."""

# T tokens, K captured layers, H hidden width
from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...data.cache.codecs import whitened_cosine


class Likeness(NamedTuple):
    """States [T, K, H] compared with the expected states."""

    relative_error_TK: Tensor
    """Length of the difference, over the length of the expected state."""
    cosine_TK: Tensor
    """Whitened cosine."""


def compare_states(found_TKH: Tensor, expected_TKH: Tensor) -> Likeness:
    found, expected = found_TKH.float(), expected_TKH.float()
    error_TK = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-12)
    return Likeness(error_TK, whitened_cosine(expected, found))
