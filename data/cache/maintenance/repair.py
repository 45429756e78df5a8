"""Takes what is damaged out of a cache, and keeps what is whole."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..cache import TOKEN_ARRAYS, Cache, state_specs
from ..codecs import CHANNEL_SCALE, HIDDEN
from ..drafts import drafts_root, list_drafts, part_of
from ..index import INDEX, SNAPSHOT, SequenceIndex, part_index_file, read_part_index
from ..manifest import CacheManifest
from ..part import commit_file, committed_parts, part_folder, read_commit
from ..reader import Slot
from ..storage.base import Storage
from ..target_files import RECORD_NAME, TARGET
from ..writer import StatePartWriter
from .quarantine import QUARANTINE, list_quarantined
from .verify import PartState, VerifyReport, read_part, verify_snapshot, verify_target


@dataclass(slots=True)
class RepairReport:
    """What was taken out, and what was kept."""

    parts: list[str] = field(default_factory=list)
    """Parts moved to `quarantine/`."""
    num_kept: int = 0
    """Whole sequences of those, written into new parts."""
    lost: list[str] = field(default_factory=list)
    """`seq_id`s that the cache lacks now."""
    num_untold: int = 0
    """Of the parts, those whose sequences no index tells any more: the cache lacks these, too."""
    num_drafts_parts: int = 0
    """Parts of first drafts that were removed."""
    target_removed: bool = False


def repair(storage: Storage, found: VerifyReport) -> RepairReport:
    """Mends what `verify` found, as far as it can be mended; nobody may write to the cache meanwhile.

    A damaged part goes to quarantine, and its whole sequences into a new part. What is lost, `vpd extract` makes
    again, as it does for every record that the cache lacks; `vpd draft` does the same for first drafts.

    Raises:
        CacheCorruptError: the cache's manifest is damaged: nothing can be told without it.
    """
    manifest = CacheManifest.read(storage)
    report = RepairReport()
    bad = sorted({problem.part for problem in found.problems if problem.part is not None})
    snapshot, _ = verify_snapshot(storage)
    whole = _sequences_of(storage, [name for name in committed_parts(storage) if name not in bad])
    for name in bad:
        state = read_part(storage, manifest, name, snapshot.of_part(name))
        _keep_whole(storage, manifest, name, state, whole, report)
        _put_aside(storage, name)
        report.parts.append(name)
        report.num_untold += not len(state.rows)
    _remove_drafts(storage, found, bad, report)
    for problem in found.problems:
        if problem.note is not None:
            storage.remove(problem.note)
    if any(True for _ in verify_target(storage)):
        storage.remove(RECORD_NAME)
        storage.remove(TARGET)
        report.target_removed = True
    for name in storage.list_folder(INDEX):
        if SNAPSHOT.fullmatch(name):
            storage.remove(f"{INDEX}/{name}")
    cache = Cache(storage, manifest)
    if cache.parts:
        cache.write_snapshot()
    return report


def _sequences_of(storage: Storage, parts: list[str]) -> set[str]:
    tables = [read_part_index(storage, name, read_commit(storage, "", name)) for name in parts]
    return set(SequenceIndex.concatenate(tables).strings("seq_id"))


def _keep_whole(
    storage: Storage, manifest: CacheManifest, name: str, state: PartState, whole: set[str], report: RepairReport
) -> None:
    """Writes a damaged part's whole sequences into a new part, and lists the others."""
    reasons = {seq_id: problem.what for problem in state.problems for seq_id in problem.sequences}
    kept = [row for row in state.rows if row.seq_id not in reasons and row.seq_id not in whole]
    if kept:
        scale = state.part.resident.get(CHANNEL_SCALE)
        spec, slot = state_specs(manifest)[HIDDEN], Slot()
        with StatePartWriter(storage, manifest, scale) as writer:
            for row in kept:
                stored_TKW = slot.fill(state.part, spec, row, verify=True).numpy()
                tokens = slice(row.first_row, row.first_row + row.num_tokens)
                writer.append(row, stored_TKW, **{name: state.part.resident[name][tokens] for name in TOKEN_ARRAYS})
            writer.commit({"kept_of": name})
    lost = [row for row in state.rows if row.seq_id in reasons and row.seq_id not in whole]
    list_quarantined(
        storage,
        [{"seq_id": r.seq_id, "source": r.source, "row": r.source_row, "reason": reasons[r.seq_id]} for r in lost],
    )
    report.num_kept += len(kept)
    report.lost += [row.seq_id for row in lost]


def _put_aside(storage: Storage, name: str) -> None:
    """Takes a part out of the cache: its commit record first, as nothing exists without it."""
    for file, aside in (
        (commit_file("", name), f"{name}.json"),
        (part_index_file(name), f"{name}.parquet"),
        (part_folder("", name), f"{name}.zarr"),
    ):
        if storage.exists(file):
            storage.move(file, f"{QUARANTINE}/{aside}")


def _remove_drafts(storage: Storage, found: VerifyReport, bad: list[str], report: RepairReport) -> None:
    """Removes damaged first drafts, and those of parts that are no more."""
    damaged = {(p.drafts, p.drafts_part) for p in found.problems if p.drafts is not None}
    for fingerprint in list_drafts(storage):
        names = committed_parts(storage, drafts_root(fingerprint))
        damaged |= {(fingerprint, name) for name in names if part_of(name) in bad}
    for fingerprint, name in sorted(damaged, key=str):
        assert fingerprint is not None
        root = drafts_root(fingerprint)
        if name is None:
            report.num_drafts_parts += len(committed_parts(storage, root))
            storage.remove(root.rstrip("/"))
        elif storage.exists(commit_file(root, name)) or storage.exists(part_folder(root, name)):
            storage.remove(commit_file(root, name))
            storage.remove(part_folder(root, name))
            report.num_drafts_parts += 1
