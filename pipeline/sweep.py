"""Several runs from one cache: runs that read the same sequences train together, in one pass over the cache."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from ..data.cache.cache import Cache
from ..data.cache.storage.files import write_text_durably
from ..data.errors import ConfigError, NonFiniteError
from ..stages.evaluate.plan import ReplayPlan
from ..stages.holdout import split_rows
from ..stages.train.checkpoints import find_drafter
from ..stages.train.plan import make_trainer, plan_run_replay
from ..stages.train.trainer import Trainer
from .config import VpdConfig
from .launch import run_all
from .options import from_text, leaf_fields
from .run_folder import METRICS, SECTIONS, RunFolder
from .signals import Stopped
from .training import check_trackers, run_trainers

SHARED = ("seed", "batch_tokens", "tokens_per_pass", "max_len", "holdout", "log_every", "precision")
"""Settings that must be equal in runs that train together, beside the number of steps."""
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
        ConfigError: a key has no list of values, is not a setting of a run, or is given twice.
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
    """The first name that was there before, if any."""
    return next((name for i, name in enumerate(names) if name in names[:i]), None)


def run_name(settings: dict[str, Any]) -> str:
    """The folder's name of a run, such as `lr=0.0003,tau=4`."""
    text = ",".join(f"{key.rpartition('.')[2]}={json.dumps(value)}" for key, value in settings.items())
    return re.sub(r'[" ]', "", text).replace("/", "_")


def plan_runs(out: Path, vary: Sequence[str], configure: Callable[[dict[str, Any]], VpdConfig]) -> list[SweepRun]:
    """One run for each combination.

    Args:
        configure: gives the settings of a run from those of its combination.

    Raises:
        ConfigError: two runs would have the same folder.
    """
    runs = [SweepRun(run_name(each), out / run_name(each), configure(each)) for each in combinations(vary)]
    if repeated := find_repeated([run.name for run in runs]):
        raise ConfigError(f"--vary: the run {repeated} is asked for twice. Leave out values that repeat.")
    return runs


def run_workers(num_workers: int, arguments: list[str]) -> int:
    """Runs the command in several processes, each with its own GPU and its share of the runs; returns an exit code."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    return run_all(
        [
            ([*arguments, "--worker-index", str(i)], {"CUDA_VISIBLE_DEVICES": devices[i % len(devices)]})
            for i in range(num_workers)
        ],
        as_one=False,
    )


def train_all(cache: Cache, runs: Sequence[SweepRun], together: int, as_json: bool) -> dict[str, NonFiniteError]:
    """Trains the runs to their last steps, at most `together` of them at once; returns the errors of those that failed.

    Raises:
        ConfigError: a tracker is not installed.
        VpdError: the replay after training is not possible.
        Stopped: a signal has stopped the runs.
    """
    for run in runs:
        check_trackers(run.config.train)
        plan_evaluation(cache, run)
    alike: defaultdict[tuple[Any, ...], list[SweepRun]] = defaultdict(list)
    for run in runs:
        alike[tuple(getattr(run.config.train, name) for name in SHARED)].append(run)
    failures: dict[str, NonFiniteError] = {}
    for group in alike.values():
        for start in range(0, len(group), together):
            failures |= train_group(cache, group[start : start + together], as_json)
    return failures


def train_group(cache: Cache, runs: Sequence[SweepRun], as_json: bool) -> dict[str, NonFiniteError]:
    """Trains runs that read the same sequences; runs at the same step go on together. A failure is shown at once."""
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
            with suppress(NonFiniteError):  # That of the last run; the failures of all runs are shown below.
                if late := run_trainers(trainers, folders, runs[0].config, as_json):
                    click.echo("vpd: stopped after a run's last step; the same command continues.", err=True)
                    raise Stopped(late)
        finally:
            failed = {each.run.name: each.failure for each in trainers if each.failure is not None}
            for name, error in failed.items():
                click.echo(f"vpd: error: {name}: {error}", err=True)
        failures |= failed
    return failures


def plan_evaluation(cache: Cache, run: SweepRun) -> ReplayPlan:
    """The replay of the run's held-out sequences."""
    config = run.config
    _, held_out = split_rows(cache, config.train.holdout)
    return plan_run_replay(cache, held_out, config.train, config.eval, config.read)


def evaluate_run(cache: Cache, run: SweepRun) -> None:
    """Writes the acceptance lengths on the held-out sequences into the run's folder."""
    checkpoint = find_drafter(run.folder)
    report = plan_evaluation(cache, run).run(checkpoint)
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
    return sorted(results, key=lambda result: -result["alpha"].get("d2sd", result["alpha"]["first"]))
