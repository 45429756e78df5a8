"""The target's folder: its context layers, its pieces as transformers loads them, its fingerprint."""

import json
import re
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.own_code import save_own_code
from support.tiny import END, HIDDEN, NUM_LAYERS, VOCAB, Damage, save_target, snapshot
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from vpd.data.cache.storage.local import LocalStorage
from vpd.data.cache.target_files import target_folder
from vpd.data.errors import CacheCorruptError, TargetError
from vpd.stages.drafter.target_pieces import TargetPieces, load_tokenizer
from vpd.stages.extract.config import ExtractConfig
from vpd.stages.extract.target import check_layers, context_layers, copy_pieces, load_target, read_pieces
from vpd.stages.extract.transformers_engine import load_model


@pytest.fixture(params=["llama", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a tiny target."""
    return shutil.copytree(request.getfixturevalue(f"tiny_{request.param}"), tmp_path / request.param)


def expected_pieces(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors that the model itself computes with."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    pieces = {"embed_tokens.weight": model.get_input_embeddings().weight, "norm.weight": model.model.norm.weight}
    if not model.config.tie_word_embeddings:
        pieces["lm_head.weight"] = model.get_output_embeddings().weight
    return {name: value.detach() for name, value in pieces.items()}


def check_pieces(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# Layers


@pytest.mark.parametrize(
    ("num_target_layers", "num_draft_layers", "expected"),
    [
        (36, 5, (1, 9, 17, 25, 33)),
        (36, 1, (18,)),
        (36, 2, (1, 33)),
        (28, 5, (1, 7, 13, 19, 25)),
        (30, 3, (1, 14, 27)),
        (64, 5, (1, 16, 31, 46, 61)),
        (6, 3, (1, 2, 3)),
    ],
)
def test_layers_follow_the_rule_of_dflash(num_target_layers: int, num_draft_layers: int, expected: tuple[int, ...]):
    assert context_layers(num_target_layers, num_draft_layers) == expected


@pytest.mark.parametrize("num_draft_layers", [2, 3, 4, 5, 8])
def test_layers_are_the_formula_rounded_for_every_depth(num_draft_layers: int):
    for num_target_layers in range(4, 100):
        exact = [1 + Fraction(i * (num_target_layers - 4), num_draft_layers - 1) for i in range(num_draft_layers)]
        assert context_layers(num_target_layers, num_draft_layers) == tuple(map(round, exact))


@pytest.mark.parametrize(
    ("layer_ids", "words"),
    [
        pytest.param((), ["ascending, distinct layer ids", "[]"], id="none"),
        pytest.param((2, 1), ["ascending, distinct", "[2, 1]", "extract.layer_ids"], id="descending"),
        pytest.param((1, 1), ["ascending, distinct", "[1, 1]"], id="twice"),
        pytest.param((1, 6), ["0..5", "has 6 layers", "[1, 6]", "extract.layer_ids"], id="too-large"),
        pytest.param((-1, 2), ["0..5", "[-1, 2]"], id="negative"),
    ],
)
def test_impossible_layers_are_refused(layer_ids: tuple[int, ...], words: list[str]):
    with pytest.raises(TargetError) as caught:
        check_layers(layer_ids, 6)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("layer_ids", [(0,), (5,), (0, 5), (0, 1, 2, 3, 4, 5)])
def test_possible_layers_pass(layer_ids: tuple[int, ...]):
    assert check_layers(layer_ids, 6) == layer_ids


def test_a_rule_that_finds_too_few_layers_is_refused():
    with pytest.raises(TargetError, match="distinct"):
        check_layers(context_layers(6, 5), 6)


# Folder


def test_a_target_says_what_it_is(folder: Path, tiny_tokenizer: PreTrainedTokenizerFast):
    target = load_target(str(folder))
    assert (target.num_layers, target.hidden_size, target.vocab_size) == (NUM_LAYERS, HIDDEN, VOCAB)
    assert target.eos_token_ids == {tiny_tokenizer.get_vocab()[END]}


@pytest.mark.parametrize("ids", [7, [7, 8]])
def test_ends_of_the_generation_config_count_too(ids: Any, folder: Path):
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ids}))
    assert load_target(str(folder)).eos_token_ids == {1, 7, *(ids if isinstance(ids, list) else [])}


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("ids", [-1, VOCAB, [1, VOCAB + 7], "</s>", True])
def test_ends_outside_the_vocabulary_are_refused_by_file(file: str, ids: Any, folder: Path):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ids}))
    with pytest.raises(TargetError, match=re.escape(str(path))) as caught:
        load_target(str(folder))
    assert "eos_token_id" in str(caught.value)


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("model.safetensors", ["expected weights (*.safetensors)", "found none", "save_pretrained"]),
        ("config.json", ["expected a model", "found no config.json"]),
        ("tokenizer.json", ["tokenizer", "can't be loaded"]),
    ],
)
def test_a_folder_without_a_file_names_what_is_missing(gone: str, words: list[str], folder: Path):
    (folder / gone).unlink()
    with pytest.raises(TargetError) as caught:
        load_target(str(folder))
    for word in (*words, str(folder)):
        assert word in str(caught.value)


@pytest.mark.parametrize("is_whole", [True, False])
def test_an_adapter_in_the_targets_folder_is_named(is_whole: bool, folder: Path):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    if not is_whole:
        (folder / "config.json").unlink()
    with pytest.raises(TargetError, match=r"extract\.adapter to") as caught:
        load_target(str(folder))
    assert str(folder) in str(caught.value)


def test_a_folder_of_the_hubs_cache_names_its_snapshot(folder: Path, tmp_path: Path):
    snapshot = shutil.move(folder, tmp_path / "models--a--b/snapshots/abc")
    with pytest.raises(TargetError, match=rf"hub's local cache: give {re.escape(str(snapshot))}"):
        load_target(str(tmp_path / "models--a--b"))


def test_config_and_tokenizer_are_enough_without_weights(folder: Path):
    (folder / "model.safetensors").unlink()
    target = load_target(str(folder), weights=False)
    assert (target.num_layers, len(target.eos_token_ids)) == (NUM_LAYERS, 1)
    with pytest.raises(TargetError, match="expected weights"):
        _ = target.weights


# Code of the target


@pytest.fixture
def own_code(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return save_own_code(tiny_llama, tmp_path, monkeypatch)


def test_code_of_the_target_runs_only_with_leave(own_code: Path):
    with pytest.raises(TargetError, match=r"own code \(auto_map in .*own/config\.json\).*extract\.trust_remote_code"):
        load_target(str(own_code))


@pytest.mark.parametrize("file", ["configuration_own.py", "modeling_own.py"])
def test_code_that_ends_the_program_is_an_error(file: str, own_code: Path):
    path = own_code / file
    path.write_text(path.read_text() + "\nraise SystemExit(0)\n")
    with pytest.raises(TargetError, match="ends the program"):
        load_target(str(own_code), trust_remote_code=True)


def test_code_of_the_target_reaches_config_and_engine_but_not_the_cache(
    own_code: Path, tiny_llama: Path, tmp_path: Path
):
    target, storage = load_target(str(own_code), trust_remote_code=True), LocalStorage(tmp_path / "cache")
    assert type(load_model(target, "float32")).__name__ == "OwnForCausalLM"
    check_pieces(read_pieces(target), read_pieces(load_target(str(tiny_llama))))
    storage.root.mkdir()
    copy_pieces(target, storage)
    stored = target_folder(storage)
    assert not list(stored.glob("*.py"))
    assert "auto_map" not in (stored / "config.json").read_text()
    assert load_tokenizer(stored)("the fox")["input_ids"] == target.tokenizer("the fox")["input_ids"]


@pytest.mark.parametrize(
    ("settings", "trusted"),
    [
        ({}, False),
        ({"trust_remote_code": True}, True),
        ({"engine_args": {"trust_remote_code": True}}, True),
        ({"engine_args": {"trust_remote_code": "yes"}}, False),
    ],
)
def test_the_setting_or_the_engine_argument_gives_leave(settings: dict[str, Any], trusted: bool):
    assert ExtractConfig(**settings).trusts_target_code == trusted


# Mistral's folders


def test_the_tokenizer_of_the_folder_goes_before_mistrals(tiny_llama: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_llama, tmp_path / "mistral")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mistral", "sliding_window": None}))
    expected = load_target(str(folder)).tokenizer("<|im_start|>fox")["input_ids"]
    (folder / "tekken.json").write_text("{}")
    assert load_target(str(folder)).tokenizer("<|im_start|>fox")["input_ids"] == expected
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TargetError, match=r"expected a tokenizer\.json in .*mistral, found tekken\.json alone"):
        load_target(str(folder))


# Pieces


def test_pieces_are_the_tensors_that_the_model_computes_with(folder: Path):
    found = read_pieces(load_target(str(folder)))
    check_pieces(found, expected_pieces(folder))
    assert ("lm_head.weight" in found) == (folder.name == "qwen3")  # tied weights are stored once


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_pieces_come_from_sharded_weights_too(kind: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    folder = save_target(kind, tmp_path / kind, tiny_tokenizer, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    check_pieces(read_pieces(load_target(str(folder))), expected_pieces(folder))


def test_sharded_weights_without_index_are_read_by_their_headers(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    folder = save_target("qwen3", tmp_path / "qwen3", tiny_tokenizer, max_shard_size="200KB")
    expected = expected_pieces(folder)
    (folder / "model.safetensors.index.json").unlink()
    check_pieces(read_pieces(load_target(str(folder))), expected)


def test_weights_of_another_naming_are_refused(tiny_llama: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_llama, tmp_path / "llama")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name.replace("embed_tokens", "wte"): value for name, value in weights.items()}, folder / "model.safetensors"
    )
    with pytest.raises(TargetError, match=r"expected the tensor model\.embed_tokens\.weight .*found none"):
        load_target(str(folder))


def test_the_cache_holds_pieces_and_tokenizer(folder: Path, tmp_path: Path):
    target, storage = load_target(str(folder)), LocalStorage(tmp_path / "cache")
    storage.root.mkdir()
    copy_pieces(target, storage)
    expected = expected_pieces(folder)
    shutil.rmtree(folder)
    stored = target_folder(storage)
    assert stored == storage.root / "target"
    pieces = TargetPieces.load(stored)
    assert torch.equal(pieces.embed_VH, expected["embed_tokens.weight"])
    assert torch.equal(load_file(stored / "pieces.safetensors")["norm.weight"], expected["norm.weight"])
    assert torch.equal(pieces.head_VH, expected.get("lm_head.weight", pieces.embed_VH))
    assert (pieces.head_VH is pieces.embed_VH) == ("lm_head.weight" not in expected)
    text = "the quick brown fox 你好<|im_end|>"
    assert load_tokenizer(stored)(text)["input_ids"] == target.tokenizer(text)["input_ids"]
    before = snapshot(storage.root)
    copy_pieces(target, storage)  # there already: the target's weights are not needed again
    assert snapshot(storage.root) == before
    assert {path.name for path in storage.root.iterdir()} == {"target", "target.json"}


PIECE_FILES = ["pieces.safetensors", "config.json", "tokenizer.json", "generation_config.json"]


@pytest.mark.parametrize("name", PIECE_FILES)
@pytest.mark.parametrize(
    "damage",
    [Damage("bit-flipped", 0.5), Damage("cut-short", 0.9, cut=True), Damage("missing", None)],
    ids=lambda damage: damage.id,
)
def test_a_damaged_piece_is_named_and_copied_anew(damage: Damage, name: str, tiny_llama: Path, tmp_path: Path):
    target, storage = load_target(str(tiny_llama)), LocalStorage(tmp_path)
    copy_pieces(target, storage)
    before = snapshot(tmp_path)
    damage.apply(tmp_path / "target" / name)
    with pytest.raises(CacheCorruptError, match=rf"target/{re.escape(name)} is not what was written.*vpd extract"):
        target_folder(storage)
    copy_pieces(target, storage)
    assert snapshot(tmp_path) == before


def test_without_their_record_there_are_no_pieces(tiny_llama: Path, tmp_path: Path):
    """As after a crash before the record was written."""
    target, storage = load_target(str(tiny_llama)), LocalStorage(tmp_path)
    copy_pieces(target, storage)
    before = snapshot(tmp_path)
    (tmp_path / "target.json").unlink()
    with pytest.raises(CacheCorruptError, match=r"expected the target's pieces in .*found none.*vpd extract"):
        target_folder(storage)
    copy_pieces(target, storage)
    assert snapshot(tmp_path) == before


# Fingerprint


def test_the_fingerprint_is_that_of_the_content(folder: Path, tmp_path: Path):
    fingerprint = load_target(str(folder)).fingerprint()
    other = shutil.copytree(folder, tmp_path / "elsewhere")
    assert load_target(str(other)).fingerprint() == fingerprint
    weights = load_file(other / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert load_target(str(other)).fingerprint() != fingerprint


def test_the_fingerprint_sees_the_config_and_every_shard(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    folder = save_target("llama", tmp_path / "llama", tiny_tokenizer, max_shard_size="200KB")
    target = load_target(str(folder))
    found = {target.fingerprint()}
    for path in [folder / "config.json", *target.weight_files()]:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + b" ")
        found.add(target.fingerprint())
        path.write_bytes(content)
    assert len(found) == 2 + len(target.weight_files())
    assert target.fingerprint() in found


def test_targets_differ_and_share_a_tokenizer(tiny_llama: Path, tiny_qwen3: Path):
    llama, qwen3 = load_target(str(tiny_llama)), load_target(str(tiny_qwen3))
    assert llama.fingerprint() != qwen3.fingerprint()
    assert llama.tokenizer_hash() == qwen3.tokenizer_hash()


def test_another_vocabulary_has_another_tokenizer_hash(folder: Path):
    before = load_target(str(folder)).tokenizer_hash()
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"].pop()
    path.write_text(json.dumps(content))
    assert load_target(str(folder)).tokenizer_hash() != before
