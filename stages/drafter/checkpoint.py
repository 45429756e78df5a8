"""Drafter checkpoints in the public DFlash form: `config.json` and `model.safetensors`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...data.cache.manifest import CacheManifest
from ...data.cache.storage.files import fsync_folder, fsync_tree
from ...data.errors import DrafterError, StorageError
from .model import Drafter
from .shape import DrafterShape

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_drafter(
    weights: Mapping[str, Tensor], folder: Path, config: dict[str, Any], extra: dict[str, Any] | None = None
) -> None:
    """Writes a checkpoint under another name, with fsync, and renames it. Weights are stored as bfloat16.

    Args:
        weights: a drafter's `state_dict`.
        config: the result of `DrafterShape.to_json`.
        extra: further files, by name the object for `torch.save`.

    Raises:
        StorageError: the checkpoint can't be written; nothing of it remains.
    """
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    stored = {name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in weights.items()}
    try:
        (aside / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_file(stored, aside / WEIGHTS, metadata={"format": "pt"})
        for name, content in (extra or {}).items():
            torch.save(content, aside / name)
        fsync_tree(aside)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise StorageError(
            f"the checkpoint {folder} could not be written: {error}. Is the disk full? Older checkpoints are "
            "unchanged. Repair that, and the same command continues from the latest."
        ) from error
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(aside, folder)
    fsync_folder(folder.parent)


def load_shape(folder: str | Path) -> DrafterShape:
    """Reads a drafter's shape.

    Raises:
        DrafterError: there is no readable `config.json` of a DFlash drafter.
    """
    path = Path(folder) / CONFIG
    try:
        return DrafterShape.from_json(json.loads(path.read_text()), str(path))
    except (FileNotFoundError, NotADirectoryError):
        raise DrafterError(
            f"expected a drafter at {folder}, found no {CONFIG} there. Give the folder of a DFlash checkpoint."
        ) from None
    except json.JSONDecodeError as error:
        raise DrafterError(f"{path} is not JSON: {error}. Restore the file.") from None


def load_drafter(
    folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Drafter:
    """Loads a drafter from a folder in the public DFlash form.

    Raises:
        DrafterError: files are missing, or the weights do not have the shape that `config.json` says.
    """
    shape = load_shape(folder)
    path = Path(folder) / WEIGHTS
    try:
        weights = load_file(path, device=str(device))
    except (FileNotFoundError, SafetensorError) as error:
        raise DrafterError(f"expected the weights of a drafter in {path}: {error}. Restore the file.") from None
    with torch.device("meta"):
        drafter = Drafter(shape)
    expected = {name: tuple(value.shape) for name, value in drafter.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if expected != found:
        name = sorted(expected.items() ^ found.items())[0][0]
        raise DrafterError(
            f"{path} does not fit its {CONFIG}: for {name} expected {expected.get(name, 'nothing')}, "
            f"found {found.get(name, 'nothing')}. Give a checkpoint in the public DFlash form."
        )
    drafter.load_state_dict({name: value.to(dtype) for name, value in weights.items()}, assign=True)
    return drafter.requires_grad_(False).eval()


def drafter_fingerprint(folder: str | Path) -> str:
    """Hash of a drafter's weights and shape, which decide its drafts; 16 hex digits.

    Raises:
        DrafterError: files are missing.
    """
    digest = hashlib.sha256(repr(load_shape(folder)).encode())
    try:
        with open(Path(folder) / WEIGHTS, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except FileNotFoundError:
        raise DrafterError(f"expected the weights of a drafter in {Path(folder) / WEIGHTS}, found none.") from None
    return digest.hexdigest()[:16]


def check_fits(shape: DrafterShape, manifest: CacheManifest, where: str | Path) -> None:
    """Checks that a drafter was made for a cache's states.

    Raises:
        DrafterError: something differs; the message names all differences.
    """
    pairs = {
        "hidden size": (manifest.hidden_size, shape.hidden_size),
        "context layers": (manifest.layer_ids, shape.target_layer_ids),
        "vocabulary": (manifest.vocab_size, shape.vocab_size),
    }
    different = [
        f"{name}: the cache has {ours}, the drafter {theirs}"
        for name, (ours, theirs) in pairs.items()
        if ours != theirs
    ]
    if different:
        raise DrafterError(
            f"the drafter {where} does not fit the cache. {'; '.join(different)}. "
            "Use a drafter made for this target and these layers, or extract a cache with the drafter's layers."
        )
