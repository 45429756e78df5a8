"""Which of vLLM's classes runs a target whose own class there does not hand out its layers' states."""

from __future__ import annotations

import warnings
from typing import Any

from ..target import Target

BACKEND, EXPERTS_BACKEND = "TransformersForCausalLM", "TransformersMoEForCausalLM"
"""vLLM's classes that run transformers' class of a target, and hand out its layers' states; the second has experts."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def choose_backend(target: Target, engine_args: dict[str, Any]) -> dict[str, Any]:
    """Engine arguments that make vLLM run the target through its Transformers backend; empty where this is no use.

    The argument `model_impl` alone does not serve: vLLM looks for the capture's own class in that backend too.
    """
    asked = engine_args.get("model_impl")
    if "hf_overrides" in engine_args or asked not in (None, "auto", "transformers"):
        return {}
    if asked != "transformers" and _hands_out_states(list(target.model_config.architectures or [])):
        return {}
    if target.model_config is not target.config:
        return {}
    has_experts = any(getattr(target.config, name, None) for name in EXPERTS)
    return {"model_impl": "auto", "hf_overrides": {"architectures": [EXPERTS_BACKEND if has_experts else BACKEND]}}


def _hands_out_states(architectures: list[str]) -> bool:
    """Whether vLLM's own class hands out states (EAGLE-3's interface); also true where vLLM has no class of its own."""
    from vllm.model_executor.models.interfaces import supports_eagle3
    from vllm.model_executor.models.registry import ModelRegistry

    known = [name for name in architectures if name in ModelRegistry.models]
    if not known:
        return True
    try:
        with warnings.catch_warnings():  # of vLLM's modules, which say nothing to users
            warnings.simplefilter("ignore")
            loaded: Any = ModelRegistry.models[known[0]].load_model_cls()
    except ImportError:  # a package of this class is missing, which vLLM itself reports
        return True
    return supports_eagle3(loaded)
