"""Blocks of a pass: what first drafts add to them, and that they are the same in any company."""

# G block size
from typing import Any, NamedTuple

import pytest
import torch
from support.recorded import (
    DRAFT,
    TOKEN,
    G,
    draw,
    make_config,
    make_drafts,
    make_sequence,
    pack_all,
    prefixes,
    training_blocks,
)
from vpd.data.cache.drafts import NOT_DRAFTED, FirstDrafts
from vpd.data.cache.reader import CachedSequence
from vpd.stages.train.samples import TrainingBlocks, boundary_readers, reads_draft_tokens

REJECTIONS = [0, 3, 4, 2, NOT_DRAFTED, 1, 2, 0, 0, 0, 1, 1, 0]
"""Accept lengths in `DRAFTED`: 2 is right to its last position, 4 was not drafted, 6 and 11 to the end of the turn."""
DRAFTED = "aaaaaaaaa.aaa"


@pytest.mark.parametrize("visible", ["recorded", "first-draft"])
def test_visible_tokens_are_the_recorded_or_the_first_drafts(visible: str):
    config = make_config(visible=visible)
    blocks = training_blocks(make_sequence(DRAFTED), config, 0, make_drafts(REJECTIONS))
    for anchor, prefix, row in zip(blocks.anchors_N.tolist(), prefixes(blocks), blocks.block_ids_NG, strict=True):
        drafted = visible == "first-draft" and REJECTIONS[anchor] != NOT_DRAFTED
        base = DRAFT + 10 * anchor if drafted else TOKEN + anchor
        assert row[: prefix + 1].tolist() == [TOKEN + anchor, *(base + k for k in range(1, prefix + 1))]
    assert max(prefixes(blocks)) > 0


class Reads(NamedTuple):
    id: str
    settings: dict[str, Any]
    boundaries: bool
    tokens: bool


READS = [
    Reads("geometric", {}, False, False),
    Reads("boundary", {"prefix": {"sampler": "boundary"}}, True, False),
    Reads("posterior", {"prefix": {"sampler": "posterior"}}, True, True),
    Reads("topk", {"prefix": {"sampler": "topk"}}, True, True),
    Reads("mixture-of-priors", {"prefix": {"sampler": "mixture", "mixture": {"geometric": 1}}}, False, False),
    Reads("mixture-with-past", {"prefix": {"sampler": "mixture", "mixture": {"past-boundary": 1}}}, True, False),
    Reads("mixture-with-topk", {"prefix": {"sampler": "mixture", "mixture": {"topk": 1, "boundary": 1}}}, True, True),
    Reads("mixture-not-in-use", {"prefix": {"sampler": "geometric", "mixture": {"topk": 1}}}, False, False),
    Reads("chain", {"anchor": {"sampler": "chain"}}, True, False),
    Reads("failure", {"anchor": {"sampler": "failure"}}, True, False),
    Reads("first-draft-visible", {"visible": "first-draft"}, True, True),
    Reads(
        "first-drafter", {"objective": "dflash", "prefix": {"sampler": "topk"}, "visible": "first-draft"}, False, False
    ),
    Reads("chain-of-first-drafter", {"objective": "dflash", "anchor": {"sampler": "chain"}}, True, False),
]


@pytest.mark.parametrize("case", READS, ids=lambda case: case.id)
def test_drafts_are_read_where_a_setting_needs_them(case: Reads):
    config = make_config(**case.settings)
    assert (bool(boundary_readers(config)), reads_draft_tokens(config)) == (case.boundaries, case.tokens)


# What a draw depends on

MIXED = {
    "prefix": {"sampler": "mixture", "mixture": {"posterior": 1, "past-boundary": 1, "topk": 1, "geometric": 1}},
    "visible": "first-draft",
}
DRAWS = {
    "dflash": {"objective": "dflash"},
    "geometric": {},
    "mixture": MIXED,
    "mixture-at-failures": {**MIXED, "anchor": {"sampler": "failure"}},
    "mixture-on-the-chain": {**MIXED, "anchor": {"sampler": "chain", "uniform_share": 0.5}},
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
