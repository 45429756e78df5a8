"""`vpd verify`."""

from __future__ import annotations

from typing import Any

from ...data.cache.maintenance.repair import repair
from ...data.cache.maintenance.verify import VerifyReport, count_parts, verify
from ...data.cache.storage.places import open_storage
from ..output import emit, format_bytes
from ..progress import ProgressReport


def run_verify(place: str, must_repair: bool, num_threads: int, as_json: bool) -> int:
    """Checks a cache, and repairs it if asked to.

    Returns:
        An exit code: 1 if anything was wrong, repaired or not.
    """
    storage = open_storage(place)
    with ProgressReport("verify", count_parts(storage), "bytes") as progress:
        found = verify(storage, num_threads, progress.advance)
    result: dict[str, Any] = {"cache": place, **found.to_json()}
    lines = [problem.what for problem in found.problems] + [f"note: {note}" for note in found.notes]
    if found.problems and must_repair:
        repaired = repair(storage, found)
        result["repair"] = {name: getattr(repaired, name) for name in type(repaired).__slots__}
        lines += describe_repair(result["repair"])
    lines.append(describe_check(place, found, must_repair))
    emit(result, as_json, "\n".join(lines))
    return int(bool(found.problems))


def describe_repair(result: dict[str, Any]) -> list[str]:
    lost, num_drafts_parts, num_unknown = result["lost"], result["num_drafts_parts"], result["num_unknown"]
    lines = [
        f"repaired: {len(result['parts'])} parts put into quarantine, {result['num_kept']} of their sequences kept, "
        f"{len(lost)} lost{': ' if lost else ''}{', '.join(lost)}; {num_drafts_parts} parts of first drafts removed."
    ]
    if num_unknown:
        lines.append(f"which sequences {num_unknown} of these parts held is not known any more.")
    steps = []
    if lost or num_unknown or result["target_removed"]:
        steps.append("the vpd extract command of this cache extracts again what is lost")
    if num_drafts_parts:
        steps.append("vpd draft completes the first drafts")
    return [*lines, f"next: {'; then '.join(steps)}."] if steps else lines


def describe_check(place: str, found: VerifyReport, is_repaired: bool) -> str:
    checked = f"{found.num_sequences} sequences in {found.num_parts} parts, {format_bytes(found.num_bytes)}"
    if not found.problems:
        return f"{place}: {checked}: all as written."
    bad = {seq_id for problem in found.problems for seq_id in problem.sequences}
    advice = "" if is_repaired else " Repair the cache with --repair."
    return f"{place}: {checked}: {len(found.problems)} problems, {len(bad)} sequences can't be read.{advice}"
