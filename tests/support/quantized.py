"""Targets in the quantized forms of compressed-tensors, made by hand from a target with plain weights."""

# O outputs, I inputs, g weights of a group
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
SYMMETRIC = {"symmetric": True, "dynamic": False}


def to_int8(weight_OI: Tensor) -> dict[str, Tensor]:
    scale_O1 = weight_OI.abs().amax(dim=1, keepdim=True) / 127
    return {"weight": (weight_OI / scale_O1).round().to(torch.int8), "weight_scale": scale_O1}


def to_float8(weight_OI: Tensor) -> dict[str, Tensor]:
    scale_O1 = weight_OI.abs().amax(dim=1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    return {"weight": (weight_OI / scale_O1).to(torch.float8_e4m3fn), "weight_scale": scale_O1}


def to_int4(weight_OI: Tensor) -> dict[str, Tensor]:
    groups_OGg = weight_OI.unflatten(1, (-1, GROUP))
    scale_OG1 = groups_OGg.abs().amax(dim=2, keepdim=True) / 7
    codes_OI = (groups_OGg / scale_OG1).round().flatten(1).to(torch.int8)
    return {
        "weight_packed": pack_to_int32(codes_OI, 4),
        "weight_scale": scale_OG1.squeeze(2),
        "weight_shape": torch.tensor(weight_OI.shape),
    }


FORMS: dict[str, tuple[str, Callable[[Tensor], dict[str, Tensor]], dict[str, Any], bool]] = {
    "int8": ("int-quantized", to_int8, {"num_bits": 8, "type": "int", "strategy": "channel"}, True),
    "float8": ("float-quantized", to_float8, {"num_bits": 8, "type": "float", "strategy": "channel"}, True),
    "int4": (
        "pack-quantized",
        to_int4,
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP},
        False,
    ),
}
"""Name -> form in compressed-tensors, how a matrix is quantized, how its codes are described, and whether the layers'
inputs are quantized too."""


def quantize(folder: Path, name: str) -> Path:
    """Quantizes the layers' matrices of a saved target; embedding, norms and head stay as they are."""
    form, to_codes, described, has_quantized_inputs = FORMS[name]
    weights: dict[str, Tensor] = {}
    for key, value in load_file(folder / "model.safetensors").items():
        if not key.endswith("_proj.weight"):
            weights[key] = value
            continue
        weights |= {f"{key.removesuffix('weight')}{part}": code for part, code in to_codes(value).items()}
    save_file(
        {key: value.contiguous() for key, value in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    inputs = {**described, "strategy": "token", "symmetric": True, "dynamic": True} if has_quantized_inputs else None
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": described | SYMMETRIC, "input_activations": inputs}
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder
