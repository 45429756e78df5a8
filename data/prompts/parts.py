"""Content of a message: a text, or a list of parts of which each is text or thinking."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..errors import PromptError
from .reading import texts_of
from .values import describe, require_string

TEXT_TYPES = ("text", "input_text", "output_text")
THINKING_TYPES = ("thinking", "reasoning", "think")
MEDIA_TYPES = ("image", "audio", "video", "file")


class JoinedParts(NamedTuple):
    """What the parts of a message hold."""

    text: str
    thinking: str


def join_parts(value: Any, name: str, expected: str = "a string") -> JoinedParts:
    """Joins the text parts of a content, and its thinking parts. A string is its own only part.

    Raises:
        PromptError: the content is neither a string nor a list of parts, or a part is an image or unknown.
    """
    if isinstance(value, dict) and ("type" in value or "text" in value):
        value = [value]
    if not isinstance(value, list):
        return JoinedParts(require_string(value, name, expected), "")
    texts: list[str] = []
    thoughts: list[str] = []
    for i, part in enumerate(value):
        where = f"{name}[{i}]"
        if isinstance(part, str):
            texts.append(require_string(part, where))
        elif isinstance(part, dict):
            kind = "thinking" if part.get("thought") is True else part.get("type") or "text"
            is_thinking = kind in THINKING_TYPES
            if is_thinking and any(texts):
                raise PromptError(f"{where} is thinking after text, and a message has its thinking before the rest")
            (thoughts if is_thinking else texts).append(_read_part(part, kind, where))
        else:
            raise PromptError(f"{where} must be a part of a message, found {describe(part)}")
    return JoinedParts("".join(texts), "".join(thoughts))


def _read_part(part: dict[str, Any], kind: object, name: str) -> str:
    if isinstance(kind, str) and kind.startswith("tool_"):
        raise PromptError(
            f"{name} is a part of the type {kind[:40]!r}; write a call under tool_calls of the message, and a result "
            "as a message of the role tool"
        )
    if kind not in TEXT_TYPES + THINKING_TYPES or not isinstance(kind, str):
        found = next((medium for medium in MEDIA_TYPES if medium in str(kind).lower()), None)
        what = f"is {'an' if found in ('image', 'audio') else 'a'} {found}" if found else "is no text"
        raise PromptError(f"{name} {what} (its type is {str(kind)[:40]!r}), and vpd trains on text alone")
    if kind == "text" and not any(part.get(key) is not None for key in ("text", "content")):
        raise PromptError(f"{name} is no text (its keys are {list(part)[:40]}), and vpd trains on text alone")
    keys = (kind, "text", "content") if kind in THINKING_TYPES else ("text", "content")
    key = next((key for key in keys if part.get(key) is not None), keys[0])
    for other, item in part.items():
        if any(medium in str(other).lower() for medium in MEDIA_TYPES) and texts_of(item):
            raise PromptError(f"{name}.{other} is no text, and vpd trains on text alone")
    inner = part.get(key)
    if kind in THINKING_TYPES and isinstance(inner, list):
        return "".join(join_parts(inner, f"{name}.{key}"))
    return require_string(inner, f"{name}.{key}")
