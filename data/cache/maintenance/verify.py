"""Checks every byte of a cache against its records, and says which sequences of which part are bad."""

# K layers, H hidden width
from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

import torch

from ...errors import CacheCorruptError, CacheNotFoundError, VpdError
from ..cache import NO_CHOICE, TOKEN_ARRAYS, channel_scale_spec, state_specs
from ..codecs import CHANNEL_SCALE, HIDDEN, Codec
from ..drafts import draft_specs, drafts_root, list_drafts, part_of, read_facts
from ..index import (
    SequenceIndex,
    SequenceRow,
    find_snapshot,
    hash_content,
    part_index_file,
    read_part_index,
    read_snapshot,
)
from ..manifest import CacheManifest
from ..part import PARTS, OpenPart, committed_parts, part_folder, read_commit
from ..reader import CachedTokens, Slot, read_tokens
from ..records import FileDigest, describe
from ..shard import WHAT_TO_DO, ArraySpec, parse_footer
from ..storage.base import Storage
from ..target_files import read_target_record
from ..work import damaged_notes
from .salvage import locate_chunks, whole_chunks

BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong."""

    what: str
    part: str | None = None
    """The part of states that it belongs to; None for what concerns the whole cache or first drafts."""
    sequences: tuple[str, ...] = ()
    """`seq_id`s of the sequences that can't be read any more because of it."""
    drafts: str | None = None
    """`<fingerprint>` of the first drafts that it belongs to."""
    drafts_part: str | None = None
    """The part of those."""
    note: str | None = None
    """The file of an extraction's note that is damaged."""


@dataclass(slots=True)
class VerifyReport:
    """What was checked, and what is wrong."""

    num_parts: int = 0
    num_sequences: int = 0
    num_bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is worth knowing, and not wrong."""

    def to_json(self) -> dict[str, Any]:
        return {
            "num_parts": self.num_parts,
            "num_sequences": self.num_sequences,
            "num_bytes": self.num_bytes,
            "problems": [
                {name: getattr(problem, name) for name in Problem.__slots__ if getattr(problem, name)}
                for problem in self.problems
            ],
            "notes": self.notes,
        }


@dataclass(frozen=True, slots=True)
class PartState:
    """A part as far as it can be read."""

    part: OpenPart
    rows: SequenceIndex
    problems: list[Problem]
    num_bytes: int


def count_parts(storage: Storage) -> int:
    """Parts of states and of first drafts: what `verify` reports progress in."""
    return sum(len(committed_parts(storage, root)) for root in ["", *map(drafts_root, list_drafts(storage))])


def verify(
    storage: Storage, num_threads: int = 2, on_part: Callable[[int], None] = lambda num_bytes: None
) -> VerifyReport:
    """Checks a cache.

    Args:
        on_part: called with the number of bytes of each part that has been checked, of states and of first drafts.

    Raises:
        CacheNotFoundError: there is no cache.
    """
    report = VerifyReport()
    try:
        manifest = CacheManifest.read(storage)
    except (CacheCorruptError, CacheNotFoundError) as error:
        if isinstance(error, CacheNotFoundError) and not committed_parts(storage):
            raise
        report.problems.append(Problem(f"{said(error)} Nothing else can be checked without it."))
        return report
    report.problems += verify_target(storage)
    snapshot, problems = verify_snapshot(storage)
    report.problems += problems
    report.problems += [Problem(said(error), note=file) for file, error in damaged_notes(storage)]
    names = committed_parts(storage)
    report.problems += verify_committed(storage, names, snapshot)

    def check(name: str) -> tuple[list[Problem], int, int]:
        state = read_part(storage, manifest, name, snapshot.of_part(name))
        return state.problems, len(state.rows), state.num_bytes  # not the part, which is open and in memory

    with ThreadPoolExecutor(num_threads) as pool:
        for future in as_completed([pool.submit(check, name) for name in names]):
            problems, num_sequences, num_bytes = future.result()
            report.problems += problems
            report.num_parts += 1
            report.num_sequences += num_sequences
            report.num_bytes += num_bytes
            on_part(num_bytes)
        for fingerprint in list_drafts(storage):
            report.problems += verify_drafts(storage, manifest, fingerprint, names, pool, on_part)
    committed = set(names)
    unlisted = [name for name in storage.list_folder(PARTS) if name.removesuffix(".zarr") not in committed]
    if unlisted:
        report.notes.append(f"not committed, by a writer at work or a dead one: {', '.join(unlisted)}")
    report.problems.sort(key=lambda problem: (problem.part or "", problem.drafts or "", problem.what))
    return report


def verify_target(storage: Storage) -> Iterator[Problem]:
    """Checks the target's config, tokenizer and pieces."""
    try:
        files = read_target_record(storage)
    except CacheCorruptError as error:
        yield Problem(said(error))
        return
    for name, described in files.items():
        if (problem := check_file(storage, name, described)) is not None:
            yield Problem(problem)


def verify_snapshot(storage: Storage) -> tuple[SequenceIndex, list[Problem]]:
    """The rows of the snapshot, as far as they can be trusted."""
    try:
        table = read_snapshot(storage)
    except CacheCorruptError as error:
        return SequenceIndex.concatenate([]), [Problem(said(error))]
    if table is None and committed_parts(storage):
        return SequenceIndex.concatenate([]), [Problem(f"{storage.place}: the snapshot of the index is missing")]
    return SequenceIndex.concatenate([] if table is None else [table]), []


def verify_committed(storage: Storage, names: list[str], snapshot: SequenceIndex) -> Iterator[Problem]:
    """Parts that the snapshot lists and that have no commit record any more."""
    committed = set(names)
    for name in snapshot.parts:
        if name not in committed:
            lost = tuple(snapshot.of_part(name).strings("seq_id"))
            yield Problem(f"{storage.place}: the commit record of {name} is missing", name, lost)
    if (latest := find_snapshot(storage)) is not None and len(names) < int(latest.split("-")[1]):
        yield Problem(f"{storage.place}: {latest} was made of more parts than the {len(names)} that are committed")


def read_part(storage: Storage, manifest: CacheManifest, name: str, listed: SequenceIndex) -> PartState:
    """Reads every byte of a part of states, however damaged it is.

    Args:
        listed: its rows in the snapshot, which stand in for its own index if that is damaged.
    """
    place = f"{storage.place}/{part_folder('', name)}"
    problems: list[Problem] = []
    bad: dict[str, str] = {}
    rows, files = _read_records(storage, name, listed, problems)
    specs = state_specs(manifest)
    part = OpenPart(place, sum(spec_rows(manifest, row) for row in rows), {}, {}, {})
    whole = [specs[array] for array in TOKEN_ARRAYS]
    if Codec(manifest.codec).needs_channel_scale:
        whole.append(channel_scale_spec(manifest))
    for spec in whole:
        bad_chunks = _read_whole(storage, part, name, spec, files, problems)
        for row in rows:
            first, count = row.first_row // spec.chunk_tokens, spec.num_chunks(row.num_tokens)
            if spec.name == CHANNEL_SCALE:
                first, count = 0, 1
            if bad_chunks & set(range(first, first + count)):
                bad.setdefault(row.seq_id, f"its {spec.name} are damaged")
    _open_hidden(storage, part, name, specs[HIDDEN], rows, files, problems)
    slot = Slot()
    for row in rows:
        reason = bad.get(row.seq_id) or _check_sequence(part, specs[HIDDEN], row, manifest, slot)
        if reason is not None:
            bad[row.seq_id] = reason
            problems.append(Problem(f"{name}: {row.seq_id}: {reason}", name, (row.seq_id,)))
    return PartState(part, rows, problems, sum(described["bytes"] for described in files.values()))


def spec_rows(manifest: CacheManifest, row: SequenceRow) -> int:
    """Rows of the arrays that a sequence takes, padding included."""
    return -(-row.num_tokens // manifest.chunk_tokens) * manifest.chunk_tokens


def _read_records(
    storage: Storage, name: str, listed: SequenceIndex, problems: list[Problem]
) -> tuple[SequenceIndex, dict[str, Any]]:
    """A part's rows, and the description of its files; small files are checked here."""
    try:
        commit = read_commit(storage, "", name)
    except CacheCorruptError as error:
        problems.append(Problem(said(error), name))
        return listed, {}
    files = commit["files"]
    shards = tuple(f"/{array}/c/" for array in (HIDDEN, CHANNEL_SCALE, *TOKEN_ARRAYS))
    for file, described in files.items():
        if file != part_index_file(name) and not any(shard in file for shard in shards):
            problem = check_file(storage, file, described)
            problems += [] if problem is None else [Problem(problem, name)]
    try:
        rows = SequenceIndex.concatenate([read_part_index(storage, name, commit)]).of_part(name)
    except CacheCorruptError as error:
        problems.append(Problem(said(error), name))
        return listed, files
    if len(rows) != commit["num_sequences"]:
        problems.append(
            Problem(f"{name}: {commit['num_sequences']} sequences committed, {len(rows)} in its index", name)
        )
    if len(listed) and list(listed) != list(rows):
        problems.append(Problem(f"{name}: its index and the snapshot differ", name))
    return rows, files


def _read_whole(
    storage: Storage, part: OpenPart, name: str, spec: ArraySpec, files: dict[str, Any], problems: list[Problem]
) -> set[int]:
    """Reads a small array; returns the numbers of the chunks that are damaged, and leaves zeros in their place."""
    file = f"{part_folder('', name)}/{spec.shard_name}"
    try:
        content = storage.read(file)
    except FileNotFoundError:
        problems.append(Problem(f"{storage.place}/{file} is missing", name))
        content = b""
    num_chunks = spec.num_chunks(spec.chunk_tokens if spec.name == CHANNEL_SCALE else part.num_rows)
    part.resident[spec.name], bad = whole_chunks(content, spec, num_chunks)
    if files.get(file) not in (None, describe(content)) and not bad:
        problems.append(Problem(f"{storage.place}/{file}: it is not what was written, though its rows are whole", name))
    return bad


def _open_hidden(
    storage: Storage,
    part: OpenPart,
    name: str,
    spec: ArraySpec,
    rows: SequenceIndex,
    files: dict[str, Any],
    problems: list[Problem],
) -> None:
    """Opens the shard of the states; where its chunk index is damaged, the chunks are located without it."""
    file = f"{part_folder('', name)}/{spec.shard_name}"
    place = f"{storage.place}/{file}"
    try:
        opened = storage.open(file)
    except FileNotFoundError:
        problems.append(Problem(f"{place} is missing", name))
        return
    part.files[HIDDEN] = opened
    size, footer = opened.tail(spec.footer_bytes(part.num_rows))
    expected = files.get(file, {}).get("bytes", size)
    try:
        if size != expected:
            raise CacheCorruptError(f"{place}: expected {expected} bytes, found {size}")
        part.chunks[HIDDEN] = parse_footer(footer, place)
        covered = int(part.chunks[HIDDEN][:, 1].sum()) + len(footer)
        if len(part.chunks[HIDDEN]) != spec.num_chunks(part.num_rows) or covered != size:
            raise CacheCorruptError(f"{place}: its chunks do not fill it")
    except CacheCorruptError as error:
        problems.append(Problem(said(error), name))
        part.chunks[HIDDEN] = locate_chunks(opened, spec, rows)


def _check_sequence(
    part: OpenPart, spec: ArraySpec, row: SequenceRow, manifest: CacheManifest, slot: Slot
) -> str | None:
    """What is wrong with a sequence; None if nothing is."""
    if HIDDEN not in part.files:
        return "its states are gone"
    try:
        stored_TKW = slot.fill(part, spec, row, verify=True)
    except CacheCorruptError as error:
        return said(error)
    scale = part.resident.get(CHANNEL_SCALE)
    scale_KH = None if scale is None else torch.from_numpy(scale)
    if not torch.isfinite(Codec(manifest.codec).decode(stored_TKW, manifest.hidden_size, scale_KH)).all():
        return "its states are not finite"
    return _check_tokens(read_tokens(part, row), manifest)


def _check_tokens(tokens: CachedTokens, manifest: CacheManifest) -> str | None:
    row, num_tokens = tokens.row, tokens.row.num_tokens
    ids = tokens.token_ids_S.tolist()
    choices = [choice for choice in tokens.target_argmax_T.tolist() if choice != NO_CHOICE]
    if not all(0 <= token < manifest.vocab_size for token in [*ids, *choices]):
        return f"a token id lies outside the vocabulary of {manifest.vocab_size}"
    following = tokens.loss_mask_S[1 : num_tokens + 1]
    if (tokens.target_argmax_T[: len(following)][following] == NO_CHOICE).any():
        return "the target's choice is missing before a supervised token"
    if int(tokens.loss_mask_S.sum()) != row.num_supervised:
        return f"its index has {row.num_supervised} supervised tokens, its mask {int(tokens.loss_mask_S.sum())}"
    mask = tokens.loss_mask_S[:num_tokens].int().tolist()
    if hash_content(ids[:num_tokens], mask, row.final_token_id) != row.content_hash:
        return "its tokens are not those that its index describes"
    return None


def verify_drafts(
    storage: Storage,
    manifest: CacheManifest,
    fingerprint: str,
    parts: list[str],
    pool: ThreadPoolExecutor,
    on_part: Callable[[int], None],
) -> list[Problem]:
    """Checks the first drafts of one drafter."""
    root = drafts_root(fingerprint)
    try:
        facts = read_facts(storage, fingerprint)
    except CacheCorruptError as error:
        return [Problem(said(error), drafts=fingerprint)]
    specs = draft_specs(int(facts["block_size"]), manifest.chunk_tokens)
    names = committed_parts(storage, root)
    problems: list[Problem] = []
    committed, committed_states = set(names), set(parts)
    for folder in storage.list_folder(f"{root}{PARTS}"):
        if (name := folder.removesuffix(".zarr")) not in committed:
            what = f"{storage.place}/{root}: the first drafts of {name} have no commit record"
            problems.append(Problem(what, drafts=fingerprint, drafts_part=name))
    for name, (found, num_bytes) in zip(
        names, pool.map(lambda name: _verify_drafts_part(storage, root, name, list(specs.values())), names), strict=True
    ):
        problems += [Problem(what, drafts=fingerprint, drafts_part=name) for what in found]
        if part_of(name) not in committed_states:
            what = f"{storage.place}/{root}: first drafts of {name}, which is no part of the cache"
            problems.append(Problem(what, drafts=fingerprint, drafts_part=name))
        on_part(num_bytes)
    return problems


def _verify_drafts_part(storage: Storage, root: str, name: str, specs: list[ArraySpec]) -> tuple[list[str], int]:
    """What is wrong with a part of first drafts, and its size in bytes."""
    try:
        commit = read_commit(storage, root, name)
    except CacheCorruptError as error:
        return [said(error)], 0
    files: dict[str, Any] = commit["files"]
    found = [check_file(storage, file, described) for file, described in files.items()]
    path = part_folder(root, name)
    for spec in specs:
        if f"{path}/{spec.shard_name}" not in files:
            found.append(f"{storage.place}/{path}: the array {spec.name} was never committed")
    return [what for what in found if what is not None], sum(described["bytes"] for described in files.values())


def said(error: VpdError) -> str:
    """An error without its advice to run what is running."""
    return str(error).removesuffix(f" {WHAT_TO_DO}")


def check_file(storage: Storage, name: str, described: dict[str, Any]) -> str | None:
    """What is wrong with a file; None if it is what its record says."""
    place = f"{storage.place}/{name}"
    digest = FileDigest()
    try:
        file, size = storage.open(name), storage.size(name)
    except FileNotFoundError:
        return f"{place} is missing"
    block = memoryview(bytearray(min(size, BLOCK_BYTES)))
    while digest.num_bytes < size:
        count = file.read_into([block[: size - digest.num_bytes]], digest.num_bytes)
        if not count:
            break
        digest.update(block[:count])
    found = digest.describe()
    return None if found == described else f"{place} is not what was written: expected {described}, found {found}"
