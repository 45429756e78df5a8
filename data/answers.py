"""The target's answer as a message of the next prompt: the inverse of what the chat template writes."""

from __future__ import annotations

from typing import NamedTuple

from .errors import PromptError
from .prompts.messages import REASONING, Message
from .template import ChatTemplate
from .turns import common_len

QUESTION, THINKING, ANSWER = "zq0qz", "zq1qz", "zq2qz"
"""Words that no template writes."""


class AnswerForm(NamedTuple):
    """What a template writes around the parts of the last answer, after the header that opens the answer."""

    before_thinking: str = ""
    between: str = ""
    """Between the thinking and the rest; empty if the template has no field for thinking."""
    before_plain: str = ""
    """Before an answer without thinking."""
    is_open: bool = False
    """Whether the header opens the thinking already."""

    @classmethod
    def of(cls, template: ChatTemplate) -> AnswerForm:
        """Found by rendering; without any text if the template refuses the words."""
        question = Message("user", QUESTION)
        try:
            head = template.render([question], True)
            plain = _after(head, template.render([question, Message("assistant", ANSWER)], False))
            form = cls(before_plain=plain.partition(ANSWER)[0] if ANSWER in plain else "")
            if template.thinking_name is None:
                return form
            thinking = Message("assistant", ANSWER, {REASONING: THINKING})
            whole = template.render([question, thinking], False)
        except PromptError:
            return cls()
        before, _, after = _after(head, whole).partition(THINKING)
        between, found, _ = after.partition(ANSWER)
        if not found or not between.strip():
            return form
        return form._replace(
            before_thinking=before, between=between, is_open=not before.strip() and whole.startswith(head)
        )

    def read(self, text: str) -> Message:
        """The assistant's message that this text gives, as a chat client with a reasoning parser would send it.

        An answer that was cut off in its thinking has no other content.
        """
        mark = self.between if self.between in text else self.between.strip()
        begin = self.before_thinking.strip()
        begins = self.is_open or (bool(begin) and text.lstrip().startswith(begin))
        if mark and (mark in text or begins):
            thinking, _, content = text.partition(mark)
            thinking = _without_start(thinking, self.before_thinking)
            return Message("assistant", content, {REASONING: thinking} if thinking.strip() else {})
        return Message("assistant", _without_start(text, self.before_plain))


def _after(head: str, text: str) -> str:
    """What follows the part of `head` with which `text` begins."""
    return text[common_len(head, text) :]


def _without_start(text: str, start: str) -> str:
    if text.startswith(start):
        return text[len(start) :]
    bare = start.strip()
    return text.lstrip()[len(bare) :] if bare and text.lstrip().startswith(bare) else text
