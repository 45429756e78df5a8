"""What an extraction will do: the engine, the cache's manifest, and the records that are left, each checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ...data.cache.cache import CHUNK_TOKENS, Cache
from ...data.cache.manifest import MANIFEST_NAME, CacheManifest
from ...data.cache.storage.places import open_storage
from ...data.cache.work import finished_units, read_units
from ...data.chat import ChatFormat
from ...data.errors import ConfigError, PromptError
from ...data.prompts.records import PromptRecord, PromptSet, read_prompts
from ...data.prompts.rows import HubPart
from ...data.thinking import ThinkingMarks
from .config import ExtractConfig
from .conversations import (
    Conversation,
    GeneratedConversation,
    GivenConversation,
    SequenceTooLong,
    ThinkingPolicy,
    UnknownToken,
)
from .engines import plan_engine, plan_sampling
from .sink import ExtractReport
from .target import Target, check_layers, context_layers, copy_pieces, target_facts


def plan_layers(target: Target, config: ExtractConfig) -> tuple[int, ...]:
    """The context layers, listed or by DFlash's rule."""
    listed = config.layer_ids
    layers = tuple(listed) if listed is not None else context_layers(target.num_layers, config.num_draft_layers)
    return check_layers(layers, target.num_layers)


def plan_thinking(target: Target, config: ExtractConfig) -> ThinkingPolicy:
    """
    Raises:
        ConfigError: the thinking can't be found, or is to be dropped from answers that it led to.
    """
    if config.thinking == "drop" and config.mode == "generate":
        raise ConfigError(
            "extract.thinking: what the target thought can't be dropped from an answer that it has just generated, "
            "whose states depend on it. Set mask, or keep it from thinking (extract.template_args, such as "
            "{enable_thinking: false})."
        )
    if config.thinking == "mask":
        return ThinkingPolicy(masked=ThinkingMarks.of(target.tokenizer, config.thinking_marks))
    return ThinkingPolicy(dropped=config.thinking_marks if config.thinking == "drop" else None)


def plan_prompts(places: Sequence[str | Path], config: ExtractConfig) -> PromptSet:
    """The records that the config chooses. Greedily, a repeated prompt gets the same answer, and is left out."""
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
    """The target's chat format, or that of the template file in the config."""
    template = None
    if config.chat_template is not None:
        try:
            template = Path(config.chat_template).read_text()
        except OSError as error:
            raise PromptError(f"expected a chat template at {config.chat_template}: {error.strerror}.") from None
    return ChatFormat(
        target.tokenizer, eos_token_ids=target.eos_token_ids, template=template, template_args=config.template_args
    )


def plan_manifest(
    target: Target, layer_ids: tuple[int, ...], chat: ChatFormat, prompts: PromptSet, config: ExtractConfig
) -> CacheManifest:
    """The manifest of the cache that this run would make; the engine's facts follow once it runs."""
    names = ["mode", "max_len", "thinking"]
    if config.mode == "generate":
        names += ["max_new_tokens", "temperature", "top_p", "top_k"] + ["seed"] * (config.temperature > 0)
    return CacheManifest(
        **target_facts(target),
        template_hash=chat.template_hash,
        layer_ids=layer_ids,
        vllm_layer_ids=tuple(i + 1 for i in layer_ids),
        generation={name: getattr(config, name) for name in names},
        engine=plan_engine(config),
        codec=config.codec,
        chunk_tokens=CHUNK_TOKENS,
        versions={name: metadata.version(name) for name in ("vpd", "torch", "transformers", "zarr")},
        rendered_sample=render_sample(prompts, chat, config),
    )


def render_sample(prompts: PromptSet, chat: ChatFormat, config: ExtractConfig) -> str:
    """The first record that the template renders, as it renders it; with none, the extraction itself will say why."""
    for record in prompts.records:
        if record.text is not None:
            return record.text
        try:
            return chat.render(record.messages, config.mode == "generate")
        except PromptError:
            continue
    return ""


def open_cache(place: str | Path, manifest: CacheManifest, target: Target) -> Cache:
    """Creates the cache, or opens it to add to it; stores the target's pieces."""
    cache = Cache.create_or_open(place, manifest)
    copy_pieces(target, cache.storage)
    return cache


@dataclass(frozen=True, slots=True)
class ExtractPlan:
    """What is left to do for a cache, every record checked."""

    conversations: list[Conversation]
    report: ExtractReport
    prompt_set: str
    """Hash of the contents of all prompts; goes into the commit records."""
    seq_ids: list[str]
    """Ids of all records, done or not, in their order."""
    known_units: dict[str, dict[str, Any]]
    """Work units that are recorded as finished, and the records; what they lack was lost since, or went wrong."""


def plan_extraction(
    place: str | Path,
    manifest: CacheManifest,
    prompts: PromptSet,
    chat: ChatFormat,
    target: Target,
    config: ExtractConfig,
) -> ExtractPlan:
    """Checks the cache's origin, if there is one, and every record that it lacks; writes nothing.

    So a bad record costs no engine start, and leaves no cache behind that the corrected command would not fit.

    Raises:
        FingerprintMismatchError: the folder holds a cache of another origin.
        PromptError: a record can't be used (unless `config.skip_bad`).
    """
    storage = open_storage(place)
    storage.require_folder()
    present: set[str] = set()
    # Before the cache is opened: what these units hold is then sure to be seen.
    finished = read_units(storage, finished_units(storage))
    if storage.exists(MANIFEST_NAME):
        cache = Cache.open(storage, allow_empty=True)
        manifest.check_same_origin(cache.manifest, cache.place)
        present = set(cache.rows.strings("seq_id"))
    hopeless = {seq_id: reason for done in finished.values() for seq_id, reason in done["skipped"].items()}
    missing = [record for record in prompts.records if record.seq_id not in present]
    report = ExtractReport(num_present=len(prompts.records) - len(missing))
    report.skipped.update(hopeless[record.seq_id] for record in missing if record.seq_id in hopeless)
    missing = [record for record in missing if record.seq_id not in hopeless]
    if prompts.num_duplicates:
        report.skipped["duplicate"] = prompts.num_duplicates
    if prompts.num_skipped:
        report.skipped["unreadable record"] = prompts.num_skipped
    conversations = list(start_conversations(missing, chat, target, config, report))
    seq_ids = [record.seq_id for record in prompts.records]
    return ExtractPlan(conversations, report, prompts.fingerprint, seq_ids, finished)


REASONS = {SequenceTooLong: "too long", UnknownToken: "token beyond the vocabulary"}
"""Why a record was skipped; any other error means that it has nothing to train on."""


def start_conversations(
    records: list[PromptRecord], chat: ChatFormat, target: Target, config: ExtractConfig, report: ExtractReport
) -> Iterator[Conversation]:
    """Each record's conversation; bad records are errors, or skipped and counted."""
    thinking = plan_thinking(target, config)
    unusable = "no assistant token" if config.mode == "given" else "no user message"
    for record in records:
        try:
            conversation: Conversation
            if config.mode == "given":
                conversation = GivenConversation(record, chat, config.max_len, target.vocab_size, thinking)
            else:
                conversation = GeneratedConversation(
                    record,
                    chat,
                    target.tokenizer,
                    max_len=config.max_len,
                    max_new_tokens=config.max_new_tokens,
                    vocab_size=target.vocab_size,
                    greedy=plan_sampling(config).greedy,
                    thinking=thinking,
                )
            conversation.first_request()
            yield conversation
        except PromptError as error:
            if not config.skip_bad:
                raise PromptError(f"{record.source}, row {record.row}: {error}") from error
            report.skipped[REASONS.get(type(error), unusable)] += 1
