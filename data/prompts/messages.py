"""Messages of a conversation, checked as they are read from a record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import PromptError
from .calls import Note, parse_calls
from .parts import join_parts
from .reading import DEFAULT_READING, Reading, is_held, may_carry, texts_of
from .roles import CALL, ROLES
from .values import describe, from_json_text, require_filled_list, require_string

REASONING = "reasoning_content"
"""Key of `Message.extra` for what a model thought before its answer."""
EXTRA_KEYS = ("tool_calls", "tool_call_id", "name", REASONING)
"""Keys of a message, beside role and content, that chat templates know."""
ROLE_KEYS = ("role", "from", "speaker", "author")
CONTENT_KEYS = ("content", "value", "text")
THINKING_KEYS = (REASONING, "reasoning", "thinking", "thought", "thoughts")
WEIGHT_KEYS = ("weight", "train", "loss")
"""Keys that say whether to train on a message."""
ASKING_KEYS = ("human", "user", "input", "question", "prompt", "instruction", "query")
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
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = from_json_text(value, name)
    items = require_filled_list(value, name)
    if takes_texts and all(isinstance(item, str) for item in items):
        roles = ("user", "assistant")
        return tuple(Message(roles[i % 2], require_string(item, f"{name}[{i}]")) for i, item in enumerate(items))
    messages: list[Message] = []
    for i, item in enumerate(items):
        if isinstance(item, str) and item.lstrip().startswith("{"):
            item = from_json_text(item, f"{name}[{i}]")
        if not isinstance(item, dict):
            raise PromptError(f"{name}[{i}] must be an object, found {describe(item)}")
        pair = _split_pair(item)
        messages += [_parse_message(each, f"{name}[{i}]", reading, note) for each in pair or [item]]
    return tuple(messages)


def _split_pair(item: dict[str, Any]) -> list[dict[str, Any]] | None:
    """A question and its answer as two messages; None if the item is one message."""
    if any(item.get(key) is not None for key in ROLE_KEYS + CONTENT_KEYS):
        return None
    asked, answered = _first_present(item, ASKING_KEYS), _first_present(item, ANSWERING_KEYS)
    if asked[1] is None or answered[1] is None:
        return None
    rest = {key: value for key, value in item.items() if key not in (asked[0], answered[0])}
    return [{"role": "user", "content": asked[1]}, {**rest, "role": "assistant", "content": answered[1]}]


def _parse_message(item: dict[str, Any], name: str, reading: Reading, note: Note) -> Message:
    item = {key: value for key, value in item.items() if key not in reading.ignore}
    role_key, given_role = _first_present(item, ROLE_KEYS)
    role = reading.role_of(given_role)
    if role is None:
        raise PromptError(
            f"{name}.{role_key} must be one of {list(ROLES)}, found {given_role!r}; if that is the "
            "name of a role, say of which one with extract.roles"
        )
    content_key, content = _first_present(item, CONTENT_KEYS)
    extra = _read_extra(item, name, note)
    where = f"{name}.{content_key}"
    if role == CALL:
        role = "assistant"
        if "tool_calls" not in extra and not (isinstance(content, str) and "<tool_call>" in content):
            extra, content = {"tool_calls": parse_calls(content, where, note), **extra}, None
    if content is None and role == "assistant" and {"tool_calls", REASONING} & extra.keys():
        content = ""
    if role == "tool" and isinstance(content, dict) and "type" not in content and "text" not in content:
        content = json.dumps(content, ensure_ascii=False)
    text, thought = join_parts(content, where)
    if thought:
        extra = _with_thinking(extra, thought, where)
    if role != "assistant" and REASONING in extra:
        raise PromptError(f"{name} has thinking, but its role is {role}; only an assistant's turn may have it")
    _check_weight(item, role, name)
    _check_rest(item, {role_key, content_key}, [text, *([extra[REASONING]] if REASONING in extra else [])], name)
    return Message(role, text, extra)


def _read_extra(item: dict[str, Any], name: str, note: Note) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    for key in ("tool_calls", "function_call"):
        if item.get(key) not in (None, [], "", {}):
            calls = parse_calls(item[key], f"{name}.{key}", note)
            if calls and extra.get("tool_calls", calls) != calls:
                raise PromptError(f"{name} has tool_calls and a function_call, which differ")
            if calls:
                extra["tool_calls"] = calls
    for key in ("tool_call_id", "name"):
        if item.get(key) not in (None, [], ""):
            value = item[key]
            extra[key] = require_string(value, f"{name}.{key}") if isinstance(value, str) else value
    for key in THINKING_KEYS:
        if item.get(key) not in (None, [], ""):
            joined = join_parts(item[key], f"{name}.{key}")
            extra = _with_thinking(extra, joined.text + joined.thinking, f"{name}.{key}")
    return extra


def _with_thinking(extra: dict[str, Any], thought: str, name: str) -> dict[str, Any]:
    if extra.get(REASONING, thought) != thought:
        raise PromptError(f"{name} is not the thinking that the message has under another key")
    return {**extra, REASONING: thought}


def _check_weight(item: dict[str, Any], role: str, name: str) -> None:
    for key in WEIGHT_KEYS:
        value = item.get(key)
        if role == "assistant" and isinstance(value, (bool, int, float)) and value != 1:
            raise PromptError(
                f"{name}.{key} is {value}, but vpd trains on every answer alike; leave the record out, or say "
                f"--set 'extract.ignore=[{key}]'"
            )


def _check_rest(item: dict[str, Any], read: set[str], contents: list[str], name: str) -> None:
    known = {*read, *EXTRA_KEYS, *THINKING_KEYS, "function_call"}
    for key, value in item.items():
        if key in known or not may_carry(key):
            continue
        lost = next((text for text in texts_of(value) if not is_held(text, contents)), None)
        if lost is not None:
            raise PromptError(
                f"{name}.{key} could carry a part of the conversation, and nothing reads it: {describe(lost)}. "
                f"Leave it out with --set 'extract.ignore=[{key}]'"
            )


def _first_present(item: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, Any]:
    """The first of `keys` whose value is not null, with its value; without such a key, the first key and None."""
    return next(((key, item[key]) for key in keys if item.get(key) is not None), (keys[0], None))
