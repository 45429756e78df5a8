"""Block geometry against loops over positions."""

# S tokens of a sequence, N blocks, G block size
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vpd.stages.drafter.blocks import accept_lengths, anchors_of, block_tokens, show_prefix

MASK = 99


class Talk(NamedTuple):
    """A sequence of several turns, with or without a state for its last token."""

    tokens: list[int]
    mask: list[bool]
    num_context: int
    block_size: int


@st.composite
def talks(draw: st.DrawFn) -> Talk:
    turns = draw(st.lists(st.tuples(st.booleans(), st.integers(1, 6)), min_size=1, max_size=6))
    mask = [assistant for assistant, length in turns for _ in range(length)]
    # Each token is its position, so that a token from another place is noticed.
    return Talk(list(range(len(mask))), mask, len(mask) - draw(st.integers(0, 1)), draw(st.integers(2, 8)))


def expected_anchors(talk: Talk) -> list[int]:
    return [
        position
        for position in range(len(talk.tokens))
        if position < talk.num_context
        and talk.mask[position]
        and position + 1 < len(talk.tokens)
        and talk.mask[position + 1]
    ]


def turn_end(talk: Talk, position: int) -> int:
    """First position after `position` that is no assistant token."""
    while position < len(talk.mask) and talk.mask[position]:
        position += 1
    return position


@settings(deadline=None, max_examples=100)
@given(talks())
def test_anchors_are_the_assistant_tokens_with_a_state_whose_next_token_is_the_assistants(talk: Talk):
    anchors_N = anchors_of(torch.tensor(talk.mask), talk.num_context)
    assert anchors_N.tolist() == expected_anchors(talk)
    assert anchors_N.dtype == torch.int64


@settings(deadline=None, max_examples=100)
@given(talks())
def test_blocks_hold_the_recorded_tokens_and_their_labels_end_with_the_turn(talk: Talk):
    anchors = expected_anchors(talk)
    tokens_NG, labeled_NG = block_tokens(
        torch.tensor(talk.tokens), torch.tensor(talk.mask), torch.tensor(anchors, dtype=torch.int64), talk.block_size
    )
    assert tokens_NG.shape == labeled_NG.shape == (len(anchors), talk.block_size)
    for anchor, tokens, labeled in zip(anchors, tokens_NG.tolist(), labeled_NG.tolist(), strict=True):
        end = turn_end(talk, anchor)
        assert labeled == [0 < k < end - anchor for k in range(talk.block_size)]
        assert labeled[1]
        for k, token in enumerate(tokens):
            assert token == min(anchor + k, len(talk.tokens) - 1)


def test_labels_do_not_resume_with_the_next_turn():
    mask = torch.tensor([False, True, True, False, True, True])
    tokens_NG, labeled_NG = block_tokens(torch.arange(6), mask, torch.tensor([1]), 5)
    assert tokens_NG.tolist() == [[1, 2, 3, 4, 5]]
    assert labeled_NG.tolist() == [[False, True, False, False, False]]


def test_a_prompt_without_an_answer_has_no_anchor():
    mask = torch.zeros(5, dtype=torch.bool)
    anchors_N = anchors_of(mask, 5)
    assert anchors_N.tolist() == []
    assert block_tokens(torch.arange(5), mask, anchors_N, 4)[0].shape == (0, 4)


@settings(deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(2, 8))
def test_a_prefix_is_the_anchor_and_as_many_tokens_as_its_length(data: st.DataObject, num_blocks: int, G: int):
    prefixes = data.draw(st.lists(st.integers(0, G - 1), min_size=num_blocks, max_size=num_blocks))
    tokens_NG = torch.arange(num_blocks * G).view(num_blocks, G)
    shown = show_prefix(tokens_NG, torch.tensor(prefixes), MASK)
    expected = [[block * G + k if k <= prefix else MASK for k in range(G)] for block, prefix in enumerate(prefixes)]
    assert shown.tolist() == expected
    assert tokens_NG.tolist() == torch.arange(num_blocks * G).view(num_blocks, G).tolist()


def slow_accept_length(draft: list[int], recorded: list[int], labeled: list[bool]) -> int:
    length = 0
    while length < len(draft) and labeled[length + 1] and draft[length] == recorded[length + 1]:
        length += 1
    return length


@settings(deadline=None, max_examples=100)
@given(st.data(), st.integers(1, 5), st.integers(2, 8))
def test_accept_lengths_count_the_right_tokens_before_the_first_wrong_one(data: st.DataObject, N: int, G: int):
    row = st.lists(st.integers(0, 1), min_size=G, max_size=G)
    rows = st.lists(row, min_size=N, max_size=N)
    draft, recorded, labeled = data.draw(rows), data.draw(rows), data.draw(rows)
    found = accept_lengths(torch.tensor(draft)[:, 1:], torch.tensor(recorded), torch.tensor(labeled).bool())
    expected = [
        slow_accept_length(row[1:], recorded_row, [bool(x) for x in labeled_row])
        for row, recorded_row, labeled_row in zip(draft, recorded, labeled, strict=True)
    ]
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("draft", "num_labels", "expected"),
    [
        pytest.param([1, 2, 3], 3, 3, id="all-right"),
        pytest.param([9, 2, 3], 3, 0, id="first-wrong"),
        pytest.param([1, 9, 3], 3, 1, id="right-again-later"),
        pytest.param([1, 2, 3], 2, 2, id="turn-ends-inside"),
    ],
)
def test_accept_length(draft: list[int], num_labels: int, expected: int):
    labeled = torch.tensor([[0 < k <= num_labels for k in range(4)]])
    assert accept_lengths(torch.tensor([draft]), torch.arange(4)[None], labeled).tolist() == [expected]
