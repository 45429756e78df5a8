"""Checkpoints of a run: a drafter in the public form, and beside it what resuming needs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...data.cache.storage.files import write_text_durably
from ...data.errors import DrafterError
from ..drafter.checkpoint import CONFIG, WEIGHTS
from ..hub import find_model

CHECKPOINTS, STATE, ALPHA = "checkpoints", "training_state.pt", "alpha.json"
STATE_VERSION = 2
NAME = re.compile(r"step-(\d+)")


def checkpoint_path(run: Path, step: int) -> Path:
    return run / CHECKPOINTS / f"step-{step:07d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first; one that was being written has another name."""
    found = [path for path in (run / CHECKPOINTS).glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name)


def keep_latest(run: Path, keep: int) -> None:
    """Removes all checkpoints but the latest, and the best of each measure."""
    best = best_checkpoints(run)
    for path in list_checkpoints(run)[:-keep]:
        if path not in best:
            # By another name first: half a checkpoint is none.
            shutil.rmtree(path.rename(path.with_name(f".{path.name}.removed.tmp")))


def remove_unfinished(run: Path) -> None:
    """Removes what processes that were killed have left of checkpoints that they wrote or removed."""
    for path in (run / CHECKPOINTS).glob(".step-*.tmp"):
        shutil.rmtree(path)


class Judgement(NamedTuple):
    """What a checkpoint's replay has given."""

    alpha: float
    measure: dict[str, Any]
    """JSON values that say how it was measured; what was measured in another way is no match for it."""


def note_judgement(checkpoint: Path, judgement: Judgement) -> None:
    write_text_durably(checkpoint / ALPHA, json.dumps(judgement._asdict()) + "\n")


def read_judgement(checkpoint: Path) -> Judgement | None:
    """None if it was not evaluated."""
    path = checkpoint / ALPHA
    return Judgement(**json.loads(path.read_text())) if path.is_file() else None


def best_checkpoints(run: Path) -> list[Path]:
    """The first checkpoint of best acceptance length by each measure; the measure of the latest one judged is last."""
    judged: dict[str, list[tuple[Path, float]]] = {}
    for path in list_checkpoints(run):
        if (found := read_judgement(path)) is not None:
            measure = json.dumps(found.measure, sort_keys=True)
            judged[measure] = [*judged.pop(measure, []), (path, found.alpha)]
    return [max(alike, key=lambda item: item[1])[0] for alike in judged.values()]


def best_checkpoint(run: Path) -> Path | None:
    """The best of the checkpoints that were judged as the latest was; None if none was judged."""
    return next(reversed(best_checkpoints(run)), None)


def find_drafter(name: str | Path) -> Path:
    """The drafter's folder that a user means: a checkpoint's, a run's best checkpoint or its latest, or one of the hub.

    Raises:
        DrafterError: there is none of these.
    """
    folder = find_model(str(name), (CONFIG, WEIGHTS), "drafter", DrafterError)
    if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
        return folder
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise DrafterError(
            f"expected a drafter in {folder}: a checkpoint ({CONFIG}, {WEIGHTS}) or a run with checkpoints; found "
            "neither. Train one with `vpd train`, or give a DFlash checkpoint."
        )
    return best_checkpoint(folder) or checkpoints[-1]


def load_state(checkpoint: Path) -> dict[str, Any]:
    """What `STATE` holds: version, step, weights (float32), their average, optimizers and schedules.

    Raises:
        DrafterError: it is missing or of another version.
    """
    path = checkpoint / STATE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, RuntimeError, EOFError) as error:
        raise DrafterError(f"expected the training state at {path}: {error}. Remove this checkpoint.") from None
    if state["version"] != STATE_VERSION:
        raise DrafterError(f"{path} has version {state['version']}, this vpd reads {STATE_VERSION}.")
    return state
