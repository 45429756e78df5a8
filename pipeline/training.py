"""Runs trainers for people: configuration shown, progress, metrics and trackers, a clean stop on a signal."""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Sequence
from typing import Any

import click

from ..data.errors import ConfigError
from ..stages.config import TrainConfig
from ..stages.train.loop import run_together
from ..stages.train.trainer import Trainer
from .config import VpdConfig, config_yaml
from .progress import ProgressReport
from .run import SECTIONS, RunFolder
from .signals import StopSignals


def check_trackers(config: TrainConfig) -> None:
    """
    Raises:
        ConfigError: a tracker's package is not installed.
    """
    missing = [name for name in config.trackers if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"train.trackers: {', '.join(missing)} is not installed. Install it, or leave it out: metrics.jsonl holds "
            "the same figures."
        )


def run_trainers(trainers: Sequence[Trainer], folders: Sequence[RunFolder], config: VpdConfig, as_json: bool) -> None:
    """Runs trainers to their last step, each with its folder; exits as a signal would if one stops them."""
    lead = trainers[0]
    is_main = lead.accelerator.is_main_process
    if is_main and not as_json:
        click.echo(config_yaml(config, SECTIONS), err=True)
    for trainer, folder in zip(trainers, folders, strict=True):
        if is_main:
            folder.start(trainer.step)
        if trainer.config.trackers:
            trainer.accelerator.init_trackers(folder.folder.name, plain_values(folder.settings()))
    folder_of = {id(trainer): folder for trainer, folder in zip(trainers, folders, strict=True)}
    note = "compiling" if any(trainer.config.compile for trainer in trainers) else ""
    with StopSignals("after this step") as signals:
        with ProgressReport("train", lead.num_steps - lead.step, "labels", note, quiet=not is_main) as progress:

            def on_step(trainer: Trainer, metrics: dict[str, Any]) -> None:
                step = metrics["step"]
                if step % trainer.config.log_every == 0 or step == trainer.num_steps or "alpha" in metrics:
                    if is_main:
                        folder_of[id(trainer)].log(metrics)
                    trainer.accelerator.log(plain_values(metrics), step=step)
                if trainer is next(each for each in trainers if each.failure is None):
                    progress.advance(metrics["num_labels"], describe_step(metrics))

            finished = run_together(trainers, on_step, lambda: signals.received is not None)
        for trainer in trainers:
            trainer.accelerator.end_training()
        if not finished and is_main:
            done = f"step {lead.step} of {lead.num_steps}"
            click.echo(f"vpd: stopped after {done}, which is saved; the same command continues.", err=True)
    if not finished:
        sys.exit(128 + (signals.received or signal.SIGTERM))


def describe_step(metrics: dict[str, Any]) -> str:
    note = (
        f"step {metrics['step']}  loss {metrics['loss']:.3f}  first token right {metrics['accept_rate'][0]:.0%}  "
        f"{metrics['tokens_per_second']:.0f} tokens/s  data wait {metrics['data_wait']:.0%}"
    )
    return note + (f"  alpha {metrics['alpha']:.3f}" if "alpha" in metrics else "")


def plain_values(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values as trackers take them: `accept_rate/1`, `train/lr`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list | tuple):
            value = {str(i): each for i, each in enumerate(value, start=1)}
        if isinstance(value, dict):
            found |= plain_values(value, f"{prefix}{name}/")
        elif value is not None:
            found[f"{prefix}{name}"] = value
    return found
