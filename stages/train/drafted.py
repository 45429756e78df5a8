"""What training knows of the first drafts."""

# T tokens of a sequence, N anchors, G block size, J = G - 1 drafted positions, A alternatives
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...data.cache.arrays import NOT_DRAFTED
from ...data.cache.drafts import FirstDrafts
from ...data.cache.index import SequenceRow
from .samplers import Reads


class Drafted(NamedTuple):
    """The first drafts at N anchors, as far as the samplers in use read them."""

    accept_len_N: Tensor
    """int64: accept length L; `NOT_DRAFTED` where there is no draft."""
    confidence_NJ: Tensor | None
    """float32: confidences c_1..c_(G-1); None if no sampler reads them."""
    tokens_NJA: Tensor | None
    """int64: the likeliest tokens of each position, best first, the draft's own included; None alike."""
    probs_NJA: Tensor | None
    """float32: their probabilities."""

    @classmethod
    def read(cls, drafts: FirstDrafts, row: SequenceRow, anchors_N: Tensor, reads: Reads) -> Drafted:
        """Reads the drafts of a sequence at these anchors."""
        if reads < Reads.CONFIDENCES:
            return cls(drafts.accept_lengths(row)[anchors_N].long(), None, None, None)
        found = drafts.read(row)
        probs_NJA = found.probs_TGA[anchors_N].float()
        everything = reads == Reads.ALTERNATIVES
        return cls(
            accept_len_N=found.accept_len_T[anchors_N].long(),
            confidence_NJ=probs_NJA[..., 0],
            tokens_NJA=found.tokens_TGA[anchors_N].long() if everything else None,
            probs_NJA=probs_NJA if everything else None,
        )

    @property
    def has_draft_N(self) -> Tensor:
        """bool: whether the anchor was drafted."""
        return self.accept_len_N != NOT_DRAFTED

    def fails_within(self, num_labels_N: Tensor) -> Tensor:
        """bool [N]: whether the draft is known to fail before the block's labels end."""
        return self.has_draft_N & (self.accept_len_N < num_labels_N)

    def at(self, indices: Tensor) -> Drafted:
        """The drafts at some of the anchors."""
        return Drafted._make(None if field is None else field[indices] for field in self)

    @classmethod
    def concatenate(cls, parts: list[Drafted], device: torch.device) -> Drafted:
        """The drafts of several sequences one after another, on a device."""
        fields = zip(*parts, strict=True)
        return cls._make(None if field[0] is None else torch.cat(field).to(device) for field in fields)
