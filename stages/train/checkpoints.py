"""Checkpoints of a run: each is a drafter in the public form, with the training state beside it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...data.cache.storage.files import write_text_durably
from ...data.errors import DrafterError
from ..drafter.checkpoint import CONFIG, FILES, WEIGHTS
from ..drafter.weights import advice_for
from ..hub import find_model

CHECKPOINTS, STATE, ALPHA = "checkpoints", "training_state.pt", "alpha.json"
STATE_VERSION = 2
NAME = re.compile(r"step-(\d+)")


def checkpoint_path(run: Path, step: int) -> Path:
    return run / CHECKPOINTS / f"step-{step:07d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first; an unfinished one has another name."""
    found = [path for path in (run / CHECKPOINTS).glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name)


def keep_latest(run: Path, keep: int) -> None:
    """Removes all checkpoints except the `keep` latest and the best of each measure."""
    best = best_checkpoints(run)
    for path in list_checkpoints(run)[:-keep]:
        if path not in best:
            # Renamed first, so that a checkpoint that is half removed is not taken for a complete one. On NFS a file
            # that another process reads can't be removed yet; `remove_unfinished` does so when the run is continued.
            shutil.rmtree(path.rename(path.with_name(f".{path.name}.removed.tmp")), ignore_errors=True)


def remove_unfinished(run: Path) -> None:
    """Removes unfinished checkpoints, which processes leave behind that are killed while they write or remove one."""
    for path in (run / CHECKPOINTS).glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


class CheckpointResult(NamedTuple):
    """What the evaluation of a checkpoint has given."""

    alpha: float
    """Acceptance length."""
    measure: dict[str, Any]
    """JSON values that say how alpha was measured. Results of different measures are not compared."""


def write_result(checkpoint: Path, result: CheckpointResult) -> None:
    write_text_durably(checkpoint / ALPHA, json.dumps(result._asdict()) + "\n")


def read_result(checkpoint: Path) -> CheckpointResult | None:
    """None if the checkpoint was not evaluated.

    Raises:
        DrafterError: the file is damaged.
    """
    path = checkpoint / ALPHA
    try:
        return CheckpointResult(**json.loads(path.read_text())) if path.is_file() else None
    except (ValueError, TypeError, RecursionError) as error:
        raise DrafterError(
            f"{path}: expected the result of a checkpoint's evaluation: {error}. Remove the file; the checkpoint then "
            "counts as one that was not evaluated."
        ) from None


def best_checkpoints(run: Path) -> list[Path]:
    """The first checkpoint of largest alpha for each measure; the measure that was used last comes last."""
    by_measure: dict[str, list[tuple[Path, float]]] = {}
    for path in list_checkpoints(run):
        if (found := read_result(path)) is not None:
            measure = json.dumps(found.measure, sort_keys=True)
            by_measure[measure] = [*by_measure.pop(measure, []), (path, found.alpha)]
    return [max(alike, key=lambda item: item[1])[0] for alike in by_measure.values()]


def best_checkpoint(run: Path) -> Path | None:
    """The best checkpoint by the measure of the latest evaluated one; None if no checkpoint was evaluated."""
    return next(reversed(best_checkpoints(run)), None)


def find_drafter(name: str | Path) -> Path:
    """The folder of the drafter that a user names.

    The name is a checkpoint's folder, a run's folder (its best checkpoint, else its latest), or a hub id.

    Raises:
        DrafterError: there is no such drafter.
    """
    folder = find_model(str(name), FILES, "drafter", DrafterError)
    if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
        return folder
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        if (folder / CONFIG).is_file():
            raise DrafterError(
                f"expected the weights of a drafter in {folder / WEIGHTS}, found no such file. "
                f"{advice_for(folder / WEIGHTS)}"
            )
        raise DrafterError(
            f"expected a drafter in {folder}: a checkpoint ({CONFIG}, {WEIGHTS}) or a run with checkpoints; found "
            "neither. Train one with `vpd train`, or give a DFlash checkpoint."
        )
    return best_checkpoint(folder) or checkpoints[-1]


def load_state(checkpoint: Path) -> dict[str, Any]:
    """What `STATE` holds: version, step, weights (float32), their average, optimizers and schedules.

    Raises:
        DrafterError: the file is missing, damaged, or of another version.
    """
    path = checkpoint / STATE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, RuntimeError, EOFError) as error:
        raise DrafterError(f"expected the training state at {path}: {error}. Remove this checkpoint.") from None
    if state["version"] != STATE_VERSION:
        raise DrafterError(f"{path} has version {state['version']}, this vpd reads {STATE_VERSION}.")
    return state
