"""What a DFlash drafter's `config.json` may say. A checkpoint's config and a config to train by have the same rules.

A key is read, or must have a value that leaves the computation as vpd does it, or says nothing about the computation.
Every other key is refused by name, since other programs may compute something else because of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from ...data.errors import DrafterError

ARCHITECTURES = ("DFlashDraftModel", "DFlashSpeculator")
"""Names of the plain DFlash architecture; the second one is that of the library speculators."""
SIZES = {
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
    "vocab_size",
    "block_size",
    "num_target_layers",
}
"""Keys whose value is a whole number from 1 on."""
READ = SIZES | {
    "architectures",
    "dflash_config",
    "layer_types",
    "max_window_layers",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "use_sliding_window",
}
READ_IN_DFLASH = {"block_size", "loss_type", "mask_token_id", "prefix_weight_base", "target_layer_ids", "training_mode"}
PLAIN: dict[str, tuple[Any, ...]] = {
    "add_swa_attention_sink_bias": (False,),
    "attention_bias": (False,),
    "attention_value_scale": (1,),
    "attn_logit_softcapping": (),
    "causal": (False,),
    "embedding_multiplier": (1,),
    "enable_confidence_head": (False,),
    "final_logit_softcapping": (),
    "has_own_lm_head": (False,),
    "hidden_act": ("silu",),
    "input_embedding_scale": (1,),
    "is_causal": (False,),
    "is_neox_style": (True,),
    "logit_scale": (1,),
    "mlp_bias": (False,),
    "model_type": ("qwen3", "dflash"),
    "output_multiplier": (1,),
    "partial_rotary_factor": (1,),
    "projector_type": ("dflash",),
    "rope_is_neox_style": (True,),
    "sample_from_anchor": (False,),
    "shift_label": (False,),
    "use_aux_hidden_state": (True,),
    "use_gemma_norm": (False,),
    "use_swa": (False,),
}
"""Keys at either level, and the values that leave the computation as it is. None, the value of an absent key, does so
for all of them."""
OF_DOMINO = {
    "auf",
    "emb_dim",
    "gru_hidden_dim",
    "lambda_base_decay_ratio",
    "lambda_base_start",
    "pure_draft_prefix_len",
}
"""Sizes of a Domino head and of its loss; a plain drafter of speculators states them too."""
OF_MARKOV = {
    "confidence_head_alpha",
    "confidence_head_with_markov",
    "conv_group_size",
    "conv_kernel_size",
    "markov_head_type",
    "markov_rank",
    "selector_rank",
    "selector_top_k",
}
"""Sizes of the heads of other drafters; they need no value that leaves the computation as it is."""
HARMLESS = {
    *("attention_dropout", "attn_implementation", "auto_map", "bos_token_id", "chunk_size_feed_forward"),
    *("cross_attention_hidden_size", "decoder_start_token_id", "dtype", "eagle_aux_hidden_state_layer_ids"),
    *("eos_token_id", "finetuning_task", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder"),
    *("label2id", "name_or_path", "output_attentions", "output_hidden_states", "pad_token_id", "prefix"),
    *("problem_type", "return_dict", "return_dict_in_generate", "sep_token_id", "sliding_window_non_causal"),
    *("swa_window_size", "task_specific_params", "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class"),
    *("torch_dtype", "transformers_version", "use_bfloat16", "use_cache"),
    # What older versions of transformers write about generation:
    *("bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping"),
    *("encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id"),
    *("forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size"),
    *("num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "remove_invalid_values"),
    *("repetition_penalty", "suppress_tokens", "temperature", "tf_legacy_loss", "top_k", "top_p", "torchscript"),
    *("typical_p", "pruned_heads"),
}
"""Bookkeeping, and settings that act together with keys that are refused."""
OF_SPECULATORS = {"speculators_config", "speculators_model_type", "speculators_version", "aux_hidden_state_layer_ids"}
NESTED = "transformer_layer_config"
"""The key under which speculators writes the sizes of the layers."""
FULL = "full_attention"
LARGEST = 1 << 31


def public_form(config: Any, where: str) -> dict[str, Any]:
    """A drafter's config in the public DFlash form, which speculators' form is turned into.

    Raises:
        DrafterError: the content is no drafter's config, or one of another kind of drafter.
    """
    if not isinstance(config, dict):
        raise DrafterError(f"{where}: expected a JSON object, found {config!r:.40}. Give a DFlash drafter's config.")
    for name in ("dflash_config", "rope_parameters", "rope_scaling", NESTED):
        if not isinstance(config.get(name, {}), dict if name == NESTED else dict | None):
            raise DrafterError(f"{where}: expected a JSON object in {name}, found {config[name]!r:.40}.")
    config = _from_speculators(config, where) if NESTED in config else config
    rope = config.get("rope_parameters") or {}
    if isinstance(rope.get(FULL), dict):  # by kind of layer; all layers have full attention, else they are refused
        config = {**config, "rope_parameters": rope[FULL]}
    return config


def _from_speculators(config: dict[str, Any], where: str) -> dict[str, Any]:
    layers, layer_ids = config[NESTED] or {}, config.get("aux_hidden_state_layer_ids")
    kind = config.get("speculators_model_type")
    if kind != "dflash" or layers.get("model_type", "qwen3") != "qwen3":
        raise DrafterError(
            f"{where}: expected speculators_model_type dflash with layers of qwen3, found {kind!r} with layers of "
            f"{layers.get('model_type')!r}. vpd reads plain DFlash drafters only."
        )
    if not isinstance(layer_ids, list) or not all(_is_whole(i, 1) for i in layer_ids):
        raise DrafterError(f"{where}: expected whole numbers in aux_hidden_state_layer_ids, found {layer_ids!r:.80}.")
    from transformers import Qwen3Config  # Its import takes seconds.

    # Speculators leaves out the values that are the library's defaults.
    defaults = {
        name: value for name, value in Qwen3Config().to_dict().items() if name in READ and name != "layer_types"
    }
    if {"rope_theta", "rope_scaling"} & layers.keys():
        defaults.pop("rope_parameters", None)
    own = {key: value for key, value in config.items() if key not in {NESTED, "model_type", *OF_SPECULATORS}}
    dflash = {"mask_token_id": own.pop("mask_token_id", None), "target_layer_ids": [i - 1 for i in layer_ids]}
    given = own.get("dflash_config") or {}
    if wrong := [key for key in dflash if given.get(key, dflash[key]) != dflash[key]]:
        raise DrafterError(
            f"{where}: expected one value for {wrong[0]}, found {dflash[wrong[0]]!r:.80} in speculators' form and "
            f"{given[wrong[0]]!r:.80} in dflash_config. Remove the wrong one."
        )
    if own.get("projector_type") is None:
        own["projector_type"] = "dflash"
    return {**defaults, **layers, **own, "num_target_layers": None, "dflash_config": given | dflash}


def check_keys(config: dict[str, Any], where: str) -> None:
    """Checks all keys of a config in the public form except those of RoPE.

    Raises:
        DrafterError: the message names every key that vpd does not compute as other programs do.
    """
    dflash = config.get("dflash_config") or {}
    problems = [*_check_level(config, "", READ), *_check_level(dflash, "dflash_config.", READ_IN_DFLASH)]
    problems += _check_relations(config)
    if problems:
        raise DrafterError(
            f"{where}: {'; '.join(problems)}. vpd computes plain DFlash drafters only: give such a drafter, or remove "
            "a key that the drafter does not need."
        )


def _check_level(level: dict[str, Any], prefix: str, read: set[str]) -> Iterator[str]:
    """What is wrong with the keys of one level of a config."""
    for key, value in level.items():
        shown = f"{prefix}{key}: "
        if key in SIZES and key in read:
            if value is not None and not _is_whole(value, 1):
                yield f"{shown}expected a whole number from 1 on, found {value!r:.40}"
        elif key in PLAIN:
            if value is not None and not any(_same(value, plain) for plain in PLAIN[key]):
                wanted = " or ".join(map(repr, PLAIN[key])) or "none"
                yield f"{shown}expected {wanted}, found {value!r:.40}"
        elif key in OF_DOMINO:
            if value and level.get("projector_type") != "dflash":
                yield f"{shown}found {value!r:.40}, which belongs to another kind of drafter"
        elif key in OF_MARKOV:
            if value:
                yield f"{shown}found {value!r:.40}, which belongs to another kind of drafter"
        elif key not in read | HARMLESS | {"draft_vocab_size", "target_hidden_size"} and not key.startswith("_"):
            yield from _check_unknown(shown, key, value, read | PLAIN.keys())


def _check_unknown(shown: str, key: str, value: Any, known: set[str]) -> Iterator[str]:
    if value is None:
        return
    near = get_close_matches(key, sorted(known), 1, 0.8)
    if near and near[0] != key:
        yield f"{shown}unknown key, nearest: {near[0]}"
    elif value is not False:
        yield f"{shown}unknown key, which may change what the drafter computes; found {value!r:.40}"


def _check_relations(config: dict[str, Any]) -> Iterator[str]:
    """What is wrong with keys that depend on others."""
    for architecture in _as_list(config.get("architectures")):
        if architecture not in ARCHITECTURES:
            yield f"architectures: expected {ARCHITECTURES[0]}, found {architecture!r:.40}"
    num_layers, types = config.get("num_hidden_layers"), config.get("layer_types")
    if types is not None:
        other = [kind for kind in _as_list(types) if kind != FULL]
        if "sliding_attention" in other:
            yield "layer_types: found sliding-window layers (sliding_attention)"
        elif other:
            yield f"layer_types: expected {FULL}, found {other[0]!r:.40}"
        elif num_layers is not None and len(_as_list(types)) != num_layers:
            yield f"layer_types: expected num_hidden_layers = {num_layers!r:.20} entries, found {len(_as_list(types))}"
    elif _slides_by_count(config):
        yield "use_sliding_window: found sliding-window layers from max_window_layers on"
    for key, other in (("draft_vocab_size", "vocab_size"), ("target_hidden_size", "hidden_size")):
        if config.get(key) not in (None, config.get(other)):
            yield f"{key}: expected {other} = {config.get(other)}, found {config[key]!r:.40}"
    epsilon = config.get("rms_norm_eps")
    if epsilon is not None and not is_positive(epsilon):
        yield f"rms_norm_eps: expected a number above 0, found {epsilon!r:.40}"
    dflash = config.get("dflash_config") or {}
    sizes = {level["block_size"] for level in (config, dflash) if _is_whole(level.get("block_size"), 1)}
    if len(sizes) > 1:
        yield f"block_size: found {config['block_size']}, and {dflash['block_size']} in dflash_config"
    layer_ids, mask = dflash.get("target_layer_ids"), dflash.get("mask_token_id")
    if layer_ids is not None and not (layer_ids and all(_is_whole(i, 0) for i in _as_list(layer_ids))):
        yield f"dflash_config.target_layer_ids: expected whole numbers, found {layer_ids!r:.80}"
    if mask is not None and not _is_whole(mask, 0):
        yield f"dflash_config.mask_token_id: expected a whole number, found {mask!r:.40}"


def _slides_by_count(config: dict[str, Any]) -> bool:
    """Whether layers slide that `layer_types` does not name: those from `max_window_layers` on."""
    if not config.get("use_sliding_window") or config.get("sliding_window") is None:
        return False
    first, num_layers = config.get("max_window_layers") or 0, config.get("num_hidden_layers") or 1
    return not (_is_whole(first, 0) and _is_whole(num_layers, 1)) or first < num_layers


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _is_whole(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < LARGEST


def is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _same(value: Any, plain: Any) -> bool:
    """Equality in which True is not 1."""
    return value == plain and isinstance(value, bool) == isinstance(plain, bool)
