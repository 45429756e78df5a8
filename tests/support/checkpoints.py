"""Checkpoints of drafters with random weights, and changes to them."""

# H hidden width
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from vpd.stages.drafter.checkpoint import save_drafter
from vpd.stages.drafter.model import Drafter
from vpd.stages.drafter.shape import DrafterShape

from support.tiny import SHAPE

H = SHAPE.hidden_size


def make_drafter(shape: DrafterShape = SHAPE) -> Drafter:
    drafter = Drafter(shape)
    drafter.init_weights(torch.Generator().manual_seed(0))
    return drafter


def save(folder: Path, drafter: Drafter, **files: Any) -> Path:
    config = drafter.shape.to_json(training_mode="vp_drafter", prefix_weight_base=0.9)
    save_drafter(drafter.state_dict(), folder, config, files or None)
    return folder


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


def save_pieces(folder: Path, dtype: torch.dtype = torch.float32, tied: bool = False) -> dict[str, torch.Tensor]:
    """The target's pieces as a cache holds them."""
    generator = torch.Generator().manual_seed(3)
    names = ["embed_tokens.weight"] if tied else ["embed_tokens.weight", "lm_head.weight"]
    pieces = {name: torch.randn(20, H, generator=generator).to(dtype) for name in names}
    pieces["norm.weight"] = torch.rand(H, generator=generator).to(dtype)
    folder.mkdir()
    save_file(pieces, folder / "pieces.safetensors")
    return pieces
