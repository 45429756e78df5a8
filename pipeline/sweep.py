"""Several runs from one cache: those that read the same sequences train together, in one pass over it."""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table

from ..data.cache.cache import Cache
from ..data.cache.index import SequenceIndex
from ..data.cache.storage.files import write_text_durably
from ..data.errors import ConfigError, NonFiniteError
from ..stages.evaluate.replay import Replay
from ..stages.holdout import split_rows
from ..stages.train.checkpoints import find_drafter
from ..stages.train.plan import make_trainer, plan_replay
from ..stages.train.trainer import Trainer
from .config import VpdConfig
from .launch import run_all
from .options import from_text, leaf_fields
from .run_folder import METRICS, SECTIONS, RunFolder
from .training import check_trackers, run_trainers

SHARED = ("seed", "batch_tokens", "tokens_per_pass", "max_len", "holdout", "log_every", "precision")
"""Settings that runs trained together have in common, beside the number of steps."""
EVALUATION = "eval.json"


@dataclass(frozen=True, slots=True)
class SweepRun:
    """One run of a sweep."""

    name: str
    folder: Path
    config: VpdConfig


def combinations(texts: Sequence[str]) -> list[dict[str, Any]]:
    """Every combination of the values in texts such as `train.lr=[3e-4,6e-4]`.

    Raises:
        ConfigError: a key has no list of values, is none of a run's settings, or is given twice.
    """
    choices = [(key.strip(), from_text(values)) for key, _, values in (text.partition("=") for text in texts)]
    for key, values in choices:
        section = key.partition(".")[0]
        if section not in SECTIONS or key not in leaf_fields(VpdConfig):
            raise ConfigError(f"--vary: expected a setting of {' or '.join(SECTIONS)}, found {key!r}")
        if not isinstance(values, list) or not values:
            raise ConfigError(f"--vary {key}: expected a list of values, such as {key}=[1,2], found {values!r}")
    keys = [key for key, _ in choices]
    if repeated := find_repeated(keys):
        raise ConfigError(f"--vary: {repeated} is given twice. Give all its values in one list.")
    return [dict(zip(keys, found, strict=True)) for found in itertools.product(*(values for _, values in choices))]


def find_repeated(names: Sequence[str]) -> str | None:
    return next((name for i, name in enumerate(names) if name in names[:i]), None)


def run_name(settings: dict[str, Any]) -> str:
    """`lr=0.0003,tau=4`: a folder's name."""
    text = ",".join(f"{key.rpartition('.')[2]}={json.dumps(value)}" for key, value in settings.items())
    return re.sub(r'[" ]', "", text).replace("/", "_")


def plan_runs(out: Path, vary: Sequence[str], configure: Callable[[dict[str, Any]], VpdConfig]) -> list[SweepRun]:
    """One run for each combination.

    Args:
        configure: from a combination's settings to those of its run.

    Raises:
        ConfigError: two runs would have the same folder.
    """
    runs = [SweepRun(run_name(each), out / run_name(each), configure(each)) for each in combinations(vary)]
    if repeated := find_repeated([run.name for run in runs]):
        raise ConfigError(f"--vary: the run {repeated} is asked for twice. Leave out values that repeat.")
    return runs


def run_workers(num_workers: int, arguments: list[str]) -> int:
    """The same command in several processes, each with a GPU of its own and its share of the runs; an exit code."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    return run_all(
        [
            ([*arguments, "--worker-index", str(i)], {"CUDA_VISIBLE_DEVICES": devices[i % len(devices)]})
            for i in range(num_workers)
        ],
        as_one=False,
    )


def train_all(cache: Cache, runs: Sequence[SweepRun], together: int, as_json: bool) -> dict[str, NonFiniteError]:
    """Trains the runs to their last steps, at most `together` of them at once; returns those that failed, and why."""
    for run in runs:
        check_trackers(run.config.train)
        plan_replay(cache, held_out_rows(cache, run), run.config.train, run.config.eval)
    alike: defaultdict[tuple[Any, ...], list[SweepRun]] = defaultdict(list)
    for run in runs:
        alike[tuple(getattr(run.config.train, name) for name in SHARED)].append(run)
    failures: dict[str, NonFiniteError] = {}
    for group in alike.values():
        for start in range(0, len(group), together):
            failures |= train_group(cache, group[start : start + together], as_json)
    return failures


def train_group(cache: Cache, runs: Sequence[SweepRun], as_json: bool) -> dict[str, NonFiniteError]:
    """Trains runs that read the same sequences; those at the same step go on together. Failures are told at once."""
    at_step: defaultdict[tuple[int, int], list[tuple[Trainer, RunFolder]]] = defaultdict(list)
    pieces = None
    for run in runs:
        folder = RunFolder(run.folder, run.config, cache)
        trainer = make_trainer(
            cache, run.folder, run.config.drafter, run.config.train, run.config.read, run.config.eval, pieces
        )
        pieces = trainer.pieces
        at_step[trainer.step, trainer.num_steps].append((trainer, folder))
    failures: dict[str, NonFiniteError] = {}
    for found in at_step.values():
        trainers, folders = zip(*found, strict=True)
        try:
            with suppress(NonFiniteError):  # of the last that was left; all are looked at below
                if late := run_trainers(trainers, folders, runs[0].config, as_json):
                    click.echo("vpd: stopped after a run's last step; the same command continues.", err=True)
                    sys.exit(128 + late)
        finally:
            failed = {each.run.name: each.failure for each in trainers if each.failure is not None}
            for name, error in failed.items():
                click.echo(f"vpd: error: {name}: {error}", err=True)
        failures |= failed
    return failures


def held_out_rows(cache: Cache, run: SweepRun) -> SequenceIndex:
    return split_rows(cache, run.config.train.holdout)[1]


def evaluate_run(cache: Cache, run: SweepRun) -> None:
    """Writes the run's acceptance lengths on its held-out sequences beside its checkpoints."""
    config, held_out = run.config, held_out_rows(cache, run)
    checkpoint = find_drafter(run.folder)
    drafts = plan_replay(cache, held_out, config.train, config.eval)
    drafters = (checkpoint, None) if drafts is None else (drafts, checkpoint)
    report = Replay(cache, *drafters, config.eval, config.read).run(held_out)
    found = {"run": run.name, "checkpoint": str(checkpoint), **report.to_json()}
    write_text_durably(run.folder / EVALUATION, json.dumps(found, indent=2) + "\n")


def collect(runs: Sequence[SweepRun]) -> list[dict[str, Any]]:
    """Name, last loss and acceptance lengths of each run that was evaluated, the best first."""
    results = []
    for run in runs:
        if not (run.folder / EVALUATION).is_file():
            continue
        evaluation = json.loads((run.folder / EVALUATION).read_text())
        lines = map(json.loads, (run.folder / METRICS).read_text().splitlines())
        *_, loss = (line["loss"] for line in lines if "loss" in line)
        results.append({"run": run.name, "loss": loss, **evaluation})
    return sorted(results, key=lambda result: -[*result["alpha"].values()][-1])


def show_runs(results: list[dict[str, Any]]) -> Table:
    """A table, with the interval of the last alpha, by which the runs are sorted."""
    settings = [*results[0]["alpha"]]
    table = Table(title="vpd sweep", title_justify="left")
    table.add_column("run", overflow="fold")
    for name in ("loss", *(f"alpha {name}" for name in settings), "95 % interval"):
        table.add_column(name)
    for result in results:
        low, high = result["interval"][settings[-1]]
        alphas = [f"{result['alpha'][name]:.3f}" for name in settings]
        loss = "not finite" if result["loss"] is None else f"{result['loss']:.3f}"
        table.add_row(result["run"], loss, *alphas, f"{low:.3f}, {high:.3f}")
    return table
