"""What a reasoning model thinks before it answers: found by its marks, masked or taken out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from .errors import ConfigError
from .prompts.records import Message

REASONING = "reasoning_content"


@dataclass(frozen=True, slots=True)
class ThinkingMarks:
    """The tokens between which a model thinks."""

    begin_id: int
    end_id: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, marks: Sequence[str]) -> ThinkingMarks:
        """
        Raises:
            ConfigError: a mark is no token of the tokenizer.
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
        """The loss mask without the thinking and its marks; one that a turn leaves open ends with the turn."""
        masked: list[int] = []
        inside = before = 0
        for token_id, supervised in zip(token_ids, loss_mask, strict=True):
            if before and not supervised:
                inside = 0
            if token_id == self.begin_id:
                inside = 1
            masked.append(supervised and not inside and token_id != self.end_id)
            if token_id == self.end_id:
                inside = 0
            before = supervised
        return [int(each) for each in masked]


def without_thinking(message: Message, marks: Sequence[str]) -> Message:
    """An assistant's message as if it had not thought."""
    if message.role != "assistant":
        return message
    begin, end = marks
    thought, found, answer = message.content.partition(end)
    is_thought = found and (begin not in thought or thought.lstrip().startswith(begin))
    extra = {key: value for key, value in message.extra.items() if key != REASONING}
    return Message(message.role, answer.lstrip() if is_thought else message.content, extra)
