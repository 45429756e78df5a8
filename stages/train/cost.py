"""What a training run costs, on paper: operations, bytes read, steps, hours."""

# T context tokens, N blocks, G block size, P labelled positions, H hidden width, V vocabulary
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..drafter.shape import DrafterShape
from .config import TrainConfig

SECONDS_PER_HOUR = 3600


def training_flops(
    shape: DrafterShape, num_tokens: float, num_blocks: float, num_labels: float, num_seen: float
) -> float:
    """Operations that the loss and its gradient need, two for a multiplication and an addition.

    A weight takes 2 a row forward, 2 for its gradient and 2 for its input's, which `fc` does without. The head is
    frozen: 4 a label. A pair of a block position and what it sees takes 4 a channel forward and 8 backward.

    Args:
        num_tokens: context tokens T.
        num_labels: block positions P whose logits are computed.
        num_seen: context tokens that each block sees, summed over blocks.
    """
    H, width = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    positions = num_blocks * shape.block_size
    kv_weights = 2 * H * shape.num_key_value_heads * shape.head_dim
    layer_weights = 2 * H * width + kv_weights + 3 * H * shape.intermediate_size
    pairs = shape.block_size * (num_seen + positions)
    per_layer = 6 * positions * layer_weights + 6 * num_tokens * kv_weights + 12 * pairs * width
    into_context = 4 * num_tokens * len(shape.target_layer_ids) * H * H
    return shape.num_layers * per_layer + into_context + 4 * num_labels * shape.vocab_size * H


@dataclass(frozen=True, slots=True)
class TrainingCost:
    """A whole run, all epochs."""

    num_steps: int
    num_tokens: float
    """Context tokens read."""
    flops: float

    def gpu_hours(self, tflops: float, utilisation: float) -> float:
        """Hours of one GPU with this many TFLOPS at its peak, of which training reaches a share."""
        return self.flops / (tflops * 1e12 * utilisation) / SECONDS_PER_HOUR


def training_cost(
    shape: DrafterShape, config: TrainConfig, lengths: Sequence[float], num_sequences: int
) -> TrainingCost:
    """The cost of a run at most: every position past the anchor is a label, every token may be an anchor.

    Args:
        lengths: tokens of sequences that stand for all.
        num_sequences: how many they stand for, before some are held out.
    """
    tokens = np.minimum(np.asarray(lengths, dtype=float), config.max_len)
    blocks = np.minimum(tokens, config.num_anchors)
    trained = num_sequences * (1 - config.holdout)
    num_tokens = float(tokens.mean()) * trained
    steps_per_epoch = max(1, -(-round(num_tokens) // config.batch_tokens))
    num_steps = config.max_steps or max(1, round(config.epochs * steps_per_epoch))
    visits = trained * num_steps / steps_per_epoch
    per_sequence = training_flops(
        shape,
        float(tokens.mean()),
        float(blocks.mean()),
        float(blocks.mean()) * (shape.block_size - 1),
        float((blocks * tokens).mean()) / 2,
    )
    return TrainingCost(num_steps, float(tokens.mean()) * visits, per_sequence * visits)
