"""The shape of a drafter, and its `config.json` in the public DFlash form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...data.errors import DrafterError

SUPPORTED_ROPE = "default"


@dataclass(frozen=True, kw_only=True, slots=True)
class DrafterShape:
    """The sizes of a drafter's weights and blocks, and the context layers that it reads."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    vocab_size: int
    block_size: int
    """Positions of a block, the anchor included."""
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    """Context layers: id i is the output of the target's 0-based layer i."""
    num_target_layers: int

    def __post_init__(self) -> None:
        if not 2 <= self.block_size <= 255:
            raise DrafterError(f"block_size must be in 2..255, got {self.block_size}. Choose another block size.")
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise DrafterError(
                f"expected a mask token id within the vocabulary of {self.vocab_size}, got {self.mask_token_id}. "
                "Set drafter.mask_token_id to a token that never occurs in text."
            )
        if self.head_dim % 2:
            raise DrafterError(f"expected an even head_dim, which RoPE halves, got {self.head_dim}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise DrafterError(
                f"expected query heads to be a multiple of key-value heads, got {self.num_attention_heads} and "
                f"{self.num_key_value_heads}. Change drafter.num_attention_heads or drafter.num_key_value_heads."
            )

    def to_json(self, *, training_mode: str, prefix_weight_base: float | None) -> dict[str, Any]:
        """The `config.json` that vLLM, SGLang and the public DFlash code read."""
        return {
            "architectures": ["DFlashDraftModel"],
            "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
            "model_type": "qwen3",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "block_size": self.block_size,
            "dflash_config": {
                "causal": False,
                "mask_token_id": self.mask_token_id,
                "prefix_weight_base": prefix_weight_base,
                "target_layer_ids": list(self.target_layer_ids),
                "training_mode": training_mode,
            },
            "dtype": "bfloat16",
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "layer_types": ["full_attention"] * self.num_layers,
            "max_position_embeddings": self.max_position_embeddings,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "num_target_layers": self.num_target_layers,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": SUPPORTED_ROPE},
            "rope_theta": self.rope_theta,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "vocab_size": self.vocab_size,
        }

    @classmethod
    def from_json(cls, config: dict[str, Any], where: str) -> DrafterShape:
        """Reads a published drafter's `config.json`.

        Raises:
            DrafterError: a key is missing, or the drafter needs a feature that vpd does not support.
        """
        if not isinstance(config, dict):
            raise DrafterError(
                f"{where}: expected a JSON object, found {config!r:.40}. Give a DFlash drafter's config."
            )
        dflash = config.get("dflash_config") or {}
        refuse_unsupported(config, where)
        try:
            return cls(
                num_layers=config["num_hidden_layers"],
                hidden_size=config["hidden_size"],
                num_attention_heads=config["num_attention_heads"],
                num_key_value_heads=config["num_key_value_heads"],
                head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
                intermediate_size=config["intermediate_size"],
                rms_norm_eps=config["rms_norm_eps"],
                rope_theta=float(rope_parameters(config)["rope_theta"]),
                max_position_embeddings=config["max_position_embeddings"],
                vocab_size=config["vocab_size"],
                block_size=config["block_size"] if "block_size" in config else dflash["block_size"],
                mask_token_id=dflash["mask_token_id"],
                target_layer_ids=tuple(dflash["target_layer_ids"]),
                num_target_layers=config["num_target_layers"],
            )
        except TypeError as error:
            raise DrafterError(
                f"{where}: a value has the wrong type ({error}). Give a drafter in the public DFlash form."
            ) from None
        except KeyError as error:
            raise DrafterError(
                f"{where}: expected the key {error} of a DFlash drafter's config.json, found none. "
                "Give a drafter in the public DFlash form."
            ) from None


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """RoPE settings of a `config.json`, in the newer form (`rope_parameters`) or the older ones."""
    older = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return {"rope_type": rope.get("type", SUPPORTED_ROPE), **older, **rope}


def refuse_unsupported(config: dict[str, Any], where: str) -> None:
    """Refuses variants of the architecture that this drafter would compute wrongly.

    Raises:
        DrafterError: the drafter is such a variant.
    """
    rope = rope_parameters(config)
    # Without `layer_types`, the layers from `max_window_layers` on have a sliding window.
    slides_by_count = (
        config.get("layer_types") is None
        and bool(config.get("use_sliding_window"))
        and config.get("sliding_window") is not None
        and config.get("max_window_layers", 0) < config.get("num_hidden_layers", 1)
    )
    reasons = {
        f"RoPE of type {rope['rope_type']}": rope["rope_type"] != SUPPORTED_ROPE,
        "partial rotary embeddings": config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) != 1.0,
        "sliding-window layers": slides_by_count or "sliding_attention" in (config.get("layer_types") or []),
        "causal blocks": bool((config.get("dflash_config") or {}).get("causal", False)),
        f"activation {config.get('hidden_act')}": config.get("hidden_act", "silu") != "silu",
        "attention biases": bool(config.get("attention_bias", False)),
    }
    found = [reason for reason, present in reasons.items() if present]
    if found:
        raise DrafterError(f"{where}: this drafter has {', '.join(found)}, which vpd does not support.")
