"""Checkpoints of a run: a drafter in the public form, and beside it what resuming needs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from ...data.cache.files import write_text_durably
from ...data.errors import DrafterError
from ..drafter.checkpoint import CONFIG, WEIGHTS

CHECKPOINTS, STATE, BEST = "checkpoints", "training_state.pt", "best.json"
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
    """Removes all checkpoints but the latest, and the best."""
    best = best_checkpoint(run)
    for path in list_checkpoints(run)[:-keep]:
        if path != best:
            # By another name first: half a checkpoint is none.
            shutil.rmtree(path.rename(path.with_name(f".{path.name}.removed.tmp")))


def remove_unfinished(run: Path) -> None:
    """Removes what processes that were killed have left of checkpoints that they wrote or removed."""
    for path in (run / CHECKPOINTS).glob(".step-*.tmp"):
        shutil.rmtree(path)


def note_alpha(run: Path, step: int, alpha: float, measure: dict[str, Any]) -> None:
    """Makes a checkpoint the best one, if its acceptance length is.

    Args:
        measure: JSON values that say how it was measured; what was measured in another way is no match for it.
    """
    path = run / BEST
    best = json.loads(path.read_text()) if best_checkpoint(run) is not None else None
    if best is None or best.get("measure") != measure or alpha > best["alpha"]:
        write_text_durably(path, json.dumps({"step": step, "alpha": alpha, "measure": measure}) + "\n")


def best_checkpoint(run: Path) -> Path | None:
    """The checkpoint of best acceptance length; None if none was evaluated."""
    path = run / BEST
    if not path.is_file():
        return None
    found = checkpoint_path(run, json.loads(path.read_text())["step"])
    return found if found.is_dir() else None


def find_drafter(folder: str | Path) -> Path:
    """The drafter's folder that a user means: a checkpoint, or a run, of which it is the best checkpoint or the latest.

    Raises:
        DrafterError: there is neither.
    """
    folder = Path(folder)
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
