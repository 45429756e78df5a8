"""What a chat template leaves out: found by rendering a conversation whose pieces are words that occur nowhere else."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .errors import PromptError
from .prompts.messages import REASONING, Message
from .template import ChatTemplate

MAX_SHAPES = 4096
"""Shapes of conversations that are remembered."""
TAG_OR_LINE = re.compile(r"<[^<>\n]{1,40}>|\[/?[A-Z_]+\]|\n")
"""What may stand between the parts of an answer, such as its thinking and the rest."""

UNKNOWN = "unknown"

Shape = tuple[Any, ...]
Word = Callable[[str], str]
"""Takes the name of a piece; returns a word that stands for the piece."""


class DroppedByTemplate(PromptError):
    """The template leaves out a part of the record."""


class DropCheck:
    """Looks whether templates write all of a conversation. Conversations of one shape are looked at once."""

    def __init__(self) -> None:
        self._found: dict[Shape, str | None] = {}
        """Shape -> what the template leaves out; `UNKNOWN` if the template refuses the words."""

    def require_all(self, template: ChatTemplate, messages: Sequence[Message], text: str, is_prompt: bool) -> None:
        """
        Args:
            messages: what `ChatTemplate.adapt` has returned.
            text: the rendered messages.
            is_prompt: whether `text` ends with the header of the assistant's next turn.

        Raises:
            DroppedByTemplate: the template leaves out a message, thinking, a call, or the functions.
        """
        shape = (template.text, bool(template.tools), is_prompt, *map(_shape_of, messages))
        if shape not in self._found:
            if len(self._found) >= MAX_SHAPES:
                self._found.clear()
            self._found[shape] = _find_dropped(template, messages, is_prompt)
        dropped = self._found[shape]
        if dropped == UNKNOWN:
            dropped = next((_name(m, i) for i, m in enumerate(messages) if m.content.strip() not in text), None)
        if dropped is None and messages and messages[-1].role == "assistant":
            dropped = _part_left_out(messages[-1].content, len(messages) - 1, text)
        if dropped is None:
            dropped = _word_left_out(messages, text)
        if dropped is not None:
            advice = ", or leave thinking out with --thinking drop" if "thinking" in dropped else ""
            raise DroppedByTemplate(
                f"the chat template leaves out {dropped}, so the target would never see it. Remove it from the "
                f"record, give a template that writes it (--chat-template){advice}."
            )


def _shape_of(message: Message) -> Shape:
    calls = message.extra.get("tool_calls") or ()
    has_arguments = tuple(bool(_function_of(call).get("arguments")) for call in calls)
    return message.role, bool(message.content.strip()), *sorted(message.extra), has_arguments


def _find_dropped(template: ChatTemplate, messages: Sequence[Message], is_prompt: bool) -> str | None:
    """The first piece that the template leaves out; None if there is none; `UNKNOWN` if it refuses the words."""
    names: dict[str, str] = {}

    def word(name: str) -> str:
        found = f"zq{len(names)}qz"
        names[found] = name
        return found

    tools_word = word("the functions of the record (tools)") if template.tools else ""
    disguised = [_disguise(message, i, word) for i, message in enumerate(messages)]
    equipped = template.with_tools([_rename(tool, tools_word) for tool in template.tools])
    try:
        text = equipped.render(disguised, is_prompt)
    except PromptError:
        return UNKNOWN
    for found, name in names.items():
        if found not in text and not _is_dropped_by_design(name, messages, template):
            return name
    return None


def _is_dropped_by_design(name: str, messages: Sequence[Message], template: ChatTemplate) -> bool:
    """Whether this is the thinking of an earlier turn, and the template writes the thinking of the last one."""
    return name.startswith("the thinking") and name != _thinking_of(len(messages) - 1) and bool(template.thinking_name)


def _thinking_of(i: int) -> str:
    return f"the thinking of messages[{i}]"


def _name(message: Message, i: int) -> str:
    return f"the content of messages[{i}] (role {message.role})"


def _disguise(message: Message, i: int, word: Word) -> Message:
    """The message, with a word in the place of each text."""
    name = f"messages[{i}] (role {message.role})"
    extra = dict(message.extra)
    if extra.get(REASONING):
        extra[REASONING] = word(_thinking_of(i))
    if extra.get("tool_calls"):
        extra["tool_calls"] = [_disguise_call(call, name, word) for call in extra["tool_calls"]]
    content = word(_name(message, i)) if message.content.strip() else message.content
    return Message(message.role, content, extra)


def _disguise_call(call: Mapping[str, Any], name: str, word: Word) -> dict[str, Any]:
    function = dict(_function_of(call))
    function["name"] = word(f"the name of a call in {name}")
    arguments = function.get("arguments")
    if arguments and isinstance(arguments, Mapping):
        function["arguments"] = {key: word(f"the argument {key} of a call in {name}") for key in arguments}
    return {**call, "function": function} if "function" in call else function


def _function_of(call: Mapping[str, Any]) -> Mapping[str, Any]:
    found = call.get("function", call)
    return found if isinstance(found, Mapping) else {}


def _rename(tool: Mapping[str, Any], name: str) -> dict[str, Any]:
    function = {**_function_of(tool), "name": name}
    return {**tool, "function": function} if "function" in tool else function


def _part_left_out(content: str, i: int, text: str) -> str | None:
    """A part of the last answer that the rendered text lacks, such as thinking that stands before the answer."""
    if content.strip() in text:
        return None
    parts = (part.strip() for part in TAG_OR_LINE.split(content))
    lost = next((part for part in parts if part and part not in text), None)
    if lost is None:
        return None
    kind = "the thinking" if "think" in content else "a part"
    return f"{kind} of messages[{i}], {lost[:60]!r}"


def _word_left_out(messages: Sequence[Message], text: str) -> str | None:
    """A word of a question or an instruction that the rendered text lacks, but for a switch such as /no_think.

    Results of tools are left aside, since templates write them as JSON.
    """
    for i, message in enumerate(messages):
        if message.role in ("user", "system", "developer") and message.content.strip() not in text:
            words = (word for word in message.content.split() if not word.startswith("/"))
            lost = next((word for word in words if word not in text), None)
            if lost is not None:
                return f"a part of messages[{i}] (role {message.role}), {lost[:60]!r}"
    return None
