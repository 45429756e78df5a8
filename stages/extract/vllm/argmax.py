"""The target's greedy choices, computed from its captured states."""

# T tokens, H hidden width, V vocabulary
from __future__ import annotations

import torch
from torch import Tensor, nn

from ....data.errors import TargetError
from ...drafter.target_pieces import linear
from ..target import Target, read_pieces


class ArgmaxHead:
    """Final norm and LM head of the target: last layer's output in, greedy choice out.

    Monotone maps of the logits (scaling, soft-capping) are left out, because they do not change the choice.
    """

    def __init__(self, target: Target):
        """
        Raises:
            TargetError: the target's final norm or LM head can't be found.
        """
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        pieces = {name: value.to(device) for name, value in read_pieces(target).items()}
        weights = {name.removeprefix("norm."): value for name, value in pieces.items() if name.startswith("norm.")}
        self._norm = make_final_norm(target, weights).to(device)
        self._head_VH = pieces.get("lm_head.weight", pieces["embed_tokens.weight"]).to(dtype)
        self._bias_V = pieces["lm_head.bias"].to(dtype) if "lm_head.bias" in pieces else None

    @torch.inference_mode()
    def __call__(self, states_TH: Tensor, tokens_per_chunk: int = 512) -> Tensor:
        """Choices, int64 [T], for states [T, H] before the final norm."""
        choices = []
        for chunk in states_TH.split(tokens_per_chunk):
            normed = self._norm(chunk.to(self._head_VH.device, torch.float32)).to(self._head_VH.dtype)
            choices.append(linear(normed, self._head_VH, self._bias_V).argmax(dim=-1).cpu())
        return torch.cat(choices)


def make_final_norm(target: Target, weights: dict[str, Tensor]) -> nn.Module:
    """The target's final norm in float32: the module of transformers' class for this target, as norms differ.

    Raises:
        TargetError: transformers' class has no single module between the last layer and the head.
    """
    name = target.architecture.norm
    if name is None:
        raise TargetError(
            f"expected one final norm between the last layer and the head of transformers' class for "
            f"{target.config.model_type}, found none or several modules. Choose --engine transformers."
        )
    norm = target.architecture.module(name).float()
    norm.load_state_dict({name: value.float() for name, value in weights.items()}, assign=True)
    return norm
