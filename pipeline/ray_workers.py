"""Extraction by workers on a Ray cluster: a running one, or else one that is started on this machine."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

from ..data.cache.storage.base import Storage
from ..data.cache.work import finished_units
from ..data.errors import ConfigError, EngineDiedError, ExtractionError, VpdError
from ..stages.extract.manifest import open_cache
from ..stages.extract.sink import ExtractReport
from .extraction import ExtractJob, Prepared, prepare, work_on
from .plugins import load_plugins
from .progress import ProgressReport

RETRIES = 10
"""How often a worker that has died is started again."""
SECONDS_BETWEEN_POLLS = 2.0
SECONDS_TO_END = 60.0
"""Seconds that a worker may take to commit, beyond the time that its engine has to stop."""


@dataclass(frozen=True, slots=True)
class RayResources:
    """Number of workers, and what each of them takes of the cluster."""

    num_workers: int
    num_gpus: float
    num_cpus: float


def extract_on_ray(
    job: ExtractJob, prepared: Prepared, resources: RayResources, must_stop: Callable[[], bool]
) -> ExtractReport:
    """Runs the job with several workers.

    A worker that dies, or whose engine dies, is replaced, and the others take over its units. Every node must find
    target, prompts and cache at the same place.

    Args:
        must_stop: once this is true, the workers commit what is finished and end.

    Raises:
        ConfigError: Ray is not installed.
        ExtractionError: the workers ended before the job was done.
        VpdError: a worker found something wrong, and the others have not done the job.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("--ray needs the package ray, which is not installed: pip install 'vpd[ray]'.")
    import ray
    from ray.exceptions import RayError

    report = prepared.plan.report
    if not prepared.plan.num_left:
        return report
    cache = open_cache(job.out, prepared.manifest, prepared.target)
    error: BaseException | None = None
    with (
        redirect_stdout(sys.stderr),  # Ray reports dead workers on standard output, where only the result belongs.
        ProgressReport("extract", len(prepared.plan.units), "units") as progress,
    ):
        if not ray.is_initialized():
            ray.init(log_to_driver=False, configure_logging=False)
        options: dict[str, Any] = {"max_retries": RETRIES, "retry_exceptions": [EngineDiedError]}
        worker = ray.remote(num_cpus=resources.num_cpus, num_gpus=resources.num_gpus, **options)(run_worker)
        pending = [worker.remote(job) for _ in range(resources.num_workers)]
        shown = len(finished_units(cache.storage))
        is_stopping, next_cancel = False, 0.0
        while pending:
            if must_stop() and time.monotonic() >= next_cancel:
                is_stopping = True
                for task in pending:
                    ray.cancel(task)
                # A worker whose process was just starting may have missed it, and is canceled again later.
                next_cancel = time.monotonic() + job.settings.stop_seconds + SECONDS_TO_END
            done, pending = ray.wait(pending, timeout=SECONDS_BETWEEN_POLLS)
            for found in done:
                try:
                    add_report(report, ray.get(found))
                except (RayError, VpdError) as caught:
                    error = caught
            shown = show_units(progress, cache.storage, shown)
    if error is not None:
        report.num_left = prepare(job).plan.num_left
        if report.num_left and not is_stopping:
            raise as_vpd_error(error) from error
    return report


def run_worker(job: ExtractJob) -> ExtractReport:
    """What a worker does, in a process of Ray. Its report does not count what planning has left out."""
    load_plugins()
    prepared = prepare(job)
    planned = prepared.plan.report
    skipped, rules = planned.left_out.counts.copy(), planned.rules.copy()
    report = work_on(prepared)
    report.left_out.counts -= skipped
    report.rules -= rules
    return report


def show_units(progress: ProgressReport, storage: Storage, shown: int) -> int:
    """Advances the progress to the number of finished units; returns that number."""
    finished = len(finished_units(storage))
    for _ in range(finished - shown):
        progress.advance(1)
    return max(finished, shown)


def add_report(report: ExtractReport, found: ExtractReport) -> None:
    """Adds a worker's report to the whole report."""
    report.num_written += found.num_written
    report.num_tokens += found.num_tokens
    report.num_checked += found.num_checked
    report.num_argmax_differing += found.num_argmax_differing
    report.num_left = found.num_left
    report.left_out.update(found.left_out)
    report.rules.update(found.rules)
    if found.audit is not None and found.audit["worst_relative_error"] >= worst_error(report):
        report.audit = found.audit


def worst_error(report: ExtractReport) -> float:
    return 0.0 if report.audit is None else report.audit["worst_relative_error"]


def as_vpd_error(error: BaseException) -> VpdError:
    """The error that a worker raised, or advice after its death."""
    cause: Any = getattr(error, "cause", None)
    if isinstance(cause, VpdError):
        return cause
    return ExtractionError(
        f"Ray's workers ended before the extraction was done: {str(error).splitlines()[0]}. What they committed is "
        "kept. Find the reason in Ray's logs, and run the same command again."
    )
