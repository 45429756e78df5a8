"""Parts of a target's class and what it does around them, against the model itself, loaded whole."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.kinds import KINDS, save_kind
from support.tiny import VOCAB, save_target
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast
from vpd.data.cache.storage.local import LocalStorage
from vpd.data.cache.target_files import target_folder
from vpd.data.errors import TargetError
from vpd.stages.drafter.target_pieces import TargetPieces
from vpd.stages.extract.architecture import LogitsMap, embedding_multiplier
from vpd.stages.extract.target import copy_pieces, load_target, read_pieces
from vpd.stages.extract.transformers_engine import load_model
from vpd.stages.extract.vllm.argmax import ArgmaxHead

IDS = torch.arange(20, 40)


def stored_pieces(folder: Path, place: Path, dtype: torch.dtype = torch.float32) -> TargetPieces:
    """The target's pieces as stage two reads them from a cache."""
    place.mkdir()
    copy_pieces(load_target(str(folder)), LocalStorage(place))
    return TargetPieces.load(target_folder(LocalStorage(place)), dtype=dtype)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_what_its_model_gives(name: str, tmp_path: Path):
    folder = save_kind(name, tmp_path / "target")
    pieces = stored_pieces(folder, tmp_path / "cache")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    with torch.no_grad():
        torch.testing.assert_close(pieces.embed_VH[IDS], model.get_input_embeddings()(IDS), rtol=1e-6, atol=0)
        out = model(IDS[None], output_hidden_states=True)
        logits = out.hidden_states[-1][0] @ pieces.head_VH.T  # after the final norm
        if (cap := pieces.logits_soft_cap) is not None:
            logits = cap * torch.tanh(logits / cap)
    torch.testing.assert_close(logits, out.logits[0], rtol=1e-4, atol=1e-5)
    assert (tmp_path / "cache/target/pieces.json").exists() == name.startswith(("Gemma", "Granite", "Cohere"))


@pytest.mark.parametrize("name", ["Gemma 2", "Granite", "OLMo 2"])
def test_the_final_norm_is_that_of_the_model(name: str, tmp_path: Path):
    folder = save_kind(name, tmp_path / "target")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    kept: list[torch.Tensor] = []
    model.model.layers[-1].register_forward_hook(
        lambda module, args, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        expected = model(IDS[None]).logits[0].argmax(dim=-1)
    assert torch.equal(ArgmaxHead(load_target(str(folder)))(kept[0].view(len(IDS), -1)), expected)


def test_a_multiplier_is_rounded_as_the_weight_is(tmp_path: Path):
    """Gemma multiplies by sqrt(128), in the weight's type."""
    target = load_target(str(save_kind("Gemma 3", tmp_path / "target")))
    assert embedding_multiplier(target.architecture, torch.bfloat16) == float(torch.tensor(128**0.5).bfloat16())
    assert embedding_multiplier(target.architecture, torch.float32) == float(torch.tensor(128**0.5))


@pytest.mark.parametrize(
    ("logits_map", "expected"),
    [(LogitsMap(multiplier=0.5), 1.5), (LogitsMap(soft_cap=2.0), 2 * torch.tensor(1.5).tanh())],
)
def test_a_logits_map_is_its_formula(logits_map: LogitsMap, expected: Any):
    assert float(logits_map(torch.tensor(3.0))) == pytest.approx(float(expected))


# Names in the weight files


def rename(folder: Path, old: str, new: str, **more: torch.Tensor) -> Path:
    """Renames the prefix of all tensors, and adds some."""
    weights = load_file(folder / "model.safetensors")
    renamed = {name.replace(old, new, 1) if name.startswith(old) else name: value for name, value in weights.items()}
    save_file(renamed | more, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_layers_for_multi_token_prediction_are_ignored(tiny_qwen3: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_qwen3, tmp_path / "qwen3")
    expected = read_pieces(load_target(str(folder)))
    extra = {
        f"model.layers.6.{name}": torch.randn_like(value)
        for name, value in (
            ("embed_tokens.weight", expected["embed_tokens.weight"]),
            ("shared_head.head.weight", expected["lm_head.weight"]),
            ("shared_head.norm.weight", expected["norm.weight"]),
        )
    }
    found = read_pieces(load_target(str(rename(folder, "model.", "model.", **extra))))
    assert {name: value.tolist() for name, value in found.items()} == {
        name: value.tolist() for name, value in expected.items()
    }


def test_weights_without_the_prefix_of_the_base_model_load(tiny_llama: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_llama, tmp_path / "llama")
    expected = read_pieces(load_target(str(folder)))
    found = read_pieces(load_target(str(rename(folder, "model.", ""))))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def vision_target(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny Qwen3-VL: a text tower beside a vision tower."""
    text = {
        "model_type": "qwen3_vl_text", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 96, "vocab_size": 320, "eos_token_id": 1,
        "rope_parameters": {"rope_theta": 5e6, "rope_type": "default", "mrope_section": [8, 4, 4]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_vl", text_config=text, vision_config=vision, tie_word_embeddings=False)
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_text_tower_of_a_vision_language_target_is_found(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    target = load_target(str(vision_target(tmp_path / "target", tiny_tokenizer)))
    model = load_model(target, "float32")
    pieces = read_pieces(target)
    assert target.num_layers == 4
    assert torch.equal(pieces["embed_tokens.weight"], model.model.language_model.embed_tokens.weight)
    assert torch.equal(pieces["norm.weight"], model.model.language_model.norm.weight)
    assert torch.equal(pieces["lm_head.weight"], model.lm_head.weight)


def test_a_head_that_only_the_config_ties_is_refused(tiny_qwen3: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_qwen3, tmp_path / "qwen3")
    change_config(folder, tie_word_embeddings=True)
    with pytest.raises(TargetError, match=r"lm_head\.weight .* to equal model\.embed_tokens\.weight"):
        load_target(str(folder))


def test_a_head_that_is_neither_there_nor_tied_is_refused(tiny_llama: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_llama, tmp_path / "llama")
    change_config(folder, tie_word_embeddings=False)
    with pytest.raises(TargetError, match=r"expected the tensor lm_head\.weight.*found none.*tie_word_embeddings"):
        load_target(str(folder))


def test_weights_without_a_layer_are_refused_by_the_engine(tiny_llama: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_llama, tmp_path / "llama")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TargetError, match=r"found none .* for model\.layers\.2\.mlp\.up_proj\.weight"):
        load_model(load_target(str(folder)), "float32")


# Quantized pieces


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def quantize_head(folder: Path, form: str) -> torch.Tensor:
    """Puts a float8 head into the weight files, and returns the head that the codes and scales stand for."""
    weights = load_file(folder / "model.safetensors")
    head_VH = weights.pop("lm_head.weight")
    rows, columns = head_VH.shape
    steps = {"tensor": (rows, columns), "row": (1, columns), "block": (128, 128)}[form]
    codes, scales = torch.empty_like(head_VH, dtype=torch.float8_e4m3fn), []
    expected = torch.empty_like(head_VH)
    for top in range(0, rows, steps[0]):
        scales.append([])
        for left in range(0, columns, steps[1]):
            place = (slice(top, top + steps[0]), slice(left, left + steps[1]))
            scale = head_VH[place].abs().max() / 448
            codes[place] = (head_VH[place] / scale).to(torch.float8_e4m3fn)
            expected[place] = codes[place].float() * scale
            scales[-1].append(float(scale))
    name = "lm_head.weight_scale_inv" if form == "block" else "lm_head.weight_scale"
    saved = torch.tensor(scales) if form != "tensor" else torch.tensor(scales[0][0])
    save_file(weights | {"lm_head.weight": codes, name: saved}, folder / "model.safetensors", {"format": "pt"})
    return expected


@pytest.mark.parametrize("form", ["tensor", "row", "block"])
def test_a_float8_head_is_dequantized(form: str, tiny_qwen3: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_qwen3, tmp_path / "qwen3")
    expected = quantize_head(folder, form)
    change_config(folder, quantization_config={"quant_method": "fp8"})
    torch.testing.assert_close(read_pieces(load_target(str(folder)))["lm_head.weight"], expected, rtol=1e-6, atol=0)


def test_a_float8_head_of_which_the_config_knows_nothing_is_refused(tiny_qwen3: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_qwen3, tmp_path / "qwen3")
    quantize_head(folder, "row")
    with pytest.raises(TargetError, match=r"lm_head\.weight .*F8_E4M3.*no quantization_config"):
        load_target(str(folder))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16}, "lm_head.qweight, lm_head.qzeros"),
        ({"weight_packed": torch.int32, "weight_scale": torch.float16}, "lm_head.weight_packed"),
        ({"weight": torch.uint8, "weight.absmax": torch.float32}, "found U8 with weight.absmax"),
        ({"weight": torch.int8, "SCB": torch.float32}, "found I8 with SCB"),
        ({"weight": torch.float8_e4m3fn}, "found F8_E4M3 with no scales"),
    ],
    ids=["gptq-awq", "compressed-tensors", "bitsandbytes-4bit", "bitsandbytes-8bit", "no-scales"],
)
def test_other_quantized_heads_are_refused_by_name(
    tensors: dict[str, torch.dtype], words: str, tiny_qwen3: Path, tmp_path: Path
):
    folder = shutil.copytree(tiny_qwen3, tmp_path / "qwen3")
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    weights |= {f"lm_head.{name}": torch.zeros(4, 4).to(dtype) for name, dtype in tensors.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, quantization_config={"quant_method": "some"})
    with pytest.raises(TargetError) as caught:
        load_target(str(folder))
    assert words in str(caught.value)


class Head(NamedTuple):
    """A quantized head that can't be read, and words of the error."""

    id: str
    scales: dict[str, torch.Tensor]
    config: dict[str, Any]
    words: str


HEADS = [
    Head("scales-of-groups", {"weight_scale": torch.ones(VOCAB, 4)}, {}, rf"found scales of shape \({VOCAB}, 4\)"),
    Head("two-scales", {"weight_scale": torch.ones(1), "weight_scale_2": torch.ones(1)}, {}, "weight_scale_2 beside"),
    Head("no-pair", {"weight_scale": torch.ones(1)}, {"weight_block_size": [128]}, r"two whole numbers.*\[128\]"),
    Head("zero", {"weight_scale": torch.ones(1)}, {"weight_block_size": [0, 128]}, r"two whole numbers.*\[0, 128\]"),
    Head("text", {"weight_scale": torch.ones(1)}, {"weight_block_size": "128"}, "two whole numbers.*'128'"),
]


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.id)
def test_a_head_with_other_scales_is_refused(head: Head, tiny_qwen3: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_qwen3, tmp_path / "qwen3")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"].to(torch.float8_e4m3fn)
    weights |= {f"lm_head.{name}": value for name, value in head.scales.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, quantization_config={"quant_method": "fp8"} | head.config)
    with pytest.raises(TargetError, match=head.words):
        load_target(str(folder))


def test_a_quantized_norm_is_refused(tiny_qwen3: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_qwen3, tmp_path / "qwen3")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.float8_e4m3fn)
    weights["model.norm.weight_scale"] = torch.ones(1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, quantization_config={"quant_method": "fp8"})
    with pytest.raises(TargetError, match=r"model\.norm\.weight .*found scales of shape \(1,\)"):
        load_target(str(folder))


@pytest.mark.parametrize("tensor", ["model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("vocab_size", [VOCAB + 80, VOCAB - 80])
def test_pieces_of_another_size_than_the_config_says_are_named(
    vocab_size: int, tensor: str, tiny_qwen3: Path, tmp_path: Path
):
    folder = shutil.copytree(tiny_qwen3, tmp_path / "qwen3")
    weights = load_file(folder / "model.safetensors")
    rows, width = weights[tensor].shape
    weights[tensor] = torch.ones(vocab_size, width)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TargetError) as caught:
        load_target(str(folder))
    for words in (f"({rows}, {width}) at {tensor}", str(folder / "config.json"), f"({vocab_size}, {width})"):
        assert words in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pieces_that_are_no_numbers_are_refused(value: float, tiny_qwen3: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_qwen3, tmp_path / "qwen3")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][3, 5] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TargetError, match=r"lm_head\.weight in .*NaN or infinite"):
        read_pieces(load_target(str(folder)))


# Stage two


def test_a_cache_without_the_record_stays_readable(tmp_path: Path):
    """As caches were before the multipliers were recorded."""
    folder = save_kind("Gemma", tmp_path / "target")
    scaled = stored_pieces(folder, tmp_path / "cache")
    (tmp_path / "cache/target/pieces.json").unlink()
    plain = TargetPieces.load(tmp_path / "cache/target")
    torch.testing.assert_close(plain.embed_VH * 128**0.5, scaled.embed_VH)
    assert plain.embed_VH is plain.head_VH


def test_sharded_targets_are_found_too(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    folder = save_target("qwen3", tmp_path / "qwen3", tiny_tokenizer, max_shard_size="200KB")
    assert load_target(str(folder)).pieces.facts() == {}
