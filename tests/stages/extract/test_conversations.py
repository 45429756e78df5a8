"""Conversations: what the engine is asked for, and which tokens of the finished sequence are supervised."""

# T tokens that entered the target
from typing import Any

import pytest
import torch
from support.tiny import CHATML, END, VOCAB
from transformers import PreTrainedTokenizerFast
from vpd.data.cache.arrays import NO_CHOICE
from vpd.data.chat import ChatFormat
from vpd.data.errors import PromptError
from vpd.data.prompts.messages import Message
from vpd.data.prompts.records import PromptRecord
from vpd.data.thinking import ThinkingMarks, ThinkingPolicy
from vpd.stages.extract.conversations import (
    FinishedSequence,
    GeneratedConversation,
    GivenConversation,
    SequenceTooLong,
    split_turns,
)
from vpd.stages.extract.engine import Completion, EngineRequest

ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}


def make_record(turns: str = "", text: str | None = None) -> PromptRecord:
    """`su` is a system and a user message; the content of message i is `say i`."""
    messages = tuple(Message(ROLES[turn], f"say {i}") for i, turn in enumerate(turns))
    return PromptRecord("id", "prompts.jsonl", 7, messages, text)


@pytest.fixture(scope="module")
def chat(tiny_tokenizer: PreTrainedTokenizerFast) -> ChatFormat:
    return ChatFormat(tiny_tokenizer, eos_token_ids={tiny_tokenizer.get_vocab()[END]})


@pytest.fixture(scope="module")
def end(tiny_tokenizer: PreTrainedTokenizerFast) -> int:
    return tiny_tokenizer.get_vocab()[END]


def complete(request: EngineRequest, output_ids: list[int], argmax: list[int] | None = None) -> Completion:
    """An engine's completion; the argmax at prompt positions is 9."""
    num_tokens = len(request.prompt_ids) + len(output_ids) - 1
    choices = [9] * (len(request.prompt_ids) - 1) + (output_ids if argmax is None else argmax)
    return Completion(
        key=request.key,
        prompt_ids=request.prompt_ids,
        output_ids=output_ids,
        finish_reason="length",
        hidden_TKH=torch.zeros(num_tokens, 1, 2, dtype=torch.bfloat16) if request.capture else None,
        argmax_T=torch.tensor(choices) if request.capture else None,
    )


def finish(conversation: GivenConversation | GeneratedConversation, completion: Completion) -> FinishedSequence:
    outcome = conversation.advance(completion)
    assert isinstance(outcome, FinishedSequence)
    return outcome


def supervised(tokenizer: PreTrainedTokenizerFast, token_ids: list[int], loss_mask: list[int]) -> str:
    assert len(token_ids) == len(loss_mask)
    return str(tokenizer.decode([t for t, wanted in zip(token_ids, loss_mask, strict=True) if wanted]))


# Given responses


@pytest.mark.parametrize(
    ("record", "text", "answers"),
    [
        pytest.param(
            make_record("ua"),
            "<|im_start|>user\nsay 0<|im_end|>\n<|im_start|>assistant\nsay 1<|im_end|>\n",
            "say 1<|im_end|>",
            id="prompt-response",
        ),
        pytest.param(
            make_record("suaua"),
            "<|im_start|>system\nsay 0<|im_end|>\n<|im_start|>user\nsay 1<|im_end|>\n"
            "<|im_start|>assistant\nsay 2<|im_end|>\n<|im_start|>user\nsay 3<|im_end|>\n"
            "<|im_start|>assistant\nsay 4<|im_end|>\n",
            "say 2<|im_end|>say 4<|im_end|>",
            id="two-answers",
        ),
        pytest.param(make_record(text="a fox"), "a fox", " fox", id="text"),
    ],
)
def test_a_given_response_is_one_prefill(record, text, answers, chat, tiny_tokenizer):
    conversation = GivenConversation(record, chat, 100, VOCAB)
    request = conversation.first_request()
    assert tiny_tokenizer.decode(request.prompt_ids) == text
    assert (request.key, request.max_new_tokens, request.capture) == ("id", 1, True)
    sequence = finish(conversation, complete(request, [44]))
    assert sequence.token_ids == request.prompt_ids
    assert supervised(tiny_tokenizer, sequence.token_ids, sequence.loss_mask) == answers
    assert request.supervised == sequence.loss_mask
    assert sequence.target_argmax == [9 if wanted else NO_CHOICE for wanted in [*sequence.loss_mask[1:], 0]]
    assert sequence.prompt_len == sequence.loss_mask.index(1)
    assert (sequence.final_token_id, sequence.finish_reason, sequence.num_checked) == (None, "given", 0)


def test_the_first_token_of_a_text_is_not_supervised(chat: ChatFormat):
    conversation = GivenConversation(make_record(text="a fox"), chat, 100, VOCAB)
    sequence = finish(conversation, complete(conversation.first_request(), [44]))
    assert sequence.loss_mask == [0] + [1] * (len(sequence.token_ids) - 1)


def test_max_len_cuts_a_given_response(chat: ChatFormat):
    whole = GivenConversation(make_record("ua"), chat, 100, VOCAB)
    token_ids = whole.first_request().prompt_ids
    first_answer_token = finish(whole, complete(whole.first_request(), [44])).prompt_len
    for max_len in range(1, len(token_ids) + 2):
        if max_len <= first_answer_token:
            with pytest.raises(PromptError) as caught:
                GivenConversation(make_record("ua"), chat, max_len, VOCAB)
            for word in (f"first {max_len} tokens of {len(token_ids)}", "--skip-bad"):
                assert word in str(caught.value)
        else:
            request = GivenConversation(make_record("ua"), chat, max_len, VOCAB).first_request()
            assert request.prompt_ids == token_ids[:max_len]


# Generated responses


def generate(record: PromptRecord, chat: ChatFormat, **changes: Any) -> GeneratedConversation:
    settings: dict[str, Any] = {"max_len": 100, "max_new_tokens": 20, "vocab_size": VOCAB, "greedy": True} | changes
    return GeneratedConversation(record, chat, **settings)


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ("u", ["u"]),
        ("su", ["su"]),
        ("uau", ["u", "u"]),
        ("suaua", ["su", "u"]),
        ("uu", ["u", "u"]),
        ("uat", ["u", "t"]),
        ("s", []),
        ("a", []),
    ],
)
def test_every_user_or_tool_message_gets_an_answer_of_the_targets_own(turns: str, expected: list[str]):
    found = split_turns(make_record(turns))
    assert ["".join(message.role[0] for message in turn) for turn in found] == expected


def test_one_answer(chat: ChatFormat, tiny_tokenizer: PreTrainedTokenizerFast, end: int):
    conversation = generate(make_record("su"), chat)
    request = conversation.first_request()
    assert tiny_tokenizer.decode(request.prompt_ids) == (
        "<|im_start|>system\nsay 0<|im_end|>\n<|im_start|>user\nsay 1<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (request.max_new_tokens, request.capture) == (20, True)
    sequence = finish(conversation, complete(request, [50, 51, end]))
    assert sequence.token_ids == [*request.prompt_ids, 50, 51]
    assert sequence.loss_mask == [0] * len(request.prompt_ids) + [1, 1]
    assert sequence.target_argmax == [NO_CHOICE] * (len(request.prompt_ids) - 1) + [50, 51, end]
    assert (sequence.prompt_len, sequence.final_token_id) == (len(request.prompt_ids), end)


def test_the_record_s_own_answers_are_not_used(chat: ChatFormat, tiny_tokenizer: PreTrainedTokenizerFast):
    asked = [generate(make_record(turns), chat).first_request() for turns in ("u", "ua")]
    assert asked[0] == asked[1]


def test_two_turns_end_in_one_sequence_with_both_answers_marked(
    chat: ChatFormat, tiny_tokenizer: PreTrainedTokenizerFast, end: int
):
    conversation = generate(make_record("uu"), chat)
    first = conversation.first_request()
    assert not first.capture
    second = conversation.advance(complete(first, [*tiny_tokenizer("a dog")["input_ids"], end]))
    assert isinstance(second, EngineRequest)
    assert (second.key, second.capture) == (first.key, True)
    assert tiny_tokenizer.decode(second.prompt_ids) == (
        "<|im_start|>user\nsay 0<|im_end|>\n<|im_start|>assistant\na dog<|im_end|>\n"
        "<|im_start|>user\nsay 1<|im_end|>\n<|im_start|>assistant\n"
    )
    sequence = finish(conversation, complete(second, [*tiny_tokenizer("a fox")["input_ids"], end]))
    assert supervised(tiny_tokenizer, sequence.token_ids, sequence.loss_mask) == "a dog<|im_end|>a fox"
    assert (first.supervised, second.supervised) == ([], sequence.loss_mask[: len(second.prompt_ids)])
    own = len(second.prompt_ids) - 1
    assert sequence.target_argmax[:own] == [9 if wanted else NO_CHOICE for wanted in sequence.loss_mask[1 : own + 1]]
    assert (sequence.prompt_len, sequence.final_token_id) == (len(second.prompt_ids), end)


def test_a_text_is_continued(chat: ChatFormat, tiny_tokenizer: PreTrainedTokenizerFast):
    request = generate(make_record(text="a fox"), chat).first_request()
    assert tiny_tokenizer.decode(request.prompt_ids) == "a fox"


@pytest.mark.parametrize("room", [-5, 0, 1, 2, 19, 20, 500])
def test_prompt_and_answer_fill_max_len_at_most(room: int, chat: ChatFormat, tiny_tokenizer: PreTrainedTokenizerFast):
    """`room` new tokens fill the sequence up to `max_len`, since the last of them does not enter the target."""
    prompt_ids = generate(make_record("u"), chat).first_request().prompt_ids
    conversation = generate(make_record("u"), chat, max_len=len(prompt_ids) + room - 1)
    if room < 2:
        with pytest.raises(SequenceTooLong) as caught:
            conversation.first_request()
        for word in (f"{len(prompt_ids)} tokens", "extract.max_len", "--skip-bad"):
            assert word in str(caught.value)
        return
    request = conversation.first_request()
    assert request.max_new_tokens == min(room, 20)
    sequence = finish(conversation, complete(request, [50] * request.max_new_tokens))
    assert len(sequence.token_ids) == min(len(prompt_ids) + 19, len(prompt_ids) + room - 1)


def test_a_later_turn_may_outgrow_max_len(chat: ChatFormat, tiny_tokenizer: PreTrainedTokenizerFast):
    conversation = generate(make_record("uu"), chat, max_len=30)
    with pytest.raises(SequenceTooLong):
        conversation.advance(complete(conversation.first_request(), [50] * 20))


@pytest.mark.parametrize(("greedy", "argmax", "checked"), [(True, [50, 51, 52], 3), (False, [50, 8, 52], 0)])
def test_greedy_choices_stand_and_those_that_rounding_turns_are_counted(greedy, argmax, checked, chat):
    conversation = generate(make_record("u"), chat, greedy=greedy)
    request = conversation.first_request()
    sequence = finish(conversation, complete(request, [50, 51, 52], [50, 8, 52]))
    assert sequence.target_argmax == [NO_CHOICE] * (len(request.prompt_ids) - 1) + argmax
    assert (sequence.num_checked, sequence.num_argmax_differing) == (checked, 1 if greedy else 0)


@pytest.mark.parametrize("turns", ["s", "a", "sa"])
def test_a_record_with_nothing_to_answer_is_named(
    turns: str, chat: ChatFormat, tiny_tokenizer: PreTrainedTokenizerFast
):
    with pytest.raises(PromptError, match=r"expected a user message"):
        generate(make_record(turns), chat)


def test_a_template_that_renders_earlier_answers_otherwise_is_refused(tiny_tokenizer: PreTrainedTokenizerFast):
    marked = "('?' if m.role == 'assistant' and add_generation_prompt else '') + m.content"
    template = CHATML.replace("m.content", marked)
    chat = ChatFormat(tiny_tokenizer, eos_token_ids={1}, template=template)
    conversation = generate(make_record("uu"), chat)
    completion = complete(conversation.first_request(), [50, 1])
    with pytest.raises(PromptError, match=r".*template"):
        conversation.advance(completion)


def test_special_tokens_of_an_earlier_answer_stay_in_the_prompt(chat: ChatFormat, tiny_tokenizer: Any, end: int):
    """`<|im_start|>` stands for the marks of thinking that some targets have among their special tokens."""
    written = "<|im_start|>hmm<|im_start|>a fox"
    conversation = generate(make_record("uu"), chat)
    ids = tiny_tokenizer(written, add_special_tokens=False)["input_ids"]
    second = conversation.advance(complete(conversation.first_request(), [*ids, end]))
    assert isinstance(second, EngineRequest)
    assert f"assistant\n{written}<|im_end|>\n" in tiny_tokenizer.decode(second.prompt_ids)
    assert supervised(tiny_tokenizer, second.prompt_ids, [*second.supervised]) == f"{written}<|im_end|>"


# Thinking and calls


def test_thinking_that_cuts_an_answer_off_supervises_nothing(chat: ChatFormat, tiny_tokenizer: Any, end: int):
    policy = ThinkingPolicy(masked=ThinkingMarks(7, 8))
    for output_ids, expected in (
        ([7, 20, 8, 21, end], [0, 0, 0, 1]),
        ([20, 21], [1]),
        ([7, 20, 21], [0, 0]),
    ):
        conversation = generate(make_record("u"), chat, thinking=policy)
        sequence = finish(conversation, complete(conversation.first_request(), output_ids))
        assert sequence.loss_mask[sequence.prompt_len :] == expected
        # The last token is no part of the sequence; within the thinking it is no label either.
        assert sequence.final_token_id == (None if 7 in output_ids and 8 not in output_ids else output_ids[-1])


def test_given_thinking_is_left_out_or_not_supervised(chat: ChatFormat, tiny_tokenizer: Any):
    record = PromptRecord("id", "x", 1, (Message("user", "q"), Message("assistant", "<t>hm</t>yes")), None)
    dropped = GivenConversation(record, chat, 100, VOCAB, ThinkingPolicy(dropped=("<t>", "</t>")))
    plain = PromptRecord("id", "x", 1, (Message("user", "q"), Message("assistant", "yes")), None)
    assert dropped.first_request() == GivenConversation(plain, chat, 100, VOCAB).first_request()


CALL = {"tool_calls": [{"function": {"name": "add", "arguments": {}}}]}


def calling(*roles: str) -> PromptRecord:
    """`c` is an assistant's call, `r` a tool's result; other letters as in `make_record`."""
    kinds = {**ROLES, "c": "assistant", "r": "tool"}
    messages = tuple(
        Message(kinds[role], f"say {i}", CALL if role == "c" else {}) for i, role in enumerate("".join(roles))
    )
    return PromptRecord("id", "x", 1, messages, None)


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ("ucra", [["say 0", "say 1", "say 2"]]),  # the answer to the result is the target's
        ("ucrcra", [["say 0", "say 1", "say 2", "say 3", "say 4"]]),
        ("uc", [["say 0"]]),  # a call without a result is an answer like any other
        ("ucraucra", [["say 0", "say 1", "say 2"], ["say 4", "say 5", "say 6"]]),
        ("uaucr", [["say 0"], ["say 2", "say 3", "say 4"]]),
    ],
)
def test_a_call_stays_where_its_result_follows(roles: str, expected: list[list[str]]):
    assert [[message.content for message in turn] for turn in split_turns(calling(roles))] == expected


CALLING = CHATML.replace("m.content +", "m.content + (m.tool_calls[0].function.name if m.tool_calls else '') +")


def test_recorded_calls_are_not_supervised(tiny_tokenizer: Any, end: int):
    chat = ChatFormat(tiny_tokenizer, eos_token_ids={end}, template=CALLING)
    answer = tiny_tokenizer("ok")["input_ids"]
    conversation = generate(calling("ucra", "ua"), chat)
    first = conversation.first_request()
    assert tiny_tokenizer.decode(first.prompt_ids).count("say 1") == 1
    second = conversation.advance(complete(first, [*answer, end]))
    assert isinstance(second, EngineRequest)
    sequence = finish(conversation, complete(second, [*answer, end]))
    assert supervised(tiny_tokenizer, sequence.token_ids, sequence.loss_mask) == f"ok{END}ok"
