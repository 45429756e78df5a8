"""Targets with a LoRA adapter: their states are those of the merged target."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.extracting import by_row, run
from support.in_process import in_process
from support.tiny import write_jsonl
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from vpd.data.errors import ConfigError, FingerprintMismatchError, TargetError
from vpd.stages.extract.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_adapter
from vpd.stages.extract.engine import EngineRequest, Sampling
from vpd.stages.extract.target import load_target
from vpd.stages.extract.vllm.engine import VllmEngine, supported_lora_rank

RANK, ALPHA = 4, 8
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": RANK,
    "lora_alpha": ALPHA,
    "target_modules": ["q_proj", "down_proj"],
    "bias": "none",
}


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, large enough to change the target's answers."""
    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, weight in model.named_parameters():
        module = name.removesuffix(".weight")
        if module.endswith(tuple(CONFIG["target_modules"])):
            num_out, num_in = weight.shape
            down, up = (torch.randn(size, generator=generator) * 0.2 for size in ((RANK, num_in), (num_out, RANK)))
            weights |= {
                f"base_model.model.{module}.lora_A.weight": down,
                f"base_model.model.{module}.lora_B.weight": up,
            }
    save_file(weights, folder / ADAPTER_WEIGHTS)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(scope="module")
def merged(
    tiny_llama: Path, tiny_tokenizer: PreTrainedTokenizerFast, adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A target with the weights W + alpha / r * B A."""
    folder = tmp_path_factory.mktemp("merged")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    weights = load_file(adapter / ADAPTER_WEIGHTS)
    for name, weight in model.named_parameters():
        place = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{place}.lora_A.weight" in weights:
            weight.data += ALPHA / RANK * weights[f"{place}.lora_B.weight"] @ weights[f"{place}.lora_A.weight"]
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_a_cache_of_an_adapted_target_is_that_of_the_merged_one(
    tiny_llama: Path, merged: Path, adapter: Path, tiny_prompts: Path, tmp_path: Path
):
    for name, target in (("plain", tiny_llama), ("merged", merged)):
        run(target, tiny_prompts, tmp_path / name)
    run(tiny_llama, tiny_prompts, tmp_path / "adapted", adapter=str(adapter))
    plain, expected, found = (by_row(tmp_path / name) for name in ("plain", "merged", "adapted"))
    assert any(not torch.equal(plain[row].token_ids_S, expected[row].token_ids_S) for row in expected)
    for row, theirs in expected.items():
        ours = found[row]
        assert torch.equal(ours.token_ids_S, theirs.token_ids_S)
        assert torch.equal(ours.target_argmax_T, theirs.target_argmax_T)
        torch.testing.assert_close(ours.hidden_TKH.float(), theirs.hidden_TKH.float(), rtol=2**-7, atol=1e-3)


def test_a_cache_takes_nothing_of_the_target_without_its_adapter(tiny_llama: Path, adapter: Path, tmp_path: Path):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "name a fox"}])
    run(tiny_llama, prompts, tmp_path / "cache", adapter=str(adapter))
    with pytest.raises(FingerprintMismatchError, match="target_fingerprint"):
        run(tiny_llama, prompts, tmp_path / "cache")


@pytest.fixture(scope="module")
def engine(tiny_llama: Path, adapter: Path) -> Iterator[VllmEngine]:
    with in_process():
        engine = VllmEngine(
            load_target(str(tiny_llama), str(adapter)),
            (1, 3),
            Sampling(temperature=0, top_p=1, top_k=0, seed=0),
            dtype="float32",
            max_len=64,
            engine_args={"enforce_eager": True, "kv_cache_memory_bytes": 1 << 28},
        )
    yield engine
    engine.close()


@pytest.mark.engine
def test_vllm_s_states_are_those_of_the_merged_target(engine: VllmEngine, merged: Path):
    engine.submit(EngineRequest(key="a", prompt_ids=[5, 6, 7, 8, 9], max_new_tokens=8, capture=True))
    while not (completions := engine.poll()):
        pass
    (found,) = completions
    assert found.hidden_TKH is not None
    ids = found.prompt_ids + found.output_ids
    model = AutoModelForCausalLM.from_pretrained(merged)
    with torch.inference_mode():
        out = model(torch.tensor([ids[:-1]]), output_hidden_states=True)
    assert out.logits[0, len(found.prompt_ids) - 1 :].argmax(dim=-1).tolist() == found.output_ids
    for k, layer_id in enumerate((1, 3)):
        expected = out.hidden_states[layer_id + 1][0]
        torch.testing.assert_close(found.hidden_TKH[:, k].float(), expected, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, ["found IA3", "Merge it"]),
        ({"target_modules": ["q_proj", "lm_head"]}, ["changes lm_head", "Merge it"]),
        ({"modules_to_save": ["embed_tokens"]}, ["changes embed_tokens", "Merge it"]),
        ({"use_dora": True}, ["found use_dora", "Merge it"]),
        ({"bias": "all"}, ["found bias", "Merge it"]),
        ({"r": "x"}, ["expected the JSON of a LoRA adapter"]),
    ],
)
def test_adapters_of_another_kind_are_refused(changes: dict[str, Any], words: list[str], adapter: Path, tmp_path: Path):
    (tmp_path / ADAPTER_WEIGHTS).touch()
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(CONFIG | changes))
    with pytest.raises(TargetError) as caught:
        load_adapter(str(tmp_path))
    assert all(word in str(caught.value) for word in words)


def test_transformers_without_peft_says_what_to_install(
    tiny_llama: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("vpd.stages.extract.transformers_engine.can_apply", lambda: False)
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "name a fox"}])
    with pytest.raises(ConfigError, match=r"vpd\[adapter\]"):
        run(tiny_llama, prompts, tmp_path / "cache", adapter=str(adapter))


def test_an_adapter_of_another_target_is_named(tiny_llama: Path, adapter: Path, tmp_path: Path):
    narrow = {
        name: w[:, :7].clone() if "lora_A" in name else w for name, w in load_file(adapter / ADAPTER_WEIGHTS).items()
    }
    save_file(narrow, tmp_path / ADAPTER_WEIGHTS)
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(CONFIG))
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "name a fox"}])
    with pytest.raises(TargetError, match="Check that it was trained on this target"):
        run(tiny_llama, prompts, tmp_path / "cache", adapter=str(tmp_path))


@pytest.mark.parametrize("file", [ADAPTER_CONFIG, ADAPTER_WEIGHTS])
def test_a_folder_without_an_adapter_is_named(file: str, tmp_path: Path):
    (tmp_path / file).touch()
    missing = {ADAPTER_CONFIG: ADAPTER_WEIGHTS, ADAPTER_WEIGHTS: ADAPTER_CONFIG}[file]
    with pytest.raises(TargetError, match=rf"{tmp_path}, found no {missing}"):
        load_adapter(str(tmp_path))


def test_the_largest_rank_of_all_modules_counts(tmp_path: Path):
    (tmp_path / ADAPTER_WEIGHTS).touch()
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(CONFIG | {"rank_pattern": {"q_proj": 24}}))
    assert load_adapter(str(tmp_path)).rank == 24


@pytest.mark.parametrize(("rank", "supported"), [(1, 8), (8, 8), (9, 16), (24, 32), (512, 512), (600, 600)])
def test_the_least_rank_that_vllm_supports(rank: int, supported: int):
    assert supported_lora_rank(rank) == supported
