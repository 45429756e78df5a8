"""Training data: the blocks drawn from each sequence, and the blocks of one pass."""

# S tokens of a sequence, T with a state, D context features, M anchors to choose from, N blocks, G block size
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from ...data.cache.arrays import NO_CHOICE
from ...data.cache.cache import Cache
from ...data.cache.drafts import FirstDrafts
from ...data.cache.index import SequenceRow
from ...data.cache.reader import CachedSequence, CachedTokens
from ...data.errors import CacheNotFoundError
from ..drafter.blocks import anchors_of, block_tokens, show_prefix
from .anchors import ANCHOR_SAMPLERS, AnchorCandidates, choose_anchors
from .config import TrainConfig
from .drafted import Drafted
from .objective import BlockLabels
from .order import counter_generator
from .prefix import PREFIX_SAMPLERS, BlockFacts, draw_prefixes, samplers_in_use
from .samplers import Reads


@dataclass(frozen=True, slots=True)
class SequenceBlocks:
    """The blocks that start in one sequence, before their prefixes are drawn; on the CPU."""

    anchors_N: Tensor
    tokens_NG: Tensor
    """Recorded tokens."""
    labeled_NG: Tensor
    """bool: positions that have a label."""
    labels_NG: Tensor
    """Tokens to predict."""
    uniform_N: Tensor
    """float32 in [0, 1): decides the prefix length of each block."""
    drafted: Drafted | None
    """The first drafts at the anchors; None if nothing reads them."""


@dataclass(frozen=True, slots=True)
class TrainingBlocks:
    """The blocks of the sequences of one pass, all on the training device."""

    features_TD: Tensor
    """bfloat16: context features of all sequences, one after another."""
    num_tokens: list[int]
    """Context tokens of each sequence."""
    num_blocks: list[int]
    """Blocks of each sequence."""
    anchors_N: Tensor
    block_ids_NG: Tensor
    """Inputs: the visible prefix, then the mask token."""
    labels: BlockLabels


def anchors_within(sequence: CachedTokens, max_len: int) -> Tensor:
    """Anchors [M] among the first `max_len` tokens; the token after these may still be a label."""
    return anchors_of(sequence.loss_mask_S[: max_len + 1], min(sequence.row.num_tokens, max_len))


def require_anchor(cache: Cache, rows: Sequence[SequenceRow], max_len: int) -> None:
    """Checks that some sequence has an anchor.

    Raises:
        CacheNotFoundError: no sequence has one.
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
    step: int,
) -> SequenceBlocks | None:
    """Chooses a sequence's anchors; None if the sequence has none within `max_len`.

    The choice depends only on seed, step and sequence.
    """
    generator = counter_generator(config.seed, step, sequence.row.seq_id)
    token_ids_S, loss_mask_S = (x[: config.max_len + 1] for x in (sequence.token_ids_S, sequence.loss_mask_S))
    anchors_M = anchors_within(sequence, config.max_len)
    if not len(anchors_M):
        return None
    tokens_MG, labeled_MG = block_tokens(token_ids_S, loss_mask_S, anchors_M, block_size)
    reads = max(draft_readers(config).values(), default=Reads.NOTHING)
    drafted_M = Drafted.read(drafts, sequence.row, anchors_M, reads) if drafts is not None and reads else None
    candidates = AnchorCandidates(anchors_M, labeled_MG.sum(dim=1), block_size, drafted_M)
    chosen_N = choose_anchors(config.anchor, candidates, config.num_anchors, generator)
    anchors_N, tokens_NG = anchors_M[chosen_N], tokens_MG[chosen_N]
    return SequenceBlocks(
        anchors_N=anchors_N,
        tokens_NG=tokens_NG,
        labeled_NG=labeled_MG[chosen_N],
        labels_NG=_labels(sequence, tokens_NG, anchors_N, config),
        uniform_N=torch.rand(len(anchors_N), generator=generator),
        drafted=None if drafted_M is None else drafted_M.at(chosen_N),
    )


def draft_readers(config: TrainConfig) -> dict[str, Reads]:
    """The samplers in use that read first drafts, such as `prefix sampler topk`, and how much each reads."""
    found = {f"anchor sampler {config.anchor.sampler}": ANCHOR_SAMPLERS[config.anchor.sampler].reads}
    if config.objective == "vp":
        prefix_samplers = samplers_in_use(config.prefix)
        found = {f"prefix sampler {name}": PREFIX_SAMPLERS[name].reads for name in prefix_samplers} | found
    return {name: reads for name, reads in found.items() if reads}


def pack(
    sequences: Sequence[SequenceBlocks],
    features_TD: Tensor,
    num_tokens: list[int],
    config: TrainConfig,
    block_size: int,
    mask_token_id: int,
) -> TrainingBlocks:
    """Puts the blocks of several sequences one after another on the training device, and draws their prefixes there.

    Args:
        features_TD: the sequences' context features, one after another, on the training device.
        num_tokens: context tokens of each sequence.
    """
    device = features_TD.device

    def packed(name: str) -> Tensor:
        return torch.cat([getattr(sequence, name) for sequence in sequences]).to(device)

    tokens_NG, labeled_NG = packed("tokens_NG"), packed("labeled_NG")
    num_labels_N = labeled_NG.sum(dim=1)
    if config.objective == "dflash":
        prefix_len_N = torch.zeros_like(num_labels_N)
    else:
        parts = [sequence.drafted for sequence in sequences if sequence.drafted is not None]
        drafted = Drafted.concatenate(parts, device) if parts else None
        prefix_len_N = draw_prefixes(config.prefix, BlockFacts(num_labels_N, block_size, drafted), packed("uniform_N"))
    return TrainingBlocks(
        features_TD=features_TD,
        num_tokens=num_tokens,
        num_blocks=[len(sequence.anchors_N) for sequence in sequences],
        anchors_N=packed("anchors_N"),
        block_ids_NG=show_prefix(tokens_NG, prefix_len_N, mask_token_id),
        labels=BlockLabels(packed("labels_NG"), labeled_NG, prefix_len_N),
    )


def _labels(sequence: CachedSequence, tokens_NG: Tensor, anchors_N: Tensor, config: TrainConfig) -> Tensor:
    """Recorded tokens, or at each position the target's choice after the recorded tokens before that position."""
    if config.labels == "recorded":
        return tokens_NG
    previous_NG = anchors_N[:, None] + torch.arange(tokens_NG.shape[1]) - 1
    return sequence.target_argmax_T[previous_NG.clamp(max=sequence.row.num_tokens - 1)]


def feature_rms(cache: Cache, rows: Sequence[SequenceRow], num_sequences: int = 16) -> Tensor:
    """Root mean square of each context feature, float32 [D], over the first sequences.

    A few channels of hidden states are hundreds of times larger than the rest. Training divides the features by these
    values, so that all channels have the same size.
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
    found.discard(NO_CHOICE)
    return torch.tensor(sorted(found))
