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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...data.cache.manifest import CacheManifest
from ...data.cache.storage.files import fsync_folder, fsync_tree
from ...data.errors import DrafterError, StorageError
from .model import Drafter
from .shape import DrafterShape
from .target_pieces import load_piece_facts
from .weights import advice_for, check_copies, check_weights

CONFIG, WEIGHTS, MASK_EMBEDDING = "config.json", "model.safetensors", "mask_embedding.pt"
FILES = (CONFIG, WEIGHTS, f"{WEIGHTS}.index.json", MASK_EMBEDDING)
"""The files of a drafter's folder that vpd looks at."""


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
        DrafterError: there is no readable `config.json` of a DFlash drafter that vpd computes.
    """
    if not (Path(folder) / CONFIG).exists():
        raise DrafterError(
            f"expected a drafter at {folder}, found no {CONFIG} there. Give the folder of a DFlash checkpoint."
        )
    path = Path(folder) / CONFIG
    shape = DrafterShape.from_json(read_json(path), str(path))
    if (extra := Path(folder) / MASK_EMBEDDING).exists():
        raise DrafterError(
            f"{extra}: this drafter has an embedding of its own for the mask token, which vpd does not support. Give "
            "a drafter that takes the target's embedding."
        )
    return shape


def read_json(path: Path) -> Any:
    """The content of a drafter's config.

    Raises:
        DrafterError: the file is damaged or can't be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DrafterError(f"{path}: expected a drafter's config.json: {error.strerror}. Restore the file.") from None
    except (ValueError, RecursionError) as error:
        raise DrafterError(f"{path} is not JSON: {error}. {advice_for(path)}") from None


def load_drafter(
    folder: str | Path,
    *,
    target_folder: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Drafter:
    """Loads a drafter from a folder in the public DFlash form.

    Args:
        target_folder: a cache's `target_folder`. Copies of the target's weights beside the drafter's must equal the
            target's weights there; None: such copies are refused.

    Raises:
        DrafterError: files are missing, or the weights are no numbers or not of the shape that `config.json` says.
    """
    drafter = _empty_drafter(load_shape(folder))
    path = Path(folder) / WEIGHTS
    if copies := check_weights(path, _weight_shapes(drafter)):
        check_copies(path, copies, target_folder)
    with safe_open(path, "pt", device=str(device)) as file:
        weights = {name: file.get_tensor(name).to(dtype) for name in drafter.state_dict()}
    if wrong := next((name for name, value in weights.items() if not value.isfinite().all()), None):
        raise DrafterError(
            f"{path}: expected numbers in {wrong}, found NaN or infinite values (as {dtype}), so the training of the "
            "drafter failed or the file is damaged. Give another checkpoint."
        )
    drafter.load_state_dict(weights, assign=True)
    return drafter.requires_grad_(False).eval()


def _empty_drafter(shape: DrafterShape) -> Drafter:
    with torch.device("meta"):
        return Drafter(shape)


def _weight_shapes(drafter: Drafter) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in drafter.state_dict().items()}


def check_drafter(folder: str | Path, manifest: CacheManifest) -> DrafterShape:
    """Checks that a drafter is whole and was made for a cache's states; reads no weight.

    Raises:
        DrafterError: files are missing or damaged, or the drafter does not fit.
    """
    shape = load_shape(folder)
    check_fits(shape, manifest, folder)
    check_weights(Path(folder) / WEIGHTS, _weight_shapes(_empty_drafter(shape)))
    return shape


def drafter_fingerprint(folder: str | Path, target_folder: Path | None = None) -> str:
    """Hash of a drafter's weights and shape, which decide its drafts; 16 hex digits.

    All else in the folder that could decide them is refused when the shape and the weights are read.

    Args:
        target_folder: a cache's `target_folder`. If that target scales its embedding or its logits, which decides the
            drafts too, the hash covers this; None: the target does not.

    Raises:
        DrafterError: files are missing.
    """
    digest = hashlib.sha256(repr(load_shape(folder)).encode())
    if target_folder is not None and (facts := load_piece_facts(target_folder)):
        digest.update(json.dumps(facts, sort_keys=True).encode())
    path = Path(folder) / WEIGHTS
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DrafterError(
            f"expected the weights of a drafter in {path}: {error.strerror}. {advice_for(path)}"
        ) from None
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
        "layers of the target": (manifest.num_target_layers, shape.num_target_layers or manifest.num_target_layers),
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
