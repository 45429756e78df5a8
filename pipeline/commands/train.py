"""`vpd train`."""

from __future__ import annotations

import atexit
import gc
import sys
from pathlib import Path

import click

from ...data.cache.cache import Cache
from ...stages.holdout import is_held_out
from ...stages.train.checkpoints import list_checkpoints
from ...stages.train.plan import begun_checkpoint, check_agrees, make_trainer, plan_shape
from ..config import VpdConfig, read_drafter_json
from ..launch import is_launched, launch
from ..output import emit
from ..reading import open_for_reading
from ..run_folder import RunFolder
from ..training import check_trackers, run_trainers


def run_train(
    place: str,
    out: Path,
    config: VpdConfig,
    as_json: bool,
    num_processes: int = 1,
    drafter_config: Path | None = None,
) -> int | None:
    """Trains a run to its last step.

    Args:
        drafter_config: a drafter's config.json, whose settings `config` already has; the rest of it is checked.
        num_processes: with more than one, this process starts that many of the same command.

    Returns:
        An exit code if other processes were started.
    """
    if num_processes > 1 and not is_launched():
        return launch(num_processes, sys.argv[1:])
    if is_launched():
        # The process group ends up in reference cycles, and its threads must end before the interpreter does.
        atexit.register(gc.collect)
    cache = open_for_reading(place, config.read)
    check_trackers(config.train)
    if drafter_config is not None:
        shape = plan_shape(cache, config.drafter, begun_checkpoint(out, config.train))
        check_agrees(shape, read_drafter_json(drafter_config), str(drafter_config))
    folder = RunFolder(out, config, cache)
    trainer = make_trainer(cache, out, config.drafter, config.train, config.read, config.eval)
    if trainer.accelerator.is_main_process:
        warn_if_nothing_is_held_out(cache, config.train.holdout)
    run_trainers([trainer], [folder], config, as_json)
    if trainer.accelerator.is_main_process:
        checkpoint = str(list_checkpoints(out)[-1])
        emit({"run": str(out), "step": trainer.step, "checkpoint": checkpoint}, as_json, f"trained: {checkpoint}")
    return None


def warn_if_nothing_is_held_out(cache: Cache, share: float) -> None:
    """Says on standard error that a share above 0 holds out no sequence of a small cache."""
    if share and not any(is_held_out(seq_id, share) for seq_id in cache.rows.strings("seq_id")):
        click.echo(
            f"vpd: --holdout {share} holds out none of {len(cache)} sequences, so vpd eval will have no sequence that "
            "this run was not trained on. Give a larger --holdout.",
            err=True,
        )
