"""The target's pieces that stage two needs, found in the weight files by the target's own class."""

# O outputs, I inputs of a quantized matrix
from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ...data.errors import TargetError
from .architecture import Architecture, embedding_multiplier
from .weights import DOWNLOAD, Weights

EMBED, HEAD, NORM = "embed_tokens", "lm_head", "norm"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SCALED = ("F8_E4M3", "F8_E5M2", "I8")
"""Types whose values become the weight's when they are multiplied by the scales beside them."""
SCALES = ("weight_scale", "weight_scale_inv")
"""Names of such scales; both are factors."""
OF_INPUTS = ("input_scale", "input_scale_inv", "activation_scale")
"""Names of scales of a layer's inputs, which leave the weight as it is."""
BLOCK = (128, 128)
"""Rows and columns of a block with a scale of its own, unless the config says otherwise."""
UNQUANTIZED = (
    "Stage two needs the embedding, the final norm and the LM head: give a target that leaves these unquantized."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """Where the pieces are in the weight files."""

    architecture: Architecture
    weights: Weights
    names: dict[str, str]
    """Name of a piece, such as `lm_head.weight` -> name of its tensor in the weight files."""
    dtype: torch.dtype
    """Type of the pieces that are dequantized."""
    block: tuple[int, int] = BLOCK
    """Rows and columns of a quantized weight's block."""

    def read(self) -> dict[str, Tensor]:
        """The pieces, dequantized.

        Raises:
            TargetError: a value is no number, or is infinite.
        """
        found = {piece: self._read(name) for piece, name in self.names.items()}
        for piece, value in found.items():
            if not value.isfinite().all():
                raise TargetError(
                    f"expected numbers in {self.names[piece]} in {self.weights.files[self.names[piece]]}, found NaN or "
                    f"infinite values, so the file is damaged. {DOWNLOAD}"
                )
        return found

    def facts(self) -> dict[str, float]:
        """What the target does around embedding and head, by the names of `TargetPieces`; empty if nothing."""
        dtype = self.weights.dtypes[self.names[f"{EMBED}.weight"]]
        logits = {name: value for name, value in asdict(self.architecture.logits_map).items() if value is not None}
        found = {f"logits_{name}": value for name, value in logits.items()}
        found["embedding_multiplier"] = embedding_multiplier(self.architecture, FLOATS.get(dtype, self.dtype))
        return {name: value for name, value in found.items() if name == "logits_soft_cap" or value != 1.0}

    def _read(self, name: str) -> Tensor:
        value = self.weights.read(name)
        scales = scale_name(name, self.weights)
        if self.weights.dtypes[name] in FLOATS or scales is None:
            return value
        return dequantize(value, self.weights.read(scales), self.block).to(self.dtype)


def find_pieces(architecture: Architecture, weights: Weights, config: PretrainedConfig) -> Pieces:
    """
    Raises:
        TargetError: the weights lack a piece, or hold it in a form that vpd can't read.
    """
    names = architecture.checkpoint_names(list(weights.files))
    found: dict[str, str] = {}
    parts = {EMBED: architecture.embed, HEAD: architecture.head}
    if architecture.norm is not None:
        parts[NORM] = architecture.norm
    for piece, module in parts.items():
        for parameter in ("weight", "bias"):
            if getattr(architecture.module(module), parameter, None) is None:
                continue
            name = names.get(f"{module}.{parameter}")
            if piece == HEAD and parameter == "weight" and architecture.is_tied:
                _require_tied(name, found[f"{EMBED}.weight"], weights)
                continue
            if name is None:
                raise _missing(f"{module}.{parameter}", list(names), weights)
            found[f"{piece}.{parameter}"] = name
    text = config.get_text_config()
    quantized = getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None)
    block = _block_of(quantized, weights)
    for piece, name in found.items():
        module, _, parameter = piece.rpartition(".")
        shape = architecture.shapes[f"{parts[module]}.{parameter}"]
        _require_readable(name, shape, weights, quantized, block)
    dtype: Any = getattr(text, "dtype", None) or getattr(config, "dtype", None)
    return Pieces(
        architecture=architecture,
        weights=weights,
        names=found,
        dtype=dtype if dtype in FLOATS.values() else torch.bfloat16,
        block=block,
    )


def _block_of(quantized: Any, weights: Weights) -> tuple[int, int]:
    """
    Raises:
        TargetError: the config's block size is no pair of whole numbers.
    """
    size = quantized.get("weight_block_size") if isinstance(quantized, dict) else None
    if size is None:
        return BLOCK
    if not (isinstance(size, list) and len(size) == 2 and all(type(each) is int and each > 0 for each in size)):
        raise TargetError(
            f"expected two whole numbers from 1 on at quantization_config.weight_block_size in "
            f"{weights.folder / 'config.json'}, found {size!r:.40}. {DOWNLOAD}"
        )
    return size[0], size[1]


def scale_name(name: str, weights: Weights) -> str | None:
    """Name of the scales of a quantized tensor; None if there are none."""
    stem = name.removesuffix("weight")
    return next((stem + scales for scales in SCALES if stem + scales in weights.files), None)


def dequantize(values_OI: Tensor, scales: Tensor, block: tuple[int, int] = BLOCK) -> Tensor:
    """The weight, float32: each value times the scale of its tensor, of its row, or of its block.

    Args:
        scales: of a shape that `scales_fit` takes.
    """
    scales = scales.float()
    rows, columns = values_OI.shape
    if scales.numel() == 1:
        return values_OI.float() * scales.reshape(1, 1)
    if scales.shape in ((rows,), (rows, 1)):
        return values_OI.float() * scales.reshape(rows, 1)
    scales_OI = scales.repeat_interleave(block[0], dim=0)[:rows].repeat_interleave(block[1], dim=1)[:, :columns]
    return values_OI.float() * scales_OI


def scales_fit(scales: tuple[int, ...], shape: tuple[int, ...], block: tuple[int, int]) -> bool:
    """Whether scales of this shape are those of a matrix, of its rows, or of its blocks."""
    if len(shape) != 2:
        return False
    rows, columns = shape
    of_blocks = (-(-rows // block[0]), -(-columns // block[1]))
    return math.prod(scales) == 1 or scales in ((rows,), (rows, 1), of_blocks)


def _missing(name: str, present: list[str], weights: Weights) -> TargetError:
    stem = name.rpartition(".")[0] + "."
    others = sorted(each for each in present if each.startswith(stem))
    if others:
        return TargetError(
            f"expected the tensor {name} in the weights of {weights.folder}, found it quantized in a form that vpd "
            f"can't read ({', '.join(others[:4])}). Stage two needs the embedding, the final norm and the LM head: "
            "give a target that leaves these unquantized, or has them in float8 with scales."
        )
    return TargetError(
        f"expected the tensor {name} of the target's class in the weights of {weights.folder}, found none. The weights "
        "are of another model or incomplete, or config.json is wrong about tie_word_embeddings: download both again."
    )


def _require_tied(head: str | None, embed: str, weights: Weights) -> None:
    """
    Raises:
        TargetError: the weights hold another head than the embedding, which the config says they share.
    """
    if head is None or head == embed:
        return
    if weights.dtypes[head] == weights.dtypes[embed] and torch.equal(weights.read(head), weights.read(embed)):
        return
    raise TargetError(
        f"expected {head} in the weights of {weights.folder} to equal {embed}, since config.json ties them "
        "(tie_word_embeddings), found other values. Engines use different ones of the two: remove the wrong tensor or "
        "correct config.json."
    )


def _require_readable(
    name: str, shape: tuple[int, ...], weights: Weights, quantized: Any, block: tuple[int, int]
) -> None:
    """
    Args:
        shape: that of the class's parameter.

    Raises:
        TargetError: the tensor has another shape, or is quantized and vpd or the engines can't tell how.
    """
    kind, where = weights.dtypes[name], f"{name} in the weights of {weights.folder}"
    if kind not in FLOATS:
        stem, scales = name.removesuffix("weight"), scale_name(name, weights)
        beside = sorted(each.removeprefix(stem) for each in weights.files if each.startswith(stem) and each != name)
        others = set(beside) - {"bias", (scales or "").removeprefix(stem), *OF_INPUTS}
        if kind not in SCALED or scales is None or others:
            raise TargetError(
                f"expected floating-point values at {where}, found {kind} with "
                f"{', '.join(beside) or 'no scales'} beside it, which vpd can't dequantize. {UNQUANTIZED}"
            )
        if not scales_fit(weights.shapes[scales], shape, block):
            raise TargetError(
                f"expected scales for the tensor, for its rows or for its blocks of {block}, for {where} of shape "
                f"{shape}, found scales of shape {weights.shapes[scales]}. {UNQUANTIZED}"
            )
        if quantized is None:
            raise TargetError(
                f"{where} is quantized ({kind}), but {weights.folder / 'config.json'} has no quantization_config, "
                "without which engines read the codes as the weights. Download config.json again."
            )
    if weights.shapes[name] != shape:
        raise TargetError(
            f"expected the shape {shape} at {where}, which {weights.folder / 'config.json'} asks for, found "
            f"{weights.shapes[name]}. The weights are of another model, or a size in config.json is wrong or absent: "
            "download both again."
        )
