"""Record shapes of public data sets: `shapes.jsonl` holds a small record of each, and the turns that it must become."""

import json
from pathlib import Path
from typing import Any

import pytest
from vpd.data.errors import ConfigError, PromptError
from vpd.data.prompts.forms import Content, parse_record
from vpd.data.prompts.reading import Reading

PARAMETERS = {"type": "object", "properties": {"a": {"type": "number"}}}
ADD = {"name": "add", "description": "sum of two", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": ADD}
ASKED, ANSWERED = [("user", "name a dog")], [("user", "name a dog"), ("assistant", "Lazy.")]
BRIEF = [("system", "be brief"), *ANSWERED]
HUMAN, GPT = {"from": "human", "value": "name a dog"}, {"from": "gpt", "value": "Lazy."}
USER, ASSISTANT = {"role": "user", "content": "name a dog"}, {"role": "assistant", "content": "Lazy."}
SYSTEM = {"role": "system", "content": "be brief"}
OTHER = {"role": "assistant", "content": "Rex, I would say."}


def turns(content: Content) -> list[tuple[Any, ...]]:
    return [(m.role, m.content, *([dict(m.extra)] if m.extra else [])) for m in content.messages]


SHAPES: dict[str, tuple[dict[str, Any], list[tuple[Any, ...]]]] = {
    each["shape"]: (each["record"], [tuple(turn) for turn in each["turns"]])
    for each in map(json.loads, Path(__file__).with_name("shapes.jsonl").read_text(encoding="utf-8").splitlines())
}
"""Name -> a record, and its turns: role, content and, where there is more, the further fields."""


@pytest.mark.parametrize("name", SHAPES)
def test_a_public_shape_reads_as_it_stands(name: str):
    record, expected = SHAPES[name]
    assert turns(parse_record(record)) == expected


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "oasst-message": (
        {"message_id": "1", "parent_id": "0", "message_tree_id": "0", "text": "name a dog", "role": "prompter"},
        "parent_id",
    ),
    "arena-two-answers": (
        {
            "question_id": 1,
            "model_a": "m",
            "winner": "model_a",
            "conversation_a": [USER, ASSISTANT],
            "conversation_b": [USER, OTHER],
        },
        "conversation_a",
    ),
    "ultrafeedback-four-answers": (
        {"instruction": "name a dog", "completions": [{"response": "Lazy.", "model": "m"}], "correct_answers": ["x"]},
        "completions",
    ),
    "smoltalk2-arguments": (
        {
            "messages": [USER, ASSISTANT],
            "chat_template_kwargs": {"custom_instructions": "be brief", "enable_thinking": True},
        },
        "chat_template_kwargs",
    ),
    "mmlu": ({"question": "name a dog", "choices": ["Lazy", "Rex"], "answer": 0}, "choices"),
    "s1k": (
        {"question": "name a dog", "solution": "Lazy.", "thinking_trajectories": ["Which one?"]},
        "thinking_trajectories",
    ),
    "images": ({"messages": [USER, ASSISTANT], "images": ["a.png"]}, "images"),
    "image-place": ({"messages": [USER, ASSISTANT], "image_path": "a.png"}, "image_path"),
    "image-bytes": ({"messages": [USER, ASSISTANT], "image": {"bytes": b"\x89PNG", "path": None}}, "image"),
    "message-images": ({"messages": [USER | {"images": ["a.png"]}, ASSISTANT]}, r"messages\[0\].images"),
    "image-part": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ASSISTANT]},
        r"messages\[0\].content\[0\] is an image",
    ),
    "audio-part": (
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
        "is an audio",
    ),
    "unknown-part": (
        {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "1"}]}]},
        "of the type 'tool_use'; write a call under tool_calls",
    ),
    "other-system": ({"messages": [SYSTEM, USER, ASSISTANT], "system": "be rude"}, "system"),
    "documents": ({"messages": [USER, ASSISTANT], "documents": [{"title": "x", "body": "dogs"}]}, "documents"),
    "context-beside-messages": ({"messages": [USER, ASSISTANT], "context": "On dogs."}, "context"),
    "other-chosen": ({"messages": [USER, ASSISTANT], "chosen": [USER, OTHER]}, "chosen"),
    "tools-of-plain-text": ({"text": "name a dog", "tools": [ADD]}, "tools"),
    "thinking-of-many-answers": ({"messages": [USER, ASSISTANT, USER, OTHER], "reasoning": "Which one?"}, "reasoning"),
    "thinking-without-answer": ({"prompt": "name a dog", "thinking": "Which one?"}, "thinking"),
    "answer-not-to-learn": ({"prompt": "name a dog", "completion": "Lazy.", "label": False}, "label is false"),
    "turn-not-to-learn": ({"messages": [USER, ASSISTANT | {"weight": 0}]}, r"messages\[1\].weight is 0"),
    "several-answers": ({"prompt": "name a dog", "completion": ["Lazy.", "Rex."]}, "completion holds 2 answers"),
    "function-call-that-is-none": (
        {"conversations": [HUMAN, {"from": "function_call", "value": "add 2"}]},
        r"conversations\[1\].value",
    ),
    "chosen-of-another-prompt": ({"prompt": "name a cat", "chosen": [USER, ASSISTANT]}, "chosen begins with another"),
    "chosen-text-alone": ({"chosen": "Lazy.", "rejected": "Rex."}, "chosen must be"),
    "context-of-passages": (
        {"question": "who?", "answer": "A fox.", "context": {"contexts": ["A fox runs."]}},
        "context",
    ),
    "definition": ({"definition": "Name it.", "inputs": "a dog", "targets": "Lazy."}, "definition"),
    "instances": ({"instruction": "name it", "instances": [{"input": "a dog", "output": "Lazy."}]}, "instances"),
    "longer-prompt": ({"messages": [USER, ASSISTANT], "prompt": "Be rude and name a dog"}, "'prompt' could carry"),
    "template-switches": ({"messages": [USER], "chat_template_kwargs": {"x": False}}, "chat_template_kwargs"),
    "enable-thinking": ({"messages": [USER], "enable_thinking": False}, "enable_thinking: false"),
    "numbers-of-a-tool": (
        {"messages": [USER, ASSISTANT | {"tool_responses": [{"name": "add", "response": {"sum": 5}}]}]},
        "tool_responses",
    ),
    "two-contents": ({"conversations": [HUMAN | {"content": "name a cat"}, GPT]}, r"conversations\[0\].value"),
    "part-of-a-turn-not-to-learn": (
        {"messages": [USER, ASSISTANT | {"train_detail": [{"train": False}]}]},
        "train_detail",
    ),
    "harmony-channel": ({"messages": [USER, ASSISTANT | {"channel": "analysis"}, ASSISTANT]}, "channel is 'analysis'"),
    **{
        f"short-name-{name}": ({"messages": [USER, ASSISTANT], name: "Be rude."}, f"'{name}' could carry")
        for name in ("sys", "sys_msg", "ctx", "scratchpad")
    },
    "refusal": ({"messages": [USER, ASSISTANT | {"content": "", "refusal": "No."}]}, "refusal"),
    "interleaved-thinking": (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": ["Lazy.", {"type": "thinking", "thinking": "Which one?"}]},
            ]
        },
        r"content\[1\] is thinking after text",
    ),
    "part-of-thinking": (
        {"messages": [USER, {"role": "assistant", "content": [{"type": "thinking", "thinking": ["a", 5]}, "Lazy."]}]},
        r"thinking\[1\] must be a part",
    ),
    "gemini-call": (
        {"contents": [{"role": "user", "parts": [{"functionCall": {"name": "add"}}]}]},
        "no text .*functionCall",
    ),
    "records-in-one-object": ({"data": [{"prompt": "name a dog", "response": "Lazy."}]}, "data holds records"),
    "call-without-arguments": (
        {"messages": [USER, ASSISTANT | {"tool_calls": [{"name": "add", "payload": {"a": 2}}]}]},
        r"tool_calls\[0\] must have its arguments under",
    ),
    "call-with-python-text": (
        {"messages": [USER, ASSISTANT | {"tool_calls": [{"name": "add", "arguments": "{'a': 2}"}]}]},
        "arguments must be JSON text",
    ),
    "call-with-huge-number": (
        {"messages": [USER, ASSISTANT | {"tool_calls": [{"name": "add", "arguments": "9" * 5000}]}]},
        "arguments must be JSON text",
    ),
    "call-with-a-key-twice": (
        {"messages": [USER, ASSISTANT | {"tool_calls": [{"name": "add", "arguments": '{"a": 1, "a": 2}'}]}]},
        "two values",
    ),
    "role": ({"conversations": [{"from": "alice", "value": "hi"}]}, "extract.roles"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_record_that_would_lose_something_is_refused_by_name(name: str):
    record, word = REFUSED[name]
    with pytest.raises(PromptError, match=word):
        parse_record(record)


@pytest.mark.parametrize(
    "name",
    [
        "ultrafeedback-four-answers",
        "smoltalk2-arguments",
        "s1k",
        "images",
        "message-images",
        "documents",
        "turn-not-to-learn",
    ],
)
def test_what_a_refusal_names_can_be_left_out(name: str):
    record, word = REFUSED[name]
    key = word.rpartition(".")[2].split()[0]
    content = parse_record(record, Reading(ignore=(key,)))
    assert turns(content)[0] == ASKED[0]
    assert key not in content.facts.used


SPELLINGS = {
    "system": ["System", "SYSTEM", "system_prompt"],
    "user": ["Human", "USER", "prompter"],
    "assistant": ["GPT", "ChatGPT", "bard", "AI", "Model", "chat bot", "gpt-4"][:5],
    "tool": ["function_response", "Tool-Response", "ipython", "OBSERVATION", "environment", "function response"],
}


@pytest.mark.parametrize(("role", "name"), [(role, name) for role, names in SPELLINGS.items() for name in names])
def test_roles_are_known_in_their_usual_spellings(role: str, name: str):
    (message, _) = (
        parse_record({"messages": [{"role": name, "content": "x"}, USER]}).messages[:2]
        if role != "assistant"
        else (parse_record({"messages": [USER, {"role": name, "content": "x"}]}).messages[::-1])
    )
    assert message.role == role


def test_a_setting_names_other_roles():
    record = {"conversations": [{"from": "Alice", "value": "name a dog"}, {"from": "GPT-X", "value": "Lazy."}]}
    assert turns(parse_record(record, Reading(roles={"Alice": "user", "GPT-X": "gpt"}))) == ANSWERED
    labels = {"messages": [USER | {"role": 0}, ASSISTANT | {"role": 1}]}
    assert turns(parse_record(labels, Reading(roles={"0": "user", "1": "assistant"}))) == ANSWERED
    with pytest.raises(ConfigError, match=r"extract\.roles: expected Alice to be one of"):
        Reading(roles={"Alice": "wizard"})


def test_used_keys_and_left_out_keys_are_told():
    record = {"id": 3, "Question": "name a dog", "response": "Lazy.", "source": "x", "input": "", "system": None}
    facts = parse_record(record).facts
    assert facts.used == ("Question", "response")
    assert facts.left_out == ("id", "source", "input", "system")


def test_a_request_of_a_batch_file_tells_its_own_keys():
    facts = parse_record({"custom_id": "1", "body": {"model": "m", "messages": [USER, ASSISTANT, USER]}}).facts
    assert facts == (("body",), ("custom_id", "body.model"), ("ends with the user",))


RULES = {
    "begins with the assistant": ([SYSTEM, OTHER, USER, ASSISTANT], BRIEF),
    "ends with the user": ([SYSTEM, USER, ASSISTANT, USER], [*BRIEF, *ASKED]),
    "has an empty turn": ([USER, {"role": "assistant", "content": " "}], [*ASKED, ("assistant", " ")]),
    "repeats a role": ([USER, USER, ASSISTANT], [*ASKED, *ANSWERED]),
}


@pytest.mark.parametrize("rule", RULES)
def test_an_unusual_order_follows_a_rule_that_is_named(rule: str):
    messages, expected = RULES[rule]
    content = parse_record({"messages": messages})
    assert turns(content) == expected
    assert content.facts.rules == (rule,)
    assert parse_record({"messages": [SYSTEM, USER, ASSISTANT]}).facts.rules == ()


def test_every_rule_is_stated_in_the_docs():
    page = (Path(__file__).parents[3] / "docs" / "prompts.md").read_text(encoding="utf-8")
    assert all(f"| {rule} |" in page for rule in RULES)


def test_functions_in_a_system_message_of_hermes_are_not_given_twice():
    content = parse_record(SHAPES["hermes"][0])
    assert content.tools == ()
    assert content.facts.rules == ("the system message already lists the functions",)


@pytest.mark.parametrize(
    "name", ["llama-factory-glaive", "openai-tool-calls", "openai-function-call", "glaive", "xlam"]
)
def test_functions_reach_the_template_in_one_form(name: str):
    assert parse_record(SHAPES[name][0]).tools == (TOOL,)


@pytest.mark.parametrize("key", ["parameters", "input_schema", "inputSchema"])
@pytest.mark.parametrize("as_text", [False, True])
def test_the_parameters_of_a_function_have_one_name(key: str, as_text: bool):
    tool = {**ADD, key: json.dumps(PARAMETERS) if as_text else PARAMETERS}
    if key != "parameters":
        del tool["parameters"]
    assert parse_record({"messages": [USER], "tools": [tool]}).tools == (TOOL,)


ARGUMENTS = [
    pytest.param({"a": 2, "b": None}, {"a": 2}, id="null"),
    pytest.param('{"a": 2, "b": null}', {"a": 2, "b": None}, id="null-in-text"),
    pytest.param({"a": float("nan"), "b": 2}, {"b": 2}, id="nan"),
    pytest.param("[1]", [1], id="text-of-a-list"),
    pytest.param(json.dumps('{"a": 2}'), {"a": 2}, id="text-of-a-text"),
    pytest.param(" ", {}, id="no-text"),
    pytest.param(None, {}, id="absent"),
]


@pytest.mark.parametrize(("given", "expected"), ARGUMENTS)
def test_arguments_are_an_object_wherever_they_stand_for_one(given: Any, expected: Any):
    call = {"function": {"name": "add", "arguments": given}}
    content = parse_record({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]})
    assert content.messages[1].extra["tool_calls"] == [{"function": {"name": "add", "arguments": expected}}]
