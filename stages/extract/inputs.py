"""What goes into an extraction: the records, the chat format, and how thinking is treated."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...data.cache.manifest import MANIFEST_NAME, CacheManifest
from ...data.cache.storage.places import open_storage
from ...data.chat import ChatFormat
from ...data.errors import ConfigError, PromptError
from ...data.prompts.reading import Reading
from ...data.prompts.records import PromptSource
from ...data.prompts.rows import HubPart
from ...data.thinking import ThinkingMarks, ThinkingPolicy
from .config import ExtractConfig
from .target import Target

DATE = "template_date"
"""Key of the manifest's `generation` for the date that the template was given."""


def plan_prompts(places: Sequence[str | Path], config: ExtractConfig) -> PromptSource:
    """The rows that the settings choose from these files and data sets.

    Unless the settings say otherwise, a repeated prompt is kept only if answers are sampled: a greedy answer would be
    the same again.

    Raises:
        PromptError: see `PromptSource`.
    """
    duplicates = config.duplicates
    if duplicates == "auto":
        duplicates = "keep" if config.mode == "generate" and config.temperature > 0 else "drop"
    return PromptSource(
        places,
        unit_rows=config.machinery.unit_records,
        limit=config.limit,
        shuffle_seed=config.shuffle_seed,
        keep_duplicates=duplicates == "keep",
        reading=Reading(columns=config.columns, roles=config.roles, ignore=tuple(config.ignore)),
        hub=HubPart(config.split, config.subset),
    )


def make_chat(target: Target, config: ExtractConfig, out: str | Path | None = None) -> ChatFormat:
    """The chat format of the target, or of the template file that the settings name.

    Args:
        out: place of the cache, whose date a template that reads the clock is given.

    Raises:
        PromptError: the template file can't be read.
        CacheCorruptError: the cache's manifest is damaged.
    """
    template = None
    if config.chat_template is not None:
        try:
            template = Path(config.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PromptError(
                f"expected a chat template (Jinja text in UTF-8) at {config.chat_template}: {error}."
            ) from None
    return ChatFormat(
        target.tokenizer,
        eos_token_ids=target.eos_token_ids,
        template=template,
        template_args=config.template_args,
        date=plan_date(config, out),
    )


def plan_date(config: ExtractConfig, out: str | Path | None) -> datetime.date:
    """The date of the settings; else the date that the cache was begun with; else today.

    Raises:
        CacheCorruptError: the cache's manifest is damaged.
    """
    found = config.template_date
    if found is None and out is not None:
        storage = open_storage(out)
        if storage.exists(MANIFEST_NAME):
            found = CacheManifest.read(storage).generation.get(DATE)
    return datetime.date.today() if found is None else datetime.date.fromisoformat(found)


def with_template_end(target: Target, chat: ChatFormat) -> Target:
    """The target, whose answers also end at the token that the template writes after an answer."""
    end = chat.further_end_id
    return target if end is None else replace(target, further_end_ids=(*target.further_end_ids, end))


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
