"""Chat format: for every template, the supervised tokens are the assistant's answers with their ends."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chats import CHATML, END, NO_END, TOKENIZER, TRIMMING, byte_level_tokenizer, chat_format, supervised, talk
from tokenizers import processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
from vpd.data.chat import ChatFormat, TokenizedConversation
from vpd.data.errors import PromptError
from vpd.data.prompts.messages import Message

# In Qwen3's manner: answers before the last user turn lose their thinking, and without thinking the
# generation prompt closes an empty think block.
QWEN3 = """
{%- set ns = namespace(last_user=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last_user = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
    {%- set content = m.content -%}
    {%- if m.role == 'assistant' and loop.index0 < ns.last_user -%}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{%- generation -%}{{ m.content + '<|im_end|>' }}{%- endgeneration -%}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
MARKED_WITHOUT_END = MARKED.replace("m.content + '<|im_end|>' }}{%- endg", "m.content }}{%- endg")
END_OF_USER_ONLY = NO_END.replace("m.content }}", "m.content + ('<|im_end|>' if m.role == 'user' else '') }}")
END_BETWEEN_TURNS = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}"
    "{% if not loop.last %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_end|>[assistant]' }}{% endif %}"
)
END_OF_LAST_ONLY = NO_END.replace(
    "m.content }}", "m.content + ('<|im_end|>' if loop.last and m.role == 'assistant' else '') }}"
)
CHANGING = (
    "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
)


THOUGHT = "<think>\nhmm\n</think>\n\n"


def thinking_before_tool(result: str) -> list[Message]:
    answered = [Message("tool", result), Message("assistant", "two")]
    return [*talk("hi", f"{THOUGHT}one"), *answered, *talk("so", "three")]


CASES = [
    *(
        pytest.param(
            QWEN3, {}, thinking_before_tool(result), [f"one{END}", f"two{END}", f"three{END}"], id=f"tool-{result}"
        )
        for result in ("result", "", "[assistant]", "assistant\n")
    ),
    pytest.param(CHATML, {}, talk("hi", "hello"), [f"hello{END}"], id="one-turn"),
    pytest.param(CHATML, {}, talk("hi", "one", "so", "two", system="be"), [f"one{END}", f"two{END}"], id="two-turns"),
    pytest.param(CHATML, {}, talk("hi", "one", "more"), [f"one{END}"], id="ends-with-the-user"),
    pytest.param(CHATML, {}, talk("hi", ""), [END], id="empty-answer"),
    pytest.param(CHATML, {}, talk("hi", f"a{END}b", "so", "c"), [f"a{END}", f"c{END}"], id="end-inside"),
    pytest.param(CHATML, {}, talk("same", "same", "same", "same"), [f"same{END}"] * 2, id="same-content"),
    pytest.param(CHATML, {}, talk("\U0001f600", "\U0001f600"), [f"\U0001f600{END}"], id="emoji"),
    pytest.param(
        CHATML,
        {},
        [*talk("hi", "one"), Message("tool", "result"), Message("assistant", "two")],
        [f"one{END}", f"two{END}"],
        id="tool",
    ),
    pytest.param(
        CHATML,
        {},
        [*talk("hi", "one"), Message("assistant", "two")],
        [f"one{END}", f"two{END}"],
        id="two-answers-in-a-row",
    ),
    pytest.param(
        QWEN3,
        {},
        talk("hi", f"{THOUGHT}one", "so", f"{THOUGHT}two"),
        [f"one{END}", f"{THOUGHT}two{END}"],
        id="qwen3-drops-earlier-thinking",
    ),
    pytest.param(
        QWEN3,
        {"enable_thinking": False},
        talk("hi", "one", "so", "<think>\n\n</think>\n\ntwo"),
        [f"one{END}", f"two{END}"],
        id="qwen3-empty-think-block-is-prompt",
    ),
    pytest.param(
        QWEN3,
        {"enable_thinking": False},
        talk("hi", f"{THOUGHT}<b>", "so", "<thin", "so", "x"),
        [f"<b>{END}", f"<thin{END}", f"x{END}"],
        id="qwen3-answers-that-look-like-a-think-block",
    ),
    pytest.param(MARKED, {}, talk("hi", "one", "so", "two"), [f"one{END}", f"two{END}"], id="marked"),
    pytest.param(
        MARKED, {}, [Message("assistant", "zero"), *talk("hi", "one")], [f"zero{END}", f"one{END}"], id="marked-first"
    ),
    pytest.param(
        MARKED_WITHOUT_END,
        {},
        talk("hi", "hello \U0001f600", "so", "\u00e9"),
        ["hello \U0001f600", "\u00e9"],
        id="marked-multi-byte-end",
    ),
    pytest.param(NO_END, {}, talk("hi", "one", "so", "two"), ["one", "two"], id="no-end"),
    pytest.param(END_OF_USER_ONLY, {}, talk("hi", "one", "so", "two"), ["one", "two"], id="only-the-user-ends"),
    pytest.param(END_OF_LAST_ONLY, {}, talk("hi", "one", "so", "two"), ["one", f"two{END}"], id="only-the-last-ends"),
    pytest.param(END_BETWEEN_TURNS, {}, talk("hi", "one", "so", "two"), [f"one{END}", "two"], id="end-between-turns"),
]


@pytest.mark.parametrize(("template", "args", "messages", "expected"), CASES)
def test_the_supervised_tokens_are_the_answers(template, args, messages, expected):
    assert supervised(chat_format(template, **args), messages) == expected


@pytest.mark.parametrize("template", [CHATML, QWEN3, MARKED], ids=["chatml", "qwen3", "marked"])
@pytest.mark.parametrize("tokenizer", [TOKENIZER, TRIMMING], ids=["full-offsets", "trimmed-offsets"])
@settings(deadline=None)
@given(data=st.data())
def test_any_content_is_supervised_to_the_letter(template, tokenizer, data):
    """`<` is left out, so that no content writes a special token or a think block."""
    content = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<")) | st.sampled_from(
        ["", " ", "  two  spaces  ", "\n\n", "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\u0939\u093f", "user\n"]
    )
    num_turns = data.draw(st.integers(1, 3))
    contents = data.draw(st.lists(content, min_size=2 * num_turns, max_size=2 * num_turns))
    if template == QWEN3:
        contents = [text.lstrip("\n") for text in contents]
    runs = supervised(chat_format(template, tokenizer), talk(*contents), tokenizer)
    assert runs == [f"{answer}{END}" for answer in contents[1::2]]


@settings(deadline=None)
@given(question=st.text(), answer=st.text())
def test_the_prompt_is_the_unsupervised_head_of_a_one_turn_conversation(question, answer):
    chat = chat_format(CHATML)
    messages = talk(question, answer)
    prompt_ids = chat.prompt_ids(messages[:1])
    tokenized = chat.conversation(messages)
    assert tokenized.token_ids[: len(prompt_ids)] == prompt_ids
    assert not any(tokenized.loss_mask[: len(prompt_ids)])
    assert tokenized.loss_mask[len(prompt_ids)] == 1


def test_a_marked_answer_that_ends_in_a_trimmed_space_does_not_run_on():
    chat = chat_format(MARKED_WITHOUT_END, TRIMMING)
    assert supervised(chat, talk("hi", "one  ", "so", "two"), TRIMMING) == ["one  ", "two"]


def test_plain_text_gets_special_tokens_and_all_but_the_first_are_supervised():
    tokenizer = adding_bos()
    chat = chat_format(None, tokenizer)
    tokenized = chat.text("hello world")
    assert tokenizer.decode(tokenized.token_ids) == "<s>hello world"
    assert tokenized.loss_mask == [0] + [1] * (len(tokenized.token_ids) - 1)
    assert tokenizer.bos_token_id not in chat_format(CHATML, tokenizer).conversation(talk("a", "b")).token_ids


def adding_bos() -> PreTrainedTokenizerFast:
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.mark.parametrize("text", ["hello", "<s>hello", "<s><s>hello"])
def test_there_is_one_begin_of_text_token_however_the_text_came(text: str):
    """`template` writes the token, and the tokenizer adds it."""
    tokenizer = adding_bos()
    assert tokenizer.decode(chat_format(None, tokenizer).text(text).token_ids) == "<s>hello"
    chat = chat_format("{{ bos_token }}{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}", tokenizer)
    assert tokenizer.decode(chat.prompt_ids(talk(text))) == f"<s>hello{END}"
    found = chat.conversation(talk(text, "one"))
    assert tokenizer.decode(found.token_ids) == f"<s>hello{END}one{END}"
    assert len(found.token_ids) == len(found.loss_mask)
    # A begin-of-text token inside a text stays where it is.
    assert tokenizer.decode(chat.prompt_ids(talk("a<s><s>b"))) == f"<s>a<s><s>b{END}"


def test_plain_text_without_a_token_is_refused():
    with pytest.raises(PromptError, match="no token"):
        chat_format(None).text("")


def test_the_tokenizers_own_template_is_the_default_and_an_explicit_one_wins():
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = CHATML
    assert chat_format(None, tokenizer).template_hash == chat_format(CHATML).template_hash
    assert chat_format(None, tokenizer).render(talk("hi"), True) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat_format(NO_END, tokenizer).render(talk("hi"), True) == "[user]hi[assistant]"


def test_the_template_hash_covers_the_template_and_its_arguments():
    formats = [
        chat_format(None),
        chat_format(CHATML),
        chat_format(QWEN3),
        chat_format(QWEN3, enable_thinking=False),
        chat_format(QWEN3, enable_thinking=True),
    ]
    hashes = {chat.template_hash for chat in formats}
    assert len(hashes) == len(formats)
    assert all(len(digest) == 16 and int(digest, 16) >= 0 for digest in hashes)
    assert chat_format(QWEN3, a=1, b=2).template_hash == chat_format(QWEN3, b=2, a=1).template_hash


def test_named_templates_need_a_default():
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "rag": NO_END}
    assert chat_format(None, tokenizer).template_hash == chat_format(CHATML).template_hash
    tokenizer.chat_template = {"rag": NO_END, "tool_use": NO_END}
    with pytest.raises(PromptError, match="no default"):
        chat_format(None, tokenizer)


REFUSALS = [
    pytest.param(None, talk("hi", "one"), 'pass a template .*{"text": ...}', id="no-template"),
    pytest.param(CHATML, talk("hi"), r"expected an assistant message, found the roles \['user'\]", id="no-answer"),
    pytest.param(CHATML, [Message("assistant", "one")], "no prompt before it", id="answer-without-prompt"),
    pytest.param(ALTERNATING, [*talk("a", "b"), *talk("c", "d")][::-1], "roles must alternate", id="raise-exception"),
    pytest.param("{% if %}", talk("hi", "one"), "chat template refused", id="template-syntax"),
    pytest.param("{{ messages + 1 }}", talk("hi", "one"), "chat template refused", id="template-type-error"),
    pytest.param(CHANGING, talk("hi", "one"), r"changes the text before messages\[1\]", id="changing-head"),
    pytest.param(NO_END, talk("hi", ""), r"messages\[1\] has no end", id="empty-answer-without-end"),
    pytest.param(MARKED_WITHOUT_END, talk("hi", ""), "no token of their own", id="marked-empty-answer-without-end"),
]


@pytest.mark.parametrize(("template", "messages", "message"), REFUSALS)
def test_what_cannot_be_masked_is_refused(template, messages, message):
    with pytest.raises(PromptError, match=message):
        chat_format(template).conversation(messages)


def test_a_conversation_without_template_has_no_prompt_either():
    with pytest.raises(PromptError, match="no chat template"):
        chat_format(None).prompt_ids(talk("hi"))


def test_an_empty_conversation_is_refused():
    with pytest.raises(PromptError, match="empty conversation"):
        chat_format(CHATML).prompt_ids([])


def test_a_slow_tokenizer_is_refused():
    chat = ChatFormat(ByT5Tokenizer(), eos_token_ids={1}, template=CHATML)
    with pytest.raises(PromptError, match="fast tokenizer"):
        chat.conversation(talk("hi", "one"))


WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>tools\n' + tools[0].function.name + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '[' + call.function.name + ']' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def supervised_runs(found: TokenizedConversation) -> list[str]:
    """The runs of supervised tokens, as text."""
    runs: list[list[int]] = []
    before = 0
    for token_id, mask in zip(found.token_ids, found.loss_mask, strict=True):
        if mask:
            runs.append([*runs.pop(), token_id] if before else [token_id])
        before = mask
    return [str(TOKENIZER.decode(run)) for run in runs]


def test_calls_and_tools_go_through_the_template():
    call = {"function": {"name": "add", "arguments": {}}}
    messages = [Message("user", "add"), Message("assistant", "", {"tool_calls": [call]}), Message("tool", "3")]
    messages.append(Message("assistant", "three"))
    chat = chat_format(WITH_TOOLS)
    assert chat.with_tools(()) is chat
    equipped = chat.with_tools([{"function": {"name": "add"}}])
    head = "<|im_start|>tools\nadd<|im_end|>\n<|im_start|>user\nadd<|im_end|>\n<|im_start|>assistant\n"
    assert equipped.render(messages[:1], True) == head
    both = [f"[add]{END}", f"three{END}"]
    assert supervised_runs(equipped.conversation(messages)) == both
    # The given message itself is left out; an equal message is not.
    assert supervised_runs(equipped.conversation(messages, [messages[1]])) == both[1:]
    assert supervised_runs(equipped.conversation(messages, [Message("assistant", "three")])) == both
