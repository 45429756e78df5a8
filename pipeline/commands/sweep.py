"""`vpd sweep`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...data.errors import ConfigError
from ..config import load_config, parse_assignment
from ..launch import is_launched
from ..output import make_console
from ..progress import ProgressReport
from ..reading import open_for_reading
from ..signals import STOPPED_CODES
from ..sweep import SweepRun, collect, evaluate_run, plan_runs, run_workers, train_all

if TYPE_CHECKING:
    from rich.table import Table


def run_sweep(
    place: str,
    out: Path,
    vary: Sequence[str],
    source: str | None,
    assignments: Sequence[str],
    together: int,
    num_workers: int,
    worker_index: int | None,
    as_json: bool,
) -> int:
    """Trains and evaluates the runs, or this worker's share of them, and shows their acceptance lengths.

    Args:
        source: a recipe's name or a YAML file.
        assignments: settings of all runs, as `KEY=VALUE`.
        together: runs that share one pass over the cache.
        worker_index: the worker whose share is done; None: all shares are done.

    Returns:
        An exit code: 1 if a run has failed.

    Raises:
        ConfigError: a launcher has started this process as one of several.
        Stopped: a signal has stopped the runs.
    """
    if is_launched():
        raise ConfigError(
            "vpd sweep: a launcher has started this command as one of several processes, but each run of a sweep has "
            "one process. Start it once with --num-workers, or once on each machine with --worker-index."
        )
    shared = dict(map(parse_assignment, assignments))
    runs = plan_runs(out, vary, lambda settings: load_config(source, shared | settings))
    if num_workers > 1 and worker_index is None:
        code = run_workers(num_workers, sys.argv[1:])
    else:
        code = train_and_evaluate(place, runs[worker_index or 0 :: num_workers], together, as_json)
    if worker_index is None and code not in STOPPED_CODES:
        show_sweep(runs, as_json)
    return code


def train_and_evaluate(place: str, runs: Sequence[SweepRun], together: int, as_json: bool) -> int:
    """Returns an exit code: 1 if a run has failed."""
    cache = open_for_reading(place, runs[0].config.read)
    failures = train_all(cache, runs, together, as_json)
    finished = [run for run in runs if run.name not in failures]
    with ProgressReport("eval", len(finished)) as progress:
        for run in finished:
            evaluate_run(cache, run)
            progress.advance(note=run.name)
    return int(bool(failures))


def show_sweep(runs: Sequence[SweepRun], as_json: bool) -> None:
    results = collect(runs)
    if as_json:
        click.echo(json.dumps({"runs": results}))
    elif results:
        make_console().print(table_of_runs(results))


def table_of_runs(results: list[dict[str, Any]]) -> Table:
    """The runs with the interval of the last alpha, by which they are sorted."""
    from rich.table import Table

    names = [*results[0]["alpha"]]
    table = Table(title="vpd sweep", title_justify="left")
    table.add_column("run", overflow="fold")
    for name in ("loss", *(f"alpha {name}" for name in names), "95 % interval"):
        table.add_column(name)
    for result in results:
        low, high = result["interval"][names[-1]]
        alphas = [f"{result['alpha'][name]:.3f}" for name in names]
        loss = "not finite" if result["loss"] is None else f"{result['loss']:.3f}"
        table.add_row(result["run"], loss, *alphas, f"{low:.3f}, {high:.3f}")
    return table
