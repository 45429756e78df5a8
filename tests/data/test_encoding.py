"""Announced texts have the tokens of texts that are tokenized alone, and masks found at once those found one by one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import CHATML, make_tokenizer
from vpd.data.chat import ChatFormat
from vpd.data.encoding import TextEncoder
from vpd.data.prompts.forms import Content
from vpd.data.prompts.messages import Message
from vpd.data.turns import _mask_each, mask_spans

TOKENIZER = make_tokenizer()
TEXTS = ["", "a fox", "the dog <|im_end|>", "é " * 9, "a fox"]


@pytest.mark.parametrize("announced", [[], TEXTS, TEXTS[:2], ["other"]], ids=len)
def test_announcing_changes_no_token(announced: list[str]):
    encoder = TextEncoder(TOKENIZER)
    encoder.announce(announced, announced[1:])
    for text in TEXTS:
        for with_special in (False, True):
            alone = TOKENIZER(text, add_special_tokens=with_special, return_offsets_mapping=True)
            assert encoder.encode(text, with_special) == (alone["input_ids"], alone["offset_mapping"])


def test_announced_contents_are_not_tokenized_again(monkeypatch: pytest.MonkeyPatch):
    chat = ChatFormat(TOKENIZER, eos_token_ids={0}, template=CHATML)
    turns = [(Message("user", f"why {i}?"), Message("assistant", "so")) for i in range(3)]
    plain = Content(text="a fox")
    alone: list[object] = [*(chat.conversation(each) for each in turns), chat.text("a fox")]
    alone.append(chat.prompt_ids(turns[0][:1]))
    calls: list[object] = []
    whole = TextEncoder._call
    monkeypatch.setattr(TextEncoder, "_call", lambda self, *args: calls.append(args) or whole(self, *args))
    chat.announce([*(Content(each) for each in turns), plain], False)
    again: list[object] = [*(chat.conversation(each) for each in turns), chat.text("a fox")]
    assert len(calls) == 2
    chat.announce([Content(turns[0][:1]), Content(()), Content((Message("assistant", "x"),))], True)
    again.append(chat.prompt_ids(turns[0][:1]))
    assert len(calls) == 3
    assert again == alone


OFFSETS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=12)


@given(offsets=OFFSETS, spans=OFFSETS, is_usual=st.booleans())
def test_masks_found_at_once_are_those_found_one_by_one(
    offsets: list[tuple[int, int]], spans: list[tuple[int, int]], is_usual: bool
):
    """Usual offsets follow one another, and have a character each."""
    offsets = [(min(each), max(each)) for each in offsets]
    if is_usual:
        offsets = sorted({(start, end + 1) for start, end in offsets})
    assert mask_spans(offsets, spans) == _mask_each(offsets, spans)
