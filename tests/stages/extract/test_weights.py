"""Damaged files of a target's folder: each is named in one paragraph before anything else happens."""

import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import run_vpd, save_target, snapshot, write_jsonl
from transformers import PreTrainedTokenizerFast
from vpd.data.cache.cache import Cache, remove_unused
from vpd.data.errors import TargetError
from vpd.stages.extract.target import load_target


class Broken(NamedTuple):
    """A damaged file of a target, and words of the error."""

    id: str
    file: str
    content: bytes | float
    """Bytes that take the place of the file's content, or the share of the content that is left."""
    words: list[str]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 4004000\n"
BROKEN = [
    Broken("weights-pointer", "model.safetensors", POINTER, ["Git LFS pointer", "git lfs pull"]),
    Broken("tokenizer-pointer", "tokenizer.json", POINTER, ["Git LFS pointer"]),
    Broken("weights-cut", "model.safetensors", 0.9, ["no whole safetensors file"]),
    Broken("weights-header-cut", "model.safetensors", b"\x10\0\0\0\0\0\0\0{", ["no whole safetensors file"]),
    Broken("weights-empty", "model.safetensors", b"", ["empty file"]),
    Broken("tokenizer-cut", "tokenizer.json", 0.5, ["tokenizer", "can't be loaded"]),
    Broken("tokenizer-newer", "tokenizer.json", b'{"version": "1.0", "model": {"type": "BPEv2"}}', ["newer version"]),
    Broken("tokenizer-config-cut", "tokenizer_config.json", 0.5, ["expected JSON", "cut short"]),
    Broken("tokenizer-config-empty", "tokenizer_config.json", b"", ["empty file"]),
    Broken("tokenizer-config-of-text", "tokenizer_config.json", b'{"model_max_length": "512"}', ["can't be loaded"]),
    Broken("tokenizer-config-surrogate", "tokenizer_config.json", b'{"backend": "\\ud800"}', ["surrogates"]),
    Broken("config-cut", "config.json", 0.5, ["expected JSON", "cut short"]),
    Broken("config-empty", "config.json", b"", ["empty file"]),
    Broken("config-no-object", "config.json", b"[1]", ["expected a JSON object", "list"]),
    Broken("config-of-nothing", "config.json", b"{}", ["config", "model_type"]),
    Broken("config-unknown-kind", "config.json", b'{"model_type": "nonesuch"}', ["config", "nonesuch"]),
    Broken("generation-cut", "generation_config.json", b'{"eos_', ["expected JSON", "cut short"]),
    Broken("generation-empty", "generation_config.json", b"", ["empty file"]),
    Broken("generation-of-words", "generation_config.json", b'{"eos_token_id": "</s>"}', ["token ids", "</s>"]),
    Broken("generation-infinite", "generation_config.json", b'{"eos_token_id": Infinity}', ["token ids", "inf"]),
    Broken("generation-of-numbers-in-text", "generation_config.json", b'{"eos_token_id": "3"}', ["whole", "'3'"]),
    Broken("generation-of-fractions", "generation_config.json", b'{"eos_token_id": [2, 2.5]}', ["whole", "2.5"]),
    Broken("generation-of-nothing", "generation_config.json", b'{"eos_token_id": [null]}', ["whole", "None"]),
    Broken("generation-of-truth", "generation_config.json", b'{"eos_token_id": true}', ["whole", "True"]),
    Broken("config-with-mark", "config.json", b'\xef\xbb\xbf{"model_type": "llama"}', ["expected JSON", "BOM"]),
    Broken("index-empty", "model.safetensors.index.json", b"", ["empty file"]),
    Broken("index-cut", "model.safetensors.index.json", b'{"weight_map": {', ["expected JSON", "cut short"]),
    Broken("index-of-nothing", "model.safetensors.index.json", b'{"weight_map": {}}', ["weight_map"]),
    Broken(
        "index-stale",
        "model.safetensors.index.json",
        b'{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}',
        ["model-00001-of-00002.safetensors", "holds a whole model.safetensors too", "remove"],
    ),
    Broken(
        "index-of-another-model",
        "model.safetensors.index.json",
        b'{"weight_map": {"transformer.wte.weight": "model.safetensors"}}',
        ["transformer.wte.weight", "different models"],
    ),
]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.id)
def test_a_damaged_file_is_named_in_one_paragraph(broken: Broken, tiny_llama: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_llama, tmp_path / "llama")
    path = folder / broken.file
    if isinstance(broken.content, bytes):
        path.write_bytes(broken.content)
    else:
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * broken.content)])
    with pytest.raises(TargetError) as caught:
        load_target(str(folder))
    for word in (*broken.words, str(folder if "tokenizer" in broken.file else path)):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("kind", ["link", "folder"])
def test_a_link_without_a_file_and_a_folder_are_named(kind: str, file: str, tiny_llama: Path, tmp_path: Path):
    """As in the hub's local cache, whose files are links, after the files were removed."""
    path = shutil.copytree(tiny_llama, tmp_path / "llama") / file
    path.unlink()
    path.symlink_to("../gone") if kind == "link" else path.mkdir()
    with pytest.raises(TargetError, match=f"expected the content of {re.escape(str(path))}: (No such|Is a dir)"):
        load_target(str(path.parent))


@pytest.mark.parametrize("with_index", [True, False])
def test_an_absent_shard_is_named(with_index: bool, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    folder = save_target("llama", tmp_path / "llama", tiny_tokenizer, max_shard_size="200KB")
    shards = sorted(folder.glob("*.safetensors"))
    shards[1].unlink()
    if not with_index:
        (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(TargetError, match=f"{re.escape(shards[1].name)}.*no such file"):
        load_target(str(folder))


def test_weights_in_another_format_are_named(tiny_llama: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_llama, tmp_path / "llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(TargetError, match=r"found pytorch_model\.bin in another format.*save_pretrained"):
        load_target(str(folder))


def test_two_sets_of_weights_are_refused(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    """transformers loads the whole file, vLLM the index's files."""
    folder = save_target("llama", tmp_path / "llama", tiny_tokenizer, max_shard_size="200KB")
    shutil.copy(next(folder.glob("*.safetensors")), folder / "model.safetensors")
    with pytest.raises(TargetError, match="expected one set of weights"):
        load_target(str(folder))


def test_a_second_file_may_add_tensors_but_not_give_one_twice(tiny_llama: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_llama, tmp_path / "target")
    save_file({"momentum": torch.zeros(2)}, folder / "optimizer.safetensors")
    load_target(str(folder))
    save_file({"model.norm.weight": torch.zeros(2)}, folder / "extra.safetensors")
    with pytest.raises(
        TargetError, match=r"model\.norm\.weight once in .*model\.safetensors and in extra\.safetensors"
    ):
        load_target(str(folder))


def test_no_cache_is_begun_for_a_damaged_target(tiny_llama: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_llama, tmp_path / "llama")
    (folder / "model.safetensors").write_bytes(POINTER)
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "the fox"}])
    done = run_vpd("extract", folder, prompts, out=tmp_path / "cache", engine="transformers", num_draft_layers=3)
    assert (done.code, "Git LFS pointer" in done.message) == (1, True)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("layer", "shape", "words"),
    [(3, (256, 64), "mlp.up_proj.weight"), (3, None, "model.layers.3.mlp.up_proj.weight")],
    ids=["another-size", "absent"],
)
def test_weights_that_do_not_fit_are_named_and_leave_no_cache(
    layer: int, shape: tuple[int, int] | None, words: str, tiny_llama: Path, tmp_path: Path
):
    """The engine finds them after the cache is begun."""
    folder = shutil.copytree(tiny_llama, tmp_path / "llama")
    weights = load_file(folder / "model.safetensors")
    del weights[f"model.layers.{layer}.mlp.up_proj.weight"]
    if shape is not None:
        weights[f"model.layers.{layer}.mlp.up_proj.weight"] = torch.zeros(shape)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "the fox"}])
    done = run_vpd("extract", folder, prompts, out=tmp_path / "cache", engine="transformers", num_draft_layers=3)
    assert (done.code, words in done.message, str(folder) in done.message) == (1, True, True)
    assert not (tmp_path / "cache").exists()


def test_a_failed_start_leaves_what_others_have_made(tiny_cache: Path, tmp_path: Path):
    cache = Cache.open(shutil.copytree(tiny_cache, tmp_path / "cache"))
    before = snapshot(tmp_path / "cache")
    remove_unused(cache.storage)
    assert snapshot(tmp_path / "cache") == before
    new = Cache.create_or_open(tmp_path / "new", cache.manifest)
    new.storage.write("work/other.worker.json", b"{}")
    remove_unused(new.storage)
    assert new.storage.exists("dataset.json")
    new.storage.remove("work/other.worker.json")
    remove_unused(new.storage)
    assert not (tmp_path / "new").exists()
