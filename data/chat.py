"""Conversations as token ids with a loss mask, written by a chat template."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .errors import PromptError
from .hashing import hash_text
from .prompts.messages import Message

GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

Span = tuple[int, int]
"""Characters of a text, end excluded."""


@dataclass(frozen=True, slots=True)
class TokenizedConversation:
    """The tokens of a conversation or a text."""

    token_ids: list[int]
    loss_mask: list[int]
    """For each token, 1 if the token is supervised, else 0."""


class ChatFormat:
    """A tokenizer with a chat template and the template's arguments."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos_token_ids: Collection[int],
        template: str | None = None,
        template_args: Mapping[str, Any] | None = None,
    ):
        """
        Args:
            eos_token_ids: tokens that end a turn.
            template: Jinja text; None = the tokenizer's own template.
            template_args: further variables of the template, such as {"enable_thinking": False}.

        Raises:
            PromptError: the tokenizer has several templates, and none of them is its default.
        """
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset(eos_token_ids)
        self._template_args = dict(template_args or {})
        self._given_template = template
        self._template = self._resolve_template(template)
        canonical_args = json.dumps(self._template_args, sort_keys=True, separators=(",", ":"))
        self.template_hash = hash_text(f"{self._template or ''}\n{canonical_args}")
        """16 hex digits over the template's text and its arguments."""

    def with_tools(self, tools: Sequence[Mapping[str, Any]]) -> "ChatFormat":
        """The format for a conversation that may call these functions."""
        if not tools:
            return self
        return ChatFormat(
            self._tokenizer,
            eos_token_ids=self._eos_token_ids,
            template=self._given_template,
            template_args={**self._template_args, "tools": [dict(tool) for tool in tools]},
        )

    def _resolve_template(self, template: str | None) -> str | None:
        if template is None and not self._tokenizer.chat_template:
            return None
        try:
            return self._tokenizer.get_chat_template(template, self._template_args.get("tools"))
        except ValueError as error:
            raise PromptError(f"the tokenizer's chat templates have no default; pass one: {error}") from error

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The text that the template writes.

        Args:
            add_generation_prompt: whether the text ends with the header that opens the assistant's next turn.

        Raises:
            PromptError: there is no template, or the template refuses the messages.
        """
        template, dicts = self._render_inputs(messages)
        try:
            rendered = self._tokenizer.apply_chat_template(
                dicts,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self._template_args,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise _template_error(messages, error) from error
        return cast(str, rendered)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the messages and of the header that opens the assistant's next turn.

        Raises:
            PromptError: see `render`.
        """
        text = self.render(messages, add_generation_prompt=True)
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def text(self, text: str) -> TokenizedConversation:
        """A plain text with the tokenizer's special tokens; all tokens but the first are supervised.

        Raises:
            PromptError: the text has no token.
        """
        token_ids = self._tokenizer(text)["input_ids"]
        if not token_ids:
            raise PromptError("the text has no token; remove the record or give it some text")
        return TokenizedConversation(token_ids, [0] + [1] * (len(token_ids) - 1))

    def conversation(
        self, messages: Sequence[Message], unsupervised: Collection[Message] = ()
    ) -> TokenizedConversation:
        """The full conversation; each assistant turn is supervised, with its end-of-turn token.

        If the template has a generation block, the block marks what the assistant wrote. Otherwise the turns are found
        by rendering the conversation up to each of them.

        Args:
            unsupervised: assistant messages that are not supervised.

        Raises:
            PromptError: the template refuses the messages, the turns can't be found in its text, or no token is left to
                supervise.
        """
        if not any(message.role == "assistant" for message in messages):
            roles = [message.role for message in messages]
            raise PromptError(f"nothing to supervise: expected an assistant message, found the roles {roles}")
        if not self._tokenizer.is_fast:
            raise PromptError(
                "the loss mask needs character offsets, which only a fast tokenizer gives; load the tokenizer as fast"
            )
        if GENERATION_BLOCK.search(self._template or ""):
            text, spans = self._render_marked(messages)
            token_ids, offsets = self._tokenize(text)
        else:
            text = self.render(messages, add_generation_prompt=False)
            token_ids, offsets = self._tokenize(text)
            ends = [o for t, o in zip(token_ids, offsets, strict=True) if t in self._eos_token_ids]
            spans = self._turn_spans(messages, text, ends)
        turns = [message for message in messages if message.role == "assistant"]
        if unsupervised and len(turns) == len(spans):
            left_out = {id(message) for message in unsupervised}
            spans = [span for span, turn in zip(spans, turns, strict=True) if id(turn) not in left_out]
        loss_mask = _mask(offsets, spans)
        if not any(loss_mask):
            raise PromptError("the assistant's turns have no token of their own; check the chat template")
        return TokenizedConversation(token_ids, loss_mask)

    def _render_inputs(self, messages: Sequence[Message]) -> tuple[str, list[dict[str, Any]]]:
        if self._template is None:
            raise PromptError(
                "the tokenizer has no chat template: pass a template (Jinja text), "
                'or use {"text": ...} records, which need no template'
            )
        return self._template, [{"role": m.role, "content": m.content, **m.extra} for m in messages]

    def _render_marked(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The rendered conversation, and the characters of its generation blocks.

        `apply_chat_template` could give the blocks' tokens, but wrongly in two cases. Where several tokens share a
        block's last character, only one of them is marked. Where a block ends in a space that the offsets leave out,
        everything up to the text's end is marked.
        """
        template, dicts = self._render_inputs(messages)
        arguments = {**self._tokenizer.special_tokens_map, **self._template_args}
        try:
            rendered = render_jinja_template(
                [dicts], chat_template=template, return_assistant_tokens_mask=True, **arguments
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise _template_error(messages, error) from error
        texts, blocks = cast(tuple[list[str], list[list[Span]]], rendered)
        return texts[0], blocks[0]

    def _tokenize(self, text: str) -> tuple[list[int], list[Span]]:
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoding["input_ids"], encoding["offset_mapping"]

    def _turn_spans(self, messages: Sequence[Message], text: str, ends: list[Span]) -> list[Span]:
        """The characters of each assistant turn.

        Args:
            text: the rendered conversation.
            ends: characters of the end-of-turn tokens in `text`.
        """
        turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
        starts: list[int] = []
        for i in turns:
            start = self._turn_start(messages, i, text)
            if starts and start <= starts[-1]:
                raise _rewritten_error(i)
            starts.append(start)
        limits = [*starts[1:], len(text)]
        return [
            (start, self._turn_end(messages, i, text, (start, limit), ends))
            for i, start, limit in zip(turns, starts, limits, strict=True)
        ]

    def _turn_start(self, messages: Sequence[Message], i: int, text: str) -> int:
        """Where message `i` begins: after the part of its generation prompt that `text` holds.

        `text` may hold only the first part of the generation prompt, if the template drops earlier thinking, or opens
        each answer with an empty think block.
        """
        if i == 0:
            raise PromptError(
                "messages[0] is the assistant's, so there is no prompt before it; begin with a user message"
            )
        head = self.render(messages[:i], add_generation_prompt=True)
        if text.startswith(head):
            return len(head)
        # The answer may begin like the rest of the generation prompt ("<b>" like "<think>"). With another answer in its
        # place, characters that are still common come from the template.
        other = Message("assistant", _absent_letter(messages[i].content))
        other_text = self.render([*messages[:i], other, *messages[i + 1 :]], add_generation_prompt=False)
        start = min(_common_len(head, text), _common_len(other_text, text))
        before = self.render(messages[:i], add_generation_prompt=False)
        if start < max(_common_len(before, text), _common_len(before, head)):
            raise _rewritten_error(i)
        return start

    def _turn_end(self, messages: Sequence[Message], i: int, text: str, window: Span, ends: list[Span]) -> int:
        """Where message `i` ends: after its end-of-turn token, or at the end of its text if it has no such token."""
        start, limit = window
        end = next((end for end in ends if start <= end[0] < limit), None)
        upto = self.render(messages[: i + 1], add_generation_prompt=False)
        # If there is text between the message and the end-of-turn token, the token belongs to a later message.
        if end and not (text.startswith(upto) and text[len(upto) : end[0]].strip()):
            return end[1]
        stop = min(_common_len(upto, text), limit)
        if stop <= start:
            raise PromptError(
                f"messages[{i}] has no end: expected one of the end-of-turn token ids "
                f"{sorted(self._eos_token_ids)} after it, found none; check these ids and the chat template"
            )
        return stop


def _mask(offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """Loss mask: 1 for each token that begins inside a span.

    Some tokenizers' offsets leave out spaces, so that a token of spaces has an empty range at its end. Such a token
    begins where the token before it ends. A token that stands for no character is never supervised.
    """
    loss_mask: list[int] = []
    previous_end = 0
    for start, end in offsets:
        begin = min(start, previous_end) if start == end else start
        loss_mask.append(int(begin < end and any(s <= begin < e for s, e in spans)))
        previous_end = end
    return loss_mask


def _common_len(a: str, b: str) -> int:
    """Length of the longest common prefix, found by bisection."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _absent_letter(content: str) -> str:
    return next(letter for letter in map(chr, range(ord("A"), 0x3000)) if letter not in content)


def _template_error(messages: Sequence[Message], error: Exception) -> PromptError:
    roles = [message.role for message in messages]
    return PromptError(
        f"the chat template refused a conversation with the roles {roles}: {error}; "
        "change the record or pass another template"
    )


def _rewritten_error(i: int) -> PromptError:
    return PromptError(
        f"the chat template changes the text before messages[{i}] when that message is added, so the message's "
        "beginning can't be found; pass a template with a {% generation %} block"
    )
