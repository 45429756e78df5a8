"""How many optimizer steps a run takes."""

from __future__ import annotations

from .config import TrainConfig


def count_steps_per_epoch(num_tokens: int, num_sequences: int, batch_tokens: int) -> int:
    """Steps that visit every sequence once: enough for the token budget, at most one per sequence, at least one.

    Args:
        num_tokens: context tokens of all training sequences.
        batch_tokens: context tokens per step.
    """
    return max(1, min(-(-num_tokens // batch_tokens), num_sequences))


def count_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    """Steps of the whole run: `max_steps`, or what `epochs` takes."""
    return config.max_steps or max(1, round(config.epochs * steps_per_epoch))
