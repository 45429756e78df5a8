"""Anchor samplers: frequencies against probabilities written out, and the chain against a decode token by token."""

# M anchors to choose from, N chosen, G block size
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vpd.data.cache.drafts import NOT_DRAFTED
from vpd.stages.train.anchors import AnchorFacts, choose_anchors
from vpd.stages.train.config import AnchorConfig

G = 5


class Talk(NamedTuple):
    """Turns of a sequence, as spans of positions, and what the first drafter did at each anchor."""

    turns: list[tuple[int, int]]
    accept_len: dict[int, int]

    @property
    def facts(self) -> AnchorFacts:
        labels = {anchor: min(G - 1, end - 1 - anchor) for start, end in self.turns for anchor in range(start, end - 1)}
        lengths = torch.tensor([self.accept_len[anchor] for anchor in labels], dtype=torch.uint8)
        return AnchorFacts(torch.tensor([*labels]), torch.tensor([*labels.values()]), lengths, G)


@st.composite
def some_talks(draw: st.DrawFn) -> Talk:
    turns, position = [], 0
    for gap, length in draw(st.lists(st.tuples(st.integers(1, 4), st.integers(2, 30)), min_size=1, max_size=4)):
        turns.append((position + gap, position + gap + length))
        position += gap + length
    accept_len = {}
    for start, end in turns:
        for anchor in range(start, end - 1):
            lengths = st.integers(0, min(G - 1, end - 1 - anchor))
            accept_len[anchor] = draw(lengths | st.just(NOT_DRAFTED))
    return Talk(turns, accept_len)


def decoded_anchors(talk: Talk) -> list[int]:
    """Where a cycle starts while every turn is decoded, token by token."""
    visited = []
    for start, end in talk.turns:
        accepted_left = 0
        for position in range(start, end - 1):
            if accepted_left:
                accepted_left -= 1
            else:  # the target's own token: the prompt's or a bonus
                visited.append(position)
                drafted = talk.accept_len[position]
                accepted_left = 0 if drafted == NOT_DRAFTED else drafted
    return visited


def choose(facts: AnchorFacts, num_anchors: int, seed: int | torch.Generator = 0, **config: Any) -> list[int]:
    """Positions of the chosen anchors."""
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    chosen_N = choose_anchors(AnchorConfig.model_validate(config), facts, num_anchors, generator)
    return facts.positions_M[chosen_N].tolist()


def long_talk(num_visited: int, num_others: int) -> Talk:
    """A turn whose first anchors each commit one token, then one which decoding never comes to."""
    assert num_others < G
    last = num_visited - 1
    accept_len = {anchor: 0 for anchor in range(last)} | {last: num_others}
    others = range(num_visited, num_visited + num_others)
    return Talk([(0, num_visited + num_others + 1)], accept_len | dict.fromkeys(others, 0))


SAMPLERS = get_args(AnchorConfig.model_fields["sampler"].annotation)


@settings(deadline=None, max_examples=60)
@given(some_talks(), st.sampled_from(SAMPLERS), st.integers(1, 40), st.floats(0, 0.95), st.integers(0, 50))
def test_chosen_anchors_are_distinct_in_order_and_some(
    talk: Talk, sampler: str, num_anchors: int, uniform_share: float, seed: int
):
    found = choose(talk.facts, num_anchors, seed, sampler=sampler, uniform_share=uniform_share)
    assert found == sorted(set(found))
    assert set(found) <= set(talk.accept_len)
    assert 1 <= len(found) <= num_anchors
    if sampler != "chain":
        assert len(found) == min(num_anchors, len(talk.accept_len))
    assert choose(talk.facts, num_anchors, seed, sampler=sampler, uniform_share=uniform_share) == found


# Frequencies, each within 4.5 standard deviations of a binomial; seeds are fixed, so this never flickers.

NUM_DRAWS = 4000


def assert_drawn(draw: Callable[[torch.Generator], list[int]], expected: dict[int, float]) -> None:
    generator = torch.Generator().manual_seed(1)
    counts = Counter(anchor for _ in range(NUM_DRAWS) for anchor in draw(generator))
    assert set(counts) <= set(expected)
    for anchor, chance in expected.items():
        deviation = (NUM_DRAWS * chance * (1 - chance)) ** 0.5
        assert abs(counts[anchor] - NUM_DRAWS * chance) <= 4.5 * deviation, (anchor, counts[anchor])


@pytest.mark.parametrize("num_anchors", [1, 3])
def test_uniform_chooses_every_anchor_equally_often(num_anchors: int):
    talk = Talk([(2, 6), (7, 10)], dict.fromkeys([2, 3, 4, 7, 8], 0))
    expected = dict.fromkeys(talk.accept_len, num_anchors / 5)
    assert_drawn(lambda generator: choose(talk.facts, num_anchors, generator), expected)


FAILING = Talk([(0, 7), (9, 12)], {0: 0, 1: 1, 2: 4, 3: NOT_DRAFTED, 4: 2, 5: 0, 9: 0, 10: 1})
# Anchor 4 has its two labels accepted and 10 its one: no rejection is known, no more than at 2 and 3.
FAILED_AT = {0: 0, 1: 1, 2: G - 1, 3: G - 1, 4: G - 1, 5: 0, 9: 0, 10: G - 1}


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_failure_weighs_anchors_with_the_power_of_their_accept_length(power: float):
    weights = {anchor: (length + 1) ** -power for anchor, length in FAILED_AT.items()}
    expected = {anchor: weight / sum(weights.values()) for anchor, weight in weights.items()}
    assert_drawn(
        lambda generator: choose(FAILING.facts, 1, generator, sampler="failure", failure_power=power), expected
    )


def test_failure_draws_one_after_another_without_replacement():
    weights = {anchor: 1 / (length + 1) for anchor, length in FAILED_AT.items()}
    total = sum(weights.values())
    expected = {
        anchor: weight / total
        + sum(first / total * weight / (total - first) for other, first in weights.items() if other != anchor)
        for anchor, weight in weights.items()
    }
    assert sum(expected.values()) == pytest.approx(2)
    assert_drawn(lambda generator: choose(FAILING.facts, 2, generator, sampler="failure"), expected)


# The chain


@settings(deadline=None, max_examples=150)
@given(some_talks(), st.integers(0, 50))
def test_chain_without_others_is_what_decoding_visits(talk: Talk, seed: int):
    assert choose(talk.facts, 1000, seed, sampler="chain", uniform_share=0.0) == decoded_anchors(talk)


def test_chain_visits_by_hand():
    accept_len = {1: 2, 2: 0, 3: 0, 4: 1, 5: 3, 6: 0, 10: NOT_DRAFTED, 11: 0, 12: 4, 13: 0, 14: 0, 15: 0, 16: 0, 17: 1}
    talk = Talk([(1, 8), (10, 19)], accept_len)
    # 1 commits 2, 3 and the bonus 4; 4 commits 5 and 6. 10 and 11 commit the next token; 12 four and 17.
    assert choose(talk.facts, 1000, sampler="chain", uniform_share=0.0) == [1, 4, 6, 10, 11, 12, 17]


class Share(NamedTuple):
    id: str
    num_visited: int
    num_others: int
    num_anchors: int
    uniform_share: float
    expected: tuple[int, int]
    """Visited anchors and others among those chosen."""


SHARES = [
    Share("all-visited-and-their-share", 12, 4, 100, 0.2, (12, 3)),
    Share("fewer-others-than-their-share", 12, 2, 100, 0.5, (12, 2)),
    Share("none-of-the-others", 12, 4, 100, 0.0, (12, 0)),
    Share("capped", 12, 4, 10, 0.3, (7, 3)),
    Share("capped-without-others", 12, 4, 5, 0.0, (5, 0)),
    Share("one-of-large-share", 12, 4, 1, 0.9, (1, 0)),
    Share("two-of-large-share", 12, 4, 2, 0.8, (1, 1)),
]


@pytest.mark.parametrize("case", SHARES, ids=lambda case: case.id)
def test_others_have_their_share_beside_the_chain(case: Share):
    talk = long_talk(case.num_visited, case.num_others)
    assert decoded_anchors(talk) == list(range(case.num_visited))
    for seed in range(5):
        found = choose(talk.facts, case.num_anchors, seed, sampler="chain", uniform_share=case.uniform_share)
        visited = sum(anchor < case.num_visited for anchor in found)
        assert (visited, len(found) - visited) == case.expected


def test_a_capped_chain_and_its_others_are_chosen_uniformly():
    talk = long_talk(5, 3)
    expected = dict.fromkeys(range(5), 2 / 5) | dict.fromkeys(range(5, 8), 1 / 3)
    assert_drawn(
        lambda generator: choose(talk.facts, 3, generator, sampler="chain", uniform_share=1 / 3),
        expected,
    )
