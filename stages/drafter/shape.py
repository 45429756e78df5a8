"""The shape of a drafter, and its `config.json` in the public DFlash form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...data.errors import DrafterError
from .public_config import LARGEST, check_keys, is_positive, public_form

SUPPORTED_ROPE = "default"
ROPE_KEYS = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"),
    *("mrope_section", "mrope_interleaved"),  # of images; text has one position for all sections
}


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
    num_target_layers: int | None
    """None: the drafter's config does not say."""

    def __post_init__(self) -> None:
        sizes = (self.num_layers, self.num_attention_heads, self.head_dim, self.intermediate_size)
        if max(sizes) >= LARGEST:
            raise DrafterError(
                f"expected numbers of layers and heads, head_dim and intermediate_size below {LARGEST}, got {sizes}."
            )
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

    def to_json(self, *, training_mode: str | None, prefix_weight_base: float | None) -> dict[str, Any]:
        """The `config.json` that vLLM, SGLang and the public DFlash code read.

        A key without a value is left out, since some readers take null for a value.

        Args:
            training_mode: `dflash` or `vp_drafter`; None: it is not known.
            prefix_weight_base: beta of the prefix lengths that a VP-Drafter was trained with; None: there is none.
        """
        own = {
            "causal": False,
            "mask_token_id": self.mask_token_id,
            "prefix_weight_base": prefix_weight_base,
            "target_layer_ids": list(self.target_layer_ids),
            "training_mode": training_mode,
        }
        config = {
            "architectures": ["DFlashDraftModel"],
            "block_size": self.block_size,
            "dflash_config": _without_none(own),
            "num_target_layers": self.num_target_layers,
            **self.layers_json(),
        }
        return dict(sorted(_without_none(config).items()))

    def layers_json(self) -> dict[str, Any]:
        """The part of `config.json` that describes the layers as those of Qwen3."""
        return {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "dtype": "bfloat16",
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "is_causal": False,
            "layer_types": ["full_attention"] * self.num_layers,
            "max_position_embeddings": self.max_position_embeddings,
            "model_type": "qwen3",
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": SUPPORTED_ROPE},
            "rope_theta": self.rope_theta,
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
        config = check_config(config, where)
        dflash = config.get("dflash_config") or {}

        def required(key: str, level: dict[str, Any] = config) -> Any:
            if level.get(key) is None:
                raise KeyError(key)
            return level[key]

        try:
            num_heads = required("num_attention_heads")
            return cls(
                num_layers=required("num_hidden_layers"),
                hidden_size=required("hidden_size"),
                num_attention_heads=num_heads,
                num_key_value_heads=required("num_key_value_heads"),
                head_dim=config.get("head_dim") or required("hidden_size") // num_heads,
                intermediate_size=required("intermediate_size"),
                rms_norm_eps=required("rms_norm_eps"),
                rope_theta=float(required("rope_theta", rope_parameters(config))),
                max_position_embeddings=required("max_position_embeddings"),
                vocab_size=required("vocab_size"),
                block_size=config.get("block_size") or required("block_size", dflash),
                mask_token_id=required("mask_token_id", dflash),
                target_layer_ids=tuple(required("target_layer_ids", dflash)),
                num_target_layers=config.get("num_target_layers"),
            )
        except DrafterError as error:
            raise DrafterError(f"{where}: {error}") from None
        except (TypeError, ValueError) as error:
            raise DrafterError(
                f"{where}: a value has the wrong type ({error}). Give a drafter in the public DFlash form."
            ) from None
        except KeyError as error:
            raise DrafterError(
                f"{where}: expected the key {error} of a DFlash drafter's config.json, found none. "
                "Give a drafter in the public DFlash form."
            ) from None


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def check_config(content: Any, where: str) -> dict[str, Any]:
    """A drafter's config in the public form, checked for everything that vpd would compute otherwise.

    A key may be absent.

    Raises:
        DrafterError: the drafter needs a feature that vpd does not support, or a key is unknown or has a wrong value.
    """
    config = public_form(content, where)
    check_rope(config, where)
    check_keys(config, where)
    return config


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """RoPE settings of a `config.json`, in the newer form (`rope_parameters`) or the older ones."""
    older = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    rope = {**older, **(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}
    return {"rope_type": rope.get("type", SUPPORTED_ROPE), **rope}


def check_rope(config: dict[str, Any], where: str) -> None:
    """
    Raises:
        DrafterError: the drafter's RoPE is one that vpd does not compute.
    """
    rope = rope_parameters(config)
    levels = config, config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    thetas = [level["rope_theta"] for level in levels if level.get("rope_theta") is not None]
    theta, unknown = rope.get("rope_theta"), [key for key in rope if key not in ROPE_KEYS and rope[key] is not None]
    reasons = {
        f"RoPE of type {rope['rope_type']}": rope["rope_type"] != SUPPORTED_ROPE,
        "partial rotary embeddings": config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) != 1.0,
        f"rope_theta {theta!r:.40}": theta is not None and not is_positive(theta),
        f"RoPE with {', '.join(unknown)}": bool(unknown) and rope["rope_type"] == SUPPORTED_ROPE,
        f"rope_theta {' and '.join(f'{each!r:.40}' for each in thetas)} at once": any(each != theta for each in thetas),
    }
    found = [reason for reason, present in reasons.items() if present]
    if found:
        raise DrafterError(f"{where}: this drafter has {', '.join(found)}, which vpd does not support.")
