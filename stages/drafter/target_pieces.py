"""The target's pieces that stage two needs, embedding and LM head, as stored once with the cache."""

# V vocabulary, H hidden width, P positions, I inputs, O outputs
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from ...data.cache.target_files import PIECE_FACTS, PIECES
from ...data.errors import DrafterError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"
LOGITS_ON_CPU, LOGITS_ON_GPU = 6 << 20, 1 << 27
"""Logits that exist at once. On a CPU they should fit into the processor's caches, and yet be enough for a fast matrix
product."""


@dataclass(frozen=True, slots=True)
class TargetPieces:
    """Frozen tensors of the target; with tied weights `head_VH` and `embed_VH` are one tensor, unless one is scaled."""

    embed_VH: Tensor
    """What the target's embedding module gives, which for some targets is a multiple of its weight."""
    head_VH: Tensor
    """The LM head, with the factor by which some targets multiply its outputs."""
    logits_soft_cap: float | None = None
    """The target's logits are `cap * tanh(outputs / cap)` of the head's outputs; None = they are these outputs."""

    @classmethod
    def load(
        cls, target_folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> TargetPieces:
        """Reads the pieces from a cache's `target_folder`."""
        facts = load_piece_facts(target_folder)
        with safe_open(target_folder / PIECES, "pt", device=str(device)) as file:
            weight_VH = file.get_tensor(EMBED).to(dtype)
            tied = HEAD not in set(file.keys())
            head_VH = weight_VH if tied else file.get_tensor(HEAD).to(dtype)
        return cls(
            _scaled(weight_VH, facts.get("embedding_multiplier", 1.0)),
            _scaled(head_VH, facts.get("logits_multiplier", 1.0)),
            facts.get("logits_soft_cap"),
        )


def load_piece_facts(target_folder: Path) -> dict[str, float]:
    """What the target does around its embedding and its head, as stored with the cache; empty if nothing."""
    path = target_folder / PIECE_FACTS
    return json.loads(path.read_text()) if path.is_file() else {}


def _scaled(matrix: Tensor, multiplier: float) -> Tensor:
    return matrix if multiplier == 1 else matrix * torch.tensor(multiplier, dtype=matrix.dtype, device=matrix.device)


def positions_per_chunk(head_VH: Tensor) -> int:
    """Number of positions whose logits are computed together."""
    return max(1, (LOGITS_ON_CPU if head_VH.device.type == "cpu" else LOGITS_ON_GPU) // len(head_VH))


def linear(x_PI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` [P, O] without a gradient, for the largest products, those with the frozen LM head.

    In float32 on a CPU, oneDNN computes the product: PyTorch's choice, MKL, is half as fast on AMD's processors.
    """
    if x_PI.device.type == "cpu" and x_PI.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x_PI, weight_OI, bias_O, "none", [], "")
    return F.linear(x_PI, weight_OI, bias_O)


def load_target_config(target_folder: Path) -> dict[str, Any]:
    """The target's `config.json` as stored with the cache."""
    return json.loads((target_folder / "config.json").read_text())


def full_attention_theta(target: dict[str, Any]) -> float:
    """The base of RoPE in the target's full-attention layers, from its `config.json` in any of the usual spellings.

    Raises:
        DrafterError: the config does not say.
    """
    for name in ("rope_parameters", "rope_scaling"):
        rope = target.get(name) or {}
        kinds = [kind for kind in rope.values() if isinstance(kind, dict)]  # by type of layer
        rope = rope.get("full_attention") or (kinds[0] if len(kinds) == 1 else rope)
        if isinstance(theta := rope.get("rope_theta"), int | float):
            return float(theta)
    for name in ("rope_theta", "global_rope_theta", "rotary_emb_base"):
        if isinstance(theta := target.get(name), int | float):
            return float(theta)
    raise DrafterError(
        "expected the RoPE base of full-attention layers in the target's config (rope_parameters or rope_theta), found "
        f"{ {name: target[name] for name in target if 'rope' in name} or 'nothing of RoPE' }. Set drafter.rope_theta."
    )


def load_tokenizer(target_folder: Path) -> PreTrainedTokenizerBase:
    """The target's tokenizer as stored with the cache.

    Raises:
        DrafterError: the tokenizer needs code of the target, which the cache does not hold.
    """
    from transformers import AutoTokenizer  # Its import takes longer than that of PyTorch.

    try:
        return AutoTokenizer.from_pretrained(target_folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare exceptions
        raise DrafterError(
            f"the target's tokenizer in {target_folder} can't be loaded without the target's own code: "
            f"{' '.join(str(error).split())[:300]}. For training, set drafter.mask_token_id."
        ) from error


def choose_mask_token(explicit: int | None, target_folder: Path, vocab_size: int) -> int:
    """The mask token's id: the given one, else that of the tokenizer in `target_folder`, else the first id that no
    token uses.

    Raises:
        DrafterError: there is none of these, or the given id lies outside the vocabulary.
    """
    if explicit is not None:
        if not 0 <= explicit < vocab_size:
            raise DrafterError(
                f"expected a mask token id within the vocabulary of {vocab_size}, got {explicit}. "
                "Set drafter.mask_token_id to a token that never occurs in text."
            )
        return explicit
    tokenizer = load_tokenizer(target_folder)
    mask_token_id: Any = getattr(tokenizer, "mask_token_id", None)
    if mask_token_id is not None:
        return int(mask_token_id)
    if len(tokenizer) < vocab_size:
        return len(tokenizer)
    raise DrafterError(
        f"the tokenizer has no mask token and uses all {vocab_size} slots of the vocabulary. "
        "Set drafter.mask_token_id to a special token that never occurs in text."
    )
