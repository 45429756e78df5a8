"""Chat templates: from messages to text, as vLLM's chat endpoint renders them."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, cast

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .errors import PromptError
from .hashing import hash_text
from .prompts.messages import REASONING, Message

GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
CLOCK = "strftime_now"
"""The function through which a template reads the clock."""
DEVELOPER_ROLE = re.compile(r"""["']developer["']""")
THINKING_NAMES = (REASONING, "reasoning", "thinking")
"""Names under which templates read the thinking of a message."""

Span = tuple[int, int]
"""Characters of a text, end excluded."""


class ChatTemplate:
    """A tokenizer's chat template, or another one for the tokenizer, with its arguments."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        given: str | None = None,
        args: Mapping[str, Any] | None = None,
        date: datetime.date | None = None,
    ):
        """
        Args:
            given: Jinja text; None = the tokenizer's own template.
            args: further variables of the template.
            date: what the template's clock shows, at midnight; None = the real clock.

        Raises:
            PromptError: the tokenizer has several templates, and none of them is its default.
        """
        self._tokenizer, self._given, self._date = tokenizer, given, date
        self._args = dict(args or {})
        self.text = self._resolve()
        """Jinja text; None if there is no template."""
        canonical_args = json.dumps(self._args, sort_keys=True, separators=(",", ":"))
        self.hash = hash_text(f"{self.text or ''}\n{canonical_args}")
        """16 hex digits over the template's text and its arguments."""
        self._thinking_names: dict[str, str | None] = {}
        self._takes_parts: dict[str, bool] = {}

    @property
    def marks_answers(self) -> bool:
        """Whether the template has a generation block around what the assistant writes."""
        return GENERATION_BLOCK.search(self.text or "") is not None

    @property
    def reads_clock(self) -> bool:
        return CLOCK in (self.text or "")

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        """The functions that the template is given."""
        return self._args.get("tools") or ()

    def with_tools(self, tools: Sequence[Mapping[str, Any]]) -> ChatTemplate:
        """The template for a conversation that may call these functions."""
        if not tools:
            return self
        equipped = copy(self)
        equipped._args = {**self._args, "tools": [dict(tool) for tool in tools]}
        equipped.text = equipped._resolve()
        return equipped

    @property
    def thinking_name(self) -> str | None:
        """Name under which the template reads a message's thinking, found by rendering; None if it reads none."""
        if self.text is None:
            return None
        if self.text not in self._thinking_names:
            names = (name for name in THINKING_NAMES if name in (self.text or "") and self._reads(name))
            self._thinking_names[self.text] = next(names, None)
        return self._thinking_names[self.text]

    @property
    def takes_parts(self) -> bool:
        """Whether the template reads a content only if it is a list of parts, as some of vision-language targets do."""
        if self.text is None:
            return False
        if self.text not in self._takes_parts:
            self._takes_parts[self.text] = not self._writes("zq0qz") and self._writes(_as_parts("zq0qz"))
        return self._takes_parts[self.text]

    def adapt(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with roles that the template knows, as vLLM's chat endpoint adapts them.

        Where the template does not name the role developer, its messages become the system's, and all system messages
        become one message at the beginning.
        """
        is_foreign = any(message.role == "developer" for message in messages)
        if not is_foreign or self.text is None or DEVELOPER_ROLE.search(self.text):
            return list(messages)
        instructing = [message for message in messages if message.role in ("developer", "system")]
        joined = Message("system", "\n\n".join(message.content for message in instructing if message.content))
        return [joined, *(message for message in messages if message not in instructing)]

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The text that the template writes for messages that `adapt` has returned.

        Args:
            add_generation_prompt: whether the text ends with the header that opens the assistant's next turn.

        Raises:
            PromptError: there is no template, or the template refuses the messages.
        """
        return self._render(self._as_dicts(messages), add_generation_prompt)

    def render_marked(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The rendered conversation, and the characters of its generation blocks.

        `apply_chat_template` could give the blocks' tokens, but wrongly in two cases. Where several tokens share a
        block's last character, only one of them is marked. Where a block ends in a space that the offsets leave out,
        everything up to the text's end is marked.

        Raises:
            PromptError: see `render`.
        """
        dicts = self._as_dicts(messages)
        arguments = {**self._tokenizer.special_tokens_map, **self._arguments()}
        try:
            rendered = render_jinja_template(
                [dicts], chat_template=self._require_text(), return_assistant_tokens_mask=True, **arguments
            )
        except Exception as error:  # a template is foreign code
            raise _refusal(dicts, error) from error
        texts, blocks = cast(tuple[list[str], list[list[Span]]], rendered)
        return texts[0], blocks[0]

    def _resolve(self) -> str | None:
        if self._given is None and not self._tokenizer.chat_template:
            return None
        try:
            return self._tokenizer.get_chat_template(self._given, self._args.get("tools"))
        except ValueError as error:
            raise PromptError(f"the tokenizer's chat templates have no default; pass one: {error}") from error

    def _arguments(self) -> dict[str, Any]:
        if self._date is None or not self.reads_clock:
            return self._args
        midnight = datetime.datetime.combine(self._date, datetime.time())
        return {CLOCK: midnight.strftime, **self._args}

    def _as_dicts(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        dicts = [{"role": m.role, "content": m.content, **m.extra} for m in messages]
        for message in dicts:
            if REASONING in message and self.thinking_name:
                message[self.thinking_name] = message.pop(REASONING)
            if self.takes_parts:
                message["content"] = _as_parts(message["content"])
        return dicts

    def _reads(self, name: str) -> bool:
        answer = {"role": "assistant", "content": "zq1qz", name: "zq2qz"}
        try:
            return "zq2qz" in self._render([{"role": "user", "content": "zq0qz"}, answer], False)
        except PromptError:
            return False

    def _writes(self, content: str | list[dict[str, str]]) -> bool:
        try:
            return "zq0qz" in self._render([{"role": "user", "content": content}], False)
        except PromptError:
            return False

    def _require_text(self) -> str:
        if self.text is None:
            raise PromptError(
                "the tokenizer has no chat template: pass a template (Jinja text), "
                'or use {"text": ...} records, which need no template'
            )
        return self.text

    def _render(self, dicts: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        template = self._require_text()
        try:
            rendered = self._tokenizer.apply_chat_template(
                dicts,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self._arguments(),
            )
        except Exception as error:  # a template is foreign code
            raise _refusal(dicts, error) from error
        return cast(str, rendered)


def _as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _refusal(dicts: Sequence[Mapping[str, Any]], error: Exception) -> PromptError:
    roles = [message["role"] for message in dicts]
    return PromptError(
        f"the chat template refused a conversation with the roles {roles}: {error or type(error).__name__}; "
        "change the record or pass another template"
    )
