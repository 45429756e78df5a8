"""The target's greedy choices from its captured states."""

# T tokens, H hidden width, V vocabulary
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...data.errors import TargetError
from .target import Target, read_pieces


class ArgmaxHead:
    """The target's greedy choice after each token, from its last layer's output before the final norm.

    Monotone maps of the logits (scaling, soft-capping) do not change the choice and are left out.
    """

    def __init__(self, target: Target):
        kind = target.config.model_type
        # Gemma stores its norm weights less one.
        self._norm_offset = 1.0 if kind.startswith("gemma") else 0.0
        self._eps = float(getattr(target.config, "rms_norm_eps", 0.0))
        if not self._eps:
            raise TargetError(
                f"expected a target whose final norm is an RMSNorm, got model type {kind} without rms_norm_eps. "
                "Choose --engine transformers."
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        pieces = {name: value.to(device, dtype) for name, value in read_pieces(target).items()}
        self._norm_H = pieces["norm.weight"].float() + self._norm_offset
        self._head_VH = pieces.get("lm_head.weight", pieces["embed_tokens.weight"])

    @torch.inference_mode()
    def __call__(self, states_TH: Tensor, tokens_per_chunk: int = 512) -> Tensor:
        """int64 [T] for states [T, H]."""
        choices = []
        for chunk in states_TH.split(tokens_per_chunk):
            chunk = chunk.to(self._head_VH.device, torch.float32)
            normed = F.rms_norm(chunk, self._norm_H.shape, self._norm_H, self._eps).to(self._head_VH.dtype)
            choices.append((normed @ self._head_VH.T).argmax(dim=-1).cpu())
        return torch.cat(choices)
