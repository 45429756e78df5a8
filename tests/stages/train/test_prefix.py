"""Prefix samplers: their probabilities against values computed by hand, and the draws from them."""

# N blocks, G block size, J = G-1 prefix lengths
import math
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vpd.data.cache.arrays import NOT_DRAFTED
from vpd.stages.evaluate.branches import CycleFacts, paper
from vpd.stages.train.config import PrefixConfig
from vpd.stages.train.drafted import Drafted
from vpd.stages.train.prefix import PREFIX_SAMPLERS, BlockFacts, draw_prefixes, prefix_distribution

NAMES = [*PREFIX_SAMPLERS]
PLAIN_NAMES = [name for name in NAMES if name != "mixture"]
LAST_UNIFORM = 1 - 2**-24
"""The largest float32 below one."""


class Block(NamedTuple):
    """What is known of one block."""

    num_labels: int
    accept_len: int = NOT_DRAFTED
    confidences: tuple[float, ...] = ()


def facts_of(*blocks: Block, block_size: int = 5, drafted: bool = True) -> BlockFacts:
    num_labels_N = torch.tensor([block.num_labels for block in blocks])
    if not drafted:
        return BlockFacts(num_labels_N, block_size, None)
    accept_len_N = torch.tensor([block.accept_len for block in blocks])
    confidence_NJ = torch.tensor([block.confidences for block in blocks])
    return BlockFacts(num_labels_N, block_size, Drafted(accept_len_N, confidence_NJ, None, None))


def sampler(name: str, **settings: Any) -> PrefixConfig:
    return PrefixConfig.model_validate({"sampler": name, **settings})


# Blocks of size 5, beta 1/2: Eq. 6 gives 8, 4, 2, 1 of 15. With confidences UNSURE, r(i) is
# 0: 1 - .5 = .5; 1: .5 (1 - .8) = .1; 2: .5 x .8 (1 - .5) = .2; 3: .5 x .8 x .5 (1 - .25) = .15.
# With LATE: .1; .9 x .1 = .09; .9 x .9 x .5 = .405; .9 x .9 x .5 x .1 = .0405.
UNSURE, LATE, CERTAIN = (0.5, 0.8, 0.5, 0.25), (0.9, 0.9, 0.5, 0.9), (1.0, 1.0, 1.0, 1.0)
EQ_6 = [8 / 15, 4 / 15, 2 / 15, 1 / 15]
EQ_6_OF_TWO = [2 / 3, 1 / 3, 0, 0]


class Case(NamedTuple):
    id: str
    settings: dict[str, Any]
    block: Block
    expected: list[float]


def believed(num_labels: int, accept_len: int, confidences: tuple[float, ...] = UNSURE) -> Block:
    return Block(num_labels, accept_len, confidences)


GEOMETRIC, VISIBLE = {"sampler": "geometric"}, {"sampler": "visible-geometric"}
BOUNDARY, PAST = {"sampler": "boundary"}, {"sampler": "past-boundary"}
POSTERIOR, TOP1, TOP2 = {"sampler": "posterior"}, {"sampler": "topk", "k": 1}, {"sampler": "topk", "k": 2}
TOP9 = {"sampler": "topk", "k": 9}
MIXED = {"sampler": "mixture", "mixture": {"boundary": 3, "geometric": 1}}
PAST_MIXED = {"sampler": "mixture", "mixture": {"past-boundary": 0.2, "visible-geometric": 0.6}}
CASES = [
    Case("geometric", GEOMETRIC, believed(4, 2), EQ_6),
    Case("geometric-turn-ends", GEOMETRIC, believed(2, 1), EQ_6_OF_TWO),
    Case("geometric-one-label", GEOMETRIC, believed(1, 0), [1, 0, 0, 0]),
    Case("visible", VISIBLE, believed(4, 0), [0, 4 / 7, 2 / 7, 1 / 7]),
    Case("visible-turn-ends", VISIBLE, believed(3, 0), [0, 2 / 3, 1 / 3, 0]),
    Case("visible-one-label", VISIBLE, believed(1, 0), [1, 0, 0, 0]),
    Case("boundary-first-token", BOUNDARY, believed(4, 0), [1, 0, 0, 0]),
    Case("boundary", BOUNDARY, believed(4, 2), [0, 0, 1, 0]),
    Case("boundary-last-token", BOUNDARY, believed(4, 3), [0, 0, 0, 1]),
    Case("boundary-last-label-of-the-turn", BOUNDARY, believed(2, 1), [0, 1, 0, 0]),
    Case("boundary-fully-accepted", BOUNDARY, believed(4, 4), EQ_6),
    Case("boundary-accepted-to-the-end-of-the-turn", BOUNDARY, believed(2, 2), EQ_6_OF_TWO),
    Case("boundary-rejected-beyond-what-is-read", BOUNDARY, believed(2, 3), EQ_6_OF_TWO),
    Case("boundary-not-drafted", BOUNDARY, believed(4, NOT_DRAFTED), EQ_6),
    Case("past-first-token", PAST, believed(4, 0), [0, 1, 0, 0]),
    Case("past", PAST, believed(4, 2), [0, 0, 0, 1]),
    Case("past-leaves-no-position", PAST, believed(4, 3), EQ_6),
    Case("past-leaves-no-label", PAST, believed(2, 1), EQ_6_OF_TWO),
    Case("past-fully-accepted", PAST, believed(4, 4), EQ_6),
    Case("past-accepted-to-the-end-of-the-turn", PAST, believed(3, 3), [4 / 7, 2 / 7, 1 / 7, 0]),
    Case("past-not-drafted", PAST, believed(4, NOT_DRAFTED), EQ_6),
    Case("posterior", POSTERIOR, believed(4, 0), [0.5 / 0.95, 0.1 / 0.95, 0.2 / 0.95, 0.15 / 0.95]),
    Case("posterior-fully-accepted", POSTERIOR, believed(4, 4), [0.5 / 0.95, 0.1 / 0.95, 0.2 / 0.95, 0.15 / 0.95]),
    Case("posterior-turn-ends", POSTERIOR, believed(2, 0), [5 / 6, 1 / 6, 0, 0]),
    Case("posterior-certain", POSTERIOR, believed(4, 1, CERTAIN), EQ_6),
    Case("posterior-not-drafted", POSTERIOR, believed(4, NOT_DRAFTED), EQ_6),
    Case("topk", TOP2, believed(4, 4), [1 / 2, 0, 1 / 2, 0]),
    Case("topk-of-late", TOP2, believed(4, 4, LATE), [1 / 2, 0, 1 / 2, 0]),
    Case("topk-at-the-boundary", TOP2, believed(4, 2), [1 / 2, 0, 1 / 2, 0]),
    Case("topk-without-those-past-the-boundary", TOP2, believed(4, 1), [1, 0, 0, 0]),
    Case("topk-all-past-the-boundary", TOP1, believed(4, 1, LATE), EQ_6),
    Case("topk-turn-ends", TOP2, believed(2, 2), [1, 0, 0, 0]),
    Case("topk-more-than-there-are", TOP9, believed(4, 2), [1 / 3, 1 / 3, 1 / 3, 0]),
    Case("topk-not-drafted", TOP9, believed(4, NOT_DRAFTED), EQ_6),
    Case("mixture", MIXED, believed(4, 1), [2 / 15, 3 / 4 + 1 / 15, 1 / 30, 1 / 60]),
    Case("mixture-turn-ends", MIXED, believed(2, 0), [3 / 4 + 1 / 6, 1 / 12, 0, 0]),
    Case("mixture-each-falls-back-alone", PAST_MIXED, believed(4, 4), [2 / 15, 1 / 15 + 3 / 7, 26 / 105, 13 / 105]),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_probabilities_are_those_computed_by_hand(case: Case):
    config = PrefixConfig.model_validate({"beta": 0.5, **case.settings})
    # Between other blocks, so that the test notices rows that are mixed up.
    blocks = [believed(4, 0, LATE), case.block, believed(1, NOT_DRAFTED)]
    found = prefix_distribution(config, facts_of(*blocks))[1].tolist()
    # A few roundings of float32; no intermediate result is below 1e-2.
    assert found == pytest.approx(case.expected, rel=3e-6, abs=0)


@pytest.mark.parametrize(
    ("beta", "block_size"), [(0.9, 16), (0.5, 8), (1.0, 6), (0.7, 2), (1.1, 16), (2.0, 8), (1.5, 255), (1e30, 4)]
)
@pytest.mark.parametrize("name", ["geometric", "visible-geometric"])
def test_priors_need_no_first_drafts(name: str, beta: float, block_size: int):
    shortest = 1 if name == "visible-geometric" and block_size > 2 else 0
    weights = [beta**j if j >= shortest else 0.0 for j in range(block_size - 1)]
    facts = facts_of(Block(block_size - 1), block_size=block_size, drafted=False)
    found = prefix_distribution(sampler(name, beta=beta), facts)[0].tolist()
    assert found == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-5, abs=1e-37)


def test_the_empty_prefix_has_its_share_of_the_papers_prior():
    found = prefix_distribution(sampler("geometric", beta=0.9), facts_of(Block(15), block_size=16, drafted=False))
    assert float(found[0, 0]) == pytest.approx(0.126, abs=5e-4)


# Draws

BLOCKS = [
    believed(num_labels, accept_len, confidences)
    for num_labels in (4, 3, 1)
    for accept_len in (0, 1, 4, NOT_DRAFTED)
    for confidences in (UNSURE, LATE)
]
MIXTURE = {"mixture": dict.fromkeys(PLAIN_NAMES, 1.0)}


@pytest.mark.parametrize("name", NAMES)
def test_uniform_numbers_spread_over_the_lengths_by_their_probability(name: str):
    num_draws, config = 2000, sampler(name, **MIXTURE)
    for block in BLOCKS:
        facts = facts_of(*[block] * num_draws)
        uniform_N = (torch.arange(num_draws) + 0.5) / num_draws
        counts = Counter(draw_prefixes(config, facts, uniform_N).tolist())
        for length, probability in enumerate(prefix_distribution(config, facts)[0].tolist()):
            # Equally spaced numbers: an interval holds its share of the numbers, plus or minus one.
            assert abs(counts[length] - num_draws * probability) < 1.01, (block, length)


@st.composite
def some_blocks(draw: st.DrawFn) -> tuple[int, list[Block]]:
    block_size = draw(st.integers(2, 10))
    confidences = st.lists(st.floats(0, 1, width=16), min_size=block_size - 1, max_size=block_size - 1).map(tuple)
    lengths = st.integers(0, block_size - 1) | st.just(NOT_DRAFTED)
    block = st.builds(Block, st.integers(1, block_size - 1), lengths, confidences)
    return block_size, draw(st.lists(block, min_size=1, max_size=8))


UNIFORM = st.sampled_from([0.0, LAST_UNIFORM]) | st.integers(0, 2**24 - 1).map(lambda i: i / 2**24)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=40)
@given(some_blocks(), st.data(), st.floats(0.05, 1.0), st.integers(1, 6))
def test_a_label_is_left_and_the_uniform_number_alone_decides(
    name: str, given: tuple[int, list[Block]], data: st.DataObject, beta: float, k: int
):
    block_size, blocks = given
    config = sampler(name, beta=beta, k=k, **MIXTURE)
    uniform_N = torch.tensor(data.draw(st.lists(UNIFORM, min_size=len(blocks), max_size=len(blocks))))
    facts = facts_of(*blocks, block_size=block_size)
    lengths_N = draw_prefixes(config, facts, uniform_N)
    assert lengths_N.dtype == torch.int64
    probs = prefix_distribution(config, facts)
    for block, row, length in zip(blocks, probs.tolist(), lengths_N.tolist(), strict=True):
        assert 0 <= length < block.num_labels
        assert row[length] > 0
        assert math.fsum(row) == pytest.approx(1, rel=1e-5)
    torch.rand(2)
    alone = [
        draw_prefixes(config, facts_of(block, block_size=block_size), uniform_N[n : n + 1])
        for n, block in enumerate(blocks)
    ]
    assert torch.equal(torch.cat(alone), lengths_N)


@pytest.mark.parametrize("name", NAMES)
def test_a_draw_compiles_without_a_graph_break(name: str):
    torch.compiler.reset()
    config = sampler(name, **MIXTURE)
    facts = facts_of(*BLOCKS * 20)
    uniform_N = torch.rand(len(BLOCKS) * 20, generator=torch.Generator().manual_seed(0))
    expected = draw_prefixes(config, facts, uniform_N)  # First, since a lazy module's first import can't be compiled.
    compiled = torch.compile(draw_prefixes, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(config, facts, uniform_N), expected)


def test_topk_chooses_the_lengths_that_decoding_launches():
    """Confidences are often equal, as stored ones can be."""
    generator = torch.Generator().manual_seed(0)
    confidence_NJ = torch.randint(9, (500, 15), generator=generator) / 8
    num_labels_N = torch.full((500,), 15)
    drafted = Drafted(num_labels_N, confidence_NJ, None, None)
    found = prefix_distribution(sampler("topk", k=4), BlockFacts(num_labels_N, 16, drafted))
    tokens_NJA, probs_NJA = torch.zeros(500, 15, 1, dtype=torch.int64), confidence_NJ[..., None]
    launched = paper(CycleFacts(tokens_NJA, probs_NJA, 4)).prefix_len_NB
    assert (found > 0).nonzero()[:, 1].view(500, 4).tolist() == launched.sort(dim=1).values.tolist()
