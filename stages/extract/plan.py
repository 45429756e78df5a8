"""What an extraction has left to do: the records that the cache lacks, each checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...data.cache.cache import Cache
from ...data.cache.manifest import MANIFEST_NAME, CacheManifest
from ...data.cache.storage.base import Storage
from ...data.cache.storage.places import open_storage
from ...data.cache.work import finished_units, read_units
from ...data.chat import ChatFormat
from ...data.errors import PromptError
from ...data.prompts.records import PromptRecord, PromptSet
from ...data.thinking import ThinkingPolicy
from .config import ExtractConfig
from .conversations import Conversation, GeneratedConversation, GivenConversation, SequenceTooLong, UnknownToken
from .engines import plan_sampling
from .inputs import plan_thinking
from .sink import ExtractReport
from .target import Target

REASONS = {SequenceTooLong: "too long", UnknownToken: "token beyond the vocabulary"}
"""Error of a record -> reason for skipping it. Any other error means that the record has nothing to train on."""


@dataclass(frozen=True, slots=True)
class ExtractPlan:
    """What is left to do for a cache, every record checked."""

    conversations: list[Conversation]
    report: ExtractReport
    prompt_set: str
    """Fingerprint of the prompt set, for the commit records."""
    seq_ids: list[str]
    """Ids of all records, done or not, in their order."""
    known_units: dict[str, dict[str, Any]]
    """Id -> record of the finished work units. A sequence that they lack was lost later, or the engine failed on it."""


def plan_extraction(
    place: str | Path,
    manifest: CacheManifest,
    prompts: PromptSet,
    chat: ChatFormat,
    target: Target,
    config: ExtractConfig,
) -> ExtractPlan:
    """Checks the cache's origin, if there is a cache, and every record that the cache lacks; writes nothing.

    So a bad record costs no engine start, and leaves no cache behind that would not fit the corrected command.

    Raises:
        FingerprintMismatchError: the place holds a cache of another origin.
        PromptError: a record can't be used (unless `config.skip_bad`).
    """
    storage = open_storage(place)
    storage.require_folder()
    # The units are read before the cache is opened, so that the cache shows every sequence that they committed.
    finished = read_units(storage, finished_units(storage))
    present = _present_ids(storage, manifest)
    unusable = {seq_id: reason for unit in finished.values() for seq_id, reason in unit["skipped"].items()}
    missing = [record for record in prompts.records if record.seq_id not in present]
    report = ExtractReport(num_present=len(prompts.records) - len(missing))
    report.skipped.update(unusable[record.seq_id] for record in missing if record.seq_id in unusable)
    report.skipped += {"duplicate": prompts.num_duplicates, "unreadable record": prompts.num_skipped}
    left = [record for record in missing if record.seq_id not in unusable]
    conversations = list(start_conversations(left, chat, target, config, report))
    seq_ids = [record.seq_id for record in prompts.records]
    return ExtractPlan(conversations, report, prompts.fingerprint, seq_ids, finished)


def start_conversations(
    records: list[PromptRecord], chat: ChatFormat, target: Target, config: ExtractConfig, report: ExtractReport
) -> Iterator[Conversation]:
    """The conversations of the records; a record that can't be used is counted in the report.

    Raises:
        PromptError: a record can't be used (unless `config.skip_bad`).
    """
    thinking = plan_thinking(target, config)
    other_reason = "no assistant token" if config.mode == "given" else "no user message"
    for record in records:
        try:
            conversation = start_conversation(record, chat, target, config, thinking)
            conversation.first_request()
            yield conversation
        except PromptError as error:
            if not config.skip_bad:
                raise PromptError(f"{record.source}, row {record.row}: {error}") from error
            report.skipped[REASONS.get(type(error), other_reason)] += 1


def start_conversation(
    record: PromptRecord, chat: ChatFormat, target: Target, config: ExtractConfig, thinking: ThinkingPolicy
) -> Conversation:
    """
    Raises:
        PromptError: the record can't be used.
    """
    if config.mode == "given":
        return GivenConversation(record, chat, config.max_len, target.vocab_size, thinking)
    return GeneratedConversation(
        record,
        chat,
        target.tokenizer,
        max_len=config.max_len,
        max_new_tokens=config.max_new_tokens,
        vocab_size=target.vocab_size,
        greedy=plan_sampling(config).greedy,
        thinking=thinking,
    )


def _present_ids(storage: Storage, manifest: CacheManifest) -> set[str]:
    """Ids of the sequences that the cache holds; none if there is no cache yet.

    Raises:
        FingerprintMismatchError: the cache has another origin than the manifest.
    """
    if not storage.exists(MANIFEST_NAME):
        return set()
    cache = Cache.open(storage, allow_empty=True)
    manifest.check_same_origin(cache.manifest, cache.place)
    return set(cache.rows.strings("seq_id"))
