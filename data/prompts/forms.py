"""Forms of a prompt record: which keys a record may have, and how its keys become messages or a text.

A form is one function under `@record_form`. Where a record has the main keys of several forms, the form that is
registered first reads the record. A null counts as an absent key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..errors import PromptError
from ..registry import Registry
from .messages import Message, describe, parse_messages, parse_tools, require_filled_list, require_string


class Content(NamedTuple):
    """What a record holds: a conversation or a plain text."""

    messages: tuple[Message, ...] = ()
    """Empty for a plain text."""
    text: str | None = None
    """None for a conversation."""
    tools: tuple[dict[str, Any], ...] = ()
    """Functions that the conversation may call, as the chat template takes them."""


Parser = Callable[[Mapping[str, Any]], Content]
"""Reads a record without nulls. Raises PromptError if a value is not what the form expects."""


class RecordForm(NamedTuple):
    """One way to write a prompt record."""

    parse: Parser
    keys: tuple[str, ...]
    """The main key, which shows the form, and the further keys that the form reads."""


RECORD_FORMS: Registry[RecordForm] = Registry("record form")
"""Main key -> form, in the order in which a record's keys are looked up."""


def record_form(key: str, *further_keys: str) -> Callable[[Parser], Parser]:
    """Registers a function as the parser of the records that have `key`.

    Only the keys named here are read from Parquet files and from data sets of the hub, and only they can be renamed.

    Raises:
        ConfigError: another form has the same main key.
    """

    def register(parse: Parser) -> Parser:
        RECORD_FORMS.add(key, RecordForm(parse, (key, *further_keys)))
        return parse

    return register


def known_keys() -> list[str]:
    """Every key that some form reads."""
    return [*dict.fromkeys(key for form in RECORD_FORMS.values() for key in form.keys)]


def parse_record(record: object) -> Content:
    """Reads a record in the first form whose main key is present.

    Raises:
        PromptError: the record has no known form, or a value is not what the form expects.
    """
    if not isinstance(record, dict):
        raise PromptError(f"expected one JSON object, found {describe(record)}")
    present = {key: value for key, value in record.items() if value is not None}
    for key, form in RECORD_FORMS.items():
        if key in present:
            return form.parse(present)
    raise PromptError(f"no known form among the keys {list(record)}; expected one of {', '.join(RECORD_FORMS)}")


@record_form("messages", "tools")
def _parse_messages(record: Mapping[str, Any]) -> Content:
    """`{"messages": [{"role": ..., "content": ...}, ...]}`: a conversation as chat templates take it."""
    return Content(parse_messages(record["messages"], "messages"), tools=parse_tools(record.get("tools")))


@record_form("conversations", "tools")
def _parse_conversations(record: Mapping[str, Any]) -> Content:
    """`{"conversations": [{"from": ..., "value": ...}, ...]}`: a conversation as ShareGPT writes it.

    A message may also have the keys `role` and `content`.
    """
    turns = parse_messages(record["conversations"], "conversations", ("from", "role"), ("value", "content"))
    return Content(turns, tools=parse_tools(record.get("tools")))


@record_form("turns")
def _parse_turns(record: Mapping[str, Any]) -> Content:
    """`{"turns": ["...", ...]}`: the user's turns of a conversation."""
    turns = require_filled_list(record["turns"], "turns")
    return Content(tuple(Message("user", require_string(turn, f"turns[{i}]")) for i, turn in enumerate(turns)))


@record_form("prompt", "response", "tools")
def _parse_prompt(record: Mapping[str, Any]) -> Content:
    """`{"prompt": ..., "response": "..."}`: a text or a list of messages, and an answer, which may be absent."""
    prompt = record["prompt"]
    if isinstance(prompt, list):
        messages = parse_messages(prompt, "prompt")
    else:
        messages = (Message("user", require_string(prompt, "prompt", "a string or a list of messages")),)
    if "response" in record:
        messages += (Message("assistant", require_string(record["response"], "response")),)
    return Content(messages, tools=parse_tools(record.get("tools")))


@record_form("text")
def _parse_text(record: Mapping[str, Any]) -> Content:
    """`{"text": "..."}`: a plain text, which no chat template touches."""
    return Content(text=require_string(record["text"], "text"))
