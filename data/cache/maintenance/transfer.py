"""Makes caches from caches: one with another codec, or one of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import FingerprintMismatchError
from ..arrays import ACCEPT_LEN, NOT_DRAFTED
from ..cache import Cache
from ..codecs import CHANNEL_SCALE, CODECS, whitened_cosine
from ..drafts import FirstDrafts, list_drafts
from ..index import SequenceIndex, SequenceRow
from ..manifest import ORIGIN
from ..part import PartWriter, read_commit
from ..reader import Request, read_ahead
from ..storage.base import Storage
from ..target_files import RECORD_NAME, store_target_files, target_folder
from ..writer import StatePartWriter, StateWriter, renew_snapshot

WORST_SHARE = 0.001
OF_THE_PART = ("part", "files", "num_rows", "num_sequences", "num_tokens", "copied_from", "kept_of")
"""The keys of a commit record that describe the part itself; the other keys say how the states were made."""
SequenceKey = tuple[str, str]
"""`seq_id` and `content_hash`: two machines may have different answers to one prompt."""


@dataclass(slots=True)
class TransferReport:
    """What a transfer copied."""

    num_copied: int = 0
    """Sequences."""
    num_present: int = 0
    """Sequences that the new cache held before, or that came from an earlier source."""
    num_same_content: int = 0
    """Sequences left out because another sequence has the same tokens and mask."""
    num_drafts_parts: int = 0
    """Parts whose first drafts were copied."""
    num_drafts_missing: int = 0
    """Parts without the first drafts of a drafter whose drafts the sources hold."""
    cosines: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    """Whitened cosine between the states before and after, of every token and layer of some sequences."""

    @property
    def cosine_mean(self) -> float | None:
        return float(np.mean(self.cosines)) if len(self.cosines) else None

    @property
    def cosine_worst(self) -> float | None:
        """The cosine that 99.9 % of the tokens and layers exceed."""
        return float(np.quantile(self.cosines, WORST_SHARE)) if len(self.cosines) else None


def recode(
    source: Cache,
    place: str | Path,
    codec: str,
    part_bytes: int,
    num_measured: int = 64,
    on_sequence: Callable[[int], None] = lambda num_tokens: None,
) -> TransferReport:
    """Copies a cache's sequences and first drafts with another codec, to a new cache or one to be continued.

    Args:
        codec: a name in `CODECS`.
        num_measured: number of sequences whose states are compared before and after.
        on_sequence: called with the number of tokens copied, which is 0 for a sequence that is there already.

    Raises:
        ConfigError: there is no such codec.
        FingerprintMismatchError: the place holds a cache of another origin, or with another codec.
    """
    target = Cache.create_or_open(place, source.manifest.model_copy(update={"codec": CODECS[codec].name}))
    copy_target(source.storage, target.storage)
    report = TransferReport()
    present = set(target.rows.strings("seq_id"))
    missing = [i for i, seq_id in enumerate(source.rows.strings("seq_id")) if seq_id not in present]
    for _ in range(len(source) - len(missing)):
        report.num_present += 1
        on_sequence(0)
    facts = {"recoded_from": source.manifest.codec, "made_by": _distinct_facts(source)}
    writer = StateWriter(target, part_bytes, facts)
    try:
        with closing(read_ahead(source.states, map(Request, source.rows.take(missing)))) as sequences:
            for sequence in sequences:
                writer.append(sequence.as_new(), sequence.hidden_TKH)
                report.num_copied += 1
                on_sequence(sequence.row.num_tokens)
    finally:
        writer.finish()
    recoded = Cache.open(target.storage)
    report.cosines = _compare(source, recoded, num_measured)
    report.num_drafts_parts, report.num_drafts_missing = copy_drafts([source], recoded)
    return report


def merge(
    sources: Sequence[Cache],
    place: str | Path,
    on_sequence: Callable[[int], None] = lambda num_tokens: None,
) -> TransferReport:
    """Joins caches of one origin, made on several machines: part by part, with the stored bytes as they are.

    Of several sequences with one `seq_id`, or with the same tokens and mask, only the first is copied. The order is:
    what the place holds, then the sources one after the other.

    Args:
        on_sequence: called with the number of tokens copied, which is 0 for a sequence that is left out.

    Raises:
        FingerprintMismatchError: the caches, or what is at the place, are of different origins.
    """
    for source in sources[1:]:
        _check_same_origin(sources[0], source)
    target = Cache.create_or_open(place, sources[0].manifest)
    copy_target(sources[0].storage, target.storage)
    report = TransferReport()
    seq_ids, contents = set(target.rows.strings("seq_id")), set(target.rows.strings("content_hash"))
    for source in sources:
        for name in source.parts:
            kept: list[SequenceRow] = []
            for row in source.rows_of_part(name):
                if row.seq_id in seq_ids:
                    report.num_present += 1
                elif row.content_hash in contents:
                    report.num_same_content += 1
                else:
                    kept.append(row)
                    seq_ids.add(row.seq_id)
                    contents.add(row.content_hash)
                    continue
                on_sequence(0)
            if kept:
                copy_part(source, name, kept, target, on_sequence)
                source.states.close()  # otherwise many caches have too many files open
                report.num_copied += len(kept)
    renew_snapshot(target.storage, target.manifest, lag=0)
    report.num_drafts_parts, report.num_drafts_missing = copy_drafts(sources, Cache.open(target.storage))
    return report


def copy_part(
    source: Cache,
    name: str,
    rows: Sequence[SequenceRow],
    target: Cache,
    on_sequence: Callable[[int], None] = lambda num_tokens: None,
) -> None:
    """Copies these sequences of a part, without decoding them, into a new part of another cache with the same codec."""
    facts = {**_facts(read_commit(source.storage, "", name)), "copied_from": name}
    scale = source.states.open(name, verify=True).resident.get(CHANNEL_SCALE)
    with (
        StatePartWriter(target.storage, target.manifest, scale) as writer,
        closing(read_ahead(source.states, map(Request, rows))) as sequences,
    ):
        for sequence in sequences:
            writer.append(sequence.as_new(), sequence.stored_TKW.numpy())
            on_sequence(sequence.row.num_tokens)
        writer.commit(facts)


def copy_drafts(sources: Sequence[Cache], target: Cache) -> tuple[int, int]:
    """Copies first drafts to those parts of the target all of whose sequences have first drafts in the sources.

    Returns:
        The number of parts that got first drafts, and the number of parts that still lack them, over all drafters.
    """
    num_copied = num_missing = 0
    for fingerprint in sorted({name for source in sources for name in list_drafts(source.storage)}):
        drafted = [
            FirstDrafts.open(source, fingerprint) for source in sources if fingerprint in list_drafts(source.storage)
        ]
        copies = FirstDrafts.create_or_open(target, fingerprint, drafted[0].facts)
        where: dict[SequenceKey, tuple[FirstDrafts, int]] = {}
        for drafts in reversed(drafted):  # an earlier source overrides a later one
            if _how_drafted(drafts) == _how_drafted(copies):
                where |= _drafted_sequences(drafts)
        for name in copies.missing_parts():
            rows = target.rows_of_part(name)
            if all(key in where for key in _keys(rows)):
                _copy_drafts_part(copies.writer(name), rows, where)
                num_copied += 1
            else:
                num_missing += 1
    return num_copied, num_missing


def _drafted_sequences(drafts: FirstDrafts) -> dict[SequenceKey, tuple[FirstDrafts, int]]:
    """The sequences that have first drafts, with their numbers among the cache's rows."""
    rows = drafts.cache.rows
    parts = rows.strings("part")
    return {key: (drafts, i) for i, key in enumerate(_keys(rows)) if parts[i] in drafts.parts}


def _copy_drafts_part(
    writer: PartWriter, rows: SequenceIndex, where: dict[SequenceKey, tuple[FirstDrafts, int]]
) -> None:
    num_anchors = 0
    keys = _keys(rows)
    with writer:
        for key in keys:
            drafts, i = where[key]
            arrays = drafts.read_arrays(drafts.cache.rows[i])
            writer.append(arrays)
            num_anchors += int((arrays[ACCEPT_LEN] != NOT_DRAFTED).sum())
        writer.commit({"num_anchors": num_anchors})
    for key in keys:
        where[key][0].close_parts()


def _how_drafted(drafts: FirstDrafts) -> dict[str, Any]:
    """The facts that must agree before first drafts of one drafter are mixed: all but the name of its folder."""
    return {name: value for name, value in drafts.facts.items() if name != "name"}


def _keys(rows: SequenceIndex) -> list[SequenceKey]:
    return list(zip(rows.strings("seq_id"), rows.strings("content_hash"), strict=True))


def _check_same_origin(first: Cache, other: Cache) -> None:
    """Checks that two caches may be joined.

    Raises:
        FingerprintMismatchError: a field of `ORIGIN` differs; the message names each.
    """
    one, two = first.manifest.model_dump(), other.manifest.model_dump()
    different = [f"{name}: {one[name]} and {two[name]}" for name in ORIGIN if one[name] != two[name]]
    if different:
        raise FingerprintMismatchError(
            f"expected caches of one origin, found that {first.place} and {other.place} differ in "
            f"{'; '.join(different)}. Leave one out. If only the codec differs, change it with vpd recode."
        )


def _facts(commit: dict[str, Any]) -> dict[str, Any]:
    """How the states of a part were made."""
    return {name: value for name, value in commit.items() if name not in OF_THE_PART}


def _distinct_facts(cache: Cache) -> list[dict[str, Any]]:
    """How the states of a cache's parts were made, without repetitions."""
    distinct: list[dict[str, Any]] = []
    for commit in cache.commits().values():
        if _facts(commit) not in distinct:
            distinct.append(_facts(commit))
    return distinct


def _compare(source: Cache, recoded: Cache, num_measured: int) -> np.ndarray:
    """Whitened cosines, flat, between the states of some sequences that both caches have."""
    places = {key: i for i, key in enumerate(_keys(source.rows))}
    common = [(i, places[key]) for i, key in enumerate(_keys(recoded.rows)) if key in places]
    cosines = [np.empty(0, np.float32)]
    for i, original in common[:num_measured]:
        before, after = source.read(source.rows[original]), recoded.read(recoded.rows[i])
        cosines.append(whitened_cosine(before.hidden_TKH, after.hidden_TKH).flatten().numpy())
    return np.concatenate(cosines)


def copy_target(source: Storage, target: Storage) -> None:
    """Copies the target's pieces, unless the other cache has them."""
    if not target.exists(RECORD_NAME):
        store_target_files(target, target_folder(source))
