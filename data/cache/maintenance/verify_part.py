"""Checks every byte of a part of states, and names the part's bad sequences."""

# K layers, H hidden width
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import CacheCorruptError
from ...lazy import LazyModule
from ..array_spec import ArraySpec
from ..arrays import NO_CHOICE, constant_specs, state_specs
from ..codecs import CHANNEL_SCALE, CODECS, HIDDEN
from ..index import SequenceIndex, SequenceRow, hash_content, part_index_file, read_part_index
from ..manifest import CacheManifest
from ..part import OpenPart, part_folder, read_commit
from ..reader import CachedTokens, Slot, read_tokens
from ..records import describe
from ..shard import parse_footer
from ..storage.base import Storage
from .problems import Problem, check_file, text_of
from .salvage import locate_chunks, whole_chunks

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")


@dataclass(frozen=True, slots=True)
class PartState:
    """A part as far as it can be read."""

    part: OpenPart
    rows: SequenceIndex
    problems: list[Problem]
    num_bytes: int


def read_part(storage: Storage, manifest: CacheManifest, name: str, listed: SequenceIndex) -> PartState:
    """Reads every byte of a part of states, however damaged the part is.

    Args:
        listed: the part's rows in the snapshot, used if the part's own index is damaged.
    """
    reader = _PartReader(storage, manifest, name)
    rows = reader.read_records(listed)
    part = OpenPart(f"{storage.place}/{reader.path}", sum(map(reader.num_rows, rows)), {}, {}, {})
    bad: dict[str, str] = {}
    for spec in reader.specs.values():
        if spec.name == HIDDEN:
            continue
        bad_chunks = reader.read_whole(part, spec, spec.num_chunks(part.num_rows))
        for row in rows:
            first = row.first_row // spec.chunk_tokens
            if bad_chunks & set(range(first, first + spec.num_chunks(row.num_tokens))):
                bad.setdefault(row.seq_id, f"its rows of {spec.name} are damaged")
    for spec in reader.constants.values():
        if reader.read_whole(part, spec, 1):
            bad = {row.seq_id: f"the {spec.name} of its part is damaged" for row in rows} | bad
    reader.open_hidden(part, rows)
    slot = Slot()
    for row in rows:
        reason = bad.get(row.seq_id) or _check_sequence(part, reader.specs, row, manifest, slot)
        if reason is not None:
            reader.report(f"{name}: {row.seq_id}: {reason}", row.seq_id)
    num_bytes = sum(described["bytes"] for described in reader.files.values())
    return PartState(part, rows, reader.problems, num_bytes)


class _PartReader:
    """Reads the files of a part of states, and collects the problems."""

    def __init__(self, storage: Storage, manifest: CacheManifest, name: str):
        self.storage, self.name, self.path = storage, name, part_folder("", name)
        self.specs, self.constants = state_specs(manifest), constant_specs(manifest)
        self.problems: list[Problem] = []
        self.files: dict[str, Any] = {}
        """The description of every file in the commit record."""

    def report(self, what: str, *seq_ids: str) -> None:
        """Adds a problem; `seq_ids` are the sequences that nobody can read because of it."""
        self.problems.append(Problem(what, self.name, seq_ids))

    def num_rows(self, row: SequenceRow) -> int:
        """Rows of the arrays that a sequence takes, padding included."""
        return self.specs[HIDDEN].padded(row.num_tokens)

    def read_records(self, listed: SequenceIndex) -> SequenceIndex:
        """The part's rows; checks all files but the shards."""
        try:
            commit = read_commit(self.storage, "", self.name)
        except CacheCorruptError as error:
            self.report(text_of(error))
            return listed
        self.files = commit["files"]
        shards = {f"{self.path}/{spec.shard_name}" for spec in (*self.specs.values(), *self.constants.values())}
        for file in self.files.keys() - shards - {part_index_file(self.name)}:
            if (problem := check_file(self.storage, file, self.files[file])) is not None:
                self.report(problem)
        try:
            rows = SequenceIndex.concatenate([read_part_index(self.storage, self.name, commit)]).of_part(self.name)
        except CacheCorruptError as error:
            self.report(text_of(error))
            return listed
        if len(rows) != commit["num_sequences"]:
            self.report(f"{self.name}: {commit['num_sequences']} sequences committed, {len(rows)} in its index")
        if len(listed) and list(listed) != list(rows):
            self.report(f"{self.name}: its index and the snapshot differ")
        return rows

    def read_whole(self, part: OpenPart, spec: ArraySpec, num_chunks: int) -> set[int]:
        """Reads an array into `part.resident`, with zeros for damaged chunks; returns the numbers of these chunks."""
        file = f"{self.path}/{spec.shard_name}"
        try:
            content = self.storage.read(file)
        except FileNotFoundError:
            self.report(f"{self.storage.place}/{file} is missing")
            content = b""
        part.resident[spec.name], bad = whole_chunks(content, spec, num_chunks)
        if self.files.get(file) not in (None, describe(content)) and not bad:
            self.report(f"{self.storage.place}/{file} is not what was written, though its rows are whole")
        return bad

    def open_hidden(self, part: OpenPart, rows: SequenceIndex) -> None:
        """Opens the shard of the states. If the chunk index is damaged, the rows of the index locate the chunks."""
        spec = self.specs[HIDDEN]
        file = f"{self.path}/{spec.shard_name}"
        place = f"{self.storage.place}/{file}"
        try:
            opened = self.storage.open(file)
        except FileNotFoundError:
            self.report(f"{place} is missing")
            return
        part.files[HIDDEN] = opened
        size, footer = opened.tail(spec.footer_bytes(part.num_rows))
        expected = self.files.get(file, {}).get("bytes", size)
        try:
            if size != expected:
                raise CacheCorruptError(f"{place}: expected {expected} bytes, found {size}.")
            part.chunks[HIDDEN] = parse_footer(footer, place)
            covered = int(part.chunks[HIDDEN][:, 1].sum()) + len(footer)
            if len(part.chunks[HIDDEN]) != spec.num_chunks(part.num_rows) or covered != size:
                raise CacheCorruptError(f"{place}: its chunks do not fill the shard.")
        except CacheCorruptError as error:
            self.report(text_of(error))
            part.chunks[HIDDEN] = locate_chunks(opened, spec, rows)


def _check_sequence(
    part: OpenPart, specs: Mapping[str, ArraySpec], row: SequenceRow, manifest: CacheManifest, slot: Slot
) -> str | None:
    """What is wrong with a sequence; None if the sequence is whole."""
    if HIDDEN not in part.files:
        return "its states are gone"
    try:
        stored_TKW = slot.fill(part, specs[HIDDEN], row, verify=True)
    except CacheCorruptError as error:
        return text_of(error)
    scale = part.resident.get(CHANNEL_SCALE)
    scale_KH = None if scale is None else torch.from_numpy(scale)
    if not torch.isfinite(CODECS[manifest.codec].decode(stored_TKW, manifest.hidden_size, scale_KH)).all():
        return "its states are not finite"
    return _check_tokens(read_tokens(part, specs, row), manifest)


def _check_tokens(tokens: CachedTokens, manifest: CacheManifest) -> str | None:
    """What is wrong with a sequence's tokens; None if they are as they must be."""
    row, num_tokens = tokens.row, tokens.row.num_tokens
    ids = tokens.token_ids_S.tolist()
    choices = [choice for choice in tokens.target_argmax_T.tolist() if choice != NO_CHOICE]
    if not all(0 <= token < manifest.vocab_size for token in [*ids, *choices]):
        return f"a token id lies outside the vocabulary of {manifest.vocab_size}"
    following = tokens.loss_mask_S[1 : num_tokens + 1]
    if (tokens.target_argmax_T[: len(following)][following] == NO_CHOICE).any():
        return "the target's choice is missing before a supervised token"
    if int(tokens.loss_mask_S.sum()) != row.num_supervised:
        return f"its index has {row.num_supervised} supervised tokens, its mask has {int(tokens.loss_mask_S.sum())}"
    mask = tokens.loss_mask_S[:num_tokens].int().tolist()
    if hash_content(ids[:num_tokens], mask, row.final_token_id) != row.content_hash:
        return "its tokens are not those that its index describes"
    return None
