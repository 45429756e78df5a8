"""Functions that a conversation may call, and the calls, as OpenAI's chat templates take them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ..errors import PromptError
from .values import describe, from_json_text, without_nulls

ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")
SCHEMA_KEYS = ("parameters", "input_schema", "inputSchema")
"""Names that data sets give to the arguments of a call, and to those of a function; the first one is OpenAI's."""
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
        with suppress(PromptError):
            tools = from_json_text(value, name) if value.strip() else ()
    if not tools:
        return ()
    if not isinstance(tools, list):
        raise PromptError(f"{name} must be a list of functions, found {describe(tools)}")
    return tuple(_parse_tool(tool, f"{name}[{i}]", note) for i, tool in enumerate(tools))


def _parse_tool(value: Any, name: str, note: Note) -> dict[str, Any]:
    tool = _clean(_object(value, name, "a function"), name, note)
    if "function" in tool:
        function = _object(tool["function"], f"{name}.function", "a function")
        return {**tool, "function": _with_parameters(function, f"{name}.function")}
    if "name" in tool and tool.get("type") in (None, "function", "custom"):
        bare = {key: item for key, item in tool.items() if key != "type"}
        return {"type": "function", "function": _with_parameters(bare, name)}
    return tool


def _with_parameters(function: dict[str, Any], name: str) -> dict[str, Any]:
    """A function with its parameters under the name that templates read; an object in place of its JSON text."""
    key = next((key for key in SCHEMA_KEYS if key in function), None)
    if key is None:
        return function
    found = {"parameters" if other == key else other: item for other, item in function.items()}
    parameters = found["parameters"]
    if isinstance(parameters, str) and parameters.lstrip().startswith("{"):
        found["parameters"] = from_json_text(parameters, f"{name}.{key}")
    return found


def parse_calls(value: Any, name: str, note: Note) -> list[dict[str, Any]]:
    """The calls of a turn: one, a list, or JSON text of them.

    Arguments that are JSON text become what the text stands for, and absent ones an empty object, as servers do it.

    Raises:
        PromptError: the value holds something that is no call, or arguments that are no JSON.
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
    if isinstance(function, dict) or (isinstance(function, str) and function.lstrip().startswith("{")):
        where = f"{name}.function"
        return {**call, "function": _parse_function(_object(function, where, "a call of a function"), where)}
    # The call stands alone, and may name its function so.
    rest = {key: item for key, item in call.items() if key in ("id", "index")}
    bare = {key: item for key, item in call.items() if key not in ("id", "index", "type", "function")}
    bare = _parse_function({"name": function, **bare}, name)
    named = {key: bare.pop(key) for key in ("name", "arguments")}
    return {**rest, **bare, "type": "function", "function": named}


def _parse_function(function: dict[str, Any], name: str) -> dict[str, Any]:
    """The name and the arguments of a call."""
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise PromptError(f"{name}.name must be a string, found {describe(function.get('name'))}")
    key = next((key for key in ARGUMENT_KEYS if key in function), None)
    if key is None and len(function) > 1:
        raise PromptError(f"{name} must have its arguments under one of {list(ARGUMENT_KEYS)}, found {list(function)}")
    found = {"arguments" if other == key else other: item for other, item in function.items()}
    arguments = found.get("arguments", {})
    while isinstance(arguments, str):  # some data sets encode them twice
        arguments = from_json_text(arguments, f"{name}.{key}") if arguments.strip() else {}
    return {**found, "arguments": arguments}


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
