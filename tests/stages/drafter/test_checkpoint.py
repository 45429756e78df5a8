"""Drafter checkpoints: the public form that other programs load, and refusals of unsupported variants."""

# H hidden width
import json
import re
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import edit_weights, make_drafter, save
from support.tiny import SHAPE, snapshot
from transformers import Qwen3Config
from vpd.data.cache.manifest import CacheManifest
from vpd.data.errors import DrafterError, StorageError
from vpd.stages.drafter.checkpoint import (
    check_drafter,
    check_fits,
    drafter_fingerprint,
    load_drafter,
    load_shape,
    save_drafter,
)
from vpd.stages.train.checkpoints import find_drafter

H = SHAPE.hidden_size
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
        "model_type": "qwen3",
        "layer_types": ["full_attention", "full_attention"],
        "is_causal": False,
        "num_target_layers": 8,
        "block_size": 5,
    }
    assert {key: config[key] for key in expected} == expected
    assert "auto_map" not in config  # The folder holds no code that the key could name.
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


def largest_file(num_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("num_bytes", [10, 4000, 60_000], ids=["no-config", "no-weights", "no-state"])
def test_a_checkpoint_that_cannot_be_written_leaves_nothing(num_bytes: int, saved: Path):
    """Acts like a full disk: the system refuses writes beyond a limit."""
    before, drafter = snapshot(saved), load_drafter(saved)
    state = {"weights": torch.zeros(100_000)}
    largest_file(num_bytes)
    try:
        with pytest.raises(StorageError, match=r"the checkpoint .* could not be written: .* disk full\?"):
            save_drafter(drafter.state_dict(), saved, json.loads((saved / "config.json").read_text()), {"state": state})
    finally:
        largest_file(resource.RLIM_INFINITY)
    assert snapshot(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        pytest.param(
            lambda weights: weights.pop("norm.weight"), r"for norm.weight expected \(8,\), found nothing", id="missing"
        ),
        pytest.param(
            lambda weights: weights.update({"conv.weight": torch.zeros(20, H), "gru.weight": torch.zeros(3)}),
            r"for conv.weight expected nothing, found \(20, 8\); also gru.weight",
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


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.float64], ids=str)
def test_weights_of_another_kind_of_number_are_refused(saved: Path, dtype: torch.dtype):
    edit_weights(saved, lambda weights: weights.update({"fc.weight": weights["fc.weight"].to(dtype)}))
    with pytest.raises(DrafterError, match=r"expected fc\.weight as F32, BF16, F16, found"):
        load_drafter(saved)


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 1234\n"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(value: float, saved: Path):
    weights = load_file(saved / "model.safetensors")
    weights["fc.weight"][3, 4] = value
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(DrafterError, match=r"fc\.weight, found NaN or infinite"):
        load_drafter(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", ["", LFS_POINTER, "{", "[" * 100_000], ids=["empty", "pointer", "cut", "deep"])
def test_a_broken_file_is_named(name: str, content: str, saved: Path):
    (saved / name).write_text(content)
    with pytest.raises(DrafterError, match=re.escape(str(saved / name))) as caught:
        check_drafter(saved, make_manifest())
    assert ("git lfs pull" in str(caught.value)) == (content == LFS_POINTER)


def test_a_config_of_bytes_or_a_folder_is_named(saved: Path):
    (saved / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(DrafterError, match=r"config\.json is not JSON"):
        load_shape(saved)
    (saved / "config.json").unlink()
    (saved / "config.json").mkdir()
    with pytest.raises(DrafterError, match=r"config\.json: expected a drafter's config\.json: Is a directory"):
        load_shape(saved)


@pytest.mark.parametrize(("index", "advice"), [(False, "Fetch the file"), (True, "several files: join them")])
def test_absent_weights_are_named(index: bool, advice: str, saved: Path):
    (saved / "model.safetensors").unlink()
    if index:
        (saved / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(DrafterError, match=rf"model\.safetensors.*{advice}"):
        find_drafter(saved)
    with pytest.raises(DrafterError, match=rf"model\.safetensors.*{advice}"):
        load_drafter(saved)


def test_an_embedding_of_the_mask_token_alone_is_refused(saved: Path):
    torch.save({"embedding": torch.zeros(H)}, saved / "mask_embedding.pt")
    for read in (load_shape, load_drafter, drafter_fingerprint):
        with pytest.raises(DrafterError, match=r"mask_embedding\.pt: this drafter has an embedding of its own"):
            read(saved)


# Fit to a cache


def make_manifest(**changes: Any) -> CacheManifest:
    layer_ids = changes.get("layer_ids", (1, 3, 5))
    return CacheManifest(
        **{
            "target_fingerprint": "t",
            "tokenizer_hash": "k",
            "template_hash": "c",
            "layer_ids": layer_ids,
            "generation": {},
            "engine": {},
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
    check_fits(replace(SHAPE, num_target_layers=None), make_manifest(), "drafter")


DIFFERENCES = {
    "hidden_size": (16, "hidden size: the cache has 16, the drafter 8"),
    "layer_ids": ((1, 3, 6), "context layers: the cache has (1, 3, 6), the drafter (1, 3, 5)"),
    "vocab_size": (21, "vocabulary: the cache has 21, the drafter 20"),
    "num_target_layers": (9, "layers of the target: the cache has 9, the drafter 8"),
}


@pytest.mark.parametrize(
    "fields",
    [*([name] for name in DIFFERENCES), ["hidden_size", "vocab_size"], list(DIFFERENCES)],
    ids=lambda fields: "+".join(fields),
)
def test_everything_that_does_not_fit_is_named_and_nothing_else(fields: list[str]):
    manifest = make_manifest(**{field: DIFFERENCES[field][0] for field in fields})
    with pytest.raises(DrafterError) as caught:
        check_fits(SHAPE, manifest, "some/drafter")
    assert "some/drafter" in str(caught.value)
    for field, (_, message) in DIFFERENCES.items():
        assert (message in str(caught.value)) == (field in fields)
