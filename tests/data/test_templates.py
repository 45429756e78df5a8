"""Published templates in small: tokens equal `apply_chat_template`, and the mask is what the target writes.

The templates in `support/templates` have the constructs of published ones. What the target writes in each turn is
written here by hand.
"""

import datetime
import functools
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import support
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from vpd.data.chat import ChatFormat, TokenizedConversation
from vpd.data.dropped import DroppedByTemplate
from vpd.data.errors import PromptError
from vpd.data.prompts.messages import REASONING, Message

FOLDER = Path(support.__file__ or "").parent / "templates"
DATE = datetime.date(2026, 1, 31)
THOUGHT = "zebra"
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "note": 'say "hi"'}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "number"}}}}}
HEADERS = ("im_start", "im_end", "im_sep", "endoftext", "end", "start_header_id", "end_header_id", "eot_id", "eot")
MORE_HEADERS = ("header_start", "header_end", "User", "Assistant", "start", "message", "channel", "return", "call")
NAMES = (*HEADERS, *MORE_HEADERS, "user", "assistant", "system", "observation", "start_of_role", "end_of_role")
PLAIN = ("<s>", "</s>", "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>", "[gMASK]", "<sop>", "<think>")
SPECIALS = [*(f"<|{name}|>" for name in (*NAMES, "end_of_text", "END_OF_TURN_TOKEN")), *PLAIN, "</think>"]


@dataclass(frozen=True)
class Known:
    """A published template, and what the target writes under it."""

    file: str
    eos: str
    answers: tuple[str, str]
    """What the target writes in the two turns of the plain conversation."""
    system: bool = True
    thinking: str | None = None
    """The last answer with thinking; None if the template has no field for thinking."""
    tools: str | None = None
    """The call; None if the template knows no tools."""
    clock: bool = False
    args: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        knows = ("thinking" * bool(self.thinking), "tools" * bool(self.tools), "clock" * self.clock)
        return "-".join([self.file, *filter(None, knows)])


IM, CALLED = "<|im_end|>", '{"a": 2, "note": "say \\"hi\\""}'
QWEN_CALL = '<tool_call>\n{"name": "add", "arguments": ' + CALLED + f"}}\n</tool_call>{IM}"
CODER_CALL = '<function=add>\n<parameter=a>\n2\n</parameter>\n<parameter=note>\nsay "hi"\n</parameter>\n</function>'
KNOWN = [
    Known("chatml", IM, (f"one{IM}", f"two{IM}")),
    Known("llama2", "</s>", (" one </s>", " two </s>")),
    Known(
        "llama3",
        "<|eot_id|>",
        ("one<|eot_id|>", "two<|eot_id|>"),
        tools='{"name": "add", "parameters": ' + CALLED + "}<|eot_id|>",
        clock=True,
    ),
    Known("llama4", "<|eot|>", ("one<|eot|>", "two<|eot|>")),
    Known(
        "mistral_v3",
        "</s>",
        ("one</s>", "two</s>"),
        tools='[TOOL_CALLS][{"name": "add", "arguments": ' + CALLED + "}]</s>",
    ),
    Known("mistral_v7", "</s>", ("one</s>", "two</s>"), clock=True),
    Known("gemma2", "<end_of_turn>", ("one<end_of_turn>", "two<end_of_turn>"), system=False),
    Known("gemma3", "<end_of_turn>", ("one<end_of_turn>", "two<end_of_turn>")),
    Known("qwen25", IM, (f"one{IM}", f"two{IM}"), tools=QWEN_CALL),
    Known(
        "qwen3",
        IM,
        (f"one{IM}", f"<think>\n\n</think>\n\ntwo{IM}"),
        thinking=f"<think>\n{THOUGHT}\n</think>\n\ntwo{IM}",
        tools=QWEN_CALL,
    ),
    Known("qwen3", IM, (f"one{IM}", f"two{IM}"), tools=QWEN_CALL, args={"enable_thinking": False}),
    Known("qwen3_coder", IM, (f"one{IM}", f"two{IM}"), tools=f"\n<tool_call>\n{CODER_CALL}\n</tool_call>{IM}"),
    Known("deepseek_v2", "</s>", (" one</s>", " two</s>")),
    Known("deepseek_v3", "</s>", ("one</s>", "two</s>")),
    Known("deepseek_r1", "</s>", ("one</s>", "two</s>")),
    Known(
        "gpt_oss",
        "<|return|>",
        ("<|channel|>final<|message|>one<|end|>", "<|channel|>final<|message|>two<|return|>"),
        thinking=f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant"
        "<|channel|>final<|message|>two<|return|>",
        tools=f" to=functions.add<|channel|>commentary json<|message|>{CALLED}<|call|>",
        clock=True,
    ),
    Known("glm4", "<|user|>", ("\none<|user|>", "\ntwo"), tools=f"add\n{CALLED}<|observation|>"),
    Known("phi3", "<|end|>", ("one<|end|>", "two<|end|>")),
    Known("phi4", IM, (f"one{IM}", f"two{IM}")),
    Known(
        "granite",
        "<|end_of_text|>",
        ("one<|end_of_text|>", "two<|end_of_text|>"),
        tools='<|tool_call|>{"name": "add", "arguments": ' + CALLED + "}<|end_of_text|>",
        clock=True,
    ),
    Known("smollm3", IM, (f"one{IM}", f"two{IM}"), clock=True),
    Known("zephyr", "</s>", ("one</s>", "two</s>")),
    Known("smolvlm", "<end_of_turn>", (" one<end_of_turn>", " two<end_of_turn>")),
    Known("command_r", "<|END_OF_TURN_TOKEN|>", ("one<|END_OF_TURN_TOKEN|>", "two<|END_OF_TURN_TOKEN|>")),
]


@functools.cache
def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["user assistant system one two add"] * 3, trainer)
    return tokenizer


def tokenizer_for(known: Known) -> PreTrainedTokenizerFast:
    # Phi-3's template ends a conversation with the end-of-text token, after the end-of-turn token.
    eos = "<|endoftext|>" if known.file == "phi3" else known.eos
    made = PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>", eos_token=eos)
    made.chat_template = (FOLDER / f"{known.file}.jinja").read_text()
    return made


def format_for(known: Known, *ends: str, **changes: Any) -> ChatFormat:
    tokenizer = tokenizer_for(known)
    ids: Any = tokenizer.convert_tokens_to_ids(list(ends or (known.eos,)))
    return ChatFormat(tokenizer, **{"eos_token_ids": ids, "template_args": known.args, "date": DATE} | changes)


def talk(known: Known, **last: Any) -> list[Message]:
    system = [Message("system", "be brief")] if known.system else []
    turns = [Message("user", "hi"), Message("assistant", "one"), Message("user", "so")]
    return [*system, *turns, Message("assistant", "two", last)]


def calling(known: Known) -> list[Message]:
    asked = [Message("user", "add"), Message("assistant", "", {"tool_calls": [CALL]})]
    return [*asked, Message("tool", "5"), Message("assistant", "five")]


def supervised(found: TokenizedConversation) -> list[str]:
    pairs = groupby(zip(found.token_ids, found.loss_mask, strict=True), key=lambda pair: pair[1])
    return [byte_level().decode([i for i, _ in run], skip_special_tokens=False) for mask, run in pairs if mask]


def reference(known: Known, messages: list[Message], **more: Any) -> list[int]:
    """Ids by the tokenizer's own method, given the names that the template reads."""
    names = {REASONING: "thinking" if known.file == "gpt_oss" else REASONING}
    dicts: list[Any] = [
        {"role": m.role, "content": m.content, **{names.get(key, key): m.extra[key] for key in m.extra}}
        for m in messages
    ]
    if known.file == "smolvlm":
        dicts = [each | {"content": [{"type": "text", "text": each["content"]}]} for each in dicts]
    clock = {"strftime_now": datetime.datetime(2026, 1, 31).strftime} if known.clock else {}
    return tokenizer_for(known).apply_chat_template(dicts, return_dict=False, **{**clock, **known.args, **more})  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("known", KNOWN, ids=str)
def test_tokens_are_the_tokenizers_own_and_the_mask_is_what_the_target_writes(known: Known):
    chat, messages = format_for(known), talk(known)
    found = chat.conversation(messages)
    assert found.token_ids == reference(known, messages)
    assert supervised(found) == list(known.answers)
    prompt = chat.prompt_ids(messages[:-1])
    assert prompt == reference(known, messages[:-1], add_generation_prompt=True)
    assert prompt[:2] != [tokenizer_for(known).bos_token_id] * 2
    assert (chat.date == DATE) == known.clock


@pytest.mark.parametrize("known", [known for known in KNOWN if known.file != "glm4"], ids=str)
def test_an_end_of_turn_that_the_config_does_not_name_is_found(known: Known):
    """GLM-4's template writes no token after the last answer."""
    chat = format_for(known, "<|im_sep|>")
    assert chat.further_end_id == tokenizer_for(known).convert_tokens_to_ids(known.eos)
    assert supervised(chat.conversation(talk(known))) == list(known.answers)
    assert format_for(known).further_end_id is None


@pytest.mark.parametrize("known", KNOWN, ids=str)
def test_thinking_is_rendered_or_refused(known: Known):
    chat, messages = format_for(known), talk(known, **{REASONING: THOUGHT})
    if known.thinking is None and not known.args:
        with pytest.raises(DroppedByTemplate, match="thinking of messages"):
            chat.conversation(messages)
    elif known.thinking is not None:
        found = chat.conversation(messages)
        assert found.token_ids == reference(known, messages)
        assert supervised(found)[-1] == known.thinking
        # Thinking of an earlier turn is dropped by design.
        earlier = [*messages, Message("user", "so"), Message("assistant", "three")]
        assert THOUGHT not in chat.render(earlier, False)


@pytest.mark.parametrize("known", KNOWN, ids=str)
def test_tools_and_calls_are_rendered_or_refused(known: Known):
    chat, messages = format_for(known, known.eos, "<|observation|>", "<|call|>").with_tools([TOOL]), calling(known)
    if known.tools is None:
        with pytest.raises(PromptError, match=r"leaves out (the functions|the name|the content)|refused"):
            chat.conversation(messages)
        return
    found = chat.conversation(messages)
    assert found.token_ids == reference(known, messages, tools=[TOOL])
    assert supervised(found)[0].strip("\n") == known.tools.strip("\n")


@pytest.mark.parametrize("known", KNOWN, ids=str)
def test_an_answer_goes_back_as_the_target_wrote_it(known: Known):
    """What the target wrote, read as a message, renders to the same text in the last turn."""
    chat, messages = format_for(known), talk(known)
    for text, extra in ((known.answers[1], {}), (known.thinking, {REASONING: THOUGHT})):
        if text is not None:
            ids = byte_level().encode(text, add_special_tokens=False).ids
            answer = chat.answer(ids)
            assert (answer.content.strip(), answer.extra) == ("two", extra)
            assert chat.conversation([*messages[:-1], answer]).token_ids == reference(known, talk(known, **extra))


@pytest.mark.parametrize("known", KNOWN, ids=str)
def test_a_developers_message_is_rendered_or_refused(known: Known):
    """As vLLM's chat endpoint does it: the message becomes the system's where the template does not know the role."""
    messages = [Message("developer", "be brief"), Message("user", "hi"), Message("assistant", "one")]
    if not known.system:
        with pytest.raises(PromptError, match="System role not supported"):
            format_for(known).conversation(messages)
        return
    as_system = [Message("system", "be brief"), *messages[1:]]
    assert format_for(known).conversation(messages).token_ids == reference(known, as_system)


@pytest.mark.parametrize("known", [known for known in KNOWN if known.thinking is not None], ids=str)
def test_answers_whose_thinking_is_gone_are_supervised_to_their_ends(known: Known):
    """Harmony ends a message inside of a conversation with a token that ends no answer."""
    words = ("one", "one", "two")
    turns = [[Message("user", "hi"), Message("assistant", word, {REASONING: THOUGHT})] for word in words]
    messages = [message for turn in turns for message in turn]
    found = format_for(known).conversation(messages)
    assert found.token_ids == reference(known, messages)
    assert supervised(found) == [known.answers[0], known.answers[0], known.thinking]


def test_functions_before_the_last_question_do_not_hide_the_earlier_answers():
    """Mistral's template moves the functions behind the first answers as soon as there is another question."""
    known = next(each for each in KNOWN if each.file == "mistral_v3")
    messages = [*calling(known), *calling(known)]
    found = format_for(known).with_tools([TOOL]).conversation(messages)
    assert found.token_ids == reference(known, messages, tools=[TOOL])
    assert supervised(found) == [known.tools, "five</s>"] * 2


@settings(deadline=None, max_examples=40)
@given(contents=st.lists(st.text("ab [/INST]\n", min_size=1).map(lambda text: f"x{text}x"), min_size=6, max_size=6))
def test_an_answer_before_moved_functions_is_found_whatever_it_says(contents: list[str]):
    known = next(each for each in KNOWN if each.file == "mistral_v3")
    messages = [Message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    found = format_for(known).with_tools([TOOL]).conversation(messages)
    assert supervised(found) == [f"{content}</s>" for content in contents[1::2]]
