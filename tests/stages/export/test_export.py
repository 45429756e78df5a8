"""Exported folders: their files, and what vpd, transformers and speculators compute from them."""

# T context tokens, N blocks, G block size, K context layers, H hidden width, D = K x H
import importlib
import json
import os
import stat
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import SHAPE, snapshot
from support.tiny_world import write_drafter
from torch import Tensor, nn
from transformers import AutoModel, Qwen3Config, dynamic_module_utils
from vpd.data.errors import ConfigError, DrafterError, StorageError
from vpd.stages.drafter.checkpoint import load_drafter, load_shape
from vpd.stages.evaluate.pair import training_mode
from vpd.stages.export.check import ExportCheck
from vpd.stages.export.export import export_drafter

ROUNDING = 1e-5
"""Largest difference of float32 values of order one that rounding explains."""
every_form = pytest.mark.parametrize("form", ["dflash", "speculators"])


@pytest.fixture(scope="module")
def speculators_imported() -> None:
    """The warnings of its import are not the project's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("speculators.convert.entrypoints")


@pytest.fixture
def drafter(tmp_path: Path) -> Path:
    return write_drafter(tmp_path / "drafter", SHAPE, 5)


def export(drafter: Path, out: Path, form: str, target: str = "org/target") -> Path:
    export_drafter(drafter, out, form, target)
    return out


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


# Files


@every_form
def test_vpd_reads_what_it_has_written(drafter: Path, tmp_path: Path, form: str):
    out = export(drafter, tmp_path / "out", form)
    # speculators' form does not say how many layers the target has.
    layers = SHAPE.num_target_layers if form == "dflash" else None
    assert load_shape(out) == replace(SHAPE, num_target_layers=layers)
    assert training_mode(out) == "dflash"
    ours, theirs = load_file(drafter / "model.safetensors"), load_file(out / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


@every_form
def test_the_bytes_are_the_same_every_time(drafter: Path, tmp_path: Path, form: str):
    first, again = export(drafter, tmp_path / "one", form), export(drafter, tmp_path / "deeper/other", form)
    assert snapshot(first) == snapshot(again)
    code = {"modeling_dflash.py"} if form == "dflash" else set()
    assert snapshot(first).keys() == {"README.md", "config.json", "model.safetensors"} | code


@every_form
def test_everybody_may_read_the_files_whom_the_umask_lets(drafter: Path, tmp_path: Path, form: str):
    before = os.umask(0o022)
    try:
        out = export(drafter, tmp_path / "out", form)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o644}


def test_the_config_says_all_that_vllm_and_sglang_read(drafter: Path, tmp_path: Path):
    assert read_config(export(drafter, tmp_path / "out", "dflash")) == {
        "architectures": ["DFlashDraftModel"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {"AutoModel": "modeling_dflash.DFlashDraftModel"},
        "block_size": 5,
        "dflash_config": {
            "causal": False,
            "mask_token_id": 19,
            "target_layer_ids": [1, 3, 5],
            "training_mode": "dflash",
        },
        "dtype": "bfloat16",
        "head_dim": 6,
        "hidden_act": "silu",
        "hidden_size": 8,
        "intermediate_size": 10,
        "is_causal": False,
        "layer_types": ["full_attention", "full_attention"],
        "max_position_embeddings": 64,
        "model_type": "qwen3",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "num_target_layers": 8,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
        "rope_theta": 500.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 20,
    }


def test_the_layers_of_speculators_are_those_after_the_tapped_ones(drafter: Path, tmp_path: Path):
    config = read_config(export(drafter, tmp_path / "out", "speculators"))
    assert config["aux_hidden_state_layer_ids"] == [2, 4, 6]
    assert config["speculators_config"]["verifier"] == {"architectures": [], "name_or_path": "org/target"}
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4


@pytest.mark.usefixtures("vllm_imported")
def test_the_form_of_vllm_for_speculators_is_not_causal(drafter: Path, tmp_path: Path):
    """vLLM has one switch for all layers, and its default is the other one than that of speculators."""
    from vllm.model_executor.models.qwen3_dflash import _dflash_layer_causal
    from vllm.transformers_utils.configs.speculators.base import SpeculatorsConfig

    out = export(drafter, tmp_path / "out", "speculators")
    found: Any = SpeculatorsConfig.from_pretrained(out)
    assert found.dflash_config["causal"] is False
    assert found.dflash_config["target_layer_ids"] == [1, 3, 5]
    assert not any(_dflash_layer_causal(found, layer) for layer in range(2))


def test_a_local_target_says_its_architectures(drafter: Path, tmp_path: Path, tiny_qwen3: Path):
    config = read_config(export(drafter, tmp_path / "out", "speculators", str(tiny_qwen3)))
    assert config["speculators_config"]["verifier"]["architectures"] == ["Qwen3ForCausalLM"]


def test_weights_keep_their_type(drafter: Path, tmp_path: Path):
    weights = load_file(drafter / "model.safetensors")
    save_file({name: value.half() for name, value in weights.items()}, drafter / "model.safetensors")
    out = export(drafter, tmp_path / "out", "dflash")
    assert read_config(out)["dtype"] == "float16"
    assert {value.dtype for value in load_file(out / "model.safetensors").values()} == {torch.float16}


def test_an_exported_folder_is_exported_again_with_the_same_weights(drafter: Path, tmp_path: Path):
    there = export(drafter, tmp_path / "there", "speculators")
    back = export(there, tmp_path / "back", "dflash")
    assert read_config(back) == {
        key: value
        for key, value in read_config(export(drafter, tmp_path / "direct", "dflash")).items()
        if key != "num_target_layers"
    }
    assert (back / "model.safetensors").read_bytes() == (there / "model.safetensors").read_bytes()


# Values


class Anchors:
    """Random states of a sequence with several blocks, and what vpd makes of them."""

    def __init__(self, drafter: Path):
        generator = torch.Generator().manual_seed(1)
        self.drafter = load_drafter(drafter)
        shape = self.drafter.shape
        T, self.width = 30, shape.hidden_size
        self.features_TD = torch.randn(T, len(shape.target_layer_ids) * self.width, generator=generator)
        self.embed_VH = torch.randn(shape.vocab_size, self.width, generator=generator)
        self.ids_T = torch.randint(shape.vocab_size, (T,), generator=generator)
        self.anchors_N = torch.tensor([1, 2, 9, 20])
        self.block_ids_NG = torch.full((4, shape.block_size), shape.mask_token_id)
        self.block_ids_NG[:, 0] = self.ids_T[self.anchors_N]

    @torch.inference_mode()
    def states(self) -> Tensor:
        """Hidden states [N, G, H]."""
        context = self.drafter.context(self.features_TD)
        return self.drafter(self.embed_VH[self.block_ids_NG], self.anchors_N, context)


def test_transformers_runs_the_code_in_the_folder(drafter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    out = export(drafter, tmp_path / "out", "dflash")
    model = AutoModel.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    assert type(model).__module__.startswith("transformers_modules.")
    assert isinstance(model.config, Qwen3Config)
    assert (model.block_size, model.mask_token_id, model.target_layer_ids) == (5, 19, [1, 3, 5])
    found = Anchors(drafter)
    for n, anchor in enumerate(found.anchors_N.tolist()):
        embedded, features = found.embed_VH[found.block_ids_NG[n]][None], found.features_TD[None, :anchor]
        with torch.inference_mode():
            states = model(embedded, features)
            shifted = model(embedded, features, torch.arange(7, 7 + anchor + 5)[None])
        assert (states[0] - found.states()[n]).abs().max() < ROUNDING
        # Rotary embeddings depend on distances alone.
        assert (states - shifted).abs().max() < 10 * ROUNDING


def states_by_training(model: Any, found: Anchors) -> Tensor:
    """Hidden states [N, G, H] of speculators' own training pass, masks included."""
    from speculators.losses import resolve_loss_config

    model.embed_tokens.weight.data.copy_(found.embed_VH)
    for head in (model.lm_head, model.verifier_lm_head):
        nn.init.zeros_(head.weight)
    kept: list[Tensor] = []
    model.norm.register_forward_hook(lambda module, inputs, output: kept.append(output))
    T = len(found.features_TD)
    loss_mask = torch.zeros(1, T)
    loss_mask[0, found.anchors_N] = 1
    with torch.inference_mode():
        model(
            hidden_states=found.features_TD[None],
            input_ids=found.ids_T[None],
            loss_mask=loss_mask,
            verifier_last_hidden_states=torch.zeros(1, T, found.width),
            document_ids=torch.zeros(1, T, dtype=torch.int64),
            max_anchors=len(found.anchors_N),
            loss_config=resolve_loss_config("ce", "eager"),
        )
    return kept[0].view(len(found.anchors_N), -1, found.width)


@every_form
@pytest.mark.usefixtures("speculators_imported")
def test_speculators_computes_the_same_states(tmp_path: Path, tiny_qwen3: Path, form: str):
    """The form `dflash` goes through the converter of speculators, which needs the target."""
    from speculators import SpeculatorModel, SpeculatorModelConfig

    shape = replace(SHAPE, vocab_size=320, mask_token_id=319, hidden_size=128, num_target_layers=6)
    drafter = write_drafter(tmp_path / "drafter", replace(shape, target_layer_ids=(0, 2, 4)), 3)
    out = export(drafter, tmp_path / "out", form, str(tiny_qwen3))
    if form == "dflash":
        from speculators.convert.entrypoints import maybe_convert_external_checkpoint

        maybe_convert_external_checkpoint(str(out), str(tiny_qwen3), output_path=str(tmp_path / "converted"))
        out = tmp_path / "converted"
    config = SpeculatorModelConfig.from_pretrained(out)
    config.transformer_layer_config._attn_implementation = "eager"
    model: Any = SpeculatorModel.from_pretrained(out, config=config, dtype=torch.float32)
    embedded = load_file(tiny_qwen3 / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.embed_tokens.weight, embedded)  # It found the target by the name in the folder.
    found = Anchors(drafter)
    assert (states_by_training(model, found) - found.states()).abs().max() < ROUNDING


# The check of an export


@every_form
def test_an_export_tells_what_it_has_compared(drafter: Path, tmp_path: Path, form: str):
    agreements = export_drafter(drafter, tmp_path / "out", form, "org/target").agreements
    assert [each.program.split()[0] for each in agreements] == [
        "vpd",
        "transformers" if form == "dflash" else "speculators",
    ]
    assert agreements[0].largest_difference == 0
    assert 0 < agreements[1].largest_difference < ROUNDING


@every_form
@pytest.mark.parametrize("name", ["fc.weight", "layers.1.self_attn.k_norm.weight", "norm.weight"])
def test_other_weights_are_noticed(drafter: Path, tmp_path: Path, form: str, name: str):
    out = export(drafter, tmp_path / "out", form)
    weights = load_file(out / "model.safetensors")
    save_file(weights | {name: weights[name] * 1.01}, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DrafterError, match=r"expected vpd .* to compute the hidden states .* found a difference of"):
        ExportCheck(drafter).run(out, form)


def test_a_reader_that_computes_something_else_is_named(drafter: Path, tmp_path: Path):
    """transformers reads RoPE's base from another key than vpd does."""
    out = export(drafter, tmp_path / "out", "dflash")
    config = read_config(out)
    del config["rope_theta"], config["num_target_layers"]
    (out / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(DrafterError, match="expected vpd"):
        ExportCheck(drafter).run(out, "dflash")


def test_a_folder_that_a_reader_can_not_load_is_named(drafter: Path, tmp_path: Path):
    out = export(drafter, tmp_path / "out", "speculators")
    config = read_config(out)
    del config["speculators_config"]["default_proposal_method"]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(DrafterError, match=r"expected speculators 0\S+ to load what was exported, found an error"):
        ExportCheck(drafter).run(out, "speculators")


# Bad input


def test_a_folder_with_files_is_left_alone(drafter: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(DrafterError, match=r"new or empty folder at .*out, found a folder that is not empty"):
        export(drafter, out, "dflash")
    assert [path.name for path in tmp_path.iterdir() if path != drafter] == ["out"]
    assert (out / "notes.txt").read_text() == "mine"


def test_an_empty_folder_is_filled(drafter: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    assert (export(drafter, tmp_path / "out", "dflash") / "config.json").is_file()


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_no_folder_is_left_alone(drafter: Path, tmp_path: Path, kind: str):
    out = tmp_path / "out"
    if kind == "file":
        out.touch()
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(DrafterError, match="found a file"):
        export(drafter, out, "dflash")


def test_a_place_that_can_not_be_written_is_named(drafter: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file/out could not be written"):
        export(drafter, tmp_path / "file/out", "dflash")


def test_the_form_speculators_needs_the_target(drafter: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"expected the target's name.*Give --target"):
        export_drafter(drafter, tmp_path / "out", "speculators")
    assert {*tmp_path.iterdir()} == {drafter}


def test_weights_that_are_no_numbers_are_refused(drafter: Path, tmp_path: Path):
    weights = load_file(drafter / "model.safetensors")
    weights["norm.weight"][0] = float("nan")
    save_file(weights, drafter / "model.safetensors")
    with pytest.raises(DrafterError, match=r"found NaN"):
        export(drafter, tmp_path / "out", "dflash")
    assert {*tmp_path.iterdir()} == {drafter}


def test_copies_of_the_targets_weights_are_not_exported_unseen(drafter: Path, tmp_path: Path):
    weights = load_file(drafter / "model.safetensors")
    save_file({**weights, "lm_head.weight": torch.zeros(20, 8)}, drafter / "model.safetensors")
    with pytest.raises(DrafterError, match=r"copies of the target's weights: lm_head\.weight"):
        export(drafter, tmp_path / "out", "dflash")
