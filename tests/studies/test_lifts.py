"""Lifts and their ratios against sums written out, and their intervals against another bootstrap."""

import random

import numpy as np
import pytest
from lifts import Lifts

TOKENS = [30, 12, 50, 7, 21, 40]
FIRST, ONE, OTHER = [15, 8, 20, 7, 9, 31], [10, 6, 15, 5, 8, 20], [12, 7, 18, 6, 8, 25]


def alpha(cycles: list[int], chosen: list[int]) -> float:
    return sum(TOKENS[s] for s in chosen) / sum(cycles[s] for s in chosen)


def lift(cycles: list[int], chosen: list[int]) -> float:
    return alpha(cycles, chosen) - alpha(FIRST, chosen)


@pytest.fixture
def lifts() -> Lifts:
    return Lifts(np.array(TOKENS), np.array(FIRST))


def test_values_are_those_of_all_sequences(lifts: Lifts):
    everything = list(range(len(TOKENS)))
    assert lifts.lift(np.array(ONE)).value == pytest.approx(lift(ONE, everything))
    expected = lift(ONE, everything) / lift(OTHER, everything)
    assert lifts.ratio(np.array(ONE), np.array(OTHER)).value == pytest.approx(expected)


def test_intervals_are_those_of_a_bootstrap_with_other_draws(lifts: Lifts):
    chooser = random.Random(1)
    drawn = [chooser.choices(range(len(TOKENS)), k=len(TOKENS)) for _ in range(4000)]
    for found, values in (
        (lifts.lift(np.array(ONE)), [lift(ONE, chosen) for chosen in drawn]),
        (lifts.ratio(np.array(ONE), np.array(OTHER)), [lift(ONE, c) / lift(OTHER, c) for c in drawn]),
    ):
        ordered = sorted(values)
        # Quantiles of 1,000 and of 4,000 draws differ by a few percent of the interval's width.
        slack = 0.12 * (ordered[3900] - ordered[100])
        assert found.low == pytest.approx(ordered[100], abs=slack)
        assert found.high == pytest.approx(ordered[3900], abs=slack)
        assert found.low <= found.value <= found.high


def test_a_way_against_itself_is_one_without_doubt(lifts: Lifts):
    assert lifts.ratio(np.array(ONE), np.array(ONE)) == (1.0, 1.0, 1.0)
    assert lifts.lift(np.array(FIRST)) == (0.0, 0.0, 0.0)
