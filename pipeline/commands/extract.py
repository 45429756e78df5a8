"""`vpd extract`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from ...data.cache.cache import Cache
from ...data.cache.storage.places import open_storage
from ...stages.draft.first_draft import FirstDrafting
from ...stages.drafter.checkpoint import check_drafter
from ...stages.extract.estimate import check_space
from ...stages.extract.sink import ExtractReport
from ...stages.train.checkpoints import find_drafter
from ..config import VpdConfig, config_yaml
from ..extraction import ExtractJob, Prepared, can_draft_beside, drafting_beside, prepare, work_on
from ..first_record import show_first_record
from ..output import describe_firsts, emit, format_bytes
from ..progress import ProgressReport
from ..ray_workers import RayResources, extract_on_ray
from ..reading import open_for_reading
from ..signals import StopSignals
from .draft import draft_over


def run_extract(
    target: str,
    prompts: tuple[str, ...],
    out: str,
    first_drafter: str | Path | None,
    config: VpdConfig,
    as_json: bool,
    ray: RayResources | None = None,
) -> ExtractReport:
    """Extracts, and drafts if there is a first drafter.

    Args:
        ray: workers on a Ray cluster that extract; None: this process extracts.
    """
    if not as_json:
        click.echo(config_yaml(config, ["extract"]), err=True)
    drafter = find_drafter(first_drafter) if first_drafter is not None else None
    prepared = prepare(ExtractJob(target, prompts, out, config.extract))
    show_first_record(prepared.manifest)
    if drafter is not None:
        check_drafter(drafter, prepared.manifest)
    check_space(open_storage(out), prepared.plan, prepared.manifest, config.extract)
    drafting = FirstDrafting(drafter, config.draft, config.read) if drafter is not None else None
    report = extract_beside_drafting(prepared, drafting, ray)
    was_stopped = report.stopped_by is not None
    if drafting is not None and not report.num_left and not was_stopped:
        draft_over(open_for_reading(out, config.read), drafting)
    cache = Cache.open(out, allow_empty=True)
    result = {
        "cache": out,
        "num_sequences": len(cache),
        "num_tokens": cache.num_tokens,
        "num_bytes": cache.num_bytes,
        **report.to_json(),
    }
    emit(result, as_json, describe_extraction(result))
    if report.num_left or (drafting is not None and was_stopped):
        left = f"{report.num_left} sequences" if report.num_left else "first drafts"
        click.echo(f"vpd: stopped; {left} are left, the same command continues.", err=True)
    report.require_confirmed()
    return report


def extract_beside_drafting(
    prepared: Prepared, drafting: FirstDrafting | None, ray: RayResources | None
) -> ExtractReport:
    """Extracts here or on Ray until the job is done or a signal comes; drafts meanwhile where that slows nothing."""
    job = prepared.job
    with StopSignals(f"within {job.settings.stop_seconds:.0f} s, with the sequences in the engine") as signals:

        def must_stop() -> bool:
            return signals.received is not None

        beside = drafting is not None and can_draft_beside(is_engine_elsewhere=ray is not None)
        with drafting_beside(job.out, drafting, must_stop) if drafting and beside else nullcontext():
            if ray is not None:
                report = extract_on_ray(job, prepared, ray, must_stop)
            else:
                with ProgressReport("extract", prepared.plan.num_left, "tokens") as progress:
                    report = work_on(prepared, progress.advance, must_stop, progress.begin)
        report.stopped_by = signals.received
        return report


def describe_extraction(result: dict[str, Any]) -> str:
    num_checked = result["num_checked"]
    return (
        f"{result['cache']}: {result['num_sequences']} sequences, {result['num_tokens']} tokens, "
        f"{format_bytes(result['num_bytes'])} ({result['num_written']} written now, {result['num_present']} there "
        f"before; skipped: {result['skipped'] or 'none'}). Of {num_checked} greedy choices compared, the stored states "
        f"confirm {num_checked - result['num_argmax_differing']}.{describe_rules(result['rules'])}"
        f"{describe_audit(result['audit'])}{describe_firsts(result['first_skipped'])}"
    )


def describe_rules(found: dict[str, int]) -> str:
    return f" Rules applied to records: {found}." if found else ""


def describe_audit(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    return (
        f" {found['num_sequences']} of them ({found['num_tokens']} tokens) were extracted a second time to compare: "
        f"worst relative error {found['worst_relative_error']:.1e}, mean {found['mean_relative_error']:.1e}; "
        f"{found['argmax_agreement']:.2%} of the choices agree."
    )
