"""Messages of a conversation, checked as they are read from a record."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ..errors import PromptError
from .calls import Note, parse_calls
from .parts import join_parts
from .reading import DEFAULT_READING, Reading, is_held, may_carry, texts_of
from .roles import CALL
from .values import describe, from_json_text, require_filled_list, require_string, unfolded

REASONING = "reasoning_content"
"""Key of `Message.extra` for what a model thought before its answer."""
EXTRA_KEYS = ("tool_calls", "tool_call_id", "name", REASONING)
"""Keys of a message, beside role and content, that chat templates know."""
CALL_KEYS = ("tool_calls", "tool_call", "function_call", "function_calls")
ROLE_KEYS = ("role", "from", "speaker", "author")
TYPE_KEY = "type"
"""Key under which LangChain has a message's role."""
CONTENT_KEYS = ("content", "value", "text", "parts")
THINKING_KEYS = (
    *(REASONING, "reasoning", "thinking", "think", "thought", "thoughts", "rationale", "cot", "complex_cot"),
    *("chain_of_thought", "reasoning_trace", "deepseek_reasoning"),
)
"""Keys of thinking, in a message and beside a conversation."""
WEIGHT_KEYS = ("weight", "train", "loss", "loss_weight", "trainable", "train_detail", "training_detail")
"""Keys that say whether to train on a message, or on which parts of the message."""
ROUTING_KEYS = ("channel", "recipient")
"""Keys of a message of Harmony that say to whom an assistant speaks."""
READ_KEYS = dict.fromkeys([*CALL_KEYS, *EXTRA_KEYS, *THINKING_KEYS])
EMPTY: tuple[Any, ...] = (None, [], "", {})
ASKING_KEYS = ("human", "user", "input", "question", "prompt", "instruction", "query")
LIST_START = re.compile(r"\s*\[\s*\{")
ANSWERING_KEYS = ("assistant", "gpt", "bot", "output", "answer", "response")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is system, developer, user, assistant or tool."""

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields for the chat template; the keys are among `EXTRA_KEYS`."""


def parse_messages(
    value: Any, name: str, reading: Reading = DEFAULT_READING, note: Note = lambda rule: None, takes_texts: bool = False
) -> tuple[Message, ...]:
    """Checks a record's list of messages, or the JSON text of such a list.

    A message has a role and a content, under one of `ROLE_KEYS` and `CONTENT_KEYS`. Or it is a question and an answer.

    Args:
        value: what `plain` returns.
        name: the list's key in the record, for error messages.
        note: takes the names of the rules that were applied.
        takes_texts: whether the list may hold texts, which are by turns the user's and the assistant's.

    Raises:
        PromptError: the value is not a list of messages, is empty, or has something that would be lost.
    """
    items = require_filled_list(_as_rows(unfolded(value, name)), name)
    if takes_texts and all([isinstance(item, str) for item in items]):
        roles = ("user", "assistant")
        return tuple(Message(roles[i % 2], require_string(item, f"{name}[{i}]")) for i, item in enumerate(items))
    messages: list[Message] = []
    for i, item in enumerate(items):
        if isinstance(item, str) and item.lstrip().startswith("{"):
            item = from_json_text(item, f"{name}[{i}]")
        if not isinstance(item, dict):
            raise PromptError(f"{name}[{i}] must be an object, found {describe(item)}")
        if reading.ignore:
            item = {key: each for key, each in item.items() if key not in reading.ignore}
        for each in _split_pair(item) or [item]:
            messages.append(_parse_message(each, f"{name}[{i}]", reading, note))
    return tuple(messages)


def list_in_text(text: Any, name: str) -> list[Any] | None:
    """The messages, if a text is the JSON text of a list of them; None for any other value."""
    if not isinstance(text, str) or not LIST_START.match(text):
        return None
    with suppress(PromptError):
        items = from_json_text(text, name)
        if all(isinstance(item, dict) and has_key(item, ROLE_KEYS) and has_key(item, CONTENT_KEYS) for item in items):
            return items
    return None


def has_key(item: Mapping[str, Any], keys: tuple[str, ...]) -> bool:
    """Whether the item has one of the keys, with a value or without one."""
    return any(key in item for key in keys)


def _as_rows(value: Any) -> Any:
    """The list of messages, if the value is a list for each key of the messages; else the value."""
    if not isinstance(value, dict) or not has_key(value, ROLE_KEYS):
        return value
    columns = [column for column in value.values() if column is not None]
    if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return value
    names = [key for key, column in value.items() if column is not None]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _split_pair(item: dict[str, Any]) -> list[dict[str, Any]] | None:
    """A question and its answer as two messages; None if the item is one message."""
    for key in ROLE_KEYS + CONTENT_KEYS:
        if item.get(key) is not None:
            return None
    asked, answered = _first_present(item, ASKING_KEYS), _first_present(item, ANSWERING_KEYS)
    if asked[1] is None or answered[1] is None:
        return None
    rest = {key: value for key, value in item.items() if key not in (asked[0], answered[0])}
    return [{"role": "user", "content": asked[1]}, {**rest, "role": "assistant", "content": answered[1]}]


def _parse_message(item: dict[str, Any], name: str, reading: Reading, note: Note) -> Message:
    role_key, given_role = _first_present(item, (*ROLE_KEYS, TYPE_KEY))
    role = reading.role_of(given_role)
    if role is None:
        raise PromptError(
            f"{name}.{role_key} must be system, developer, user, assistant, tool or another name of these, found "
            f"{given_role!r} among the keys {list(item)[:40]}; if that is the name of a role, say of which one with "
            "extract.roles"
        )
    content_key, content = _first_present(item, CONTENT_KEYS)
    where = f"{name}.{content_key}"
    if len(item) == 2 and role != CALL and isinstance(content, str):
        return Message(role, require_string(content, where))
    extra = _read_extra(item, name, note)
    if role == CALL:
        role = "assistant"
        if "tool_calls" not in extra and not (isinstance(content, str) and "<tool_call>" in content):
            extra, content = {"tool_calls": parse_calls(content, where, note), **extra}, None
    if content is None and role == "assistant" and {"tool_calls", REASONING} & extra.keys():
        content = ""
    if role == "tool" and _is_result(content):
        content = json.dumps(content, ensure_ascii=False)
    text, thought = join_parts(content, where)
    if thought:
        extra = _with_thinking(extra, thought, where)
    if role != "assistant" and REASONING in extra:
        raise PromptError(f"{name} has thinking, but its role is {role}; only an assistant's turn may have it")
    _check_rest(item, {role_key, content_key}, role, [part for part in (extra.get(REASONING), text) if part], name)
    return Message(role, text, extra)


def _is_result(content: Any) -> bool:
    """Whether the content of a tool's turn is what a function returned, and no text or part of a message."""
    if isinstance(content, list):
        return any(isinstance(item, (dict, list)) and _is_result(item) for item in content)
    if isinstance(content, dict):
        return "type" not in content and [*content] != ["text"]
    return isinstance(content, (bool, int, float))


def _read_extra(item: dict[str, Any], name: str, note: Note) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    for key in READ_KEYS:
        value = item.get(key)
        if value in EMPTY:
            continue
        where = f"{name}.{key}"
        if key in CALL_KEYS:
            calls = parse_calls(value, where, note)
            if calls and extra.get("tool_calls", calls) != calls:
                raise PromptError(f"{name} has tool_calls and {key}, which differ")
            extra |= {"tool_calls": calls} if calls else {}
        elif key in THINKING_KEYS:
            joined = join_parts(value, where)
            extra = _with_thinking(extra, joined.text + joined.thinking, where)
        else:
            extra[key] = require_string(value, where) if isinstance(value, str) else value
    return extra


def _with_thinking(extra: dict[str, Any], thought: str, name: str) -> dict[str, Any]:
    if extra.get(REASONING, thought) != thought:
        raise PromptError(f"{name} is not the thinking that the message has under another key")
    return {**extra, REASONING: thought}


def _check_rest(item: dict[str, Any], read: set[str], role: str, contents: list[str], name: str) -> None:
    """
    Raises:
        PromptError: a key that was not read may hold a part of the conversation, or says not to train on the message.
    """
    for key, value in item.items():
        if value is None or key in read or key in READ_KEYS:
            continue
        advice = f"--set 'extract.ignore=[{key}]'"
        if key in WEIGHT_KEYS and role == "assistant" and value not in (1, []) and not isinstance(value, str):
            raise PromptError(
                f"{name}.{key} is {str(value)[:40]}, but vpd trains on every answer alike; leave the record out, or "
                f"say {advice}"
            )
        if key in ROUTING_KEYS and value not in ("", "final", "all"):
            raise PromptError(
                f"{name}.{key} is {str(value)[:40]!r}, and vpd reads only answers; write thinking under {REASONING} "
                "and calls under tool_calls of the answer"
            )
        if key in CONTENT_KEYS or may_carry(key):
            lost = next((text for text in texts_of(value) if not is_held(text, contents)), None)
            if lost is not None:
                raise PromptError(
                    f"{name}.{key} could carry a part of the conversation, and nothing reads it: {describe(lost)}. "
                    f"Leave it out with {advice}"
                )


def _first_present(item: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, Any]:
    """The first of `keys` whose value is not null, with its value; without such a key, the first key and None."""
    for key in keys:
        if item.get(key) is not None:
            return key, item[key]
    return keys[0], None
