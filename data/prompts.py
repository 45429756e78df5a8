"""Prompt files (JSON Lines, gzip-compressed JSON Lines, Parquet) read into checked records.

A record takes one of these forms; where several keys are present, the first in this order counts, and a null
is the same as an absent key:

- ``{"messages": [{"role": ..., "content": ...}, ...]}``
- ``{"conversations": [{"from" or "role": ..., "value" or "content": ...}, ...]}``
- ``{"turns": ["...", ...]}``, each a user turn
- ``{"prompt": "..." or a list of messages, "response": "..."}``, the response being optional
- ``{"text": "..."}``, plain text that no chat template touches
"""

import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import PromptError

PARQUET_MAGIC = b"PAR1"
GZIP_MAGIC = b"\x1f\x8b"
PARQUET_BATCH_ROWS = 1024

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

    @property
    def content_hash(self) -> str:
        """16 hex digits that depend on the messages and the text alone."""
        return _content_hash(self.messages, self.text)


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The records of all files, in the order read."""

    records: tuple[PromptRecord, ...]
    num_skipped: int
    fingerprint: str
    """16 hex digits over the sorted `seq_id`s: the order of records does not matter."""


def read_prompts(paths: Sequence[str | Path], *, skip_bad: bool = False, limit: int | None = None) -> PromptSet:
    """Read every record of `paths`, or the first `limit` over all of them.

    With `skip_bad`, a bad record is counted instead of raised. A file that is missing, unreadable or without
    any record raises `PromptError` either way, and so does a result without records.
    """
    if limit is not None and limit < 1:
        raise PromptError(f"limit must be at least 1, got {limit}; leave it out to read every record")
    for path in paths:
        if not Path(path).is_file():
            raise PromptError(f"prompt file {path} does not exist or is not a file; check the path")
    records: list[PromptRecord] = []
    repetitions: Counter[str] = Counter()
    num_skipped = 0
    for source, row, load in _rows_of_files(paths):
        try:
            messages, text = _parse(load())
        except PromptError as error:
            if not skip_bad:
                raise PromptError(f"{source}:{row}: {error}") from None
            num_skipped += 1
            continue
        digest = _content_hash(messages, text)
        seq_id = f"{digest}-{repetitions[digest]}" if repetitions[digest] else digest
        repetitions[digest] += 1
        records.append(PromptRecord(seq_id, source, row, messages, text))
        if len(records) == limit:
            break
    if not records:
        files = ", ".join(str(path) for path in paths) or "an empty list of files"
        raise PromptError(f"no prompts in {files} ({num_skipped} bad records skipped)")
    return PromptSet(tuple(records), num_skipped, _fingerprint(records))


def _content_hash(messages: Sequence[Message], text: str | None) -> str:
    pairs = [[message.role, message.content] for message in messages]
    canonical = json.dumps([pairs, text], separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _fingerprint(records: Sequence[PromptRecord]) -> str:
    seq_ids = sorted(record.seq_id for record in records)
    return hashlib.sha256("\n".join(seq_ids).encode()).hexdigest()[:16]


# Files to rows. A row is loaded by a call, so that a bad one raises where it can be skipped.

Row = tuple[int, Callable[[], object]]


def _rows_of_files(paths: Sequence[str | Path]) -> Iterator[tuple[str, int, Callable[[], object]]]:
    for path in paths:
        row = 0
        for row, load in _rows(Path(path)):
            yield str(path), row, load
        if not row:
            raise PromptError(f"no prompts in {path}: the file has no record; remove it from the list")


def _rows(path: Path) -> Iterator[Row]:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        if not magic:
            return
        if magic == PARQUET_MAGIC or path.suffix == ".parquet":
            yield from _parquet_rows(path)
        elif magic.startswith(GZIP_MAGIC) or path.suffix == ".gz":
            with gzip.open(path, "rb") as file:
                yield from _json_rows(file)
        else:
            with path.open("rb") as file:
                yield from _json_rows(file)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, pa.ArrowException) as error:
        raise PromptError(f"prompt file {path} can't be read, its bytes may be damaged: {error}") from error


def _json_rows(lines: Iterator[bytes] | gzip.GzipFile) -> Iterator[Row]:
    for row, line in enumerate(lines, start=1):
        if line.strip():
            yield row, lambda line=line: _load_json(line)


def _load_json(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise PromptError(f"not JSON ({error}); expected one JSON object per line") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    """Only the columns that a form uses are read; the others may hold anything."""
    with pq.ParquetFile(path) as file:
        found = file.schema_arrow.names
        columns = [name for name in found if name in FORM_KEYS]
        if not columns:
            raise PromptError(f"{path}: no known form among the columns {found}; expected {EXPECTED_FORMS}")
        row = 0
        for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=columns):
            for record in batch.to_pylist():
                row += 1
                yield row, lambda record=record: record


# Rows to messages.

Content = tuple[tuple[Message, ...], str | None]


def _parse(record: object) -> Content:
    if not isinstance(record, dict):
        raise PromptError(f"expected one JSON object, found {_kind(record)}")
    present = {key: value for key, value in record.items() if value is not None}
    for key, parse in FORMS.items():
        if key in present:
            return parse(present)
    raise PromptError(f"no known form among the keys {list(record)}; expected {EXPECTED_FORMS}")


def _parse_messages(record: dict[str, Any]) -> Content:
    return _messages(record["messages"], "messages", ("role",), ("content",)), None


def _parse_conversations(record: dict[str, Any]) -> Content:
    turns = _messages(record["conversations"], "conversations", ("from", "role"), ("value", "content"))
    return turns, None


def _parse_turns(record: dict[str, Any]) -> Content:
    turns = _filled_list(record["turns"], "turns")
    return tuple(Message("user", _string(turn, f"turns[{i}]")) for i, turn in enumerate(turns)), None


def _parse_prompt(record: dict[str, Any]) -> Content:
    prompt = record["prompt"]
    if isinstance(prompt, list):
        messages = _messages(prompt, "prompt", ("role",), ("content",))
    else:
        messages = (Message("user", _string(prompt, "prompt", expected="a string or a list of messages")),)
    if "response" in record:
        messages += (Message("assistant", _string(record["response"], "response")),)
    return messages, None


def _parse_text(record: dict[str, Any]) -> Content:
    return (), _string(record["text"], "text")


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
        content_key, content = _first_present(item, content_keys)
        messages.append(Message(ROLES[role], _string(content, f"{name}[{i}].{content_key}")))
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
FORM_KEYS = (*FORMS, "response")
EXPECTED_FORMS = (
    '{"messages": [...]}, {"conversations": [...]}, {"turns": [...]}, {"prompt": ..., "response": ...} or {"text": ...}'
)
