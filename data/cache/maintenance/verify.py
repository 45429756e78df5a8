"""Checks every byte of a cache against its records, and names the bad sequences of each part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

from ...errors import CacheCorruptError, CacheNotFoundError
from ..array_spec import ArraySpec
from ..arrays import draft_specs
from ..drafts import drafts_root, list_drafts, part_of, read_facts
from ..index import SequenceIndex, find_snapshot, read_snapshot
from ..manifest import CacheManifest
from ..part import PARTS, committed_parts, part_folder, read_commit
from ..storage.base import Storage
from ..target_files import read_target_record
from ..work import damaged_notes
from .problems import Problem, check_file, text_of
from .verify_part import read_part


@dataclass(slots=True)
class VerifyReport:
    """What was checked, and what is wrong."""

    num_parts: int = 0
    num_sequences: int = 0
    num_bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What else a user may want to know."""

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


def count_parts(storage: Storage) -> int:
    """The number of parts of states and of first drafts, for a report of progress."""
    return sum(len(committed_parts(storage, root)) for root in ["", *map(drafts_root, list_drafts(storage))])


def verify(
    storage: Storage, num_threads: int = 2, on_part: Callable[[int], None] = lambda num_bytes: None
) -> VerifyReport:
    """Checks a cache.

    Args:
        on_part: called after each part, of states or of first drafts, with the part's number of bytes.

    Raises:
        CacheNotFoundError: there is no cache.
    """
    report = VerifyReport()
    try:
        manifest = CacheManifest.read(storage)
    except (CacheCorruptError, CacheNotFoundError) as error:
        if isinstance(error, CacheNotFoundError) and not committed_parts(storage):
            raise
        report.problems.append(Problem(f"{text_of(error)} Nothing else can be checked without it."))
        return report
    report.problems += verify_target(storage)
    snapshot, problems = verify_snapshot(storage)
    report.problems += problems
    report.problems += [Problem(text_of(error), note=file) for file, error in damaged_notes(storage)]
    names = committed_parts(storage)
    report.problems += verify_committed(storage, names, snapshot)

    def check(name: str) -> tuple[list[Problem], int, int]:
        state = read_part(storage, manifest, name, snapshot.of_part(name))
        return state.problems, len(state.rows), state.num_bytes  # without the part, so that its files are closed

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
        yield Problem(text_of(error))
        return
    for name, described in files.items():
        if (problem := check_file(storage, name, described)) is not None:
            yield Problem(problem)


def verify_snapshot(storage: Storage) -> tuple[SequenceIndex, list[Problem]]:
    """The rows of the snapshot, or none if the snapshot is damaged; and what is wrong with the snapshot."""
    try:
        table = read_snapshot(storage)
    except CacheCorruptError as error:
        return SequenceIndex.concatenate([]), [Problem(text_of(error))]
    if table is None and committed_parts(storage):
        return SequenceIndex.concatenate([]), [Problem(f"{storage.place}: the snapshot of the index is missing")]
    return SequenceIndex.concatenate([] if table is None else [table]), []


def verify_committed(storage: Storage, names: list[str], snapshot: SequenceIndex) -> Iterator[Problem]:
    """Finds parts that are in the snapshot but have no commit record."""
    committed = set(names)
    for name in snapshot.parts:
        if name not in committed:
            lost = tuple(snapshot.of_part(name).strings("seq_id"))
            yield Problem(f"{storage.place}: the commit record of {name} is missing", name, lost)
    if (latest := find_snapshot(storage)) is not None and len(names) < int(latest.split("-")[1]):
        yield Problem(f"{storage.place}: {latest} was made of more parts than the {len(names)} that are committed")


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
        return [Problem(text_of(error), drafts=fingerprint)]
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
            what = f"{storage.place}/{root}: first drafts of {name}, which is not a part of the cache"
            problems.append(Problem(what, drafts=fingerprint, drafts_part=name))
        on_part(num_bytes)
    return problems


def _verify_drafts_part(storage: Storage, root: str, name: str, specs: list[ArraySpec]) -> tuple[list[str], int]:
    """What is wrong with a part of first drafts, and its size in bytes."""
    try:
        commit = read_commit(storage, root, name)
    except CacheCorruptError as error:
        return [text_of(error)], 0
    files: dict[str, Any] = commit["files"]
    found = [check_file(storage, file, described) for file, described in files.items()]
    path = part_folder(root, name)
    for spec in specs:
        if f"{path}/{spec.shard_name}" not in files:
            found.append(f"{storage.place}/{path}: the array {spec.name} was never committed")
    return [what for what in found if what is not None], sum(described["bytes"] for described in files.values())
