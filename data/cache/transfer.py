"""Caches made from caches: with another codec, or of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from .codecs import CHANNEL_SCALE, CodecName, whitened_cosine
from .drafts import ACCEPT_LEN, NOT_DRAFTED, PROBS, TOKENS, FirstDrafts, list_drafts, read_facts
from .index import SequenceIndex, SequenceRow
from .part import PartWriter
from .reader import CachedSequence, Request, read_ahead
from .storage import Storage
from .store import Cache
from .target_files import RECORD_NAME, store_target_files, target_folder
from .writer import StatePartWriter, StateWriter, renew_snapshot

WORST_SHARE = 0.001


@dataclass(slots=True)
class TransferReport:
    """What was copied."""

    num_copied: int = 0
    num_present: int = 0
    """Sequences that the new cache held already, or that an earlier source brought."""
    num_same_content: int = 0
    """Sequences left out because others have the same tokens and mask."""
    num_drafts_parts: int = 0
    cosines: list[float] = field(default_factory=list)
    """Whitened cosine between the states before and after, of every token and layer of some sequences."""

    @property
    def cosine_mean(self) -> float:
        return float(np.mean(self.cosines))

    @property
    def cosine_worst(self) -> float:
        """What all but one in a thousand exceed."""
        return float(np.quantile(self.cosines, WORST_SHARE))


def recode(
    source: Cache,
    place: str | Path,
    codec: CodecName,
    part_bytes: int,
    num_measured: int = 64,
    on_sequence: Callable[[int], None] = lambda num_tokens: None,
) -> TransferReport:
    """Writes a cache's sequences and first drafts into a new cache, or one to be continued, with another codec.

    Args:
        num_measured: sequences whose states are compared before and after.

    Raises:
        FingerprintMismatchError: the place holds a cache of another origin, or with another codec.
    """
    target = Cache.create_or_open(place, source.manifest.model_copy(update={"codec": codec}))
    _copy_target(source.storage, target.storage)
    report = TransferReport()
    present = set(target.rows.strings("seq_id"))
    missing = [i for i, seq_id in enumerate(source.rows.strings("seq_id")) if seq_id not in present]
    report.num_present = len(source.rows) - len(missing)
    writer = StateWriter(target, part_bytes, {"recoded_from": source.manifest.codec})
    try:
        with closing(read_ahead(source, map(Request, source.rows.take(missing)))) as sequences:
            for sequence in sequences:
                _append(writer, sequence)
                report.num_copied += 1
                on_sequence(sequence.row.num_tokens)
    finally:
        writer.finish()
    recoded = Cache.open(target.storage)
    places = {seq_id: i for i, seq_id in enumerate(source.rows.strings("seq_id"))}
    for row in recoded.rows[:num_measured]:
        original = source.read(source.rows[places[row.seq_id]])
        report.cosines += whitened_cosine(original.hidden_TKH, recoded.read(row).hidden_TKH).flatten().tolist()
    report.num_drafts_parts = copy_drafts([source], recoded)
    return report


def merge(
    sources: Sequence[Cache],
    place: str | Path,
    on_sequence: Callable[[int], None] = lambda num_tokens: None,
) -> TransferReport:
    """Joins caches of one origin, made on several machines: part by part, the stored bytes as they are.

    A sequence is taken from the first cache that has it; so is one of several with the same tokens and mask.

    Raises:
        FingerprintMismatchError: the caches, or what is at the place, are of different origins.
    """
    for source in sources[1:]:
        sources[0].manifest.check_same_origin(source.manifest, source.place)
    target = Cache.create_or_open(place, sources[0].manifest)
    _copy_target(sources[0].storage, target.storage)
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
            if kept:
                copy_part(source, name, kept, target, on_sequence)
                report.num_copied += len(kept)
    renew_snapshot(target.storage, target.manifest, lag=0)
    merged = Cache.open(target.storage)
    report.num_drafts_parts = copy_drafts(sources, merged)
    return report


def copy_part(
    source: Cache,
    name: str,
    rows: Sequence[SequenceRow],
    target: Cache,
    on_sequence: Callable[[int], None] = lambda num_tokens: None,
) -> None:
    """Writes these sequences of a part into a new part of another cache with the same codec, without decoding them."""
    writer = StatePartWriter(
        target.storage, target.manifest, source.open_part(name, verify=True).resident.get(CHANNEL_SCALE)
    )
    try:
        with closing(read_ahead(source, map(Request, rows))) as sequences:
            for sequence in sequences:
                writer.append(sequence.row, sequence.stored_TKW.numpy(), *_token_arrays(sequence))
                on_sequence(sequence.row.num_tokens)
    except BaseException:
        writer.abandon()
        raise
    writer.commit({"copied_from": name})


def copy_drafts(sources: Sequence[Cache], target: Cache) -> int:
    """Copies first drafts to the target's parts all of whose sequences have them; returns the number of parts."""
    num_copied = 0
    for fingerprint in sorted({name for source in sources for name in list_drafts(source.storage)}):
        drafted = [
            FirstDrafts.open(source, fingerprint) for source in sources if fingerprint in list_drafts(source.storage)
        ]
        facts = read_facts(drafted[0].cache.storage, fingerprint)
        where = {
            row.seq_id: (drafts, row) for drafts in drafted for row in drafts.cache.rows if row.part in drafts.parts
        }
        copies = FirstDrafts.create_or_open(target, fingerprint, facts)
        for name in copies.missing_parts():
            rows = target.rows_of_part(name)
            if all(row.seq_id in where for row in rows):
                _copy_drafts_part(copies.writer(name), rows, where)
                num_copied += 1
    return num_copied


def _copy_drafts_part(
    writer: PartWriter, rows: SequenceIndex, where: dict[str, tuple[FirstDrafts, SequenceRow]]
) -> None:
    num_anchors = 0
    try:
        for row in rows:
            drafts, original = where[row.seq_id]
            found = drafts.read(original)
            arrays = {ACCEPT_LEN: found.accept_len_T, TOKENS: found.tokens_TGA, PROBS: found.probs_TGA}
            writer.append({name: values.numpy() for name, values in arrays.items()})
            num_anchors += int((found.accept_len_T != NOT_DRAFTED).sum())
    except BaseException:
        writer.abandon()
        raise
    writer.commit({"num_anchors": num_anchors})


def _append(writer: StateWriter, sequence: CachedSequence) -> None:
    row = sequence.row
    token_ids, argmax, mask = (array.tolist() for array in _token_arrays(sequence))
    writer.append(
        seq_id=row.seq_id,
        source=row.source,
        source_row=row.source_row,
        hidden_TKH=sequence.hidden_TKH,
        token_ids=token_ids,
        loss_mask=mask,
        target_argmax=argmax,
        prompt_len=row.prompt_len,
        final_token_id=row.final_token_id,
        finish_reason=row.finish_reason,
    )


def _token_arrays(sequence: CachedSequence) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, argmax and mask of the tokens that have a state."""
    num_tokens = sequence.row.num_tokens
    arrays = (sequence.token_ids_S[:num_tokens], sequence.target_argmax_T, sequence.loss_mask_S[:num_tokens])
    return tuple(array.to(torch.int32).numpy() for array in arrays)  # pyright: ignore[reportReturnType]


def _copy_target(source: Storage, target: Storage) -> None:
    """Copies the target's pieces, unless they are there."""
    if not target.exists(RECORD_NAME):
        store_target_files(target, target_folder(source))
