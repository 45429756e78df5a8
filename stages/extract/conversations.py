"""Conversations with the engine: from a prompt record to requests, and from completions to a finished sequence."""

# T tokens that entered the target
from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ...data.cache.arrays import NO_CHOICE, TOKEN_ARRAYS
from ...data.cache.sequence import NewSequence
from ...data.chat import ChatFormat
from ...data.errors import NothingToTrainError, PromptError
from ...data.prompts.messages import Message
from ...data.prompts.records import PromptRecord
from ...data.thinking import KEEP_THINKING, ThinkingPolicy
from .engine import Completion, EngineRequest

STAND_IN = "."
"""Stands for an answer that does not exist yet, because some templates refuse an empty answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedSequence:
    """A sequence ready to be written: T tokens, and the last generated one if there is one."""

    record: PromptRecord
    token_ids: list[int]
    loss_mask: list[int]
    target_argmax: list[int]
    """The target's greedy choice after each token that a supervised one follows, `NO_CHOICE` after the others."""
    hidden_TKH: Tensor
    prompt_len: int
    final_token_id: int | None
    finish_reason: str
    num_checked: int
    """Greedy choices of the engine that were compared with the argmax of the states."""
    num_argmax_differing: int
    """Those that the argmax computed from the states does not confirm: ties within rounding."""

    def as_new(self) -> NewSequence:
        """The sequence as a cache takes it; each array of `TOKEN_ARRAYS` is the field of that name."""
        return NewSequence(
            seq_id=self.record.seq_id,
            source=self.record.source,
            source_row=self.record.row,
            arrays={name: getattr(self, name) for name in TOKEN_ARRAYS},
            prompt_len=self.prompt_len,
            final_token_id=self.final_token_id,
            finish_reason=self.finish_reason,
        )


class SequenceTooLong(PromptError):
    """The prompt leaves no room for an answer."""


class UnknownToken(PromptError):
    """A token that the target has no embedding for."""


class Conversation(Protocol):
    """Asks the engine until a record's sequence is finished.

    All conversations of the claimed units, and of a small prompt set, wait in memory at once. So they keep their tokens
    in arrays of few bytes.
    """

    record: PromptRecord

    def first_request(self) -> EngineRequest:
        """
        Raises:
            PromptError: the prompt is too long.
        """
        ...

    def expected_len(self, response_tokens: float | None) -> float:
        """Expected number T of tokens of the sequence.

        Args:
            response_tokens: expected length of an answer; None = the longest allowed.
        """
        ...

    def advance(self, completion: Completion) -> EngineRequest | FinishedSequence:
        """The next request, or the finished sequence.

        Raises:
            PromptError: the next prompt can't be rendered, is too long, or has an unknown token.
        """
        ...


class GivenConversation:
    """The record holds the answers; the engine computes their states in one prefill."""

    def __init__(
        self,
        record: PromptRecord,
        chat: ChatFormat,
        max_len: int,
        vocab_size: int,
        thinking: ThinkingPolicy = KEEP_THINKING,
    ):
        """
        Raises:
            PromptError: the first `max_len` tokens hold no assistant token, or hold an unknown token.
        """
        self.record = record
        if record.text is not None:
            tokenized = chat.text(record.text)
        else:
            tokenized = chat.with_tools(record.tools).conversation([thinking.shorten(each) for each in record.messages])
        token_ids = tokenized.token_ids[:max_len]
        require_known(token_ids, vocab_size)
        self._token_ids = array("i", token_ids)
        self._loss_mask = bytes(thinking.mask(token_ids, tokenized.loss_mask[:max_len]))
        self._is_cut = len(tokenized.token_ids) > max_len
        if not any(self._loss_mask):
            raise NothingToTrainError(
                f"no assistant token is left in the first {max_len} tokens of "
                f"{len(tokenized.token_ids)}. Raise extract.max_len, or skip such records with --skip-bad."
            )

    def first_request(self) -> EngineRequest:
        return EngineRequest(
            key=self.record.seq_id,
            prompt_ids=self._token_ids.tolist(),
            max_new_tokens=1,
            capture=True,
            supervised=list(self._loss_mask),
        )

    def expected_len(self, response_tokens: float | None) -> float:
        return len(self._token_ids)

    def advance(self, completion: Completion) -> FinishedSequence:
        assert completion.argmax_T is not None
        assert completion.hidden_TKH is not None
        return FinishedSequence(
            record=self.record,
            token_ids=completion.prompt_ids,
            loss_mask=list(self._loss_mask),
            target_argmax=choices_before([*self._loss_mask[1:], 0], completion.argmax_T.tolist()),
            hidden_TKH=completion.hidden_TKH,
            prompt_len=self._loss_mask.index(1),
            final_token_id=None,
            finish_reason="given, cut" if self._is_cut else "given",
            num_checked=0,
            num_argmax_differing=0,
        )


class GeneratedConversation:
    """The target answers turn by turn. States are captured with the last answer, whose prompt holds the rest."""

    def __init__(
        self,
        record: PromptRecord,
        chat: ChatFormat,
        *,
        max_len: int,
        max_new_tokens: int,
        vocab_size: int,
        greedy: bool,
        thinking: ThinkingPolicy = KEEP_THINKING,
    ):
        """
        Raises:
            PromptError: the record has no user message, the template refuses the record, or a token is unknown.
        """
        self.record, self._thinking = record, thinking
        self._chat = chat.with_tools(record.tools)
        self._max_len, self._max_new_tokens, self._greedy = max_len, max_new_tokens, greedy
        self._vocab_size = vocab_size
        self._turns = split_turns(record)
        self._messages: list[Message] = list(self._turns.pop(0)) if self._turns else []
        self._prompt_loss_mask = b""
        if record.text is None and not self._messages:
            raise NothingToTrainError("expected a user message to answer, found none.")
        self._first_ids = array("i", self._prompt_ids(self._messages))

    def first_request(self) -> EngineRequest:
        return self._request(self._first_ids.tolist())

    def expected_len(self, response_tokens: float | None) -> float:
        answer = self._max_new_tokens if response_tokens is None else min(response_tokens, self._max_new_tokens)
        # The turns come from the record, because `advance` removes them from `self._turns`. A later prompt holds the
        # text of earlier answers, which rarely has more tokens than the answers themselves.
        turns = split_turns(self.record)
        num_given = len(self._first_ids)
        if len(turns) > 1:
            messages = [message for turn in turns for message in (Message("assistant", STAND_IN), *turn)][1:]
            try:
                num_given = len(self._prompt_ids(messages))
            except PromptError:  # the template may refuse the stand-in alone
                return self._max_len
        num_answers = max(1, len(turns))
        return min(num_given + num_answers * answer - 1, self._max_len)

    def advance(self, completion: Completion) -> EngineRequest | FinishedSequence:
        if self._turns:
            self._messages += [self._chat.answer(completion.output_ids), *self._turns.pop(0)]
            return self._request(self._prompt_ids(self._messages))
        return self._finish(completion)

    def _prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        text = self.record.text
        prompt_ids = self._chat.prompt_ids(messages) if text is None else self._chat.text(text).token_ids
        require_known(prompt_ids, self._vocab_size)
        return prompt_ids

    def _request(self, prompt_ids: list[int]) -> EngineRequest:
        room = self._max_len + 1 - len(prompt_ids)
        if room < 2:
            raise SequenceTooLong(
                f"the prompt has {len(prompt_ids)} tokens and leaves no "
                f"room for a response in {self._max_len}. Raise extract.max_len, or skip such records with --skip-bad."
            )
        if not self._turns:
            self._prompt_loss_mask = bytes(self._prompt_mask(prompt_ids))
        return EngineRequest(
            key=self.record.seq_id,
            prompt_ids=prompt_ids,
            max_new_tokens=min(self._max_new_tokens, room),
            capture=not self._turns,
            supervised=list(self._prompt_loss_mask),
        )

    def _finish(self, completion: Completion) -> FinishedSequence:
        assert completion.argmax_T is not None
        assert completion.hidden_TKH is not None
        prompt_ids, output_ids = completion.prompt_ids, completion.output_ids
        argmax = completion.argmax_T.tolist()
        checked: list[tuple[int, int]] = []
        if self._greedy:
            # The generated tokens are the greedy choices by definition, even if the argmax over rounded states differs.
            chosen = slice(len(prompt_ids) - 1, None)
            checked = [pair for pair in zip(argmax[chosen], output_ids, strict=True) if pair[0] != NO_CHOICE]
            argmax[chosen] = output_ids
        *loss_mask, ends_supervised = self._thinking.mask(
            prompt_ids + output_ids, [*self._prompt_loss_mask, *[1] * len(output_ids)]
        )
        return FinishedSequence(
            record=self.record,
            token_ids=prompt_ids + output_ids[:-1],
            loss_mask=loss_mask,
            target_argmax=choices_before([*loss_mask[1:], ends_supervised], argmax),
            hidden_TKH=completion.hidden_TKH,
            prompt_len=len(prompt_ids),
            final_token_id=output_ids[-1] if ends_supervised else None,
            finish_reason=completion.finish_reason,
            num_checked=len(checked),
            num_argmax_differing=sum(ours != theirs for ours, theirs in checked),
        )

    def _prompt_mask(self, prompt_ids: list[int]) -> list[int]:
        """Loss mask of the last prompt: 1 for the target's own earlier answers.

        Raises:
            PromptError: the template renders the earlier answers differently in this prompt.
        """
        answers = [message for message in self._messages if message.role == "assistant"]
        recorded = [message for message in answers if "tool_calls" in message.extra]
        if len(answers) == len(recorded):
            return [0] * len(prompt_ids)
        earlier = self._chat.conversation(self._messages, unsupervised=recorded)
        end = len(earlier.loss_mask) - earlier.loss_mask[::-1].index(1)
        if prompt_ids[:end] != earlier.token_ids[:end]:
            raise PromptError(
                "the chat template renders earlier turns differently when it asks for an answer, so these turns can't "
                "be found in the prompt. Give a template that renders them alike."
            )
        return earlier.loss_mask[:end] + [0] * (len(prompt_ids) - end)


def require_known(token_ids: Sequence[int], vocab_size: int) -> None:
    """
    Raises:
        UnknownToken: the target has no embedding for one of these tokens.
    """
    greatest = max(token_ids, default=0)
    if greatest >= vocab_size:
        raise UnknownToken(
            f"expected token ids below {vocab_size}, the size of the target's vocabulary, found {greatest}. The "
            "tokenizer has tokens that the target has no embedding for: use the target's own tokenizer, or skip such "
            "records with --skip-bad."
        )


def choices_before(supervised: list[int], argmax: list[int]) -> list[int]:
    """The choices after tokens that a supervised token follows, and `NO_CHOICE` after the others.

    Training uses no other choices, so they are left out even if the engine gives them.

    Args:
        supervised: for each token, 1 if the next token is supervised.
    """
    return [choice if wanted else NO_CHOICE for wanted, choice in zip(supervised, argmax, strict=False)]


def split_turns(record: PromptRecord) -> list[list[Message]]:
    """The messages before each answer. Every user or tool message gets an answer; the record's own answers are dropped.

    A recorded tool call stays if its result follows, because the result would fit no other call.
    """
    turns: list[list[Message]] = [[]]
    for i, message in enumerate(record.messages):
        if message.role == "assistant":
            following = record.messages[i + 1 : i + 2]
            if "tool_calls" in message.extra and any(each.role == "tool" for each in following):
                if not turns[-1] and len(turns) > 1:
                    turns.pop()
                turns[-1].append(message)
            continue
        turns[-1].append(message)
        if message.role in ("user", "tool"):
            turns.append([])
    return turns[:-1]
