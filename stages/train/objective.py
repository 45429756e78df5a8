"""The objective: Eq. 7 of the D2SD paper, with a head that never holds all logits at once."""

# N blocks, G block size, J = G - 1, P predicted positions, C of them in a chunk, V rows of the head, H hidden width
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..drafter.target_pieces import linear, positions_per_chunk
from .config import TrainConfig


class BlockLabels(NamedTuple):
    """What N blocks must predict."""

    labels_NG: Tensor
    """int64: tokens to predict."""
    labeled_NG: Tensor
    """bool: positions that have a label; never position 0."""
    prefix_len_N: Tensor
    """int64: visible tokens after the anchor, fewer than the block's labels."""

    @property
    def distance_NG(self) -> Tensor:
        """k - l - 1: how far a position lies behind the first one that is predicted."""
        k_G = torch.arange(self.labels_NG.shape[1], device=self.labels_NG.device)
        return k_G - self.prefix_len_N[:, None] - 1

    @property
    def predicted_NG(self) -> Tensor:
        """bool: positions whose label must be predicted, which are those past the prefix."""
        return self.labeled_NG & (self.distance_NG >= 0)

    @property
    def predicted_P(self) -> Tensor:
        """int64: indices of the predicted positions among all N * G."""
        return self.predicted_NG.flatten().nonzero().flatten()


def position_weights(blocks: BlockLabels, tau: float) -> Tensor:
    """Eq. 7 of arXiv 2606.04446: w_k = exp(-(k - l - 1) / tau) at predicted positions k, else 0; float32 [N, G]."""
    return torch.where(blocks.predicted_NG, torch.exp(-blocks.distance_NG.clamp(min=0) / tau), 0.0)


def normalized(weights_NG: Tensor, normalize: str) -> tuple[Tensor, Tensor]:
    """Weights and a denominator: the mean loss is the sum of weighted losses over the sum of denominators.

    `block` (the paper): each block's weights sum to one, and the denominator is the number of blocks. `batch` (the
    public code): the weights stay as they are, and the denominator is their sum.
    """
    if normalize == "block":
        return weights_NG / weights_NG.sum(dim=1, keepdim=True), weights_NG.new_tensor(len(weights_NG))
    return weights_NG, weights_NG.sum()


class LossParts(NamedTuple):
    """What one forward pass adds to a step's loss and metrics."""

    loss_sum: Tensor
    """Carries the gradient. The step's loss is the sum of these over the sum of `denominator`."""
    denominator: Tensor
    accepted_J: Tensor
    """Blocks whose first j + 1 predicted tokens are right, j = 0..G-2."""
    predicted_J: Tensor
    """Blocks that predict at least j + 1 tokens."""


def block_loss(states_PH: Tensor, blocks: BlockLabels, rows: HeadRows, config: TrainConfig) -> LossParts:
    """The loss (Eq. 7 of arXiv 2606.04446) over the states of the predicted positions."""
    predicted_NG = blocks.predicted_NG
    losses = head_losses(states_PH, blocks.labels_NG[predicted_NG], rows)
    right_NG = torch.zeros_like(predicted_NG).masked_scatter(predicted_NG, losses.right_P)
    weights_NG, denominator = normalized(position_weights(blocks, config.tau), config.normalize)
    loss_sum = (weights_NG[predicted_NG] * losses.loss_P).sum()
    accepted_NG = predicted_NG & (right_NG | ~predicted_NG).long().cumprod(dim=1).bool()
    return LossParts(
        loss_sum, denominator, _by_distance(accepted_NG, predicted_NG), _by_distance(predicted_NG, predicted_NG)
    )


def _by_distance(chosen_NG: Tensor, predicted_NG: Tensor) -> Tensor:
    """Number of chosen positions by the number of predicted positions before them; float64 [J]."""
    distance_NG = (predicted_NG.long().cumsum(dim=1) - 1).clamp(min=0)
    counts_J = torch.zeros(predicted_NG.shape[1] - 1, device=predicted_NG.device, dtype=torch.float64)
    return counts_J.scatter_add_(0, distance_NG.flatten(), chosen_NG.flatten().double())


class HeadRows(NamedTuple):
    """The rows of the LM head over which a softmax runs: all rows, or a sample."""

    head_VH: Tensor
    log_scale_V: Tensor | None
    """Added to the logits: the log of the number of tokens that a row stands for. None: each row is one token."""
    row_of_token: Tensor | None
    """int64: row of each token id, -1 if there is none. None: the row is the token id."""
    soft_cap: float | None = None
    """`TargetPieces.logits_soft_cap`."""


@dataclass(frozen=True, slots=True)
class VocabularySampler:
    """A softmax over the tokens that occur in the cache and `num_sampled` other tokens, drawn anew each step.

    Each drawn token stands for an equal share of all other tokens. So the estimate of the softmax's denominator has
    no bias, and the terms of all tokens that can be labels are exact.
    """

    head_VH: Tensor
    occurring: Tensor
    """int64, ascending: every token that can be a label."""
    num_sampled: int
    soft_cap: float | None = None

    def draw(self, generator: torch.Generator) -> HeadRows:
        """The rows of one step."""
        vocab_size = len(self.head_VH)
        occurs_V = torch.zeros(vocab_size, dtype=torch.bool)
        occurs_V[self.occurring] = True
        others = (~occurs_V).nonzero().flatten()
        chosen = others[torch.randperm(len(others), generator=generator)[: self.num_sampled]]
        token_ids = torch.cat([self.occurring, chosen])
        log_scale_V = torch.zeros(len(token_ids))
        if len(chosen):
            log_scale_V[len(self.occurring) :] = torch.tensor(len(others) / len(chosen)).log()
        row_of_token = torch.full((vocab_size,), -1)
        row_of_token[token_ids] = torch.arange(len(token_ids))
        device = self.head_VH.device
        return HeadRows(
            self.head_VH[token_ids.to(device)], log_scale_V.to(device), row_of_token.to(device), self.soft_cap
        )


class HeadLosses(NamedTuple):
    """The head's result for P positions."""

    loss_P: Tensor
    """Cross-entropy, float32; carries the gradient to the states."""
    right_P: Tensor
    """bool: the label is the most likely token."""


def head_losses(states_PH: Tensor, labels_P: Tensor, rows: HeadRows) -> HeadLosses:
    """Cross-entropy of the frozen head, chunk by chunk, so that few logits exist at once."""
    if rows.row_of_token is not None:
        labels_P = rows.row_of_token[labels_P]
    return HeadLosses(*_ChunkedHead.apply(states_PH, labels_P, rows.head_VH, rows.log_scale_V, rows.soft_cap))


class _ChunkedHead(torch.autograd.Function):
    """Computes the states' gradient together with the loss; the head is frozen and needs none."""

    @staticmethod
    def forward(
        ctx: Any,
        states_PH: Tensor,
        labels_P: Tensor,
        head_VH: Tensor,
        log_scale_V: Tensor | None,
        soft_cap: float | None,
    ) -> tuple[Tensor, Tensor]:
        loss_P = torch.empty(len(labels_P), device=states_PH.device, dtype=torch.float32)
        right_P = torch.empty_like(labels_P, dtype=torch.bool)
        gradient_PH = torch.empty_like(states_PH)
        num_positions = positions_per_chunk(head_VH)
        for start in range(0, len(labels_P), num_positions):
            chunk = slice(start, start + num_positions)
            loss_P[chunk], right_P[chunk], gradient_PH[chunk] = _chunk_of_head(
                states_PH[chunk], labels_P[chunk], head_VH, log_scale_V, soft_cap
            )
        ctx.save_for_backward(gradient_PH)
        ctx.mark_non_differentiable(right_P)
        return loss_P, right_P

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (gradient_PH,) = ctx.saved_tensors
        return gradient_PH * grad_outputs[0][:, None].to(gradient_PH.dtype), None, None, None, None


def _chunk_of_head(
    states_CH: Tensor, labels_C: Tensor, head_VH: Tensor, log_scale_V: Tensor | None, soft_cap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [C], whether the label is the likeliest token [C], and the loss's gradient to the states [C, H].

    The logits are freed on return, so that the next chunk's logits take their memory.
    """
    logits_CV = linear(states_CH.to(head_VH.dtype), head_VH).float()
    slope_CV = None
    if soft_cap is not None:
        logits_CV.div_(soft_cap).tanh_()
        slope_CV = 1 - logits_CV.square()
        logits_CV.mul_(soft_cap)
    labels = labels_C[:, None]
    likeliest = logits_CV.argmax(dim=1, keepdim=True)
    if log_scale_V is not None:
        logits_CV += log_scale_V
    label_logit, likeliest_logit = logits_CV.gather(1, labels), logits_CV.gather(1, likeliest)
    probs_CV = torch.softmax(logits_CV, dim=1, out=logits_CV)
    # The probability of the likeliest token is the one that never underflows.
    log_sum = likeliest_logit - probs_CV.gather(1, likeliest).log()
    gradient_CV = probs_CV.scatter_add_(1, labels, -torch.ones_like(label_logit))
    if slope_CV is not None:
        gradient_CV *= slope_CV
    gradient_CH = linear(gradient_CV.to(head_VH.dtype), head_VH.T)
    return (log_sum - label_logit)[:, 0], (likeliest == labels)[:, 0], gradient_CH
