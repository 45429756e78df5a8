"""Runs trainers with progress, metrics and trackers, and stops them in good order on a signal."""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from contextvars import copy_context
from typing import Any

import click

from ..data.errors import ConfigError, NonFiniteError
from ..stages.train.config import TrainConfig
from ..stages.train.loop import run_together
from ..stages.train.trainer import Trainer
from .config import VpdConfig, config_yaml
from .progress import ProgressReport
from .run_folder import SECTIONS, RunFolder
from .signals import Stopped, StopSignals


def check_trackers(config: TrainConfig) -> None:
    """
    Raises:
        ConfigError: the package of a tracker is not installed.
    """
    missing = [name for name in config.trackers if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"train.trackers: {', '.join(missing)} is not installed. Install it, or leave it out: metrics.jsonl holds "
            "the same figures."
        )


def run_trainers(
    trainers: Sequence[Trainer], folders: Sequence[RunFolder], config: VpdConfig, as_json: bool
) -> int | None:
    """Runs trainers to their last step, each with its folder.

    Returns:
        A signal that came when there was nothing left to stop.

    Raises:
        Stopped: a signal has stopped the trainers; the step that they reached is saved.
    """
    lead = trainers[0]
    is_main = lead.accelerator.is_main_process
    if is_main and not as_json:
        click.echo(config_yaml(config, SECTIONS), err=True)
    logs = {id(trainer): RunLog(trainer, folder) for trainer, folder in zip(trainers, folders, strict=True)}
    note = "compiling" if any(trainer.config.compile for trainer in trainers) else ""
    with StopSignals("after this step") as signals:
        with ProgressReport("train", lead.num_steps - lead.step, "labels", note, quiet=not is_main) as progress:

            def on_step(trainer: Trainer, metrics: dict[str, Any]) -> None:
                log = logs[id(trainer)]
                log.add_step(metrics)
                if trainer is next(each for each in trainers if each.failure is None):
                    progress.advance(metrics["num_labels"], describe_step(metrics, log.alpha))

            def on_alpha(trainer: Trainer, alpha: float) -> None:
                logs[id(trainer)].add_alpha(alpha)

            try:
                finished = run_together(trainers, on_step, on_alpha, lambda: signals.received is not None)
            except NonFiniteError:  # Raised in all processes, so that none waits for the others.
                end_all(logs.values())
                raise
        end_all(logs.values())
        if not finished and is_main:
            step = max(trainer.step for trainer in trainers)  # Trainers that failed are behind.
            done = f"step {step} of {lead.num_steps}"
            click.echo(f"vpd: stopped after {done}, which is saved; the same command continues.", err=True)
    if not finished:
        raise Stopped(signals.received or signal.SIGTERM)
    return signals.received


class RunLog:
    """Sends a run's figures to its folder and to trackers. Only the first process does so."""

    def __init__(self, trainer: Trainer, folder: RunFolder):
        self.trainer, self.folder = trainer, folder
        self.alpha: float | None = None
        """Alpha of the latest checkpoint that was replayed."""
        if trainer.accelerator.is_main_process:
            folder.start(trainer.step)
            self._start_trackers()

    def add_step(self, metrics: dict[str, Any]) -> None:
        step = metrics["step"]
        if step % self.trainer.config.log_every == 0 or step == self.trainer.num_steps:
            self._add(step, {name: value for name, value in metrics.items() if name != "step"})

    def add_alpha(self, alpha: float) -> None:
        self.alpha = alpha
        self._add(self.trainer.step, {"alpha": alpha})

    def end(self) -> None:
        """Closes the trackers, and leaves the process group."""
        with redirect_stdout(sys.stderr):
            self.trainer.accelerator.end_training()

    def _add(self, step: int, figures: dict[str, Any]) -> None:
        if self.trainer.accelerator.is_main_process:
            self.folder.log({"step": step, **figures})
            self.trainer.accelerator.log(plain_values(figures), step=step)

    def _start_trackers(self) -> None:
        """Starts one run in each tracker; a run that is continued goes on with the same one.

        Raises:
            ConfigError: a tracker does not start, since nobody is logged in or its server is out of reach.
        """
        accelerator, config, run_id = self.trainer.accelerator, self.trainer.config, self.folder.run_id
        settings = plain_values(self.folder.settings())
        run = {"name": f"{self.folder.folder.name}-{run_id}", "config": settings, "resume": "allow"}
        options = {"trackio": run, "wandb": run | {"id": run_id, "reinit": "create_new"}}
        try:
            with redirect_stdout(sys.stderr):
                # In a context of its own, since trackio ends the run of the present context when the next one starts.
                copy_context().run(accelerator.init_trackers, config.project, None, options)
        except Exception as error:  # of any kind that a tracker raises
            raise ConfigError(
                f"train.trackers: {', '.join(config.trackers)}: did not start ({error}). Leave it out, and start it "
                "later: the same command with trackers continues the run."
            ) from error
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.store_init_configuration(settings)


def end_all(logs: Iterable[RunLog]) -> None:
    for log in logs:
        log.end()


def describe_step(metrics: dict[str, Any], alpha: float | None) -> str:
    note = (
        f"step {metrics['step']}  loss {metrics['loss']:.3f}  first token right {metrics['accept_rate'][0]:.0%}  "
        f"{metrics['tokens_per_second']:.0f} tokens/s  data wait {metrics['data_wait']:.0%}"
    )
    return note if alpha is None else f"{note}  alpha {alpha:.3f}"


def plain_values(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by the flat names that trackers take: `accept_rate/1`, `train/lr`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list | tuple):
            value = {str(i): each for i, each in enumerate(value, start=1)}
        if isinstance(value, dict):
            found |= plain_values(value, f"{prefix}{name}/")
        elif value is not None:
            found[f"{prefix}{name}"] = value
    return found
