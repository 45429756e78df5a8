"""Takes damaged parts out of a cache, and keeps the whole sequences of these parts."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..arrays import state_specs
from ..cache import Cache
from ..codecs import CHANNEL_SCALE, HIDDEN
from ..drafts import drafts_root, list_drafts, part_of
from ..index import INDEX, SNAPSHOT, SequenceIndex, part_index_file, read_part_index
from ..manifest import CacheManifest
from ..part import commit_file, committed_parts, part_folder, read_commit
from ..reader import Slot, read_tokens
from ..storage.base import Storage
from ..target_files import RECORD_NAME, TARGET
from ..writer import StatePartWriter
from .quarantine import QUARANTINE, list_quarantined
from .verify import VerifyReport, verify_snapshot, verify_target
from .verify_part import PartState, read_part


@dataclass(slots=True)
class RepairReport:
    """What a repair took out, and what it kept."""

    parts: list[str] = field(default_factory=list)
    """Parts moved to `quarantine/`."""
    num_kept: int = 0
    """Whole sequences of these parts, written into new parts."""
    lost: list[str] = field(default_factory=list)
    """`seq_id`s of the sequences that the cache has lost."""
    num_unknown: int = 0
    """Number of the parts whose index is lost too, so that nobody knows which sequences they held."""
    num_drafts_parts: int = 0
    """Parts of first drafts that were removed."""
    target_removed: bool = False


def repair(storage: Storage, found: VerifyReport) -> RepairReport:
    """Repairs what `verify` found, as far as possible; nobody may write to the cache meanwhile.

    A damaged part goes to quarantine, and its whole sequences go into a new part. `vpd extract` extracts the lost
    sequences again, as it extracts all records that the cache lacks. `vpd draft` completes the first drafts.

    Raises:
        CacheCorruptError: the cache's manifest is damaged; no part can be read without it.
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
        report.num_unknown += not len(state.rows)
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
        specs, slot = state_specs(manifest), Slot()
        with StatePartWriter(storage, manifest, scale) as writer:
            for row in kept:
                stored_TKW = slot.fill(state.part, specs[HIDDEN], row, verify=True).numpy()
                writer.append(read_tokens(state.part, specs, row).as_new(), stored_TKW)
            writer.commit({"kept_of": name})
    lost = [row for row in state.rows if row.seq_id in reasons and row.seq_id not in whole]
    list_quarantined(
        storage,
        [{"seq_id": r.seq_id, "source": r.source, "row": r.source_row, "reason": reasons[r.seq_id]} for r in lost],
    )
    report.num_kept += len(kept)
    report.lost += [row.seq_id for row in lost]


def _put_aside(storage: Storage, name: str) -> None:
    """Takes a part out of the cache: first the commit record, because a part without one does not count."""
    for file, aside in (
        (commit_file("", name), f"{name}.json"),
        (part_index_file(name), f"{name}.parquet"),
        (part_folder("", name), f"{name}.zarr"),
    ):
        if storage.exists(file):
            storage.move(file, f"{QUARANTINE}/{aside}")


def _remove_drafts(storage: Storage, found: VerifyReport, bad: list[str], report: RepairReport) -> None:
    """Removes damaged first drafts, and the first drafts of parts that the repair took out."""
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
