"""Anchor samplers: frequencies against probabilities written out."""

# M anchors to choose from, N chosen, G block size
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vpd.data.cache.arrays import NOT_DRAFTED
from vpd.stages.train.anchors import ANCHOR_SAMPLERS, AnchorCandidates, choose_anchors
from vpd.stages.train.config import AnchorConfig
from vpd.stages.train.drafted import Drafted

G = 5


class Talk(NamedTuple):
    """Turns of a sequence, as spans of positions, and the first draft's accept length at each anchor."""

    turns: list[tuple[int, int]]
    accept_len: dict[int, int]

    @property
    def candidates(self) -> AnchorCandidates:
        labels = {anchor: min(G - 1, end - 1 - anchor) for start, end in self.turns for anchor in range(start, end - 1)}
        drafted = Drafted(torch.tensor([self.accept_len[anchor] for anchor in labels]), None, None, None)
        return AnchorCandidates(torch.tensor([*labels]), torch.tensor([*labels.values()]), G, drafted)


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


def choose(talk: Talk, num_anchors: int, seed: int | torch.Generator = 0, **config: Any) -> list[int]:
    """Positions of the chosen anchors."""
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    candidates = talk.candidates
    chosen_N = choose_anchors(AnchorConfig.model_validate(config), candidates, num_anchors, generator)
    return candidates.positions_M[chosen_N].tolist()


@settings(deadline=None, max_examples=60)
@given(some_talks(), st.sampled_from([*ANCHOR_SAMPLERS]), st.integers(1, 40), st.integers(0, 50))
def test_chosen_anchors_are_distinct_in_order_and_as_many_as_asked_for(
    talk: Talk, sampler: str, num_anchors: int, seed: int
):
    found = choose(talk, num_anchors, seed, sampler=sampler)
    assert found == sorted(set(found))
    assert set(found) <= set(talk.accept_len)
    assert len(found) == min(num_anchors, len(talk.accept_len))
    assert choose(talk, num_anchors, seed, sampler=sampler) == found


# Frequencies, each within 4.5 standard deviations of a binomial. Seeds are fixed, so the outcome never changes.

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
    assert_drawn(lambda generator: choose(talk, num_anchors, generator), expected)


FAILING = Talk([(0, 7), (9, 12)], {0: 0, 1: 1, 2: 4, 3: NOT_DRAFTED, 4: 2, 5: 0, 9: 0, 10: 1})
# At anchors 4 and 10 all labels are accepted, so no failure is known there, just as at 2 and 3.
FAILED_AT = {0: 0, 1: 1, 2: G - 1, 3: G - 1, 4: G - 1, 5: 0, 9: 0, 10: G - 1}


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_failure_weighs_anchors_with_the_power_of_their_accept_length(power: float):
    weights = {anchor: (length + 1) ** -power for anchor, length in FAILED_AT.items()}
    expected = {anchor: weight / sum(weights.values()) for anchor, weight in weights.items()}
    assert_drawn(lambda generator: choose(FAILING, 1, generator, sampler="failure", failure_power=power), expected)


def test_failure_draws_one_after_another_without_replacement():
    weights = {anchor: 1 / (length + 1) for anchor, length in FAILED_AT.items()}
    total = sum(weights.values())
    expected = {
        anchor: weight / total
        + sum(first / total * weight / (total - first) for other, first in weights.items() if other != anchor)
        for anchor, weight in weights.items()
    }
    assert sum(expected.values()) == pytest.approx(2)
    assert_drawn(lambda generator: choose(FAILING, 2, generator, sampler="failure"), expected)
