"""Stage one: prompts through the target, states into the cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ...data.cache.manifest import MANIFEST_NAME, CacheManifest
from ...data.cache.quarantine import QUARANTINE, list_quarantined
from ...data.cache.storage import Storage, open_storage
from ...data.cache.store import CHUNK_TOKENS, Cache
from ...data.cache.writer import StateWriter
from ...data.chat import ChatFormat
from ...data.errors import ExtractionError, PromptError
from ...data.prompts import PromptRecord, PromptSet
from ..config import ExtractConfig
from .conversations import Conversation, FinishedSequence, GeneratedConversation, GivenConversation, SequenceTooLong
from .engine import Engine, EngineRequest, Sampling
from .target import Target, check_layers, context_layers, copy_pieces, target_facts
from .transformers_engine import TransformersEngine
from .vllm_engine import VllmEngine

MAX_QUARANTINED_SHARE = 0.01


@dataclass
class ExtractReport:
    """What a run did."""

    num_present: int = 0
    """Sequences that the cache already held."""
    num_written: int = 0
    num_tokens: int = 0
    num_checked: int = 0
    """Greedy choices of the engine that were compared with the argmax of the stored states."""
    num_argmax_differing: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Records without a sequence, by reason."""


def plan_layers(target: Target, config: ExtractConfig) -> tuple[int, ...]:
    """The context layers, listed or by DFlash's rule."""
    listed = config.layer_ids
    layers = tuple(listed) if listed is not None else context_layers(target.num_layers, config.num_draft_layers)
    return check_layers(layers, target.num_layers)


def make_engine(target: Target, layer_ids: tuple[int, ...], config: ExtractConfig) -> Engine:
    """Starts the engine that the config names."""
    sampling = plan_sampling(config)
    if config.engine == "transformers":
        return TransformersEngine(target, layer_ids, sampling, dtype=config.dtype, engine_args=config.engine_args)
    return VllmEngine(
        target, layer_ids, sampling, dtype=config.dtype, max_len=config.max_len, engine_args=config.engine_args
    )


def plan_sampling(config: ExtractConfig) -> Sampling:
    """A prefill of given responses always asks for the greedy choice after the last token."""
    temperature = config.temperature if config.mode == "generate" else 0.0
    return Sampling(temperature=temperature, top_p=config.top_p, top_k=config.top_k, seed=config.seed)


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
    names = ["mode", "max_len"]
    if config.mode == "generate":
        names += ["max_new_tokens", "temperature", "top_p", "top_k"] + ["seed"] * (config.temperature > 0)
    return CacheManifest(
        **target_facts(target),
        template_hash=chat.template_hash,
        layer_ids=layer_ids,
        vllm_layer_ids=tuple(i + 1 for i in layer_ids),
        generation={name: getattr(config, name) for name in names},
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

    conversations: list[tuple[Conversation, EngineRequest]]
    report: ExtractReport
    prompt_set: str
    """Hash of the contents of all prompts; goes into the commit records."""


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
    if storage.exists(MANIFEST_NAME):
        cache = Cache.open(storage, allow_empty=True)
        manifest.check_same_origin(cache.manifest, cache.place)
        present = set(cache.rows.strings("seq_id"))
    missing = [record for record in prompts.records if record.seq_id not in present]
    report = ExtractReport(num_present=len(prompts.records) - len(missing))
    if prompts.num_skipped:
        report.skipped["unreadable record"] = prompts.num_skipped
    conversations = list(start_conversations(missing, chat, target, config, report))
    return ExtractPlan(conversations, report, prompts.fingerprint)


def extract(
    engine_factory: Callable[[], Engine],
    cache: Cache,
    plan: ExtractPlan,
    config: ExtractConfig,
    on_sequence: Callable[[int], None] = lambda num_tokens: None,
) -> ExtractReport:
    """Writes the plan's sequences. The engine starts only if there is something to do.

    Whatever ends the run, the sequences finished by then are committed.

    Args:
        on_sequence: called with the number of tokens of each sequence that is written.

    Raises:
        PromptError: a later turn of a record can't be used (unless `config.skip_bad`).
        ExtractionError: the engine failed, or too many sequences had to be put into quarantine.
    """
    report = plan.report
    if not plan.conversations:
        return report
    engine = engine_factory()
    writer = StateWriter(cache, config.part_mib << 20, {"engine": engine.facts, "prompt_set": plan.prompt_set})
    try:
        for sequence in converse(engine, plan.conversations, config, report):
            if write(writer, sequence, report):
                on_sequence(len(sequence.token_ids))
    finally:
        try:
            writer.finish()
        finally:
            engine.close()
    return report


def start_conversations(
    records: list[PromptRecord], chat: ChatFormat, target: Target, config: ExtractConfig, report: ExtractReport
) -> Iterator[tuple[Conversation, EngineRequest]]:
    """Each record's conversation and its first request; bad records are errors, or skipped and counted."""
    unusable = "no assistant token" if config.mode == "given" else "no user message"
    for record in records:
        try:
            conversation: Conversation
            if config.mode == "given":
                conversation = GivenConversation(record, chat, config.max_len)
            else:
                conversation = GeneratedConversation(
                    record,
                    chat,
                    target.tokenizer,
                    max_len=config.max_len,
                    max_new_tokens=config.max_new_tokens,
                    greedy=plan_sampling(config).greedy,
                )
            yield conversation, conversation.first_request()
        except PromptError as error:
            if not config.skip_bad:
                raise PromptError(f"{record.source}, row {record.row}: {error}") from error
            report.skipped["too long" if isinstance(error, SequenceTooLong) else unusable] += 1


def converse(
    engine: Engine,
    conversations: list[tuple[Conversation, EngineRequest]],
    config: ExtractConfig,
    report: ExtractReport,
) -> Iterator[FinishedSequence]:
    """Keeps the engine busy with up to `max_in_flight` conversations; yields sequences as they finish."""
    waiting = iter(conversations)
    running: dict[str, Conversation] = {}
    exhausted = False
    while running or not exhausted:
        while not exhausted and len(running) < config.max_in_flight:
            following = next(waiting, None)
            if following is None:
                exhausted = True
                break
            conversation, request = following
            running[request.key] = conversation
            engine.submit(request)
        for completion in engine.poll():
            try:
                outcome = running[completion.key].advance(completion)
            except PromptError as error:
                # That a later turn outgrows the limit depends on the target's answers, not on the prompt file.
                record = running.pop(completion.key).record
                if not config.skip_bad and not isinstance(error, SequenceTooLong):
                    raise PromptError(f"{record.source}, row {record.row}: {error}") from error
                reason = "too long" if isinstance(error, SequenceTooLong) else "unusable"
                report.skipped[f"{reason} after some turns"] += 1
                continue
            if isinstance(outcome, EngineRequest):
                engine.submit(outcome)
            else:
                del running[completion.key]
                yield outcome


def write(writer: StateWriter, sequence: FinishedSequence, report: ExtractReport) -> bool:
    """Appends a sequence to the cache, or to the quarantine list; returns whether it was written."""
    report.num_checked += sequence.num_checked
    report.num_argmax_differing += sequence.num_argmax_differing
    if sequence.prompt_len >= len(sequence.token_ids):
        report.skipped["empty response"] += 1
        return False
    if not torch.isfinite(sequence.hidden_TKH).all():
        _quarantine(writer.cache.storage, sequence, "states that are not finite", report)
        return False
    writer.append(
        seq_id=sequence.record.seq_id,
        source=sequence.record.source,
        source_row=sequence.record.row,
        hidden_TKH=sequence.hidden_TKH,
        token_ids=sequence.token_ids,
        loss_mask=sequence.loss_mask,
        target_argmax=sequence.target_argmax,
        prompt_len=sequence.prompt_len,
        final_token_id=sequence.final_token_id,
        finish_reason=sequence.finish_reason,
    )
    report.num_written += 1
    report.num_tokens += len(sequence.token_ids)
    return True


def _quarantine(storage: Storage, sequence: FinishedSequence, reason: str, report: ExtractReport) -> None:
    """Lists a sequence that must not be trained on; it is tried again by the next run.

    Raises:
        ExtractionError: too large a share of the run ended here.
    """
    record = sequence.record
    entry: dict[str, Any] = {"seq_id": record.seq_id, "source": record.source, "row": record.row, "reason": reason}
    list_quarantined(storage, [entry])
    report.skipped[reason] += 1
    done = report.num_written + report.skipped[reason]
    if report.skipped[reason] > max(3, MAX_QUARANTINED_SHARE * done):
        raise ExtractionError(
            f"{report.skipped[reason]} of {done} sequences had {reason}; they are listed in "
            f"{storage.place}/{QUARANTINE}. Check the target's weights and dtype; what was written before is kept."
        )
