"""Forms of a prompt record: which keys a record may have, and how its keys become messages or a text.

A form is one function under `@record_form`. Where a record has the main keys of several forms, the form that is
registered first reads the record. A null counts as an absent key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..errors import PromptError
from ..registry import Registry
from .answers import ANSWER_KEYS, add_answer, add_thinking
from .calls import parse_tools
from .messages import CONTENT_KEYS, ROLE_KEYS, THINKING_KEYS, Message, has_key, list_in_text, parse_messages
from .reading import DEFAULT_READING, Reading, may_carry
from .rules import apply_turn_rules
from .transcripts import is_transcript, read_glaive, read_transcript
from .values import describe, require_filled_list, require_string, unfolded
from .view import RecordView

SYSTEM_KEYS = ("system", "system_prompt", "system_message", "system_instruction")
TOOLS_KEYS = ("tools", "functions")
WORKED_ON_KEYS = ("input", "context")
SHARED_KEYS = (*SYSTEM_KEYS, *TOOLS_KEYS, *THINKING_KEYS)
CONVERSATION_KEYS = ("messages", "conversations", "conversation", "dialog", "dialogue", "contents", "data")
QUESTION_KEYS = ("instruction", "prompt", "question", "query", "problem", "input", "inputs")
TREE_KEYS = ("parent_id", "message_tree_id")


class ReadingFacts(NamedTuple):
    """How a record was read."""

    used: tuple[str, ...] = ()
    """Keys of the data whose values are in the content."""
    left_out: tuple[str, ...] = ()
    """The other keys of the data, with a value or without one."""
    rules: tuple[str, ...] = ()
    """Names of the rules that were applied to the record, such as "begins with the assistant"."""


NO_FACTS = ReadingFacts()


class Content(NamedTuple):
    """What a record holds: a conversation or a plain text."""

    messages: tuple[Message, ...] = ()
    """Empty for a plain text."""
    text: str | None = None
    """None for a conversation."""
    tools: tuple[dict[str, Any], ...] = ()
    """Functions that the conversation may call, as the chat template takes them."""
    facts: ReadingFacts = NO_FACTS
    """How the record was read."""


Parser = Callable[[RecordView], Content]
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

    Only the keys named here are read from tables and from data sets of the hub. A key that the parser does not look up,
    and that may hold a part of the conversation, is an error.

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


def is_wanted(column: str, reading: Reading = DEFAULT_READING) -> bool:
    """Whether reading a record needs the values of a column of this name."""
    key = reading.key_of(column)
    return key is not None and (key in known_keys() or key in TREE_KEYS or may_carry(column))


def parse_record(record: object, reading: Reading = DEFAULT_READING) -> Content:
    """Reads a record in the first form whose main key is present.

    Raises:
        PromptError: the record has no known form, a value is not what the form expects, or a key that may hold a part
            of the conversation would be lost.
    """
    if not isinstance(record, dict):
        raise PromptError(f"expected one JSON object, found {describe(record)}")
    view = RecordView(record, reading)
    present = [key for key in RECORD_FORMS if key in view.names]
    key = next((key for key in present if _looks_right(key, view.peek(key))), present[0] if present else None)
    if key is None:
        raise PromptError(
            f"no known form among the keys {list(record)[:40]}; expected one of {', '.join(RECORD_FORMS)}. Say what "
            "they are with extract.columns"
        )
    content = RECORD_FORMS[key].parse(view)
    view.check_left_out(content.messages, content.text)
    inner = content.facts
    left_out = (*view.left_out, *(f"{key}.{name}" for name in inner.left_out))
    return content._replace(facts=ReadingFacts(view.used, left_out, (*inner.rules, *view.rules)))


def _looks_right(key: str, value: Any) -> bool:
    """Whether a value may be that of a main key. Data sets count turns under `turns`, and have a date under `data`."""
    if key in (*CONVERSATION_KEYS, "turns"):
        is_text = isinstance(value, str) and value.lstrip().startswith("[")
        return is_text or isinstance(value, (list, tuple)) or (isinstance(value, dict) and key != "data")
    if key == "body":
        return isinstance(value, dict)
    return not isinstance(value, (bool, int, float))


def _parse_conversation(record: RecordView, key: str) -> Content:
    """A conversation, with the shared keys and an answer beside it."""
    value = unfolded(record[key], key)
    items = value if key == "data" and isinstance(value, list) else ()
    if any(isinstance(item, dict) and not has_key(item, ROLE_KEYS + CONTENT_KEYS) for item in items):
        raise PromptError("data holds records, and no turns of a conversation; write each record on a line of its own")
    messages = parse_messages(value, key, record.reading, record.note, takes_texts=key != "messages")
    if messages[-1].role != "assistant":
        messages = add_answer(record, messages, ANSWER_KEYS[:4])
    return _finish(record, messages)


def _finish(record: RecordView, messages: tuple[Message, ...]) -> Content:
    """The conversation with the system text, the thinking and the functions that stand under keys of their own."""
    messages = add_thinking(record, _with_system(record, messages), THINKING_KEYS)
    messages = apply_turn_rules(messages, record.note)
    return Content(messages, tools=_read_tools(record, messages))


def _with_system(record: RecordView, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages after the record's system text, unless one of them is a system message already."""
    key = record.filled(*SYSTEM_KEYS)
    if key is None or any([message.role in ("system", "developer") for message in messages]):
        return messages
    value = record[key]
    if isinstance(value, str):
        return (Message("system", require_string(value, key)), *messages)
    item = value if isinstance(value, dict) and "text" not in value else {"content": value}
    return (*parse_messages([{"role": "system", **item}], key, record.reading, record.note), *messages)


def _read_tools(record: RecordView, messages: tuple[Message, ...]) -> tuple[dict[str, Any], ...]:
    """The functions of a record, unless the system message describes them."""
    key = record.filled(*TOOLS_KEYS)
    tools = parse_tools(record[key], key, record.note) if key is not None else ()
    if tools and _lists_tools(messages[0], tools):
        record.note("the system message already lists the functions")
        return ()
    return tools


def _lists_tools(message: Message, tools: tuple[dict[str, Any], ...]) -> bool:
    """Whether a system message in the way of Hermes describes every function."""
    names = [
        str(tool.get("function", tool).get("name")) for tool in tools if isinstance(tool.get("function", tool), dict)
    ]
    return message.role == "system" and "<tools>" in message.content and all(f'"{n}"' in message.content for n in names)


def _register_conversation(key: str) -> None:
    @record_form(key, *SHARED_KEYS, *ANSWER_KEYS[:4])
    def parse(record: RecordView) -> Content:
        return _parse_conversation(record, key)

    parse.__doc__ = f'`{{"{key}": [...]}}`: a list of messages; every name that data sets give to its keys is known.'


for _key in CONVERSATION_KEYS:
    _register_conversation(_key)


@record_form("turns", *SYSTEM_KEYS, *TOOLS_KEYS)
def _parse_turns(record: RecordView) -> Content:
    """`{"turns": ["...", ...]}`: the user's turns of a conversation; or messages, if they have roles."""
    turns = require_filled_list(unfolded(record["turns"], "turns"), "turns")
    if any(isinstance(turn, dict) and has_key(turn, ROLE_KEYS) for turn in turns):
        return _parse_conversation(record, "turns")
    turns = [turn["content"] if isinstance(turn, dict) and [*turn] == ["content"] else turn for turn in turns]
    messages = tuple(Message("user", require_string(turn, f"turns[{i}]")) for i, turn in enumerate(turns))
    return Content(_with_system(record, messages), tools=_read_tools(record, messages))


@record_form("chat", *SYSTEM_KEYS)
def _parse_glaive(record: RecordView) -> Content:
    """`{"chat": "USER: ... ASSISTANT: ...", "system": "SYSTEM: ..."}`: a conversation as Glaive writes it."""
    chat = record["chat"]
    if isinstance(chat, list):
        return _parse_conversation(record, "chat")
    key = record.filled(*SYSTEM_KEYS)
    system = require_string(record[key], key) if key is not None else ""
    messages, tools = read_glaive(require_string(chat, "chat", "a string or a list of messages"), system, record.note)
    return Content(apply_turn_rules(messages, record.note), tools=tools)


def _register_question(key: str) -> None:
    @record_form(key, *SHARED_KEYS, *WORKED_ON_KEYS, *ANSWER_KEYS, "history", "label", "kto_tag")
    def parse(record: RecordView) -> Content:
        return _parse_question(record, key)

    parse.__doc__ = (
        f'`{{"{key}": ..., "response": ...}}`: a text, a transcript or a list of messages, and an answer, or none.'
    )


def _parse_question(record: RecordView, key: str) -> Content:
    asked = list_in_text(record[key], key) or record[key]
    if isinstance(asked, list):
        messages = parse_messages(asked, key, record.reading, record.note)
    elif isinstance(asked, str) and is_transcript(asked):
        messages = read_transcript(require_string(asked, key), key)
        if not messages[-1].content:
            messages = messages[:-1]
    else:
        texts = [require_string(asked, key, "a string or a list of messages")]
        for other in WORKED_ON_KEYS:
            if other != key and record.filled(other) is not None and isinstance(record.peek(other), str):
                texts.append(require_string(record[other], other))
        if len(texts) > 1:
            record.note("joined the instruction and what it works on")
            texts = [text for text in texts if text.strip()]
        messages = (*_read_history(record), Message("user", "\n\n".join(texts)))
    return _finish(record, add_answer(record, messages, ANSWER_KEYS))


def _read_history(record: RecordView) -> tuple[Message, ...]:
    """Earlier turns: a list of messages, or of pairs of a question and an answer."""
    if record.filled("history") is None:
        return ()
    history = require_filled_list(unfolded(record["history"], "history"), "history")
    if all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        history = [text for pair in history for text in pair]
    return parse_messages(history, "history", record.reading, record.note, takes_texts=True)


for _key in QUESTION_KEYS:
    _register_question(_key)


@record_form("chosen", *SHARED_KEYS)
def _parse_chosen(record: RecordView) -> Content:
    """`{"chosen": ..., "rejected": ...}`: the better one of two conversations, as messages or as a transcript."""
    chosen = record["chosen"]
    if isinstance(chosen, str):
        messages = read_transcript(require_string(chosen, "chosen"), "chosen")
    else:
        messages = parse_messages(chosen, "chosen", record.reading, record.note)
    return _finish(record, messages)


@record_form("body")
def _parse_request(record: RecordView) -> Content:
    """`{"body": {...}}`: a request of a batch file, which is a record of its own."""
    return parse_record(record["body"], record.reading)


@record_form("text")
def _parse_text(record: RecordView) -> Content:
    """`{"text": "..."}`: a plain text, which no chat template touches."""
    if (key := record.filled(*TREE_KEYS)) is not None:
        raise PromptError(
            f"the record is one message of a tree ({key!r} names its place); expected a whole conversation"
        )
    return Content(text=require_string(record["text"], "text"))
