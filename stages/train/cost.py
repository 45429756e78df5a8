"""What a training run costs: operations, tokens read, steps, hours."""

# T context tokens, N blocks, G block size, P predicted positions, H hidden width
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..drafter.shape import DrafterShape
from .config import TrainConfig
from .steps import count_steps, count_steps_per_epoch

SECONDS_PER_HOUR = 3600


def training_flops(
    shape: DrafterShape, num_tokens: float, num_blocks: float, num_labels: float, num_seen: float
) -> float:
    """Operations of the loss and its gradient; a multiplication with an addition counts as two.

    Per row, a weight takes 2 operations forward, 2 for the weight's gradient and 2 for the input's gradient; `fc`
    needs no gradient of its input. Per label, a weight of the head takes 4, since the head is frozen. A pair of a
    block position and a position that it sees takes 4 per channel forward and 8 backward.

    Args:
        num_tokens: context tokens T.
        num_blocks: blocks N.
        num_labels: predicted positions P, whose logits are computed.
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

    def gpu_hours(self, tflops: float, utilization: float) -> float:
        """Hours of one GPU.

        Args:
            tflops: the GPU's peak, in TFLOPS.
            utilization: share of the peak that training reaches; in (0, 1].
        """
        return self.flops / (tflops * 1e12 * utilization) / SECONDS_PER_HOUR


def training_cost(
    shape: DrafterShape, config: TrainConfig, lengths: Sequence[float], num_sequences: int
) -> TrainingCost:
    """The largest cost of a run: every token may be an anchor, and every position past an anchor is predicted.

    Args:
        lengths: tokens of each sequence of a sample.
        num_sequences: number of sequences that the sample stands for, held-out ones included.
    """
    tokens = np.minimum(np.asarray(lengths, dtype=float), config.max_len)
    blocks = np.minimum(tokens, config.num_anchors)
    trained = num_sequences * (1 - config.holdout)
    num_tokens = float(tokens.mean()) * trained
    steps_per_epoch = count_steps_per_epoch(round(num_tokens), round(trained), config.batch_tokens)
    num_steps = count_steps(config, steps_per_epoch)
    visits = trained * num_steps / steps_per_epoch
    per_sequence = training_flops(
        shape,
        float(tokens.mean()),
        float(blocks.mean()),
        float(blocks.mean()) * (shape.block_size - 1),
        float((blocks * tokens).mean()) / 2,
    )
    return TrainingCost(num_steps, float(tokens.mean()) * visits, per_sequence * visits)
