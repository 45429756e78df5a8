"""The forms in which a drafter is exported. Weights and their names are the same in all; config.json differs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ...data.errors import ConfigError
from ..drafter.shape import DrafterShape

CODE, CODE_CLASS = "modeling_dflash.py", "DFlashDraftModel"
"""The file with the drafter's model that a folder in the form `dflash` holds, and its class."""
SPECULATORS_VERSION = "0.9.0"
"""The version of speculators whose form is written."""


class Facts(NamedTuple):
    """What `config.json` says beside the drafter's shape."""

    training_mode: str | None
    """`dflash` for a first drafter, `vp_drafter` for a VP-Drafter; None: it is not known."""
    prefix_weight_base: float | None
    dtype: str
    """That of the weights, such as `bfloat16`."""
    target: str | None
    """The target's folder or hub id."""
    target_architectures: list[str]
    """Empty: they are not known."""


def dflash_config(shape: DrafterShape, facts: Facts) -> dict[str, Any]:
    """What vLLM and SGLang load as a DFlash drafter, and transformers with the code in the folder."""
    config = shape.to_json(training_mode=facts.training_mode, prefix_weight_base=facts.prefix_weight_base)
    code = {"AutoModel": f"{CODE.removesuffix('.py')}.{CODE_CLASS}"}
    return dict(sorted({**config, "auto_map": code, "dtype": facts.dtype}.items()))


def speculators_config(shape: DrafterShape, facts: Facts) -> dict[str, Any]:
    """What the library speculators loads, and vLLM through that library's form.

    Raises:
        ConfigError: the target is not known.
    """
    if facts.target is None:
        raise ConfigError(
            "expected the target's name, which the form speculators needs, and the drafter lies in no run that "
            "recorded one. Give --target."
        )
    proposal = {
        "accept_tolerance": 0.0,
        "proposal_type": "greedy",
        "speculative_tokens": shape.block_size - 1,
        "verifier_accept_k": 1,
    }
    training = {"training_mode": facts.training_mode, "prefix_weight_base": facts.prefix_weight_base}
    return {
        "architectures": ["DFlashSpeculator"],
        "aux_hidden_state_layer_ids": [i + 1 for i in shape.target_layer_ids],
        "block_size": shape.block_size,
        "dflash_config": {name: value for name, value in training.items() if value is not None},
        "draft_vocab_size": shape.vocab_size,
        "dtype": facts.dtype,
        "mask_token_id": shape.mask_token_id,
        "sample_from_anchor": False,
        # vLLM reads this as "all layers are causal" if it is false, also where no layer has a window.
        "sliding_window_non_causal": True,
        "speculators_config": {
            "algorithm": "dflash",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"architectures": facts.target_architectures, "name_or_path": facts.target},
        },
        "speculators_model_type": "dflash",
        "speculators_version": SPECULATORS_VERSION,
        "transformer_layer_config": {**shape.layers_json(), "dtype": facts.dtype},
    }


FORMS: dict[str, Callable[[DrafterShape, Facts], dict[str, Any]]] = {
    "dflash": dflash_config,
    "speculators": speculators_config,
}
"""Name -> function that makes `config.json`."""
