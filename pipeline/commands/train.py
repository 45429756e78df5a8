"""`vpd train`."""

from __future__ import annotations

import atexit
import gc
import sys
from pathlib import Path

from ...stages.train.checkpoints import list_checkpoints
from ...stages.train.plan import make_trainer
from ..config import VpdConfig
from ..launch import is_launched, launch
from ..output import emit
from ..reading import open_for_reading
from ..run_folder import RunFolder
from ..training import check_trackers, run_trainers


def run_train(place: str, out: Path, config: VpdConfig, as_json: bool, num_processes: int = 1) -> int | None:
    """Trains a run to its last step.

    Args:
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
    folder = RunFolder(out, config, cache)
    trainer = make_trainer(cache, out, config.drafter, config.train, config.read, config.eval)
    run_trainers([trainer], [folder], config, as_json)
    if trainer.accelerator.is_main_process:
        checkpoint = str(list_checkpoints(out)[-1])
        emit({"run": str(out), "step": trainer.step, "checkpoint": checkpoint}, as_json, f"trained: {checkpoint}")
    return None
