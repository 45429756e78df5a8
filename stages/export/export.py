"""Writes a drafter as a folder that other programs load, and checks what it wrote."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...data.cache.storage.files import fsync_folder, fsync_tree
from ...data.errors import DrafterError, StorageError
from ..drafter.checkpoint import CONFIG, WEIGHTS, read_json
from ..drafter.model import Drafter
from ..drafter.shape import DrafterShape
from ..evaluate.pair import training_mode
from .card import CARD, model_card
from .check import Agreement, ExportCheck
from .forms import CODE, FORMS, Facts
from .record import read_architectures, read_record, read_report


class Exported(NamedTuple):
    """What an export has written."""

    training_mode: str | None
    """As in `Facts`."""
    num_parameters: int
    num_bytes: dict[str, int]
    """Size of each file by name."""
    agreements: list[Agreement]


def export_drafter(
    drafter: Path, out: Path, form: str, target: str | None = None, report: Path | None = None
) -> Exported:
    """Writes the folder `out`, which holds the same bytes whenever the same drafter is exported.

    Args:
        drafter: a checkpoint's folder.
        form: a key of `FORMS`.
        target: the target's folder or hub id; None: as the drafter's run names it.
        report: a result that `vpd eval --out` wrote, for the model card.

    Raises:
        DrafterError: `out` is not free, the drafter or what its run recorded is damaged, or a reader of the form
            computes something else from the folder. Nothing is written.
        ConfigError: the form needs the target's name, and nobody says it.
        StorageError: the folder can't be written; nothing of it remains.
    """
    out = out.absolute()
    require_free(out)
    check = ExportCheck(drafter)
    record = read_record(drafter)
    found = None if report is None else read_report(report, drafter)
    weights = read_weights(drafter / WEIGHTS, check.shape)
    facts = read_facts(drafter, target or record.target, weights["fc.weight"].dtype)
    config = FORMS[form](check.shape, facts)
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        (aside / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (aside / CARD).write_text(model_card(form, check.shape, facts, record, found), encoding="utf-8")
        if form == "dflash":
            shutil.copyfile(Path(__file__).with_name(CODE), aside / CODE)
        save_file(weights, aside / WEIGHTS, metadata={"format": "pt"})
        shutil.copymode(aside / CONFIG, aside / WEIGHTS)  # safetensors lets nobody else read the file
        agreements = check.run(aside, form)
        fsync_tree(aside)
        os.rename(aside, out)  # in place of an empty folder too
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{out} could not be written: {error}. Nothing of it remains. Choose another OUT."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    fsync_folder(out.parent)
    sizes = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    return Exported(facts.training_mode, sum(value.numel() for value in weights.values()), sizes, agreements)


def require_free(out: Path) -> None:
    """
    Raises:
        DrafterError: something is at the place.
    """
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        what = "a folder that is not empty" if out.is_dir() else "a file"
        raise DrafterError(f"expected a new or empty folder at {out}, found {what}. Choose another OUT, or remove it.")


def read_weights(path: Path, shape: DrafterShape) -> dict[str, torch.Tensor]:
    """The drafter's own weights in the dtype in which they are stored; copies of the target's are left out."""
    with torch.device("meta"):
        names = Drafter(shape).state_dict()
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in names}


def read_facts(drafter: Path, target: str | None, dtype: torch.dtype) -> Facts:
    dflash = read_json(drafter / CONFIG).get("dflash_config") or {}
    return Facts(
        training_mode=training_mode(drafter),
        prefix_weight_base=dflash.get("prefix_weight_base"),
        dtype=str(dtype).removeprefix("torch."),
        target=target,
        target_architectures=read_architectures(target),
    )
