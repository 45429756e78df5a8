"""What a template leaves out is refused, and what the target wrote goes back into the prompt."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chats import CHATML, END, NO_END, TOKENIZER, chat_format, supervised, talk
from vpd.data.dropped import DroppedByTemplate
from vpd.data.prompts.messages import Message


def ignoring(*roles: str) -> str:
    return CHATML.replace("{% for m in messages %}", f"{{% for m in messages if m.role not in {list(roles)} %}}")


THINKS = CHATML.replace("m.content", "('<think>' + m.NAME + '</think>' if m.NAME else '') + m.content")
SPLITS = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
ASKED = Message("user", "hi")
DROPPED = [
    pytest.param(
        ignoring("tool"), [*talk("hi", "one"), Message("tool", "one"), Message("assistant", "two")], id="tool"
    ),
    pytest.param(ignoring("system"), talk("hi", "one", system="hi"), id="system"),
    pytest.param(ignoring("developer"), [Message("developer", "hi"), *talk("hi", "one")], id="developer-by-name"),
    pytest.param(CHATML, [ASKED, Message("assistant", "one", {"reasoning_content": "one"})], id="thinking"),
    pytest.param(SPLITS, talk("hi", "<think>hmm</think>one"), id="thinking-in-the-content"),
    pytest.param(
        CHATML, [ASKED, Message("assistant", "add", {"tool_calls": [{"function": {"name": "add"}}]})], id="call"
    ),
]


@pytest.mark.parametrize(("template", "messages"), DROPPED)
def test_what_the_template_leaves_out_is_refused_even_if_the_text_has_the_same_words(template, messages):
    with pytest.raises(DroppedByTemplate, match="leaves out the"):
        chat_format(template).conversation(messages)
    # Only the conversation's shape matters, so that the next such record is refused too.
    chat = chat_format(template)
    for _ in range(2):
        with pytest.raises(DroppedByTemplate):
            chat.conversation(messages)


CHANGED = [
    pytest.param(CHATML.replace("+ m.content", "+ m.content[:10]"), "name a dog now", "now", id="cut"),
    pytest.param(CHATML.replace("+ m.content", "+ m.content.split('\n')[0]"), "name a\ndog", "dog", id="first-line"),
    pytest.param(SPLITS, "what does </think> mean?", "what", id="thinking-mark-in-a-question"),
]


@pytest.mark.parametrize(("template", "question", "lost"), CHANGED)
def test_a_word_of_a_question_that_the_template_leaves_out_is_named(template: str, question: str, lost: str):
    with pytest.raises(DroppedByTemplate, match=f"a part of messages.0. .role user., '{lost}'"):
        chat_format(template).conversation(talk(question, "one"))


def test_a_switch_in_an_instruction_may_go():
    template = CHATML.replace("m.content", "m.content.replace('/no_think', '')")
    assert chat_format(template).render(talk("hi", system="be brief /no_think"), False)


def test_each_argument_of_a_call_must_be_written():
    first = "(m.tool_calls[0].function.name ~ m.tool_calls[0].function.arguments.a if m.tool_calls else '') + m.content"
    call = {"function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    with pytest.raises(DroppedByTemplate, match="the argument b of a call"):
        chat_format(CHATML.replace("m.content", first)).render(
            [ASKED, Message("assistant", "", {"tool_calls": [call]})], False
        )


def test_functions_that_the_template_leaves_out_are_refused():
    with pytest.raises(DroppedByTemplate, match="functions"):
        chat_format(CHATML).with_tools([{"function": {"name": "hi"}}]).prompt_ids(talk("hi"))


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_gets_the_name_that_the_template_reads(name: str):
    chat = chat_format(THINKS.replace("NAME", name))
    messages = [ASKED, Message("assistant", "one", {"reasoning_content": "hmm"})]
    assert supervised(chat, messages) == [f"<think>hmm</think>one{END}"]


def test_a_variable_of_the_name_thinking_is_no_field_of_a_message():
    chat = chat_format("{% if thinking %}{{ 'on' }}{% endif %}" + CHATML)
    assert chat.template.thinking_name is None


def test_instructions_of_developers_join_the_systems():
    messages = [*talk("hi", "one", system="be"), Message("developer", "brief"), *talk("so")]
    assert chat_format(CHATML).render(messages, False) == chat_format(CHATML).render(
        talk("hi", "one", "so", system="be\n\nbrief"), False
    )
    knowing = "{# 'developer' #}" + CHATML
    assert "<|im_start|>developer\nbrief" in chat_format(knowing).render(messages, False)


def test_without_an_end_token_the_mask_ends_with_the_content():
    lines = NO_END.replace("m.content", "m.content + '\n'")
    assert supervised(chat_format(lines), talk("hi", "one", "so", "two")) == ["one", "two"]


@settings(deadline=None, max_examples=50)
@given(answer=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), min_size=1))
def test_an_answer_of_the_target_is_read_letter_by_letter(answer: str):
    """With its special tokens, where the template has no field for thinking; in parts, where it has one."""
    plain, thinking = chat_format(CHATML), chat_format(THINKS.replace("NAME", "thinking"))
    written = f"<s>{answer}"
    ids = TOKENIZER(written + END, add_special_tokens=False)["input_ids"]
    assert plain.answer(ids) == Message("assistant", written)
    assert plain.answer(ids[:-1]) == Message("assistant", written)
    assert thinking.answer(ids) == Message("assistant", written)
    ids = TOKENIZER(f"<think>hmm</think>{written}{END}", add_special_tokens=False)["input_ids"]
    assert thinking.answer(ids) == Message("assistant", written, {"reasoning_content": "hmm"})
    assert plain.answer(ids) == Message("assistant", f"<think>hmm</think>{written}")


def test_an_answer_that_was_cut_off_in_its_thinking_is_all_thinking():
    """Also where the header opens the thinking; but not where the header closes it."""
    thinking = THINKS.replace("NAME", "thinking")
    opening = thinking.replace("<|im_start|>assistant\n' }}", "<|im_start|>assistant\n<think>' }}")
    closing = opening.replace("<think>' }}", "<think></think>' }}")
    thought = Message("assistant", "", {"reasoning_content": "hmm"})
    for template, text, expected in (
        (thinking, "<think>hmm", thought),
        (opening, "hmm", thought),
        (opening, "hmm</think>one", Message("assistant", "one", thought.extra)),
        (closing, "hmm", Message("assistant", "hmm")),
    ):
        assert chat_format(template).answer(TOKENIZER(text, add_special_tokens=False)["input_ids"]) == expected


def test_where_the_template_refuses_the_words_the_contents_are_looked_for():
    picky = "{% if messages[0].content[0] != 'h' %}{{ raise_exception('no') }}{% endif %}"
    assert chat_format(picky + CHATML).render(talk("hi", "one"), False)
    with pytest.raises(DroppedByTemplate, match="role system"):
        chat_format(picky + ignoring("system")).render(talk("hi", "one", system="how"), False)
