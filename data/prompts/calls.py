"""Functions that a conversation may call, and the calls, as OpenAI's chat templates take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import PromptError
from .values import describe, from_json_text, without_nulls

NULL_RULE = "left out a null of a call or of a function"
Note = Callable[[str], None]
"""Takes the name of a rule that was applied."""


def parse_tools(value: Any, name: str = "tools", note: Note = lambda rule: None) -> tuple[dict[str, Any], ...]:
    """The functions that a conversation may call: a list, or JSON text of a list; None means no function.

    A function that stands alone is put into an object {"type": "function", "function": ...}, as serving engines do.

    Raises:
        PromptError: the value is not a list of functions.
    """
    tools = value
    if isinstance(value, str):
        try:
            tools = from_json_text(value, name) if value.strip() else ()
        except PromptError:
            raise PromptError(f"{name} must be a list of functions, found {describe(value)}") from None
    if not tools:
        return ()
    if not isinstance(tools, list):
        raise PromptError(f"{name} must be a list of functions, found {describe(tools)}")
    return tuple(_parse_tool(tool, f"{name}[{i}]", note) for i, tool in enumerate(tools))


def _parse_tool(value: Any, name: str, note: Note) -> dict[str, Any]:
    tool = _clean(_object(value, name, "a function"), name, note)
    if "function" in tool:
        tool = {**tool, "function": _object(tool["function"], f"{name}.function", "a function")}
        tool["function"] = _with_object(tool["function"], "parameters", f"{name}.function")
    elif "name" in tool and tool.get("type") in (None, "function"):
        bare = {key: item for key, item in tool.items() if key != "type"}
        tool = {"type": "function", "function": _with_object(bare, "parameters", name)}
    return tool


def parse_calls(value: Any, name: str, note: Note) -> list[dict[str, Any]]:
    """The calls of a turn: one, a list, or JSON text of them.

    Arguments that are the JSON text of an object become the object.

    Raises:
        PromptError: the value holds something that is no call.
    """
    calls = from_json_text(value, name) if isinstance(value, str) else value
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list):
        raise PromptError(f"{name} must be a list of calls, found {describe(calls)}")
    return [_parse_call(call, f"{name}[{i}]", note) for i, call in enumerate(calls)]


def _parse_call(value: Any, name: str, note: Note) -> dict[str, Any]:
    call = _clean(_object(value, name, "a call of a function"), name, note)
    function = call.get("function")
    if isinstance(function, str) and function.lstrip().startswith("{"):
        call["function"] = from_json_text(function, f"{name}.function")
    elif not isinstance(function, dict):  # The call stands alone, and may name its function so.
        rest = {key: item for key, item in call.items() if key not in ("name", "arguments", "parameters", "function")}
        named = {"name": call.get("name", function), "arguments": call.get("arguments", call.get("parameters", {}))}
        call = {**rest, "type": rest.get("type", "function"), "function": named}
    function = _object(call["function"], f"{name}.function", "a call of a function")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise PromptError(f"{name}.function.name must be a string, found {describe(function.get('name'))}")
    return {**call, "function": _with_object(function, "arguments", f"{name}.function")}


def _clean(value: dict[str, Any], name: str, note: Note) -> dict[str, Any]:
    cleaned, had_null = without_nulls(value, name)
    if had_null:
        note(NULL_RULE)
    return cleaned


def _object(value: Any, name: str, expected: str) -> dict[str, Any]:
    found = from_json_text(value, name) if isinstance(value, str) and value.lstrip().startswith("{") else value
    if not isinstance(found, dict):
        raise PromptError(f"{name} must be {expected}, found {describe(found)}")
    return found


def _with_object(holder: dict[str, Any], key: str, name: str) -> dict[str, Any]:
    """The holder, with an object in place of the object's JSON text; unchanged if there is no such text."""
    text = holder.get(key)
    if not isinstance(text, str) or not text.lstrip().startswith("{"):
        return holder
    try:
        return {**holder, key: from_json_text(text, f"{name}.{key}")}
    except PromptError:
        return holder
