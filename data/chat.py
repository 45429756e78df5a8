"""Conversations as token ids with a loss mask, written by a chat template."""

import datetime
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from .answers import AnswerForm
from .dropped import DropCheck
from .encoding import TextEncoder
from .errors import NothingToTrainError, PromptError
from .prompts.forms import Content
from .prompts.messages import Message
from .template import ChatTemplate, Span
from .turns import mask_spans, turn_spans, without_blank_end


@dataclass(frozen=True, slots=True)
class TokenizedConversation:
    """The tokens of a conversation or a text."""

    token_ids: list[int]
    loss_mask: list[int]
    """For each token, 1 if the token is supervised, else 0."""


class ChatFormat:
    """A tokenizer with a chat template and the template's arguments.

    Conversations are rendered as vLLM's chat endpoint renders them, so only the template writes special tokens. A plain
    text is tokenized as vLLM's completions endpoint does it, so the tokenizer adds its special tokens. Neither begins
    with two begin-of-text tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos_token_ids: Collection[int],
        template: str | None = None,
        template_args: Mapping[str, Any] | None = None,
        date: datetime.date | None = None,
    ):
        """
        Args:
            eos_token_ids: tokens that end a turn, beside the one that the template writes after an answer.
            template: Jinja text; None = the tokenizer's own template.
            template_args: further variables of the template, such as {"enable_thinking": False}.
            date: what a template that reads the clock is given; None = the day of the rendering.

        Raises:
            PromptError: the tokenizer has several templates, and none of them is its default.
        """
        self._tokenizer, self._encoder = tokenizer, TextEncoder(tokenizer)
        self.template = ChatTemplate(tokenizer, template, template_args, date)
        self.date = date if self.template.reads_clock else None
        """What the template's clock shows; None if the template reads no clock."""
        self.template_hash = self.template.hash
        """16 hex digits over the template's text and its arguments."""
        found = self._find_end_of_turn()
        self.further_end_id = None if found in eos_token_ids else found
        """Token that the template writes after an answer, if it is none of `eos_token_ids`; None otherwise."""
        self._end_ids = frozenset(eos_token_ids) | ({found} if found is not None else frozenset())
        inner = self._find_inner_end()
        self._inner_end_ids = frozenset() if inner is None else frozenset([inner])
        self._check = DropCheck()
        self._answer_forms: dict[str | None, AnswerForm] = {}

    def with_tools(self, tools: Sequence[Mapping[str, Any]]) -> "ChatFormat":
        """The format for a conversation that may call these functions."""
        if not tools:
            return self
        equipped = copy(self)
        equipped.template = self.template.with_tools(tools)
        return equipped

    def announce(self, contents: Sequence[Content], add_generation_prompt: bool) -> None:
        """Tokenizes conversations and texts in one call, before they are asked for one by one.

        Args:
            add_generation_prompt: whether `prompt_ids` will be asked for, and not `conversation`.
        """
        rendered: list[str] = []
        for content in contents:
            with suppress(PromptError):  # raised again when the content is asked for
                if content.text is None:
                    template = self.with_tools(content.tools).template
                    rendered.append(template.render(template.adapt(content.messages), add_generation_prompt))
        self._encoder.announce(rendered, [content.text for content in contents if content.text is not None])

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The text that the template writes.

        Args:
            add_generation_prompt: whether the text ends with the header that opens the assistant's next turn.

        Raises:
            PromptError: there is no template, the template refuses the messages, or it leaves out a part of them.
        """
        adapted = self.template.adapt(messages)
        text = self.template.render(adapted, add_generation_prompt)
        self._check.require_all(self.template, adapted, text, add_generation_prompt)
        return text

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the messages and of the header that opens the assistant's next turn.

        Raises:
            PromptError: see `render`.
        """
        text = self.render(messages, add_generation_prompt=True)
        token_ids, _ = self._tokenize(text)
        return token_ids

    def answer(self, output_ids: Sequence[int]) -> Message:
        """The target's answer as a message of the next prompt.

        Where the template has a field for thinking, the answer is what a chat client with a reasoning parser would
        send. Otherwise it is the text that the target wrote, with its special tokens. The end-of-turn token is no part
        of the answer.
        """
        written = output_ids[:-1] if output_ids and output_ids[-1] in self._end_ids else output_ids
        text = self._tokenizer.decode(
            list(written),
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
            spaces_between_special_tokens=False,
        )
        if self.template.text not in self._answer_forms:
            self._answer_forms[self.template.text] = AnswerForm.of(self.template)
        return self._answer_forms[self.template.text].read(str(text))

    def text(self, text: str) -> TokenizedConversation:
        """A plain text with the tokenizer's special tokens; all tokens but the first are supervised.

        Raises:
            PromptError: the text has no token.
        """
        token_ids, _ = self._tokenize(text, with_special=True)
        if not token_ids:
            raise NothingToTrainError("the text has no token; remove the record or give it some text")
        return TokenizedConversation(token_ids, [0] + [1] * (len(token_ids) - 1))

    def conversation(
        self, messages: Sequence[Message], unsupervised: Collection[Message] = ()
    ) -> TokenizedConversation:
        """The full conversation; each assistant turn is supervised, with its end-of-turn token.

        If the template has a generation block, the block marks what the assistant wrote, but for blanks after the
        end-of-turn token. Otherwise the turns are found by rendering the conversation up to each of them.

        Args:
            unsupervised: assistant messages that are not supervised.

        Raises:
            PromptError: the template refuses the messages or leaves out a part of them, the turns can't be found in its
                text, or no token is left to supervise.
        """
        if not any(message.role == "assistant" for message in messages):
            roles = [message.role for message in messages]
            raise NothingToTrainError(f"nothing to supervise: expected an assistant message, found the roles {roles}")
        if not self._tokenizer.is_fast:
            raise PromptError(
                "the loss mask needs character offsets, which only a fast tokenizer gives; load the tokenizer as fast"
            )
        token_ids, offsets, spans = self._find_turns(self.template.adapt(messages))
        turns = [message for message in messages if message.role == "assistant"]
        if unsupervised and len(turns) == len(spans):
            left_out = {id(message) for message in unsupervised}
            spans = [span for span, turn in zip(spans, turns, strict=True) if id(turn) not in left_out]
        loss_mask = mask_spans(offsets, spans)
        if not any(loss_mask):
            raise NothingToTrainError("the assistant's turns have no token of their own; check the chat template")
        return TokenizedConversation(token_ids, loss_mask)

    def _find_turns(self, messages: Sequence[Message]) -> tuple[list[int], list[Span], list[Span]]:
        """Token ids of the rendered conversation, the tokens' characters, and the characters of the answers."""
        if self.template.marks_answers:
            text, spans = self.template.render_marked(messages)
            token_ids, offsets = self._tokenize(text)
            spans = without_blank_end(text, spans, _places(self._end_ids, token_ids, offsets))
        else:
            text = self.template.render(messages, False)
            token_ids, offsets = self._tokenize(text)
            ends, inner_ends = (_places(ids, token_ids, offsets) for ids in (self._end_ids, self._inner_end_ids))
            spans = turn_spans(self.template.render, messages, text, ends, inner_ends)
        self._check.require_all(self.template, messages, text, is_prompt=False)
        return token_ids, offsets, spans

    def _tokenize(self, text: str, with_special: bool = False) -> tuple[list[int], list[Span]]:
        token_ids, offsets = self._encoder.encode(text, with_special)
        surplus = self._num_surplus(token_ids)
        return token_ids[surplus:], offsets[surplus:]

    def _num_surplus(self, token_ids: Sequence[int]) -> int:
        """Begin-of-text tokens at the beginning that another one follows."""
        begin = self._tokenizer.bos_token_id
        surplus = 0
        while begin is not None and token_ids[surplus : surplus + 2] == [begin, begin]:
            surplus += 1
        return surplus

    def _find_end_of_turn(self) -> int | None:
        """The token that the template writes after the last answer; None if it writes no special token there."""
        return self._token_after("zq1qz", [Message("user", "zq0qz"), Message("assistant", "zq1qz")])

    def _find_inner_end(self) -> int | None:
        """The token that ends every message inside of a conversation; None if there is no such special token."""
        talk = [Message("user", "zq0qz"), Message("assistant", "zq1qz"), Message("user", "zq2qz")]
        found = self._token_after("zq1qz", talk)
        return found if found == self._token_after("zq2qz", talk) else None

    def _token_after(self, word: str, messages: Sequence[Message]) -> int | None:
        """The special token that follows a word in the rendered messages."""
        if self.template.text is None or not self._tokenizer.is_fast:
            return None
        try:
            text = self.template.render(messages, False)
        except PromptError:  # each record will tell
            return None
        before, found, _ = text.rpartition(word)
        after = len(before) + len(found)
        token_ids, offsets = self._tokenize(text)
        following = (t for t, (s, e) in zip(token_ids, offsets, strict=True) if s >= after and text[s:e].strip())
        first = next(following, None) if found else None
        return first if first in self._tokenizer.added_tokens_decoder else None


def _places(wanted: frozenset[int], token_ids: Sequence[int], offsets: Sequence[Span]) -> list[Span]:
    """The characters of the wanted tokens."""
    found = wanted.intersection(token_ids)
    return [offsets[i] for i, token_id in enumerate(token_ids) if token_id in found] if found else []
