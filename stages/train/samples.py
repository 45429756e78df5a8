"""Training data: the sequences held out, and the blocks drawn from each of the others."""

# S tokens of a sequence, T with a state, M anchors to choose from, N blocks, G block size, J = G-1, D context features
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from ...data.cache.cache import NO_CHOICE, Cache
from ...data.cache.drafts import NOT_DRAFTED, FirstDrafts
from ...data.cache.index import SequenceRow
from ...data.cache.reader import CachedSequence, CachedTokens
from ...data.errors import CacheNotFoundError
from ..drafter.blocks import anchors_of, block_tokens, show_prefix
from . import anchors, prefix
from .anchors import AnchorFacts, choose_anchors
from .config import TrainConfig
from .objective import BlockLabels, position_weights
from .order import counter_generator
from .prefix import BlockFacts, draw_prefixes, samplers_in_use


@dataclass(frozen=True, slots=True)
class SequenceBlocks:
    """The blocks that start in one sequence, before their prefixes are chosen; on the CPU."""

    anchors_N: Tensor
    tokens_NG: Tensor
    """Recorded tokens."""
    labelled_NG: Tensor
    labels_NG: Tensor
    uniform_N: Tensor
    """In [0, 1): decides the prefix length of each block."""
    accept_len_N: Tensor | None
    draft_NJ: Tensor | None
    """The first draft's tokens at positions 1..G-1."""
    confidence_NJ: Tensor | None


@dataclass(frozen=True, slots=True)
class TrainingBlocks:
    """The blocks of the sequences of one pass, all on the training device."""

    features_TD: Tensor
    """bfloat16 context features."""
    num_tokens: list[int]
    """Context tokens of each sequence."""
    num_blocks: list[int]
    """Blocks of each sequence."""
    anchors_N: Tensor
    block_ids_NG: Tensor
    """Inputs: the visible prefix, then the mask token."""
    labels: BlockLabels


def anchors_within(sequence: CachedTokens, max_len: int) -> Tensor:
    """Anchors [M] among the first `max_len` tokens; the token after the last of those still counts as a label."""
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
    step: int,
) -> SequenceBlocks | None:
    """Chooses a sequence's anchors; None if it has none within `max_len`.

    What is drawn depends on seed, step and sequence alone.
    """
    generator = counter_generator(config.seed, step, sequence.row.seq_id)
    token_ids_S, loss_mask_S = (x[: config.max_len + 1] for x in (sequence.token_ids_S, sequence.loss_mask_S))
    anchors_M = anchors_within(sequence, config.max_len)
    if not len(anchors_M):
        return None
    tokens_MG, labelled_MG = block_tokens(token_ids_S, loss_mask_S, anchors_M, block_size)
    accept_len_M = None if drafts is None else drafts.accept_lengths(sequence.row)[anchors_M]
    facts = AnchorFacts(anchors_M, labelled_MG.sum(dim=1), accept_len_M, block_size)
    chosen_N = choose_anchors(config.anchor, facts, config.num_anchors, generator)
    anchors_N, tokens_NG = anchors_M[chosen_N], tokens_MG[chosen_N]
    draft_NJ = confidence_NJ = None
    if drafts is not None and reads_draft_tokens(config):
        drafted = drafts.read(sequence.row)
        draft_NJ, confidence_NJ = drafted.tokens_TGA[anchors_N, :, 0].long(), drafted.probs_TGA[anchors_N, :, 0].float()
    return SequenceBlocks(
        anchors_N=anchors_N,
        tokens_NG=tokens_NG,
        labelled_NG=labelled_MG[chosen_N],
        labels_NG=_labels(sequence, tokens_NG, anchors_N, config),
        uniform_N=torch.rand(len(anchors_N), generator=generator),
        accept_len_N=None if accept_len_M is None else accept_len_M[chosen_N],
        draft_NJ=draft_NJ,
        confidence_NJ=confidence_NJ,
    )


def boundary_readers(config: TrainConfig) -> list[str]:
    """The settings for which training reads where the first draft failed."""
    found = []
    if config.objective == "vp":
        found = [f"prefix sampler {n}" for n in sorted(samplers_in_use(config.prefix) & prefix.READ_BOUNDARIES)]
        if config.visible == "first-draft":
            found.append("visible first-draft")
    if config.anchor.sampler in anchors.READ_BOUNDARIES:
        found.append(f"anchor sampler {config.anchor.sampler}")
    return found


def reads_draft_tokens(config: TrainConfig) -> bool:
    """Whether training reads the first draft's tokens and confidences too."""
    of_prefix = samplers_in_use(config.prefix) & prefix.READ_CONFIDENCES
    return config.objective == "vp" and bool(of_prefix or config.visible == "first-draft")


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

    def packed_or_none(name: str) -> Tensor | None:
        return None if getattr(sequences[0], name) is None else packed(name)

    tokens_NG, labelled_NG = packed("tokens_NG"), packed("labelled_NG")
    accept_len_N, draft_NJ = packed_or_none("accept_len_N"), packed_or_none("draft_NJ")
    facts = BlockFacts(labelled_NG.sum(dim=1), accept_len_N, packed_or_none("confidence_NJ"))
    if config.objective == "dflash":
        prefix_len_N = torch.zeros_like(facts.num_labels_N)
    else:
        prefix_len_N = draw_prefixes(config.prefix, facts, block_size, packed("uniform_N"))
    visible_NG = tokens_NG
    if config.visible == "first-draft" and draft_NJ is not None and accept_len_N is not None:
        drafted_NG = torch.cat([tokens_NG[:, :1], draft_NJ], dim=1)
        visible_NG = torch.where((accept_len_N != NOT_DRAFTED)[:, None], drafted_NG, tokens_NG)
    return TrainingBlocks(
        features_TD=features_TD,
        num_tokens=num_tokens,
        num_blocks=[len(sequence.anchors_N) for sequence in sequences],
        anchors_N=packed("anchors_N"),
        block_ids_NG=show_prefix(visible_NG, prefix_len_N, mask_token_id),
        labels=BlockLabels(
            labels_NG=packed("labels_NG"),
            weights_NG=position_weights(labelled_NG, prefix_len_N, config.tau),
        ),
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
    found.discard(NO_CHOICE)
    return torch.tensor(sorted(found))
