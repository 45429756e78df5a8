"""Drafter checkpoints: the public form others load, and refusal of what would be computed differently."""

# H hidden width
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config
from vpd.data.cache.manifest import CacheManifest
from vpd.data.errors import DrafterError
from vpd.stages.drafter.checkpoint import check_fits, drafter_fingerprint, load_drafter, load_shape, save_drafter
from vpd.stages.drafter.model import Drafter
from vpd.stages.drafter.shape import DrafterShape

H = 8
SHAPE = DrafterShape(
    num_layers=2,
    hidden_size=H,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    intermediate_size=10,
    rms_norm_eps=1e-5,
    rope_theta=500.0,
    max_position_embeddings=64,
    vocab_size=20,
    block_size=5,
    mask_token_id=19,
    target_layer_ids=(1, 3, 5),
    num_target_layers=8,
)
WEIGHT_SHAPES = {
    "fc.weight": (H, 3 * H),
    "hidden_norm.weight": (H,),
    "norm.weight": (H,),
    **{
        f"layers.{i}.{name}.weight": size
        for i in range(2)
        for name, size in {
            "self_attn.q_proj": (4 * 6, H),
            "self_attn.k_proj": (2 * 6, H),
            "self_attn.v_proj": (2 * 6, H),
            "self_attn.o_proj": (H, 4 * 6),
            "self_attn.q_norm": (6,),
            "self_attn.k_norm": (6,),
            "mlp.gate_proj": (10, H),
            "mlp.up_proj": (10, H),
            "mlp.down_proj": (H, 10),
            "input_layernorm": (H,),
            "post_attention_layernorm": (H,),
        }.items()
    },
}
# In the manner of published first drafters, which are older than the `rope_parameters` key.
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


def make_drafter(shape: DrafterShape = SHAPE) -> Drafter:
    drafter = Drafter(shape)
    drafter.init_weights(torch.Generator().manual_seed(0))
    return drafter


def save(folder: Path, drafter: Drafter, **files: Any) -> Path:
    config = drafter.shape.to_json(training_mode="vp_drafter", prefix_weight_base=0.9)
    save_drafter(drafter.state_dict(), folder, config, files or None)
    return folder


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def write_config(folder: Path, config: object) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path / "drafter", make_drafter())


# Saving and loading


def test_what_is_loaded_is_what_was_saved_rounded_to_bfloat16(saved: Path):
    drafter, loaded = make_drafter(), load_drafter(saved)
    assert loaded.shape == SHAPE
    assert not loaded.training
    expected = drafter.state_dict()
    for name, value in loaded.named_parameters():
        assert not value.requires_grad
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name].bfloat16().float()), name
    assert expected.keys() == loaded.state_dict().keys()


def test_a_second_round_trip_changes_nothing(saved: Path, tmp_path: Path):
    again = save(tmp_path / "again", load_drafter(saved))
    assert (again / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    assert (again / "config.json").read_bytes() == (saved / "config.json").read_bytes()


def test_weights_come_in_the_dtype_asked_for(saved: Path):
    assert {value.dtype for value in load_drafter(saved, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_the_weights_file_holds_the_public_names_in_bfloat16(saved: Path):
    weights = load_file(saved / "model.safetensors")
    assert {name: tuple(value.shape) for name, value in weights.items()} == WEIGHT_SHAPES
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}


def test_the_config_holds_what_engines_read(saved: Path):
    config = json.loads((saved / "config.json").read_text())
    expected = {
        "architectures": ["DFlashDraftModel"],
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "model_type": "qwen3",
        "layer_types": ["full_attention", "full_attention"],
        "sliding_window": None,
        "num_target_layers": 8,
        "block_size": 5,
    }
    assert {key: config[key] for key in expected} == expected
    assert config["dflash_config"] == {
        "mask_token_id": 19,
        "target_layer_ids": [1, 3, 5],
        "causal": False,
        "training_mode": "vp_drafter",
        "prefix_weight_base": 0.9,
    }


def test_transformers_reads_the_same_qwen3_fields(saved: Path):
    config = Qwen3Config.from_pretrained(saved)
    names = [
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "rms_norm_eps",
        "max_position_embeddings",
        "vocab_size",
    ]
    assert {name: getattr(config, name) for name in names} == {name: getattr(SHAPE, name) for name in names}
    assert config.num_hidden_layers == 2
    assert config.rope_parameters == {"rope_theta": 500.0, "rope_type": "default"}
    assert (config.hidden_act, config.attention_bias, config.tie_word_embeddings) == ("silu", False, False)


def test_saving_replaces_the_folder_and_leaves_nothing_else(saved: Path):
    (saved / "stale").write_text("")
    save(saved, make_drafter(), **{"state.pt": {"step": 3}})
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors", "state.pt"]
    assert torch.load(saved / "state.pt") == {"step": 3}
    assert [path.name for path in saved.parent.iterdir()] == ["drafter"]


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


def test_a_file_in_place_of_the_folder_is_no_drafter(saved: Path):
    with pytest.raises(DrafterError):
        load_shape(saved / "model.safetensors")


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
    "num_target_layers",
]


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
            # Without `layer_types`, Qwen3 lets every layer from `max_window_layers` on slide.
            {"layer_types": None, "use_sliding_window": True, "sliding_window": 2048, "max_window_layers": 2},
            "sliding-window",
            id="sliding-layers-older-spelling",
        ),
        pytest.param({"dflash_config": {**PUBLISHED["dflash_config"], "causal": True}}, "causal", id="causal"),
        pytest.param({"attention_bias": True}, "attention biases", id="attention-bias"),
        pytest.param({"hidden_act": "gelu"}, "gelu", id="another-activation"),
    ],
)
def test_what_would_be_computed_differently_is_refused(tmp_path: Path, added: dict[str, Any], reason: str):
    with pytest.raises(DrafterError, match=reason):
        load_shape(write_config(tmp_path, PUBLISHED | added))


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


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        pytest.param(
            lambda weights: weights.pop("norm.weight"), r"for norm.weight expected \(8,\), found nothing", id="missing"
        ),
        pytest.param(
            lambda weights: weights.update({"embed_tokens.weight": torch.zeros(20, H)}),
            r"for embed_tokens.weight expected nothing, found \(20, 8\)",
            id="beyond-the-shape",
        ),
        pytest.param(
            lambda weights: weights.update({"fc.weight": torch.zeros(H, 2 * H)}),
            r"for fc.weight expected \(8, 24\), found \(8, 16\)",
            id="another-size",
        ),
    ],
)
def test_weights_that_do_not_fit_the_config_are_named(saved: Path, edit: Callable[..., object], reason: str):
    edit_weights(saved, edit)
    with pytest.raises(DrafterError, match=reason):
        load_drafter(saved)


def test_missing_and_damaged_weights_are_named(saved: Path):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DrafterError, match="expected the weights of a drafter"):
        load_drafter(saved)
    path.unlink()
    for read in (load_drafter, drafter_fingerprint):
        with pytest.raises(DrafterError, match="expected the weights of a drafter"):
            read(saved)


# Fingerprint


def test_the_fingerprint_is_that_of_the_content(saved: Path, tmp_path: Path):
    fingerprint = drafter_fingerprint(saved)
    assert len(fingerprint) == 16
    assert int(fingerprint, 16) >= 0
    assert drafter_fingerprint(save(tmp_path / "elsewhere", make_drafter())) == fingerprint


@pytest.mark.parametrize("place", [-1, -1001], ids=["last-weight", "inner-weight"])
def test_one_weight_changes_the_fingerprint(saved: Path, place: int):
    before = drafter_fingerprint(saved)
    # Cloned: what `load_file` gives may be a view of the file.
    weights = {name: value.clone() for name, value in load_file(saved / "model.safetensors").items()}
    content = bytearray((saved / "model.safetensors").read_bytes())
    content[place] ^= 1
    (saved / "model.safetensors").write_bytes(content)
    changed = load_file(saved / "model.safetensors")
    assert sum(int((changed[name] != value).sum()) for name, value in weights.items()) == 1
    assert drafter_fingerprint(saved) != before


def test_the_fingerprint_covers_large_files_to_their_end(saved: Path):
    content = bytearray(3 << 20)
    fingerprints = set()
    for place in (0, 1 << 20, -1):
        content[place] += 1
        (saved / "model.safetensors").write_bytes(content)
        fingerprints.add(drafter_fingerprint(saved))
    assert len(fingerprints) == 3


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda config: config["dflash_config"].update(mask_token_id=18), id="mask-token"),
        pytest.param(lambda config: config["dflash_config"].update(target_layer_ids=[1, 3, 6]), id="context-layers"),
        pytest.param(lambda config: config.update(block_size=4), id="block-size"),
        pytest.param(lambda config: config["rope_parameters"].update(rope_theta=600.0), id="rope-theta"),
        pytest.param(lambda config: config.update(rms_norm_eps=1e-6), id="norm-eps"),
        pytest.param(lambda config: config.update(num_attention_heads=2, num_key_value_heads=1), id="heads"),
    ],
)
def test_a_setting_that_decides_drafts_changes_the_fingerprint(saved: Path, change: Callable[..., object]):
    before = drafter_fingerprint(saved)
    change_config(saved, change)
    assert drafter_fingerprint(saved) != before


# Fit to a cache


def make_manifest(**changes: Any) -> CacheManifest:
    layer_ids = changes.get("layer_ids", (1, 3, 5))
    return CacheManifest(
        **{
            "target_fingerprint": "t",
            "tokenizer_hash": "k",
            "template_hash": "c",
            "layer_ids": layer_ids,
            "prompt_set": "p",
            "generation": {},
            "vllm_layer_ids": tuple(i + 1 for i in layer_ids),
            "target": "target",
            "num_target_layers": 8,
            "hidden_size": H,
            "vocab_size": 20,
            "chunk_tokens": 64,
            "versions": {},
            "rendered_sample": "",
            **changes,
        }
    )


def test_a_drafter_fits_the_cache_it_was_made_for():
    check_fits(SHAPE, make_manifest(), "drafter")


DIFFERENCES = {
    "hidden_size": (16, "hidden size: the cache has 16, the drafter 8"),
    "layer_ids": ((1, 3, 6), "context layers: the cache has (1, 3, 6), the drafter (1, 3, 5)"),
    "vocab_size": (21, "vocabulary: the cache has 21, the drafter 20"),
}


@pytest.mark.parametrize(
    "fields",
    [["hidden_size"], ["layer_ids"], ["vocab_size"], ["hidden_size", "vocab_size"], list(DIFFERENCES)],
    ids=lambda fields: "+".join(fields),
)
def test_everything_that_does_not_fit_is_named_and_nothing_else(fields: list[str]):
    manifest = make_manifest(**{field: DIFFERENCES[field][0] for field in fields})
    with pytest.raises(DrafterError) as caught:
        check_fits(SHAPE, manifest, "some/drafter")
    assert "some/drafter" in str(caught.value)
    for field, (_, message) in DIFFERENCES.items():
        assert (message in str(caught.value)) == (field in fields)
