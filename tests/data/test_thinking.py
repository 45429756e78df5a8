"""Thinking: what lies between the marks, in tokens and in text."""

import re
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from vpd.data.errors import ConfigError
from vpd.data.prompts.messages import Message
from vpd.data.thinking import ThinkingMarks, without_thinking

BEGIN, END = 100, 101
MARKS = ("<think>", "</think>")
marks = ThinkingMarks(BEGIN, END)


@pytest.mark.parametrize(
    ("token_ids", "loss_mask", "expected"),
    [
        pytest.param([1, BEGIN, 2, END, 3, 4], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1], id="in-the-answer"),
        pytest.param([1, BEGIN, 2, END, 3], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1], id="begun-by-the-prompt"),
        pytest.param([1, BEGIN, 2, 3], [0, 1, 1, 1], [0, 0, 0, 0], id="cut-while-thinking"),
        pytest.param([BEGIN, END, 5], [0, 0, 1], [0, 0, 1], id="an-empty-block-of-the-template"),
        pytest.param([1, BEGIN, 2, 3, 4], [0, 1, 1, 0, 1], [0, 0, 0, 0, 1], id="left-open-in-an-earlier-turn"),
        pytest.param([1, 2, 3], [0, 1, 1], [0, 1, 1], id="none"),
    ],
)
def test_thinking_is_not_supervised(token_ids: list[int], loss_mask: list[int], expected: list[int]):
    assert marks.mask(token_ids, loss_mask) == expected


@given(st.lists(st.tuples(st.sampled_from([1, 2, BEGIN, END]), st.integers(0, 1)), max_size=30))
def test_masking_adds_nothing_and_is_done_once(pairs: list[tuple[int, int]]):
    token_ids, loss_mask = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    masked = marks.mask(token_ids, loss_mask)
    assert all(after <= before for after, before in zip(masked, loss_mask, strict=True))
    assert not any(kept for kept, token_id in zip(masked, token_ids, strict=True) if token_id in (BEGIN, END))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("<think>hm</think>\n\nyes", "yes"),
        ("hm</think>yes", "yes"),
        ("yes", "yes"),
        ("say <think> and </think>", "say <think> and </think>"),
    ],
)
def test_given_answers_lose_their_thinking(content: str, expected: str):
    message = Message("assistant", content, {"reasoning_content": "hm", "tool_calls": [1]})
    assert without_thinking(message, MARKS) == Message("assistant", expected, {"tool_calls": [1]})
    asked = Message("user", content)
    assert without_thinking(asked, MARKS) is asked


def test_marks_must_be_tokens(tiny_tokenizer: PreTrainedTokenizerFast):
    with pytest.raises(ConfigError, match=re.escape("no token <think>")):
        ThinkingMarks.of(cast(Any, tiny_tokenizer), MARKS)
    ids = [tiny_tokenizer.get_vocab()[mark] for mark in ("<|im_start|>", "<|im_end|>")]
    assert ThinkingMarks.of(cast(Any, tiny_tokenizer), ["<|im_start|>", "<|im_end|>"]) == ThinkingMarks(*ids)
