"""Conversations that are written as one text: Glaive's function calls, and transcripts of a human and an assistant."""

from __future__ import annotations

import json
import re
from typing import Any

from ..errors import PromptError
from .calls import Note, parse_calls, parse_tools
from .messages import Message
from .values import describe, plain

GLAIVE_TURN = re.compile(r"(?:^|\n[ \t]*\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE|SYSTEM):[ \t]?", re.ASCII)
GLAIVE_ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool", "SYSTEM": "system"}
GLAIVE_CALL = re.compile(r"<functioncall>\s*")
GLAIVE_ARGUMENTS = re.compile(
    r"""^\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*'(.*)'\s*\}$""", re.DOTALL
)
GLAIVE_END = "<|endoftext|>"
FUNCTIONS_FOLLOW = re.compile(r"(?<=required -)\s*(?=\{)")
TRANSCRIPT_START = re.compile(r"\n\nHuman:|\s*Human:.*\n\nAssistant:", re.DOTALL)
TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):[ \t]?")
HELPSTEER_TURN = re.compile(r"<extra_id_1>(User|Assistant)\n")
TRANSCRIPT_ROLES = {"Human": "user", "User": "user", "Assistant": "assistant"}


def read_glaive(chat: str, system: str, note: Note) -> tuple[tuple[Message, ...], tuple[dict[str, Any], ...]]:
    """The messages and the functions of a conversation as Glaive writes it.

    Raises:
        PromptError: the text is no such conversation, or a call in it can't be read.
    """
    pieces = GLAIVE_TURN.split(chat)
    if len(pieces) < 3 or pieces[0].strip():
        raise PromptError(f"chat must be turns that begin with USER: and ASSISTANT:, found {describe(chat)}")
    messages: list[Message] = []
    for i, (name, text) in enumerate(zip(pieces[1::2], pieces[2::2], strict=True)):
        messages.append(
            _glaive_message(GLAIVE_ROLES[name], text.replace(GLAIVE_END, "").strip(), f"chat, turn {i}", note)
        )
    system = system.strip().removeprefix("SYSTEM:").strip()
    system, tools = _split_functions(system, note)
    return ((Message("system", system), *messages) if system else tuple(messages)), tools


def _glaive_message(role: str, text: str, name: str, note: Note) -> Message:
    before, *calls = GLAIVE_CALL.split(text)
    if role != "assistant" or not calls:
        return Message(role, text)
    return Message(role, before.strip(), {"tool_calls": [_glaive_call(call.strip(), name, note) for call in calls]})


def _glaive_call(text: str, name: str, note: Note) -> dict[str, Any]:
    """A call, whose arguments stand as JSON text between single quotes."""
    if (quoted := GLAIVE_ARGUMENTS.match(text)) is not None:
        arguments = quoted[2]
        if "\\'" in arguments:
            arguments = arguments.replace("\\'", "'")
        text = f'{{"name": {quoted[1]}, "arguments": {json.dumps(arguments)}}}'
    return parse_calls(text, f"{name}, functioncall", note)[0]


def _split_functions(system: str, note: Note) -> tuple[str, tuple[dict[str, Any], ...]]:
    """A system text without the functions in it, and the functions; the text alone if they are no JSON."""
    sentence, *rest = FUNCTIONS_FOLLOW.split(system, maxsplit=1)
    if not rest:
        return system, ()
    decoder, text, tools = json.JSONDecoder(), rest[0].strip(), []
    try:
        while text:
            tool, end = decoder.raw_decode(text)
            tools.append(plain(tool, "system"))
            text = text[end:].lstrip().removeprefix(",").lstrip()
    except (ValueError, RecursionError):
        return system, ()
    return sentence.strip(), parse_tools(tools, "system", note)


def is_transcript(text: str) -> bool:
    """Whether a text is a conversation, as the data of HH-RLHF and of HelpSteer have it."""
    return bool(TRANSCRIPT_START.match(text) or HELPSTEER_TURN.search(text))


def read_transcript(text: str, name: str) -> tuple[Message, ...]:
    """The messages of a text in which every turn begins with an empty line and "Human:" or "Assistant:".

    HelpSteer begins every turn but the first one with <extra_id_1> and a role.

    Raises:
        PromptError: the text is no such transcript.
    """
    if HELPSTEER_TURN.search(text):
        pieces = HELPSTEER_TURN.split(f"<extra_id_1>User\n{text}")
    else:
        pieces = TRANSCRIPT_TURN.split(f"\n\n{text.lstrip()}")
    if len(pieces) < 3 or pieces[0].strip():
        raise PromptError(
            f"{name} must be a list of messages, or a text with turns of Human: and Assistant:, found "
            f"{describe(text)}. If it answers another key, say which with extract.columns={{prompt: KEY}}"
        )
    return tuple(
        Message(TRANSCRIPT_ROLES[role], turn.strip()) for role, turn in zip(pieces[1::2], pieces[2::2], strict=True)
    )
