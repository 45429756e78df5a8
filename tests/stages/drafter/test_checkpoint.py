"""Drafter checkpoints: the public form that other programs load, and refusals of unsupported variants."""

# H hidden width
import hashlib
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
from vpd.stages.drafter.model import Drafter
from vpd.stages.drafter.shape import DrafterShape
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


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


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


# Copies of the target's weights


def save_pieces(folder: Path, dtype: torch.dtype = torch.float32, tied: bool = False) -> dict[str, torch.Tensor]:
    """The target's pieces as a cache holds them."""
    generator = torch.Generator().manual_seed(3)
    names = ["embed_tokens.weight"] if tied else ["embed_tokens.weight", "lm_head.weight"]
    pieces = {name: torch.randn(20, H, generator=generator).to(dtype) for name in names}
    pieces["norm.weight"] = torch.rand(H, generator=generator).to(dtype)
    folder.mkdir()
    save_file(pieces, folder / "pieces.safetensors")
    return pieces


COPIES = {"embed_tokens.weight": 0, "lm_head.weight": 1, "verifier_lm_head.weight": 1, "verifier_norm.weight": 2}
"""Names in a checkpoint, and which of embedding, head and norm each is a copy of."""


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("copied", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_copies_of_the_targets_weights_are_left_out(
    stored: torch.dtype, copied: torch.dtype, tied: bool, saved: Path, tmp_path: Path
):
    exact = [*save_pieces(tmp_path / "exact", tied=tied).values()]
    if tied:
        exact.insert(0, exact[0])
    expected = load_drafter(saved).state_dict()
    save_pieces(tmp_path / "target", stored, tied)
    if copied != torch.float32:  # else the piece is a rounding of the copy
        exact = [piece.to(stored) for piece in exact]
    edit_weights(
        saved, lambda weights: weights.update({name: exact[i].to(copied).clone() for name, i in COPIES.items()})
    )
    found = load_drafter(saved, target_folder=tmp_path / "target").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("name", COPIES)
def test_other_weights_than_the_targets_are_refused_by_name(name: str, saved: Path, tmp_path: Path):
    pieces = [*save_pieces(tmp_path / "target").values()]
    other = pieces[COPIES[name]].clone()
    other.view(-1)[3] += 0.01
    copies = {key: pieces[i].clone() for key, i in COPIES.items()} | {name: other}
    edit_weights(saved, lambda weights: weights.update(copies))
    with pytest.raises(DrafterError, match=rf"model\.safetensors: {name}: expected a copy of the target's weight"):
        load_drafter(saved, target_folder=tmp_path / "target")


def test_a_copy_of_another_vocabulary_is_refused(saved: Path, tmp_path: Path):
    pieces = save_pieces(tmp_path / "target")
    edit_weights(saved, lambda weights: weights.update({"lm_head.weight": pieces["lm_head.weight"][:19].clone()}))
    with pytest.raises(DrafterError, match=r"lm_head\.weight: expected a copy"):
        load_drafter(saved, target_folder=tmp_path / "target")
    with pytest.raises(DrafterError, match="Name the cache"):
        load_drafter(saved)


# Fingerprint


def test_fingerprints_stay_those_of_earlier_caches(tmp_path: Path):
    """First drafts of existing caches are found by it: a hash of this text and of the file of weights."""
    described = (
        "DrafterShape(num_layers=2, hidden_size=8, num_attention_heads=4, num_key_value_heads=2, head_dim=6, "
        "intermediate_size=10, rms_norm_eps=1e-05, rope_theta=500.0, max_position_embeddings=64, vocab_size=20, "
        "block_size=5, mask_token_id=19, target_layer_ids=(1, 3, 5), num_target_layers=8)"
    )
    saved = save(tmp_path / "drafter", make_drafter())
    content = (saved / "model.safetensors").read_bytes()
    assert drafter_fingerprint(saved) == hashlib.sha256(described.encode() + content).hexdigest()[:16]


def test_the_fingerprint_covers_what_the_target_does_to_its_embedding(saved: Path, tmp_path: Path):
    save_pieces(tmp_path / "target")
    found = [drafter_fingerprint(saved), drafter_fingerprint(saved, tmp_path / "target")]
    for facts in ({"embedding_multiplier": 2.0}, {"embedding_multiplier": 3.0}, {"logits_soft_cap": 30.0}):
        (tmp_path / "target/pieces.json").write_text(json.dumps(facts))
        found.append(drafter_fingerprint(saved, tmp_path / "target"))
    assert found[0] == found[1]
    assert len({*found}) == 4


def test_the_fingerprint_is_that_of_the_content(saved: Path, tmp_path: Path):
    fingerprint = drafter_fingerprint(saved)
    assert len(fingerprint) == 16
    assert int(fingerprint, 16) >= 0
    assert drafter_fingerprint(save(tmp_path / "elsewhere", make_drafter())) == fingerprint


@pytest.mark.parametrize("place", [-1, -1001], ids=["last-weight", "inner-weight"])
def test_one_weight_changes_the_fingerprint(saved: Path, place: int):
    before = drafter_fingerprint(saved)
    # Cloned, since `load_file` may return views of the file.
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
        pytest.param(
            lambda config: config.update(rope_theta=600.0, rope_parameters={"rope_theta": 600.0}), id="rope-theta"
        ),
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
