"""Messages of a conversation, and the functions that it may call, checked as they are read from a record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import PromptError

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Role name in a data set -> role that a chat template knows."""
EXTRA_KEYS = ("tool_calls", "tool_call_id", "name", "reasoning_content")
"""Keys of a message, beside role and content, that chat templates know."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is a value of `ROLES`."""

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields for the chat template; the keys are among `EXTRA_KEYS`."""


def parse_messages(
    value: object, name: str, role_keys: tuple[str, ...] = ("role",), content_keys: tuple[str, ...] = ("content",)
) -> tuple[Message, ...]:
    """Checks a record's list of messages.

    Args:
        name: the list's key in the record, for error messages.
        role_keys: keys that may hold a message's role; the first key with a value counts.
        content_keys: keys that may hold a message's content; the first key with a value counts.

    Raises:
        PromptError: the value is not a list of messages, or is empty.
    """
    messages: list[Message] = []
    for i, item in enumerate(require_filled_list(value, name)):
        if not isinstance(item, dict):
            raise PromptError(f"{name}[{i}] must be an object, found {describe(item)}")
        role_key, role = _first_present(item, role_keys)
        if not isinstance(role, str) or role not in ROLES:
            raise PromptError(f"{name}[{i}].{role_key} must be one of {list(ROLES)}, found {role!r}")
        given = [key for key in EXTRA_KEYS if item.get(key) not in (None, [], "")]
        extra = {key: _require_nested(item[key], f"{name}[{i}].{key}") for key in given}
        content_key, content = _first_present(item, content_keys)
        if content is None and "tool_calls" in extra:
            content = ""
        messages.append(Message(ROLES[role], require_string(content, f"{name}[{i}].{content_key}"), extra))
    return tuple(messages)


def parse_tools(value: object) -> tuple[dict[str, Any], ...]:
    """Checks the functions that a conversation may call: a list, or JSON text of a list; None means no function.

    Raises:
        PromptError: the value is not a list of objects.
    """
    tools: Any = value
    if isinstance(value, str):
        try:
            tools = json.loads(value)
        except (ValueError, RecursionError):
            raise PromptError(f"tools must be a list of functions, found {describe(value)}") from None
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise PromptError(f"tools must be a list of functions, found {describe(tools)}")
    return tuple(_require_nested(tool, f"tools[{i}]") for i, tool in enumerate(tools))


def require_filled_list(value: object, name: str) -> list[Any]:
    """
    Raises:
        PromptError: the value is not a list, or is empty.
    """
    if not isinstance(value, list):
        raise PromptError(f"{name} must be a list, found {describe(value)}")
    if not value:
        raise PromptError(f"{name} must not be an empty list")
    return value


def require_string(value: object, name: str, expected: str = "a string") -> str:
    """
    Raises:
        PromptError: the value is not a string, or UTF-8 can't encode the string.
    """
    if not isinstance(value, str):
        raise PromptError(f"{name} must be {expected}, found {describe(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"{name} holds half of a surrogate pair, which no tokenizer takes: {error}") from None
    return value


def describe(value: object) -> str:
    """A value's type and the beginning of its text, for error messages."""
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def _require_nested(value: Any, name: str) -> Any:
    """Checks strings at any depth, and leaves out nulls: Parquet writes a null for each key that a record lacks."""
    if isinstance(value, dict):
        present = {require_string(key, f"a key of {name}"): item for key, item in value.items() if item is not None}
        return {key: _require_nested(item, f"{name}.{key}") for key, item in present.items()}
    if isinstance(value, list):
        return [_require_nested(item, f"{name}[{i}]") for i, item in enumerate(value)]
    return require_string(value, name) if isinstance(value, str) else value


def _first_present(item: dict[str, Any], keys: tuple[str, ...]) -> tuple[str, Any]:
    """The first of `keys` whose value is not null, with its value; without such a key, the first key and None."""
    return next(((key, item[key]) for key in keys if item.get(key) is not None), (keys[0], None))
