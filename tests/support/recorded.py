"""Sequences and first drafts in memory; every token shows its position."""

# S tokens of a sequence, T with a state, N blocks, G block size
from types import SimpleNamespace
from typing import Any, cast

import torch
from vpd.data.cache.cache import Cache
from vpd.data.cache.drafts import DraftedSequence, FirstDrafts
from vpd.data.cache.index import SequenceRow
from vpd.data.cache.reader import CachedSequence
from vpd.stages.train.config import TrainConfig
from vpd.stages.train.samples import SequenceBlocks, TrainingBlocks, draw_blocks, pack

from support.tiny import make_cached, make_index, make_row

G, MASK = 5, 999
TOKEN, ARGMAX, DRAFT = 100, 500, 2000
"""Position p holds token TOKEN + p, and the target's choice there is ARGMAX + p. Position k of the first draft at
anchor p is DRAFT + 10 * p + k. So all tokens differ."""


def parse_mask(turns: str) -> list[bool]:
    """`..aaa.`: dots are prompt tokens, letters an assistant's."""
    return [letter != "." for letter in turns]


def make_sequence(turns: str, *, final_token: bool = False, seq_id: str = "s", seed: int = 0) -> CachedSequence:
    """A sequence; with `final_token` its last token has no state."""
    mask = parse_mask(turns)
    T = len(mask) - final_token
    row = make_row(
        seq_id,
        T,
        prompt_len=turns.index("a") if "a" in turns else len(turns),
        num_supervised=sum(mask),
        final_token_id=TOKEN + T if final_token else None,
        finish_reason="stop" if final_token else "given",
    )
    hidden_TKH = torch.randn(T, 2, 3, generator=torch.Generator().manual_seed(seed)).bfloat16()
    token_ids, argmax = ([base + p for p in range(count)] for base, count in ((TOKEN, len(mask)), (ARGMAX + 1, T)))
    return make_cached(row, hidden_TKH, token_ids, mask, argmax)


def make_drafts(accept_len_T: list[int]) -> FirstDrafts:
    """First drafts with these accept lengths; their tokens do not fit the accept lengths."""
    T = len(accept_len_T)
    accept_len = torch.tensor(accept_len_T, dtype=torch.uint8)
    tokens_TG = DRAFT + 10 * torch.arange(T)[:, None] + torch.arange(1, G)
    probs_TG = torch.rand(T, G - 1, generator=torch.Generator().manual_seed(T)).half()
    tokens_TGA, probs_TGA = torch.stack([tokens_TG, -tokens_TG], dim=2).int(), torch.stack([probs_TG, 0 * probs_TG], 2)
    drafted = DraftedSequence(accept_len, tokens_TGA, probs_TGA)
    return cast(FirstDrafts, SimpleNamespace(accept_lengths=lambda row: accept_len, read=lambda row: drafted))


def make_cache(sequences: list[CachedSequence]) -> Cache:
    """A cache that holds these sequences in memory."""
    by_id = {sequence.row.seq_id: sequence for sequence in sequences}
    rows = make_index(sequence.row for sequence in sequences)

    def read(row: SequenceRow) -> CachedSequence:
        return by_id[row.seq_id]

    return cast(Cache, SimpleNamespace(rows=rows, place="cache", read=read, read_tokens=read))


def make_config(**settings: Any) -> TrainConfig:
    return TrainConfig.model_validate({"prefix": {"sampler": "geometric"}, **settings})


def draw(
    sequence: CachedSequence, config: TrainConfig, step: int = 0, drafts: FirstDrafts | None = None
) -> SequenceBlocks:
    drawn = draw_blocks(sequence, drafts, config, G, step)
    assert drawn is not None
    return drawn


def training_blocks(
    sequence: CachedSequence, config: TrainConfig, step: int = 0, drafts: FirstDrafts | None = None
) -> TrainingBlocks:
    """The blocks of a pass with this sequence only."""
    return pack_all([sequence], [draw(sequence, config, step, drafts)], config)


def pack_all(
    sequences: list[CachedSequence],
    drawn: list[SequenceBlocks],
    config: TrainConfig,
    block_size: int = G,
    mask_token_id: int = MASK,
) -> TrainingBlocks:
    """The blocks of a pass with these sequences."""
    features = [sequence.hidden_TKH[: config.max_len].flatten(1) for sequence in sequences]
    num_tokens = [len(each) for each in features]
    return pack(drawn, torch.cat(features), num_tokens, config, block_size, mask_token_id)


def prefixes(blocks: TrainingBlocks) -> list[int]:
    return [sum(token != MASK for token in ids) - 1 for ids in blocks.block_ids_NG.tolist()]
