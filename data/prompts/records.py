"""Prompts (JSON Lines, gzip-compressed JSON Lines, Parquet, data sets of the hub) read into checked records.

A record takes one of these forms; where several keys are present, the first in this order counts, and a null
is the same as an absent key:

- ``{"messages": [{"role": ..., "content": ...}, ...]}``
- ``{"conversations": [{"from" or "role": ..., "value" or "content": ...}, ...]}``
- ``{"turns": ["...", ...]}``, each a user turn
- ``{"prompt": "..." or a list of messages, "response": "..."}``, the response being optional
- ``{"text": "..."}``, plain text that no chat template touches

A message may carry what chat templates know beside its content: ``tool_calls``, ``tool_call_id``, ``name``,
``reasoning_content``. A record's ``tools`` are the functions that its conversation may call.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import PromptError
from .rows import HubPart, find_places, rows_of_places

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
"""Role names met in data sets, and the role that a chat template sees."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is a value of `ROLES`."""

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Other fields for the chat template; see `EXTRA_KEYS`."""


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """One conversation or plain text, and where it came from."""

    seq_id: str
    """Content hash; the k-th repetition of the same content gets "-k" appended, k from 1."""
    source: str
    """The file, as it was given."""
    row: int
    """Line number, or row number in Parquet; both count from 1."""
    messages: tuple[Message, ...]
    """Empty for a plain text."""
    text: str | None
    """None for a conversation."""
    tools: tuple[dict[str, Any], ...] = ()
    """Functions that the conversation may call, as the chat template takes them."""

    @property
    def content_hash(self) -> str:
        """16 hex digits that depend on the messages, the tools and the text alone."""
        return _content_hash(Content(self.messages, self.text, self.tools))


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The records of all places, in the order read, or that of the seed."""

    records: tuple[PromptRecord, ...]
    num_skipped: int
    num_duplicates: int
    """Records left out because the same content came before."""
    fingerprint: str
    """16 hex digits over the sorted `seq_id`s: the order of records does not matter."""


def read_prompts(
    places: Sequence[str | Path],
    *,
    skip_bad: bool = False,
    limit: int | None = None,
    shuffle_seed: int | None = None,
    keep_duplicates: bool = True,
    columns: Mapping[str, str] | None = None,
    hub: HubPart | None = None,
) -> PromptSet:
    """Reads every record of files, patterns and data sets, or the first `limit` over all of them.

    Args:
        skip_bad: count bad records in place of raising the first.
        shuffle_seed: the order, and so what `limit` takes, is drawn by this seed from the records' contents.
        keep_duplicates: a repeated content is a record of its own, with another id.
        columns: what a key of a record is called there, such as {"prompt": "question"}.
        hub: which rows of data sets.

    Raises:
        PromptError: a place is missing, unreadable or without any record; no record is left; a record is bad.
    """
    if limit is not None and limit < 1:
        raise PromptError(f"limit must be at least 1, got {limit}; leave it out to read every record")
    columns = columns or {}
    names = {key: columns.get(key, key) for key in FORM_KEYS}
    records: list[PromptRecord] = []
    repetitions: Counter[str] = Counter()
    num_skipped = num_duplicates = 0
    for source, row, load in rows_of_places(find_places(places), set(names.values()), hub or HubPart()):
        try:
            content = _parse(_renamed(load(), names) if columns else load())
        except PromptError as error:
            if not skip_bad:
                raise PromptError(f"{source}:{row}: {error}") from None
            num_skipped += 1
            continue
        digest = _content_hash(content)
        repetitions[digest] += 1
        number = repetitions[digest] - 1
        if number and not keep_duplicates:
            num_duplicates += 1
            continue
        records.append(PromptRecord(f"{digest}-{number}" if number else digest, source, row, *content))
        if len(records) == limit and shuffle_seed is None:
            break
    if not records:
        found = ", ".join(map(str, places)) or "an empty list of files"
        raise PromptError(f"no prompts in {found} ({num_skipped} bad records skipped)")
    if shuffle_seed is not None:
        records = sorted(records, key=lambda record: _drawn(shuffle_seed, record.seq_id))[:limit]
    return PromptSet(tuple(records), num_skipped, num_duplicates, _fingerprint(records))


def _drawn(seed: int, seq_id: str) -> bytes:
    """A record's place in the order of a seed: the same whatever file it comes from, beside whatever others."""
    return hashlib.sha256(f"{seed} {seq_id}".encode()).digest()


def _renamed(record: object, names: Mapping[str, str]) -> object:
    if not isinstance(record, dict):
        return record
    return {key: record[name] for key, name in names.items() if name in record}


class Content(NamedTuple):
    """What a record says: messages or a text."""

    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: tuple[dict[str, Any], ...] = ()


def _content_hash(content: Content) -> str:
    messages = [[m.role, m.content, *([dict(m.extra)] if m.extra else [])] for m in content.messages]
    tools = [list(content.tools)] if content.tools else []
    canonical = json.dumps([messages, content.text, *tools], separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _fingerprint(records: Sequence[PromptRecord]) -> str:
    seq_ids = sorted(record.seq_id for record in records)
    return hashlib.sha256("\n".join(seq_ids).encode()).hexdigest()[:16]


# Rows to messages.


def _parse(record: object) -> Content:
    if not isinstance(record, dict):
        raise PromptError(f"expected one JSON object, found {_kind(record)}")
    present = {key: value for key, value in record.items() if value is not None}
    for key, parse in FORMS.items():
        if key in present:
            return parse(present)
    raise PromptError(f"no known form among the keys {list(record)}; expected {EXPECTED_FORMS}")


def _parse_messages(record: dict[str, Any]) -> Content:
    return Content(_messages(record["messages"], "messages", ("role",), ("content",)), tools=_tools(record))


def _parse_conversations(record: dict[str, Any]) -> Content:
    turns = _messages(record["conversations"], "conversations", ("from", "role"), ("value", "content"))
    return Content(turns, tools=_tools(record))


def _parse_turns(record: dict[str, Any]) -> Content:
    turns = _filled_list(record["turns"], "turns")
    return Content(tuple(Message("user", _string(turn, f"turns[{i}]")) for i, turn in enumerate(turns)))


def _parse_prompt(record: dict[str, Any]) -> Content:
    prompt = record["prompt"]
    if isinstance(prompt, list):
        messages = _messages(prompt, "prompt", ("role",), ("content",))
    else:
        messages = (Message("user", _string(prompt, "prompt", expected="a string or a list of messages")),)
    if "response" in record:
        messages += (Message("assistant", _string(record["response"], "response")),)
    return Content(messages, tools=_tools(record))


def _parse_text(record: dict[str, Any]) -> Content:
    return Content(text=_string(record["text"], "text"))


def _tools(record: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """The record's functions; some data sets hold them as JSON text."""
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise PromptError(f"tools must be a list of functions, found {_kind(tools)}") from None
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise PromptError(f"tools must be a list of functions, found {_kind(tools)}")
    return tuple(_nested(tool, f"tools[{i}]") for i, tool in enumerate(tools))


def _nested(value: Any, name: str) -> Any:
    """Strings that can be encoded, at any depth, without nulls: Parquet fills with them what one record lacks."""
    if isinstance(value, dict):
        present = {_string(key, f"a key of {name}"): item for key, item in value.items() if item is not None}
        return {key: _nested(item, f"{name}.{key}") for key, item in present.items()}
    if isinstance(value, list):
        return [_nested(item, f"{name}[{i}]") for i, item in enumerate(value)]
    return _string(value, name) if isinstance(value, str) else value


def _messages(
    value: object, name: str, role_keys: tuple[str, ...], content_keys: tuple[str, ...]
) -> tuple[Message, ...]:
    messages: list[Message] = []
    for i, item in enumerate(_filled_list(value, name)):
        if not isinstance(item, dict):
            raise PromptError(f"{name}[{i}] must be an object, found {_kind(item)}")
        role_key, role = _first_present(item, role_keys)
        if not isinstance(role, str) or role not in ROLES:
            raise PromptError(f"{name}[{i}].{role_key} must be one of {list(ROLES)}, found {role!r}")
        given = [key for key in EXTRA_KEYS if item.get(key) not in (None, [], "")]
        extra = {key: _nested(item[key], f"{name}[{i}].{key}") for key in given}
        content_key, content = _first_present(item, content_keys)
        if content is None and "tool_calls" in extra:
            content = ""
        messages.append(Message(ROLES[role], _string(content, f"{name}[{i}].{content_key}"), extra))
    return tuple(messages)


def _first_present(item: dict[str, Any], keys: tuple[str, ...]) -> tuple[str, Any]:
    """The first of `keys` that is not null, with its value; the first key and None if there is none."""
    return next(((key, item[key]) for key in keys if item.get(key) is not None), (keys[0], None))


def _filled_list(value: object, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise PromptError(f"{name} must be a list, found {_kind(value)}")
    if not value:
        raise PromptError(f"{name} must not be an empty list")
    return value


def _string(value: object, name: str, expected: str = "a string") -> str:
    if not isinstance(value, str):
        raise PromptError(f"{name} must be {expected}, found {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"{name} holds half of a surrogate pair, which no tokenizer takes: {error}") from None
    return value


def _kind(value: object) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


FORMS: dict[str, Callable[[dict[str, Any]], Content]] = {
    "messages": _parse_messages,
    "conversations": _parse_conversations,
    "turns": _parse_turns,
    "prompt": _parse_prompt,
    "text": _parse_text,
}
FORM_KEYS = (*FORMS, "response", "tools")
EXTRA_KEYS = ("tool_calls", "tool_call_id", "name", "reasoning_content")
EXPECTED_FORMS = (
    '{"messages": [...]}, {"conversations": [...]}, {"turns": [...]}, {"prompt": ..., "response": ...} or {"text": ...}'
)
