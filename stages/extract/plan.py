"""What an extraction has left to do: units of rows, which are read, checked and tokenized when they are claimed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from ...data.cache.cache import Cache
from ...data.cache.manifest import MANIFEST_NAME, CacheManifest
from ...data.cache.storage.base import Storage
from ...data.cache.storage.places import open_storage
from ...data.cache.work import finished_units, read_units
from ...data.chat import ChatFormat
from ...data.dropped import DroppedByTemplate
from ...data.errors import NothingToTrainError, PromptError
from ...data.prompts.forms import Content
from ...data.prompts.records import BadRow, PromptRecord, PromptSource
from ...data.thinking import ThinkingPolicy
from .config import ExtractConfig
from .conversations import (
    Conversation,
    GeneratedConversation,
    GivenConversation,
    SequenceTooLong,
    UnknownToken,
    split_turns,
)
from .engines import plan_sampling
from .inputs import plan_thinking
from .left_out import LeftOut
from .sink import ExtractReport
from .target import Target
from .units import PreparedUnit, WorkUnit

REASONS = {
    SequenceTooLong: "too long",
    UnknownToken: "token beyond the vocabulary",
    DroppedByTemplate: "left out by the template",
}
"""Error of a record -> reason for skipping it; for other errors see `reason_of`."""
CHECKED_ROWS = 4096
"""A prompt set of up to so many rows is checked whole before the engine starts."""
TOKENIZED_AT_ONCE = 64
"""Records that are tokenized in one call."""
SAMPLE_ROWS = 256
"""Rows of a larger prompt set that are checked, and that stand for the others in the check of free space."""


class Preparation:
    """Reads the rows of units, and makes conversations of those that the cache lacks."""

    def __init__(
        self,
        prompts: PromptSource,
        chat: ChatFormat,
        target: Target,
        config: ExtractConfig,
        present: set[str],
        hopeless: Mapping[str, str],
    ):
        """
        Args:
            present: ids of the sequences that the cache holds.
            hopeless: id -> reason of the records that never give a sequence.
        """
        self._prompts, self._chat, self._target, self._config = prompts, chat, target, config
        self._present, self._hopeless = present, hopeless
        self._earlier: set[str] = set()
        """Ids of the records of other units. A record with one of these ids is a duplicate."""

    def add_earlier(self, seq_ids: Iterable[str]) -> None:
        self._earlier.update(seq_ids)

    def prepare(self, unit: WorkUnit) -> PreparedUnit:
        """
        Raises:
            PromptError: a record can't be used (unless `config.skip_bad`).
        """
        prepared = self.look_at(unit.rows, unit.unit_id)
        self._earlier.update(prepared.sequences, prepared.hopeless)
        return prepared

    def look_at(self, rows: Sequence[int], unit_id: str = "") -> PreparedUnit:
        """What `prepare` returns; duplicates of these rows' records are not recognized later.

        Raises:
            PromptError: a record can't be used (unless `config.skip_bad`).
        """
        found = PreparedUnit(unit_id, [])
        missing: list[PromptRecord] = []
        seen: set[str] = set()
        for record in self._prompts.read(rows):
            if isinstance(record, BadRow):
                self._leave_out(record, found)
                continue
            found.rules.update(record.facts.rules)
            if record.seq_id in seen or record.seq_id in self._earlier:
                found.left_out.add("duplicate")
            else:
                seen.add(record.seq_id)
                if record.seq_id in self._present:
                    found.sequences.append(record.seq_id)
                elif record.seq_id in self._hopeless:
                    found.hopeless[record.seq_id] = self._hopeless[record.seq_id]
                else:
                    missing.append(record)
        left = start_conversations(missing, self._chat, self._target, self._config, found.left_out)
        found.conversations.extend(left)
        found.sequences.extend(each.record.seq_id for each in found.conversations)
        return found

    def _leave_out(self, bad: BadRow, found: PreparedUnit) -> None:
        if not self._config.skip_bad:
            raise PromptError(bad.message)
        found.left_out.add("unreadable record", f"{bad.source}:{bad.row}", bad.reason)


@dataclass(frozen=True, slots=True)
class ExtractPlan:
    """What is left to do for a cache."""

    units: list[WorkUnit]
    """The units that are not finished. One that was finished is here if the cache lacks a sequence of it: the sequence
    was lost later, or the engine failed on it."""
    preparation: Preparation
    report: ExtractReport
    prompt_set: str
    """Fingerprint of the prompt set, for the commit records."""
    known_units: dict[str, dict[str, Any]]
    """Id -> record of the finished work units."""
    sample: PreparedUnit
    """Rows that stand for the rows that nobody has read; all rows, if all were read."""

    @property
    def conversations(self) -> list[Conversation]:
        """The conversations that the sample's rows have left."""
        return self.sample.conversations

    @property
    def num_left(self) -> int:
        """Records that are left to do; there may be fewer, as some of their rows were not read."""
        return sum(unit.num_left for unit in self.units)

    @property
    def scale(self) -> float:
        """How many rows that nobody has read a row of the sample stands for; 0 if all were read."""
        num_unread = sum(len(unit.rows) for unit in self.units if unit.prepared is None)
        return num_unread / self.sample.num_rows if num_unread and self.sample.num_rows else 0.0

    @property
    def num_expected(self) -> int:
        """Sequences to come, as many as the sample lets expect."""
        num_known = sum(unit.num_left for unit in self.units if unit.prepared is not None)
        return num_known + round(len(self.conversations) * self.scale)


def plan_extraction(
    place: str | Path,
    manifest: CacheManifest,
    prompts: PromptSource,
    chat: ChatFormat,
    target: Target,
    config: ExtractConfig,
    num_sampled: int | None = None,
) -> ExtractPlan:
    """Checks the cache's origin, if there is a cache, and records that the cache lacks; writes nothing.

    Every record of a small prompt set is checked, so that a bad record costs no engine start, and leaves no cache
    behind that would not fit the corrected command. Of a large prompt set the first unit and a sample are checked.

    Args:
        num_sampled: rows to look at, evenly chosen, for a plan that nobody carries out.

    Raises:
        FingerprintMismatchError: the place holds a cache of another origin.
        PromptError: a record can't be used (unless `config.skip_bad`), or none is left.
    """
    storage = open_storage(place)
    storage.require_folder()
    # The units are read before the cache is opened, so that the cache shows every sequence that they committed.
    finished = read_units(storage, finished_units(storage))
    present = _present_ids(storage, manifest)
    hopeless = {seq_id: reason for note in finished.values() for seq_id, reason in note["skipped"].items()}
    preparation, report = Preparation(prompts, chat, target, config, present, hopeless), ExtractReport()
    units: list[WorkUnit] = []
    for key, rows in prompts.slices():
        note = finished.get(key)
        required = [] if note is None else [each for each in note["sequences"] if each not in note["skipped"]]
        if note is None or not present.issuperset(required):
            units.append(WorkUnit(key, rows))
            continue
        report.num_present += len(required)
        report.left_out.counts.update(note["skipped"].values())
        report.left_out.counts.update(note["left_out"])
        report.rules.update(note.get("rules", {}))
        preparation.add_earlier([*required, *note["skipped"]])
    is_small = len(prompts) <= (CHECKED_ROWS if num_sampled is None else num_sampled)
    for i, unit in enumerate(units if is_small else units[: num_sampled is None]):
        prepared = preparation.prepare(unit)
        units[i] = replace(unit, prepared=prepared)
        report.count(prepared)
    unread = [unit for unit in units if unit.prepared is None]
    sample = preparation.look_at(sample_rows(unread, num_sampled or SAMPLE_ROWS)) if unread else join(units)
    units = [unit for unit in units if unit.num_left]
    if not units and not report.num_present and report.left_out.counts.keys() <= {"unreadable record"}:
        raise PromptError(
            f"no prompts in {prompts.described} ({report.left_out.counts.total()} bad records skipped)"
            + "".join(f"; the first: {message}" for message in [*report.left_out.firsts.values()][:1])
        )
    return ExtractPlan(units, preparation, report, prompts.fingerprint, finished, sample)


def sample_rows(units: Sequence[WorkUnit], number: int) -> list[int]:
    """That many of the units' rows, evenly chosen; all of them if there are fewer."""
    ends = list(accumulate(len(unit.rows) for unit in units))
    number = min(number, ends[-1] if ends else 0)
    found: list[int] = []
    for position in (i * ends[-1] // number for i in range(number)):
        i = bisect_right(ends, position)
        found.append(units[i].rows[position - ends[i]])
    return found


def join(units: Iterable[WorkUnit]) -> PreparedUnit:
    """All that prepared units hold, as one unit."""
    whole = PreparedUnit("", [])
    for unit in units:
        if unit.prepared is not None:
            whole.conversations.extend(unit.prepared.conversations)
            whole.sequences.extend(unit.prepared.sequences)
            whole.hopeless.update(unit.prepared.hopeless)
            whole.left_out.update(unit.prepared.left_out)
            whole.rules.update(unit.prepared.rules)
    return whole


def start_conversations(
    records: Sequence[PromptRecord],
    chat: ChatFormat,
    target: Target,
    config: ExtractConfig,
    left_out: LeftOut,
) -> Iterator[Conversation]:
    """The conversations of the records.

    Args:
        left_out: gets the records that can't be used.

    Raises:
        PromptError: a record can't be used (unless `config.skip_bad`).
    """
    thinking = plan_thinking(target, config)
    for start in range(0, len(records), TOKENIZED_AT_ONCE):
        chunk = records[start : start + TOKENIZED_AT_ONCE]
        chat.announce([first_content(record, config, thinking) for record in chunk], config.mode == "generate")
        for record in chunk:
            try:
                conversation = start_conversation(record, chat, target, config, thinking)
                conversation.first_request()
                yield conversation
            except PromptError as error:
                where = f"{record.source}, row {record.row}"
                if not config.skip_bad:
                    raise PromptError(f"{where}: {error}") from error
                left_out.add(reason_of(error, config.mode), where, str(error))
    chat.announce([], False)


def reason_of(error: PromptError, mode: str) -> str:
    """Why a record is skipped, for counts."""
    if isinstance(error, NothingToTrainError):
        return "no assistant token" if mode == "given" else "no user message"
    return REASONS.get(type(error), "unusable with this chat template")


def first_content(record: PromptRecord, config: ExtractConfig, thinking: ThinkingPolicy) -> Content:
    """What a record's conversation tokenizes first."""
    if record.text is not None:
        return Content(text=record.text)
    if config.mode == "given":
        return Content(tuple(thinking.shorten(message) for message in record.messages), tools=record.tools)
    turns = split_turns(record)
    return Content(tuple(turns[0]) if turns else (), tools=record.tools)


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
