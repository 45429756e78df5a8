"""Properties that hold for any data: the order of an epoch, its steps, and the processes' shares of a step."""

# E training sequences
import itertools
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.recorded import make_cache, make_sequence
from support.tiny import make_index, make_row
from vpd.stages.train import order
from vpd.stages.train.order import DataOrder


class Data(NamedTuple):
    """Sequences of these lengths in these parts, and the budget of a step."""

    lengths: list[int]
    parts: list[int]
    tokens_per_step: int
    seed: int

    def order(self) -> DataOrder:
        return DataOrder(np.array(self.lengths), np.array(self.parts), self.tokens_per_step, self.seed)


@st.composite
def any_data(draw: st.DrawFn) -> Data:
    longest = draw(st.sampled_from([1, 3, 50, 4000]))
    lengths = draw(st.lists(st.integers(1, longest), min_size=1, max_size=40))
    parts = draw(st.lists(st.integers(0, 5), min_size=len(lengths), max_size=len(lengths)))
    budget = draw(st.one_of(st.integers(1, 3 * longest), st.integers(1, 2 * sum(lengths))))
    return Data(lengths, parts, budget, draw(st.integers(0, 2)))


def steps_of_epoch(data_order: DataOrder, epoch: int) -> list[list[int]]:
    first = epoch * data_order.steps_per_epoch
    return [data_order.indices(step) for step in range(first, first + data_order.steps_per_epoch)]


def flat_epoch(data_order: DataOrder, epoch: int) -> list[int]:
    return list(itertools.chain.from_iterable(steps_of_epoch(data_order, epoch)))


# Steps


@settings(deadline=None)
@given(any_data(), st.integers(0, 3))
def test_an_epoch_visits_each_sequence_once_in_steps_that_are_not_empty(data: Data, epoch: int):
    data_order = data.order()
    num_steps = 0
    while num_steps < len(data.lengths) and num_steps * data.tokens_per_step < sum(data.lengths):
        num_steps += 1
    assert data_order.steps_per_epoch == num_steps
    steps = steps_of_epoch(data_order, epoch)
    assert all(steps)
    assert sorted(itertools.chain.from_iterable(steps)) == list(range(len(data.lengths)))


@settings(deadline=None, max_examples=300)
@given(any_data())
def test_a_step_has_fewer_tokens_than_the_budget_and_the_longest_sequence(data: Data):
    data_order = data.order()
    for step, indices in enumerate(steps_of_epoch(data_order, 0)):
        num_tokens = sum(data.lengths[index] for index in indices)
        assert data_order.num_tokens(step) == num_tokens
        assert num_tokens < data.tokens_per_step + max(data.lengths)


def test_no_tighter_bound_holds():
    """For some seed, three sequences of one token and the longest one begin within the first 4 tokens."""
    most = 0
    for seed in range(100):
        data_order = Data([5, *[1] * 7], [0] * 8, 4, seed).order()
        most = max(most, *(data_order.num_tokens(step) for step in range(data_order.steps_per_epoch)))
    assert most == 4 + 5 - 1


@settings(deadline=None)
@given(any_data())
def test_steps_take_what_begins_in_their_share_of_the_tokens_where_that_leaves_none_empty(data: Data):
    data_order = data.order()
    taken = flat_epoch(data_order, 0)
    steps: list[list[int]] = [[] for _ in range(data_order.steps_per_epoch)]
    begin = 0
    for index in taken:
        steps[begin * len(steps) // sum(data.lengths)].append(index)
        begin += data.lengths[index]
    if all(steps):
        assert steps_of_epoch(data_order, 0) == steps


# What the order depends on


@settings(deadline=None)
@given(any_data(), st.lists(st.integers(0, 200), max_size=8))
def test_a_step_is_the_same_whatever_was_asked_before(data: Data, asked: list[int]):
    data_order = data.order()
    for step in asked:
        data_order.indices(step)
    steps = range(3 * data_order.steps_per_epoch)
    fresh = [data.order().indices(step) for step in steps]
    assert [data_order.indices(step) for step in steps] == fresh
    assert [data_order.indices(step) for step in reversed(steps)] == fresh[::-1]


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else():
    lengths, parts = [*range(1, 61)], [i % 3 for i in range(60)]

    def epoch(seed: int, number: int, tokens_per_step: int = 100) -> list[int]:
        return flat_epoch(Data(lengths, parts, tokens_per_step, seed).order(), number)

    orders = [tuple(epoch(seed, number)) for seed in range(3) for number in range(3)]
    assert len(set(orders)) == 9
    assert epoch(1, 2) == epoch(1, 2)
    # The order does not depend on the size of the steps.
    assert epoch(1, 2, tokens_per_step=7) == epoch(1, 2, tokens_per_step=10**6) == epoch(1, 2)


# Processes


@settings(deadline=None)
@given(any_data(), st.integers(1, 6))
def test_processes_share_a_step_without_overlap_and_about_evenly(data: Data, num_processes: int):
    data_order = data.order()
    for step in range(data_order.steps_per_epoch, 2 * data_order.steps_per_epoch):
        indices = data_order.indices(step)
        shares = [data_order.share(step, process, num_processes) for process in range(num_processes)]
        assert sorted(itertools.chain.from_iterable(shares)) == sorted(indices)
        loads = [sum(data.lengths[index] for index in share) for share in shares]
        assert max(loads) - min(loads) <= max(data.lengths[index] for index in indices)
        # Each process reads its share in the order of the step.
        assert all(share == [index for index in indices if index in share] for share in shares)


def test_the_longest_sequences_are_shared_out_first():
    data_order = Data([1, 1, 1, 1, 4, 8], [0] * 6, 100, 0).order()
    loads = [sum(data_order.num_tokens_E[data_order.share(0, process, 2)]) for process in range(2)]
    assert sorted(loads) == [8, 8]


# Locality


@settings(deadline=None)
@given(any_data(), st.integers(1, 3), st.integers(0, 2))
def test_the_parts_come_a_few_at_a_time(data: Data, parts_at_once: int, epoch: int):
    # Parts are numbered without gaps.
    data = data._replace(parts=np.unique(data.parts, return_inverse=True)[1].tolist())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "PARTS_AT_ONCE", parts_at_once)
        parts = [data.parts[index] for index in flat_epoch(data.order(), epoch)]
    by_first_visit = list(dict.fromkeys(parts))
    window_of = {part: i // parts_at_once for i, part in enumerate(by_first_visit)}
    windows = [window_of[part] for part in parts]
    assert windows == sorted(windows)


def test_the_parts_of_a_window_are_shuffled_together_and_each_epoch_has_other_windows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(order, "PARTS_AT_ONCE", 2)
    data_order = Data([1] * 120, [i // 20 for i in range(120)], 40, 0).order()
    windows = set[frozenset[int]]()
    for epoch in range(3):
        for indices in steps_of_epoch(data_order, epoch):
            parts = [index // 20 for index in indices]
            assert (len(parts), len(set(parts))) == (40, 2)
            assert len(list(itertools.groupby(parts))) > 8
            assert sorted(indices) != indices
            windows.add(frozenset(parts))
    assert len(windows) > 3


# From a cache


@pytest.mark.parametrize("max_len", [5, 8, 100])
def test_a_sequence_counts_as_many_tokens_as_are_read(max_len: int):
    turns = ["..aa", "..aaaaaa", "...aaaaaaaaa", "." * 20]
    sequences = [
        make_sequence(text, seq_id=f"{text}{i}", final_token=text.endswith("a")) for text in turns for i in range(3)
    ]
    rows = make_cache(sequences).rows
    lengths = [min(len(sequence.hidden_TKH), max_len) for sequence in sequences]
    data_order = DataOrder.of(rows, max_len, 11, seed=1)
    assert data_order.num_tokens_E.tolist() == lengths
    assert data_order.steps_per_epoch == min(-(-sum(lengths) // 11), len(rows))
    assert steps_of_epoch(data_order, 0) == steps_of_epoch(Data(lengths, [0] * len(rows), 11, 1).order(), 0)


def test_the_parts_of_a_cache_are_told_apart_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(order, "PARTS_AT_ONCE", 1)
    names = [name for name in ("part-7", "another", "part-3") for _ in range(10)]
    rows = make_index(make_row(f"s{i}", 4, part=name) for i, name in enumerate(names))
    taken = flat_epoch(DataOrder.of(rows, 100, 9, seed=0), 0)
    assert len(list(itertools.groupby(names[index] for index in taken))) == 3
