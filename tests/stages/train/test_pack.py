"""Blocks of a pass: when they need first drafts, and that they do not depend on the pass's other blocks."""

# G block size
from typing import Any, NamedTuple

import pytest
import torch
from support.recorded import (
    G,
    draw,
    make_config,
    make_drafts,
    make_sequence,
    pack_all,
    training_blocks,
)
from vpd.data.cache.drafts import FirstDrafts
from vpd.data.cache.reader import CachedSequence
from vpd.stages.train.samplers import BOUNDARIES, CONFIDENCES, Reads
from vpd.stages.train.samples import TrainingBlocks, draft_readers


class Case(NamedTuple):
    id: str
    settings: dict[str, Any]
    expected: dict[str, Reads]


CASES = [
    Case("geometric", {}, {}),
    Case("boundary", {"prefix": {"sampler": "boundary"}}, {"prefix sampler boundary": BOUNDARIES}),
    Case("posterior", {"prefix": {"sampler": "posterior"}}, {"prefix sampler posterior": CONFIDENCES}),
    Case("topk", {"prefix": {"sampler": "topk"}}, {"prefix sampler topk": CONFIDENCES}),
    Case("mixture-of-priors", {"prefix": {"sampler": "mixture", "mixture": {"geometric": 1}}}, {}),
    Case(
        "mixture-with-past",
        {"prefix": {"sampler": "mixture", "mixture": {"past-boundary": 1}}},
        {"prefix sampler past-boundary": BOUNDARIES},
    ),
    Case(
        "mixture-with-topk",
        {"prefix": {"sampler": "mixture", "mixture": {"topk": 1, "boundary": 1}}},
        {"prefix sampler boundary": BOUNDARIES, "prefix sampler topk": CONFIDENCES},
    ),
    Case("mixture-not-in-use", {"prefix": {"sampler": "geometric", "mixture": {"topk": 1}}}, {}),
    Case("failure", {"anchor": {"sampler": "failure"}}, {"anchor sampler failure": BOUNDARIES}),
    Case("first-drafter", {"objective": "dflash", "prefix": {"sampler": "topk"}}, {}),
    Case(
        "failure-of-first-drafter",
        {"objective": "dflash", "anchor": {"sampler": "failure"}},
        {"anchor sampler failure": BOUNDARIES},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_drafts_are_read_where_a_setting_needs_them(case: Case):
    assert draft_readers(make_config(**case.settings)) == case.expected


# What a draw depends on

MIXED = {
    "prefix": {"sampler": "mixture", "mixture": {"posterior": 1, "past-boundary": 1, "topk": 1, "geometric": 1}},
}
DRAWS = {
    "dflash": {"objective": "dflash"},
    "geometric": {},
    "mixture": MIXED,
    "mixture-at-failures": {**MIXED, "anchor": {"sampler": "failure"}},
}


def drafts_of(sequence: CachedSequence) -> FirstDrafts:
    generator = torch.Generator().manual_seed(7)
    return make_drafts(torch.randint(0, G, (sequence.row.num_tokens,), generator=generator).tolist())


def same(one: TrainingBlocks, other: TrainingBlocks) -> bool:
    pairs = [
        *((getattr(one, name), getattr(other, name)) for name in ("features_TD", "anchors_N", "block_ids_NG")),
        *zip(one.labels, other.labels, strict=True),
    ]
    return all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("settings", DRAWS.values(), ids=DRAWS)
def test_draws_depend_on_seed_step_and_sequence_alone(settings: dict[str, Any]):
    def drawn(seq_id: str, step: int, seed: int) -> TrainingBlocks:
        sequence = make_sequence("." + "a" * 60, seq_id=seq_id)
        return training_blocks(sequence, make_config(**settings, num_anchors=20, seed=seed), step, drafts_of(sequence))

    first = drawn("s", 4, 3)
    torch.rand(3)
    others = [drawn("other", 4, 3), drawn("s", 5, 3), drawn("s", 4, 4)]
    assert same(drawn("s", 4, 3), first)
    assert not any(same(other, first) for other in others)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=str)
@pytest.mark.parametrize("settings", DRAWS.values(), ids=DRAWS)
def test_a_sequence_has_the_same_blocks_in_any_pass(settings: dict[str, Any], order: tuple[int, ...]):
    config = make_config(**settings, num_anchors=8)
    turns = ["..aaaaaaa.aaaa", "." + "a" * 40, "aaa"]
    sequences = [make_sequence(text, seq_id=f"s{i}", seed=i) for i, text in enumerate(turns)]
    chosen = [sequences[i] for i in order]
    drawn = [draw(sequence, config, 2, drafts_of(sequence)) for sequence in chosen]
    together = pack_all(chosen, drawn, config)
    assert together.num_tokens == [len(turns[i]) for i in order]
    assert together.num_blocks == [len(blocks.anchors_N) for blocks in drawn]
    alone = [pack_all([sequence], [blocks], config) for sequence, blocks in zip(chosen, drawn, strict=True)]
    for name in ("features_TD", "anchors_N", "block_ids_NG"):
        assert torch.equal(getattr(together, name), torch.cat([getattr(blocks, name) for blocks in alone])), name
    for name, found in together.labels._asdict().items():
        assert torch.equal(found, torch.cat([getattr(blocks.labels, name) for blocks in alone])), name
