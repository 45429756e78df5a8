"""Training data: which sequences a step reads, and the blocks drawn from each."""

# S tokens of a sequence, T with a state, N blocks, G block size, D context features
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from ...data.cache.drafts import FirstDrafts
from ...data.cache.index import SequenceIndex, SequenceRow
from ...data.cache.reader import CachedSequence, CachedTokens
from ...data.cache.store import Cache
from ...data.errors import CacheNotFoundError
from ..config import TrainConfig
from ..drafter.blocks import anchors_of, block_tokens, show_prefix
from .objective import normalised, position_weights
from .prefix import sample_prefixes

HASH_RANGE = 1 << 64


def counter_generator(*key: object) -> torch.Generator:
    """A generator that depends on the key alone, so that a resumed run draws what an unbroken one would."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")
    return torch.Generator().manual_seed(seed)


def is_held_out(seq_id: str, share: float) -> bool:
    """Whether a sequence belongs to the held-out share: a property of its id, the same in every run."""
    return int.from_bytes(hashlib.sha256(seq_id.encode()).digest()[:8], "little") < share * HASH_RANGE


def split_rows(cache: Cache, share: float) -> tuple[SequenceIndex, SequenceIndex]:
    """Training rows and held-out rows, each in the cache's order.

    Raises:
        CacheNotFoundError: nothing is left for training.
    """
    held_out = np.array([is_held_out(seq_id, share) for seq_id in cache.rows.strings("seq_id")], bool)
    usable = cache.rows.column("num_supervised") > 1
    training = cache.rows.take(np.flatnonzero(~held_out & usable))
    if not len(training):
        raise CacheNotFoundError(
            f"expected sequences to train on in {cache.place}, found none: {len(cache.rows)} sequences, of which "
            f"{held_out.sum()} are held out at {share}. Extract more, or lower train.holdout."
        )
    return training, cache.rows.take(np.flatnonzero(held_out))


@dataclass(frozen=True, slots=True)
class DataOrder:
    """Every epoch is a permutation by (seed, epoch); a step reads the next sequences of it."""

    num_sequences: int
    sequences_per_step: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return max(1, self.num_sequences // self.sequences_per_step)

    def indices(self, step: int) -> list[int]:
        """Indices of the sequences of a 0-based step; the rest of an epoch that fills no step is left out.

        With fewer sequences than a step takes, a step reads all of them, once.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        order = torch.randperm(self.num_sequences, generator=counter_generator(self.seed, "epoch", epoch)).tolist()
        return order[position * self.sequences_per_step : (position + 1) * self.sequences_per_step]


@dataclass(frozen=True, slots=True)
class TrainingBlocks:
    """The blocks drawn from one sequence, on the CPU but for the features."""

    features_TD: Tensor
    """bfloat16 context features, on the training device."""
    anchors_N: Tensor
    block_ids_NG: Tensor
    """Inputs: the visible prefix, then the mask token."""
    labels_NG: Tensor
    weights_NG: Tensor
    """Eq. 7, normalised as configured; 0 where there is no label."""
    first_masked_NG: Tensor
    """bool: the first predicted position of each block."""
    denominator: Tensor
    """What the sum of weighted losses is divided by, summed over all sequences of the step."""


def anchors_within(sequence: CachedTokens, max_len: int) -> Tensor:
    """Anchors [N] among the first `max_len` tokens; the token after the last of those still counts as a label."""
    return anchors_of(sequence.loss_mask_S[: max_len + 1], min(sequence.row.num_tokens, max_len))


def require_anchor(cache: Cache, rows: Sequence[SequenceRow], max_len: int) -> None:
    """Reads sequences until one has an anchor.

    Raises:
        CacheNotFoundError: none has.
    """
    if not any(len(anchors_within(cache.read_tokens(row), max_len)) for row in rows):
        raise CacheNotFoundError(
            f"expected an anchor (two assistant tokens in a row) among the first {max_len} tokens of a sequence, found "
            f"none in the {len(rows)} training sequences of {cache.place}. Raise train.max_len."
        )


def draw_blocks(
    sequence: CachedSequence,
    drafts: FirstDrafts | None,
    config: TrainConfig,
    block_size: int,
    mask_token_id: int,
    step: int,
    device: torch.device | str = "cpu",
) -> TrainingBlocks | None:
    """Draws anchors and prefix lengths for one sequence; None if it has no anchor within `max_len`.

    Args:
        device: where the states are decoded.
    """
    generator = counter_generator(config.seed, step, sequence.row.seq_id)
    num_context = min(sequence.row.num_tokens, config.max_len)
    token_ids_S, loss_mask_S = (x[: config.max_len + 1] for x in (sequence.token_ids_S, sequence.loss_mask_S))
    anchors = anchors_within(sequence, config.max_len)
    if not len(anchors):
        return None
    chosen = torch.randperm(len(anchors), generator=generator)[: config.num_anchors]
    anchors_N = anchors[chosen].sort().values
    tokens_NG, labelled_NG = block_tokens(token_ids_S, loss_mask_S, anchors_N, block_size)
    if config.objective == "dflash":
        prefix_len_N = torch.zeros_like(anchors_N)
    else:
        accept_len_N = None if drafts is None else drafts.accept_lengths(sequence.row)[anchors_N]
        num_labels_N = labelled_NG.sum(dim=1)
        prefix_len_N = sample_prefixes(config.prefix, num_labels_N, accept_len_N, block_size, generator)
    weights_NG, denominator = normalised(position_weights(labelled_NG, prefix_len_N, config.tau), config.normalise)
    k_G = torch.arange(block_size)
    return TrainingBlocks(
        features_TD=sequence.hidden(device)[:num_context].flatten(1),
        anchors_N=anchors_N,
        block_ids_NG=show_prefix(tokens_NG, prefix_len_N, mask_token_id),
        labels_NG=_labels(sequence, tokens_NG, anchors_N, config),
        weights_NG=weights_NG,
        first_masked_NG=k_G == prefix_len_N[:, None] + 1,
        denominator=denominator,
    )


def _labels(sequence: CachedSequence, tokens_NG: Tensor, anchors_N: Tensor, config: TrainConfig) -> Tensor:
    """Recorded tokens, or the target's own choice at each position given the recorded tokens before it."""
    if config.labels == "recorded":
        return tokens_NG
    previous_NG = anchors_N[:, None] + torch.arange(tokens_NG.shape[1]) - 1
    return sequence.target_argmax_T[previous_NG.clamp(max=sequence.row.num_tokens - 1)]


def feature_rms(cache: Cache, rows: Sequence[SequenceRow], num_sequences: int = 16) -> Tensor:
    """Root mean square of each context feature, float32 [D], over the first sequences.

    Hidden states have a few channels hundreds of times larger than the rest; divided by these, all are alike.
    """
    squares_D, num_tokens = torch.zeros(1), 0
    for row in rows[:num_sequences]:
        features_TD = cache.read(row).hidden_TKH.flatten(1).float()
        squares_D = squares_D + features_TD.square().sum(dim=0)
        num_tokens += len(features_TD)
    return (squares_D / num_tokens).sqrt().clamp(min=1e-6)


def label_tokens(cache: Cache, rows: Sequence[SequenceRow]) -> Tensor:
    """Every token id that can be a label in these sequences, ascending."""
    found: set[int] = set()
    for row in rows:
        sequence = cache.read_tokens(row)
        supervised = sequence.token_ids_S[sequence.loss_mask_S].tolist()
        found.update(chain(supervised, sequence.target_argmax_T.tolist()))
    return torch.tensor(sorted(found))
