"""What a reasoning model thinks before it answers: found by the marks around it, then masked or taken out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from .errors import ConfigError
from .prompts.messages import REASONING, Message


@dataclass(frozen=True, slots=True)
class ThinkingMarks:
    """The tokens before and after a model's thinking."""

    begin_id: int
    end_id: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, marks: Sequence[str]) -> ThinkingMarks:
        """
        Raises:
            ConfigError: a mark is not a single token of the tokenizer.
        """
        ids: list[Any] = [tokenizer.convert_tokens_to_ids(mark) for mark in marks]
        for mark, found in zip(marks, ids, strict=True):
            if found is None or found == tokenizer.unk_token_id:
                raise ConfigError(
                    f"extract.thinking: the tokenizer has no token {mark}, so thinking can't be found. Set "
                    "extract.thinking_marks to the two tokens around it, or extract.thinking to keep."
                )
        return cls(*ids)

    def mask(self, token_ids: Sequence[int], loss_mask: Sequence[int]) -> list[int]:
        """The loss mask, with 0 for the thinking and its marks. Thinking without an end mark ends with its turn."""
        masked: list[int] = []
        inside = before = 0
        for token_id, supervised in zip(token_ids, loss_mask, strict=True):
            if before and not supervised:
                inside = 0
            if token_id == self.begin_id:
                inside = 1
            masked.append(int(supervised and not inside and token_id != self.end_id))
            if token_id == self.end_id:
                inside = 0
            before = supervised
        return masked


def without_thinking(message: Message, marks: Sequence[str]) -> Message:
    """An assistant's message without its thinking; any other message unchanged.

    Args:
        marks: texts before and after the thinking; the text before may be missing at the message's start.
    """
    if message.role != "assistant":
        return message
    begin, end = marks
    thought, found, answer = message.content.partition(end)
    is_thought = found and (begin not in thought or thought.lstrip().startswith(begin))
    extra = {key: value for key, value in message.extra.items() if key != REASONING}
    return Message(message.role, answer.lstrip() if is_thought else message.content, extra)


@dataclass(frozen=True, slots=True)
class ThinkingPolicy:
    """How thinking is treated. Without fields, thinking is supervised like the rest of an answer."""

    dropped: tuple[str, str] | None = None
    """Marks between which thinking is taken out of given answers."""
    masked: ThinkingMarks | None = None
    """Tokens between which thinking is not supervised."""

    def shorten(self, message: Message) -> Message:
        """The message, without its thinking if thinking is dropped."""
        return message if self.dropped is None else without_thinking(message, self.dropped)

    def mask(self, token_ids: list[int], loss_mask: list[int]) -> list[int]:
        """The loss mask, with 0 for the thinking if thinking is masked."""
        return loss_mask if self.masked is None else self.masked.mask(token_ids, loss_mask)


KEEP_THINKING = ThinkingPolicy()
