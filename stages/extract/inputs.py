"""What goes into an extraction: the records, the chat format, and how thinking is treated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...data.chat import ChatFormat
from ...data.errors import ConfigError, PromptError
from ...data.prompts.records import PromptSet, read_prompts
from ...data.prompts.rows import HubPart
from ...data.thinking import ThinkingMarks, ThinkingPolicy
from .config import ExtractConfig
from .target import Target


def plan_prompts(places: Sequence[str | Path], config: ExtractConfig) -> PromptSet:
    """The records that the settings choose from these files and data sets.

    Unless the settings say otherwise, a repeated prompt is kept only if answers are sampled: a greedy answer would be
    the same again.

    Raises:
        PromptError: see `read_prompts`.
    """
    duplicates = config.duplicates
    if duplicates == "auto":
        duplicates = "keep" if config.mode == "generate" and config.temperature > 0 else "drop"
    return read_prompts(
        places,
        skip_bad=config.skip_bad,
        limit=config.limit,
        shuffle_seed=config.shuffle_seed,
        keep_duplicates=duplicates == "keep",
        columns=config.columns,
        hub=HubPart(config.split, config.subset),
    )


def make_chat(target: Target, config: ExtractConfig) -> ChatFormat:
    """The chat format of the target, or of the template file that the settings name.

    Raises:
        PromptError: the template file can't be read.
    """
    template = None
    if config.chat_template is not None:
        try:
            template = Path(config.chat_template).read_text()
        except OSError as error:
            raise PromptError(f"expected a chat template at {config.chat_template}: {error.strerror}.") from None
    return ChatFormat(
        target.tokenizer, eos_token_ids=target.eos_token_ids, template=template, template_args=config.template_args
    )


def plan_thinking(target: Target, config: ExtractConfig) -> ThinkingPolicy:
    """
    Raises:
        ConfigError: the tokenizer lacks the marks, or thinking is to be dropped from generated answers.
    """
    if config.thinking == "drop" and config.mode == "generate":
        raise ConfigError(
            "extract.thinking: thinking can't be dropped from a generated answer, because the answer's states depend "
            "on it. Set mask, or stop the target from thinking (extract.template_args, such as "
            "{enable_thinking: false})."
        )
    if config.thinking == "mask":
        return ThinkingPolicy(masked=ThinkingMarks.of(target.tokenizer, config.thinking_marks))
    return ThinkingPolicy(dropped=config.thinking_marks if config.thinking == "drop" else None)
