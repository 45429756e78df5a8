"""The responses of several sequences, packed for one replay."""

# S tokens of a sequence, T with a state, D context features
# N anchors, J = G - 1 drafted positions, A alternatives, R branches of any anchors
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from ..draft.passes import OpenBranches
from .branches import Shown
from .slices import Response


@dataclass(frozen=True, slots=True)
class Batch:
    """The responses of several sequences, packed; anchors are all tokens of a response but the last."""

    features_TD: Tensor
    num_tokens: list[int]
    num_anchors: list[int]
    """Anchors of each sequence."""
    responses: list[list[Response]]
    """The responses of each sequence."""
    anchors_N: Tensor
    """Positions of the anchors in their sequences."""
    anchor_ids_N: Tensor
    recorded_NJ: Tensor
    """Recorded tokens after each anchor, negative past the response."""
    drafts: tuple[Tensor, Tensor] | None
    """Recorded first drafts: tokens and probabilities [N, J, A]. None: the first drafter makes them."""

    @property
    def sequence_N(self) -> Tensor:
        """The number of each anchor's sequence."""
        counts = torch.tensor(self.num_anchors, device=self.anchors_N.device)
        return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)


def open_branches(batch: Batch, shown: Shown, n: Tensor, b: Tensor) -> OpenBranches:
    """The blocks with indices `n` (anchor) and `b` (place), both int64 [R]."""
    return OpenBranches(
        batch.anchors_N[n],
        batch.anchor_ids_N[n],
        shown.tokens_NBJ[n, b],
        shown.visible_len_NB[n, b],
        shown.excluded_NB[n, b],
    )


def join(batches: Sequence[Batch]) -> Batch:
    """Packs batches one after another."""
    drafts = [batch.drafts for batch in batches if batch.drafts is not None]
    return Batch(
        features_TD=torch.cat([batch.features_TD for batch in batches]),
        num_tokens=list(chain.from_iterable(batch.num_tokens for batch in batches)),
        num_anchors=list(chain.from_iterable(batch.num_anchors for batch in batches)),
        responses=list(chain.from_iterable(batch.responses for batch in batches)),
        anchors_N=torch.cat([batch.anchors_N for batch in batches]),
        anchor_ids_N=torch.cat([batch.anchor_ids_N for batch in batches]),
        recorded_NJ=torch.cat([batch.recorded_NJ for batch in batches]),
        drafts=(torch.cat([draft[0] for draft in drafts]), torch.cat([draft[1] for draft in drafts]))
        if drafts
        else None,
    )
