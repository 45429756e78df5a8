"""The responses that are replayed, and their cycles, against decoding token by token."""

# N anchors, J drafted positions, C ways of decoding
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.slow_decode import slow_count
from support.tiny import make_cached, make_row
from vpd.data.cache.reader import CachedSequence
from vpd.stages.evaluate.responses import BEYOND, find_responses, is_greedy, recorded_after, visited_anchors


def make_sequence(token_ids: list[int], argmax: list[int]) -> CachedSequence:
    """A sequence without states."""
    row = make_row("s", len(argmax), num_supervised=len(token_ids), finish_reason="stop")
    return make_cached(row, torch.empty(0, 2, 8, dtype=torch.bfloat16), token_ids, [True] * len(token_ids), argmax)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.booleans(), max_size=20))
def test_responses_are_the_runs_of_assistant_tokens(mask: list[bool]):
    responses = find_responses(torch.tensor(mask, dtype=torch.bool))
    covered = [position for start, end in responses for position in range(start, end)]
    assert covered == [position for position, assistant in enumerate(mask) if assistant]
    assert all(start < end for start, end in responses)
    # Two runs never touch, so no run could be longer.
    assert all(end < start for (_, end), (start, _) in pairwise(responses))


@settings(deadline=None, max_examples=100)
@given(st.data(), st.integers(2, 8), st.booleans())
def test_a_response_is_greedy_if_decoding_step_by_step_gives_it(data: st.DataObject, num_tokens: int, cut: bool):
    ids = st.integers(0, 1)
    tokens = data.draw(st.lists(ids, min_size=num_tokens, max_size=num_tokens))
    argmax = data.draw(st.lists(ids, min_size=num_tokens, max_size=num_tokens))
    if data.draw(st.booleans()):
        argmax = [*tokens[1:], 0]
    start = data.draw(st.integers(0, num_tokens - 1))
    end = data.draw(st.integers(start + 1, num_tokens))
    # The last token may have no state, and then there is no choice after it.
    sequence = make_sequence(tokens, argmax[:-1] if cut else argmax)
    written = tokens[:start]
    while 0 < len(written) < end:
        written.append(argmax[len(written) - 1])
    # Without a token before the response, the target's choice for its first token is unknown.
    assert is_greedy(sequence, (start, end)) == (start > 0 and written == tokens[:end])


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 6), st.data())
def test_recorded_tokens_are_those_after_each_anchor(tokens: list[int], J: int, data: st.DataObject):
    start = data.draw(st.integers(0, len(tokens) - 1))
    end = data.draw(st.integers(start + 1, len(tokens)))
    found = recorded_after(torch.tensor(tokens), (start, end), J)
    assert found.shape == (end - start - 1, J)
    assert found.tolist() == [
        [tokens[anchor + k] if anchor + k < end else BEYOND for k in range(1, J + 1)]
        for anchor in range(start, end - 1)
    ]


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 25), st.integers(1, 4), st.data())
def test_cycles_are_those_of_a_decode_token_by_token(N: int, C: int, data: st.DataObject):
    rows = st.lists(st.integers(0, 6), min_size=C, max_size=C)
    accept_lens = data.draw(st.lists(rows, min_size=N, max_size=N))
    found = visited_anchors(np.array(accept_lens, dtype=int).reshape(N, C))
    assert found.sum(axis=0).tolist() == [slow_count(lambda i, c=c: accept_lens[i][c], N + 1) for c in range(C)]


@pytest.mark.parametrize(
    ("accept_lens", "visited"),
    [
        pytest.param([], [], id="one-token"),
        pytest.param([0], [0], id="bonus-alone"),
        pytest.param([0, 0, 0], [0, 1, 2], id="never-accepted"),
        pytest.param([2, 9, 9], [0], id="bonus-completes-it"),
        pytest.param([1, 9, 0], [0, 2], id="one-left"),
    ],
)
def test_visited_anchors(accept_lens: list[int], visited: list[int]):
    assert visited_anchors(np.array(accept_lens, dtype=int)[:, None])[:, 0].nonzero()[0].tolist() == visited
