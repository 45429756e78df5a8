"""Answers and thinking that stand under keys of their own, beside the conversation that they belong to."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from ..errors import PromptError
from .calls import parse_calls
from .messages import REASONING, Message, list_in_text, parse_messages
from .reading import is_held, texts_of
from .values import describe, from_json_text, require_string
from .view import RecordView

ANSWER_KEYS = (
    *("response", "output", "completion", "chosen", "generated_solution", "solution", "answer", "deepseek_solution"),
    *("target", "targets", "answers"),
)
"""Keys of an answer; the first with a value counts. A number under `solution` or `answer` is a result, no answer."""
RESULT_KEYS = ("solution", "answer")
UNWANTED_KEYS = ("label", "kto_tag")
"""Keys that say whether the answer is one to learn from."""


def add_answer(record: RecordView, messages: tuple[Message, ...], keys: tuple[str, ...]) -> tuple[Message, ...]:
    """The messages with the answer that stands under one of the keys; the messages alone if there is none.

    Raises:
        PromptError: the answer is no text and no list of messages, is one of several, or is marked as a bad one.
    """
    present = [key for key in keys if key in record]
    key = record.filled(*present) or (present[0] if present else None)
    if key is None or (key in RESULT_KEYS and not isinstance(record.peek(key), (str, list, dict))):
        return messages
    if key == "answers":
        calls = _read_calls(record)
        return (*messages, Message("assistant", "", {"tool_calls": calls})) if calls else messages
    answer = list_in_text(record[key], key) or record[key]
    bad = next((each for each in UNWANTED_KEYS if each in record and record[each] is False), None)
    if bad is not None:
        raise PromptError(f"{bad} is false, so {key} is an answer not to learn from; leave such records out")
    if isinstance(answer, list) and len(answer) > 1 and all(isinstance(each, str) for each in answer):
        raise PromptError(
            f"{key} holds {len(answer)} answers, and vpd takes one of each record. To let the target answer, say "
            f"--set 'extract.ignore=[{key}]'"
        )
    is_conversation = isinstance(answer, dict) or (
        isinstance(answer, list) and any(isinstance(a, dict) for a in answer)
    )
    if not is_conversation:
        return (*messages, Message("assistant", require_string(answer, key)))
    found = parse_messages([answer] if isinstance(answer, dict) else answer, key, record.reading, record.note)
    if found[0].role == "assistant":
        return (*messages, *found)
    asked = [message.content.strip() for message in messages]
    if asked != [message.content.strip() for message in found if message.role != "system"][: len(asked)] and (
        messages != found[: len(messages)]
    ):
        raise PromptError(
            f"{key} begins with another conversation than the record's: expected {describe(asked[0])}, found "
            f"{describe(found[0].content)}"
        )
    return found


def _read_calls(record: RecordView) -> list[dict[str, Any]]:
    """The calls that answer a question, or their JSON text, under the key `answers`; nothing if these are no calls."""
    value = record.peek("answers")
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = from_json_text(value, "answers")
    if not isinstance(value, list) or not all(isinstance(each, dict) and "name" in each for each in value):
        return []
    return parse_calls(record["answers"], "answers", record.note)


def add_thinking(record: RecordView, messages: tuple[Message, ...], keys: tuple[str, ...]) -> tuple[Message, ...]:
    """The messages, the last of which has the thinking that stands under one of the keys.

    Nothing is added if the answer holds the thinking already. The thinking stays unread, which is an error, if the
    record has not exactly one answer.
    """
    key = record.filled(*keys)
    answers = [message for message in messages if message.role == "assistant"]
    if key is None or len(answers) != 1 or messages[-1] is not answers[0]:
        return messages
    thought = record.peek(key)
    if not isinstance(thought, str) or not texts_of(thought) or REASONING in answers[0].extra:
        return messages
    thought = require_string(record[key], key)
    bare, content = thought.strip(), answers[0].content
    if is_held(bare, [content]) or re.search(rf"[>\]]\s*{re.escape(bare)}\s*[<\[]", content):
        return messages
    extra = {**answers[0].extra, REASONING: thought}
    return (*messages[:-1], replace(messages[-1], extra=extra))
