"""Values of a record: checked, and turned into what JSON knows, whatever file they come from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

from ..errors import PromptError

SCALARS = frozenset([str, int, bool, type(None)])
MAX_DEPTH = 100
"""Deepest nesting of a value. Hashing and rendering recurse, so this is far below Python's own limit."""


def plain(value: Any, name: str, depth: int = 0) -> Any:
    """The value as JSON knows it.

    A map of Arrow (a list of pairs) becomes an object, a date ISO text, a decimal a number or, where no float is equal
    to it, a text. Bytes become the text that they encode in UTF-8. A NaN becomes null: the libraries that write tables
    use it for what is absent.

    Args:
        name: what the value is called, for error messages.

    Raises:
        PromptError: the value is nested too deep, or JSON has nothing like it.
    """
    if is_plain(value, depth):
        return value
    if isinstance(value, float):
        if math.isinf(value):
            raise PromptError(f"{name} is infinite, and JSON has no such number")
        return None if math.isnan(value) else value
    if depth >= MAX_DEPTH:
        raise PromptError(f"{name[:80]} is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        return {
            require_string(key, f"a key of {name}"): plain(item, f"{name}.{key}", depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        if value and all(isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) for item in value):
            return plain(_join_pairs(value, name), name, depth)
        return [plain(item, f"{name}[{i}]", depth + 1) for i, item in enumerate(value)]
    if isinstance(value, Decimal):
        number = int(value) if value == value.to_integral_value() else float(value)
        return number if Decimal(str(number)) == value else str(value)
    if isinstance(value, (date, datetime, time)):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, bytes):
        return _decode(value, name)
    raise PromptError(f"{name} must be text, a number, a list or an object, found {describe(value)}")


def is_plain(value: Any, depth: int = 0) -> bool:
    """Whether `plain` would give the value itself; False also where that takes a closer look."""
    kind = type(value)
    if kind in SCALARS:
        return True
    if kind is float:
        return math.isfinite(value)
    if depth >= MAX_DEPTH or (kind is not dict and kind is not list):
        return False
    if kind is dict:
        try:
            if not "".join(value).isascii():
                return False
        except TypeError:  # a key is no text
            return False
        value = value.values()
    return all([type(item) in SCALARS or is_plain(item, depth + 1) for item in value])


def without_nulls(value: Any, name: str) -> tuple[Any, bool]:
    """A plain value whose texts UTF-8 can encode, without nulls in its objects; and whether there was such a null.

    A table has a null for each key that one of its records has and this one lacks.

    Raises:
        PromptError: UTF-8 can't encode a text.
    """
    with suppress(ValueError):  # a text that UTF-8 can't encode is looked for below
        if b"null" not in json.dumps(value, ensure_ascii=False).encode():
            return value, False
    return _without_nulls(value, name)


def _without_nulls(value: Any, name: str) -> tuple[Any, bool]:
    if isinstance(value, dict):
        items = {key: _without_nulls(item, f"{name}.{key}") for key, item in value.items() if item is not None}
        had_null = len(items) < len(value) or any(had for _, had in items.values())
        return {key: item for key, (item, _) in items.items()}, had_null
    if isinstance(value, list):
        found = [_without_nulls(item, f"{name}[{i}]") for i, item in enumerate(value)]
        return [item for item, _ in found], any(had for _, had in found)
    return (require_string(value, name) if isinstance(value, str) else value), False


def from_json_text(text: str, name: str) -> Any:
    """What JSON text in a record stands for, as `plain` gives it.

    Raises:
        PromptError: the text is not JSON, or is nested too deep.
    """
    try:
        return plain(json.loads(text, object_pairs_hook=unique_pairs), name)
    except (ValueError, RecursionError) as error:
        if isinstance(error, PromptError):
            raise
        raise PromptError(f"{name} must be JSON text, found {describe(text)} ({str(error)[:80]})") from None


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON.

    Raises:
        ValueError: a key stands there twice, with two values.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if value != found[key]:
                raise ValueError(f"the key {key!r} has two values")
    return found


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
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise PromptError(f"{name} holds half of a surrogate pair, which no tokenizer takes: {error}") from None
    return value


def unfolded(value: Any, name: str) -> Any:
    """The list, if the value is the JSON text of one; else the value.

    Raises:
        PromptError: a text begins as a list does, and is not JSON.
    """
    return from_json_text(value, name) if isinstance(value, str) and value.lstrip().startswith("[") else value


def describe(value: object) -> str:
    """A value's type and the beginning of its text, for error messages."""
    if value is None:
        return "nothing"
    try:
        return f"{type(value).__name__} {str(value)[:40]!r}"
    except (ValueError, RecursionError):  # an integer of too many digits, or a value that is nested too deep
        return type(value).__name__


def _join_pairs(pairs: Any, name: str) -> dict[str, Any]:
    try:
        return unique_pairs(list(pairs))
    except ValueError as error:
        raise PromptError(f"{name}: {error}") from None


def _decode(value: bytes, name: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise PromptError(f"{name} holds bytes that are no text in UTF-8: {error}") from None
