"""What happens to turns in an unusual order. docs/prompts.md states these rules."""

from __future__ import annotations

from itertools import pairwise

from .calls import Note
from .messages import Message

BEGINS_WITH_ASSISTANT = "begins with the assistant"
ENDS_WITH_USER = "ends with the user"
EMPTY_TURN = "has an empty turn"
REPEATED_ROLE = "repeats a role"


def apply_turn_rules(messages: tuple[Message, ...], note: Note) -> tuple[Message, ...]:
    """The messages that take part in the conversation. The rules that were applied are noted.

    What stands before the first question is left out, but for the system message. All else stays as it is written.
    """
    opening = next((i for i, message in enumerate(messages) if message.role not in ("system", "developer")), 0)
    first_user = next((i for i, message in enumerate(messages) if message.role == "user"), opening)
    if messages[opening].role == "assistant" and first_user > opening:
        messages = messages[:opening] + messages[first_user:]
        note(BEGINS_WITH_ASSISTANT)
    if messages[-1].role == "user" and any(message.role == "assistant" for message in messages):
        note(ENDS_WITH_USER)
    if any(not message.content.strip() and not message.extra for message in messages):
        note(EMPTY_TURN)
    if any(one.role == other.role and one.role in ("user", "assistant") for one, other in pairwise(messages)):
        note(REPEATED_ROLE)
    return messages
