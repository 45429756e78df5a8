"""Reading `config.json`: published forms, and refusals of unsupported variants."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.tiny import SHAPE
from transformers import Qwen3Config
from vpd.data.errors import DrafterError
from vpd.stages.drafter.checkpoint import load_shape
from vpd.stages.drafter.shape import DrafterShape, check_config

# The form of published first drafters, which are older than the `rope_parameters` key.
PUBLISHED: dict[str, Any] = {
    "architectures": ["DFlashDraftModel"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
    "block_size": 16,
    "bos_token_id": 151643,
    "dflash_config": {"mask_token_id": 151669, "target_layer_ids": [1, 9, 17, 25, 33]},
    "dtype": "bfloat16",
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "layer_types": ["full_attention"] * 5,
    "max_position_embeddings": 40960,
    "max_window_layers": 5,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 5,
    "num_key_value_heads": 8,
    "num_target_layers": 36,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def write_config(folder: Path, config: object) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_published_config_is_read(tmp_path: Path):
    assert load_shape(write_config(tmp_path, PUBLISHED)) == DrafterShape(
        num_layers=5,
        hidden_size=4096,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=12288,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=40960,
        vocab_size=151936,
        block_size=16,
        mask_token_id=151669,
        target_layer_ids=(1, 9, 17, 25, 33),
        num_target_layers=36,
    )


@pytest.mark.parametrize(
    ("removed", "added", "changed"),
    [
        pytest.param("head_dim", {"hidden_size": 2048}, {"hidden_size": 2048, "head_dim": 64}, id="head-dim-derived"),
        pytest.param(
            "rope_theta",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}},
            {"rope_theta": 1e4},
            id="rope-parameters",
        ),
        pytest.param(
            "block_size",
            {"dflash_config": {**PUBLISHED["dflash_config"], "block_size": 8}},
            {"block_size": 8},
            id="block-size-in-dflash-config",
        ),
        pytest.param(
            "layer_types",
            {"dflash_config": {**PUBLISHED["dflash_config"], "causal": False}},
            {},
            id="causal-said-no",
        ),
        pytest.param("hidden_act", {"rope_scaling": {"type": "default"}}, {}, id="default-rope-in-its-older-spelling"),
    ],
)
def test_spellings_of_published_configs(tmp_path: Path, removed: str, added: dict[str, Any], changed: dict[str, Any]):
    plain = load_shape(write_config(tmp_path, PUBLISHED))
    config = {key: value for key, value in PUBLISHED.items() if key != removed} | added
    assert load_shape(write_config(tmp_path, config)) == replace(plain, **changed)


# Refusals


def test_a_folder_without_config_is_no_drafter(tmp_path: Path):
    with pytest.raises(DrafterError, match=r"found no config\.json"):
        load_shape(tmp_path / "nowhere")


def test_a_file_in_place_of_the_folder_is_no_drafter(tmp_path: Path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(DrafterError):
        load_shape(tmp_path / "model.safetensors")


@pytest.mark.parametrize("text", ['{"a": ', ""], ids=["cut", "empty"])
def test_a_config_that_is_not_json_is_named(tmp_path: Path, text: str):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(DrafterError, match=r"config\.json is not JSON"):
        load_shape(tmp_path)


@pytest.mark.parametrize("content", [[], "text", None], ids=["list", "string", "null"])
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, content: object):
    with pytest.raises(DrafterError, match=r"config\.json"):
        load_shape(write_config(tmp_path, content))


TOP_KEYS = [
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
    "vocab_size",
    "block_size",
]


@pytest.mark.parametrize("key", ["block_size", "hidden_size", "mask_token_id", "target_layer_ids"])
def test_a_key_of_null_is_a_missing_key(tmp_path: Path, key: str):
    dflash = PUBLISHED["dflash_config"]
    config = PUBLISHED | ({"dflash_config": {**dflash, key: None}} if key in dflash else {key: None})
    with pytest.raises(DrafterError, match=f"expected the key '{key}'"):
        load_shape(write_config(tmp_path, config))


def test_the_number_of_the_targets_layers_may_be_missing(tmp_path: Path):
    config = {name: value for name, value in PUBLISHED.items() if name != "num_target_layers"}
    assert load_shape(write_config(tmp_path, config)).num_target_layers is None


@pytest.mark.parametrize("key", TOP_KEYS)
def test_a_missing_key_is_named(tmp_path: Path, key: str):
    config = {name: value for name, value in PUBLISHED.items() if name != key}
    with pytest.raises(DrafterError, match=f"expected the key '{key}'"):
        load_shape(write_config(tmp_path, config))


@pytest.mark.parametrize("key", ["mask_token_id", "target_layer_ids"])
def test_a_missing_key_of_the_dflash_config_is_named(tmp_path: Path, key: str):
    dflash = {name: value for name, value in PUBLISHED["dflash_config"].items() if name != key}
    with pytest.raises(DrafterError, match=f"expected the key '{key}'"):
        load_shape(write_config(tmp_path, {**PUBLISHED, "dflash_config": dflash}))


def test_a_config_of_another_model_is_refused(tmp_path: Path):
    config = {name: value for name, value in PUBLISHED.items() if name != "dflash_config"}
    with pytest.raises(DrafterError, match="'mask_token_id'"):
        load_shape(write_config(tmp_path, config))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        pytest.param(("dflash_config", "mask_token_id"), None, id="mask-token-null"),
        pytest.param(("dflash_config", "target_layer_ids"), None, id="layers-null"),
        pytest.param(("num_attention_heads",), "32", id="text-for-a-number"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(tmp_path: Path, path: tuple[str, ...], value: object):
    config = json.loads(json.dumps(PUBLISHED))
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(DrafterError, match=r"config\.json"):
        load_shape(write_config(tmp_path, config))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
OLDER_LINEAR = {"type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("added", "reason"),
    [
        pytest.param({"rope_scaling": YARN}, "RoPE of type yarn", id="yarn"),
        pytest.param({"rope_parameters": {**YARN, "rope_theta": 1e6}}, "RoPE of type yarn", id="yarn-newer-spelling"),
        pytest.param({"rope_scaling": OLDER_LINEAR}, "RoPE of type linear", id="linear-older-spelling"),
        pytest.param({"partial_rotary_factor": 0.5}, "partial rotary", id="partial-rotary"),
        pytest.param(
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25}},
            "partial rotary",
            id="partial-rotary-newer-spelling",
        ),
        pytest.param(
            {"layer_types": ["full_attention"] * 4 + ["sliding_attention"], "sliding_window": 2048},
            "sliding-window",
            id="sliding-layer",
        ),
        pytest.param(
            # Without `layer_types`, the layers from `max_window_layers` on have a sliding window.
            {"layer_types": None, "use_sliding_window": True, "sliding_window": 2048, "max_window_layers": 2},
            "sliding-window",
            id="sliding-layers-older-spelling",
        ),
        pytest.param({"dflash_config": {**PUBLISHED["dflash_config"], "causal": True}}, "causal", id="causal"),
        pytest.param({"attention_bias": True}, "attention_bias", id="attention-bias"),
        pytest.param({"hidden_act": "gelu"}, "gelu", id="another-activation"),
    ],
)
def test_what_would_be_computed_differently_is_refused(tmp_path: Path, added: dict[str, Any], reason: str):
    with pytest.raises(DrafterError, match=reason):
        load_shape(write_config(tmp_path, PUBLISHED | added))


def with_dflash(**keys: Any) -> dict[str, Any]:
    return {"dflash_config": {**PUBLISHED["dflash_config"], **keys}}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "is-causal": ({"is_causal": True}, "is_causal"),
    "is-causal-against-dflash": ({"is_causal": False, **with_dflash(causal=True)}, "dflash_config.causal"),
    "interleaved-rope": ({"is_neox_style": False}, "is_neox_style: expected True, found False"),
    "interleaved-rope-older": ({"rope_is_neox_style": False}, "rope_is_neox_style"),
    "gemma-norm": ({"use_gemma_norm": True}, "use_gemma_norm"),
    "mlp-bias": ({"mlp_bias": True}, "mlp_bias"),
    "value-scale": (with_dflash(attention_value_scale=0.5), "dflash_config.attention_value_scale"),
    "output-multiplier": (with_dflash(output_multiplier=2.0), "output_multiplier"),
    "soft-cap": (with_dflash(final_logit_softcapping=30.0), "final_logit_softcapping: expected none, found 30.0"),
    "embedding-scale": (with_dflash(input_embedding_scale=11.3), "input_embedding_scale"),
    "anchor-predicts": (with_dflash(sample_from_anchor=True), "sample_from_anchor"),
    "shifted-labels": (with_dflash(shift_label=True), "shift_label"),
    "windows": (with_dflash(use_swa=True, swa_window_size=512), "use_swa"),
    "sinks": ({"add_swa_attention_sink_bias": True}, "add_swa_attention_sink_bias"),
    "dspark": (with_dflash(projector_type="dspark"), "projector_type: expected 'dflash', found 'dspark'"),
    "domino": (with_dflash(projector_type="domino", pure_draft_prefix_len=1), "projector_type.*pure_draft_prefix_len"),
    "prefix-without-projector": (with_dflash(pure_draft_prefix_len=1), "pure_draft_prefix_len"),
    "confidences": (with_dflash(enable_confidence_head=True), "enable_confidence_head"),
    "markov": (with_dflash(markov_rank=256), "markov_rank"),
    "convolution": (with_dflash(conv_kernel_size=2), "conv_kernel_size"),
    "own-head": ({"has_own_lm_head": True}, "has_own_lm_head"),
    "smaller-vocabulary": ({"draft_vocab_size": 32000}, "draft_vocab_size: expected vocab_size = 151936, found 32000"),
    "another-width": ({"target_hidden_size": 2048}, "target_hidden_size"),
    "layers-of-others": ({"layer_types": ["full_attention"] * 4}, "layer_types: expected num_hidden_layers = 5"),
    "linear-attention": ({"layer_types": ["linear_attention"] * 5}, "linear_attention"),
    "another-model": ({"model_type": "llama"}, "model_type"),
    **{
        name: ({"architectures": [name]}, f"architectures: expected DFlashDraftModel, found '{name}'")
        for name in (
            "DFlash2DraftModel",
            "DSparkDraftModel",
            "Qwen3DSparkModel",
            "DominoDraftModel",
            "LiLiCorrDraftModel",
            "Qwen3XPressModel",
            "Qwen3ForCausalLM",
        )
    },
    "quantized": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: unknown key"),
    "experts": ({"num_experts": 8}, "num_experts"),
    "misspelt": ({"hiden_act": "gelu"}, "hiden_act: unknown key, nearest: hidden_act"),
    "misspelt-inside": (with_dflash(mask_token=3), "dflash_config.mask_token: unknown key, nearest: mask_token_id"),
    "misspelt-and-false": ({"is_neox_stlye": False}, "nearest: is_neox_style"),
    "rope-of-layers": (
        {"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4}}},
        "RoPE of type yarn",
    ),
    "rope-misspelt": ({"rope_parameters": {"rope_theta": 1e6, "rope_factor": 2}}, "rope_factor"),
    "rope-theta-of-zero": ({"rope_theta": 0}, "rope_theta 0"),
    "true-for-a-number": ({"num_hidden_layers": True}, "num_hidden_layers: expected a whole number"),
    "huge": ({"hidden_size": 10**12}, "hidden_size: expected a whole number"),
    "negative": ({"vocab_size": -1}, "vocab_size"),
    "epsilon": ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
    "layer-of-text": (with_dflash(target_layer_ids=["1"]), "target_layer_ids"),
    "two-block-sizes": (with_dflash(block_size=8), "block_size: found 16, and 8 in dflash_config"),
    "two-rope-thetas": (
        {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
        "rope_theta 1000000.0 and 10000.0 at once",
    ),
    "rope-of-text": ({"rope_parameters": "default"}, "rope_parameters"),
}


@pytest.mark.parametrize(("added", "reason"), REFUSED.values(), ids=REFUSED)
def test_every_key_that_changes_the_computation_is_refused_by_name(added: dict[str, Any], reason: str):
    with pytest.raises(DrafterError, match=reason) as caught:
        check_config(PUBLISHED | added, "some/config.json")
    assert str(caught.value).startswith("some/config.json: ")
    with pytest.raises(DrafterError, match=reason):
        DrafterShape.from_json(PUBLISHED | added, "some/config.json")


@pytest.mark.parametrize(
    "added",
    [
        with_dflash(training_mode="vp_drafter", prefix_weight_base=1.2, causal=False),
        {"is_causal": False, "is_neox_style": True, "use_gemma_norm": False, "draft_vocab_size": 151936},
        {"torch_dtype": "bfloat16", "transformers_version": "4.57.0", "pad_token_id": None, "_name_or_path": "x"},
        {"quantization_config": None, "use_bidirectional": False, "output_attentions": False, "temperature": 1.0},
        with_dflash(final_logit_softcapping=None, attention_value_scale=1.0, use_swa=False, swa_window_size=None),
        with_dflash(projector_type="dflash", pure_draft_prefix_len=1, shift_label=False, enable_confidence_head=False),
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1000000}}},
        {"rope_parameters": {"rope_theta": 1000000, "mrope_section": [11, 11, 10], "mrope_interleaved": True}},
    ],
    ids=["training", "said", "bookkeeping", "off", "none", "plain-of-domino", "rope-of-layers", "rope-of-images"],
)
def test_keys_that_change_nothing_pass(added: dict[str, Any]):
    plain = DrafterShape.from_json(PUBLISHED, "")
    assert DrafterShape.from_json(PUBLISHED | added, "") == plain


def test_a_plain_drafter_in_the_form_of_speculators_is_read():
    """That library leaves out what Qwen3's config has by default, and counts layers from the embedding on."""
    defaults = Qwen3Config().to_dict()
    own = {name: PUBLISHED[name] for name in ("num_hidden_layers", "num_key_value_heads", "intermediate_size")}
    own |= {"layer_types": PUBLISHED["layer_types"], "max_position_embeddings": 40960, "model_type": "qwen3"}
    own |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "hidden_size": 4096, "head_dim": 128}
    layers = {name: value for name, value in own.items() if value != defaults.get(name) or name == "model_type"}
    assert "hidden_size" not in layers
    config = {
        "architectures": ["DFlashSpeculator"],
        "speculators_model_type": "dflash",
        "speculators_version": "0.9.0",
        "speculators_config": {"algorithm": "dflash"},
        "transformer_layer_config": layers,
        "model_type": "speculator_model",
        "aux_hidden_state_layer_ids": [2, 10, 18, 26, 34],
        "mask_token_id": 151669,
        "block_size": 16,
        "draft_vocab_size": 151936,
        "target_hidden_size": None,
        "sliding_window_non_causal": False,
        "projector_type": "dflash",
        "pure_draft_prefix_len": 1,
        "emb_dim": 256,
        "gru_hidden_dim": 1024,
        "lambda_base_start": 1.0,
        "shift_label": False,
        "sample_from_anchor": False,
    }
    plain = DrafterShape.from_json(PUBLISHED, "")
    assert DrafterShape.from_json(config, "") == replace(plain, num_target_layers=None)
    for change, reason in (
        ({"speculators_model_type": "dflash2"}, "dflash2"),
        ({"projector_type": "domino"}, "domino"),
        ({"draft_vocab_size": 32000}, "draft_vocab_size"),
        ({"sample_from_anchor": True}, "sample_from_anchor"),
        ({"aux_hidden_state_layer_ids": None}, "aux_hidden_state_layer_ids"),
        ({"dflash_config": {"mask_token_id": 5}}, "found 151669 in speculators' form and 5"),
        ({"transformer_layer_config": None}, "transformer_layer_config"),
        ({"transformer_layer_config": layers | {"model_type": "llama"}}, "llama"),
        ({"transformer_layer_config": layers | {"layer_types": ["sliding_attention"] * 5}}, "sliding-window"),
    ):
        with pytest.raises(DrafterError, match=reason):
            DrafterShape.from_json(config | change, "")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param({"mask_token_id": 20}, "mask token id within the vocabulary of 20, got 20", id="mask-outside"),
        pytest.param({"mask_token_id": -1}, "mask token id within the vocabulary", id="mask-negative"),
        pytest.param({"block_size": 1}, "block_size", id="block-of-one"),
        pytest.param({"block_size": 256}, "block_size", id="block-beyond-a-byte"),
        pytest.param({"num_key_value_heads": 3}, "multiple of key-value heads", id="heads-do-not-divide"),
        pytest.param({"head_dim": 5}, "head_dim", id="odd-head-width"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, Any], reason: str):
    with pytest.raises(DrafterError, match=reason):
        replace(SHAPE, **change)


@pytest.mark.parametrize("block_size", [2, 255])
def test_extreme_block_sizes_are_possible(block_size: int):
    assert replace(SHAPE, block_size=block_size).block_size == block_size


@pytest.mark.parametrize("name", ["num_layers", "head_dim", "intermediate_size"])
def test_sizes_that_no_machine_holds_are_refused(name: str):
    with pytest.raises(DrafterError, match="below 2147483648"):
        replace(SHAPE, **{name: 10**30})
