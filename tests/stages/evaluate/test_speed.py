"""The cost model against sizes and times that are written out."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny import SHAPE
from transformers import AutoConfig, AutoModelForCausalLM
from vpd.data.errors import TargetError
from vpd.stages.evaluate.config import EvalConfig
from vpd.stages.evaluate.speed import GPUS, TARGETS, CostModel, DenseSizes, Gpu, cost_model, sizes_of

BANDWIDTH, ARITHMETIC = 1e9, 1e12
SIZES = DenseSizes(
    num_layers=2,
    hidden_size=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=16,
    vocab_size=100,
)
"""Weights of a layer: 8 x 16 queries, 8 x 8 keys, 8 x 8 values, 16 x 8 outputs, three of 8 x 16."""
LAYERS, HEAD = 2 * (128 + 64 + 64 + 128 + 3 * 128), 800


def model(bandwidth: float = BANDWIDTH, arithmetic: float = ARITHMETIC, context: int = 10) -> CostModel:
    return CostModel(Gpu(bandwidth, arithmetic, "made up"), SIZES, SIZES, 5, context)


def test_sizes_are_those_of_the_model(tiny_llama: Path):
    sizes = sizes_of(json.loads((tiny_llama / "config.json").read_text()))
    built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_llama))
    matrices = {name: p.numel() for name, p in built.named_parameters() if p.dim() == 2 and "embed" not in name}
    head = built.get_output_embeddings().weight.numel()
    assert sizes.head_weights == head
    assert sizes.layer_weights == sum(count for name, count in matrices.items() if "lm_head" not in name)


def test_published_sizes_give_published_numbers_of_parameters():
    """Qwen3-8B has 6.95 B parameters beside the embedding, by its model card; the head is a matrix of its own."""
    sizes = TARGETS["qwen3-8b"]
    assert sizes.layer_weights + sizes.head_weights == pytest.approx(6.95e9 + sizes.head_weights, rel=0.01)


def test_a_pass_takes_as_long_as_its_memory_traffic_or_its_arithmetic():
    num_values = LAYERS + HEAD + 3 * 10 * (2 * 2 * 2 * 4)
    assert model(arithmetic=1e30).target_pass(3, 1) == pytest.approx(2 * num_values / BANDWIDTH)
    # Attention: two products over 10 tokens of context, 4 heads of 4, in each of 2 layers.
    products = 6 * (LAYERS + 2 * (2 * 10 * 16)) + 6 * HEAD
    assert model(bandwidth=1e30).target_pass(3, 2) == pytest.approx(2 * products / ARITHMETIC)
    of_drafter = 3 * 2 * 5 * (LAYERS + 2 * (2 * 10 * 16)) + 3 * 7 * HEAD
    assert model(bandwidth=1e30).drafter_pass(3, 2, 7) == pytest.approx(2 * of_drafter / ARITHMETIC)


def row(way: str, alpha: float, verified: float, second_passes: float = 0.0) -> dict[str, Any]:
    passes = {"second_passes": second_passes, "second_blocks": 4 * second_passes, "head_rows": 4 + 10 * second_passes}
    second = "d2sd" if second_passes else None
    return {"way": way, "second": second, "policy": None, "k": 4, "nodes": 8, "verified": verified, "alpha": alpha} | {
        "passes": passes
    }


def test_a_cycle_is_the_sum_of_its_passes():
    each = row("two-drafter tree", 3.0, 8.0, 2.0)
    costs = model()
    expected = costs.drafter_pass(8, 1, 4) + 2 * costs.drafter_pass(8, 4, 10) + costs.target_pass(8, 9)
    assert costs.cycle(8, each["verified"], each["passes"]) == pytest.approx(expected)


def test_many_requests_make_verified_nodes_dear():
    """Alone, memory traffic decides and nodes are free. With many requests, arithmetic decides and few nodes win."""
    gpu = GPUS["h100"]
    target = TARGETS["qwen3-8b"]
    drafter = DenseSizes(5, 4096, 32, 8, 128, 12288, 151936)
    costs = CostModel(gpu, target, drafter, 16, 1024)
    rows = [row("chain", 3.0, 15.0), row("two-drafter tree", 4.5, 64.0, 2.0)]
    by_batch = {each["batch"]: each for each in costs.compare(rows)}
    assert by_batch[1]["ways"][0]["way"] == "two-drafter tree"
    assert by_batch[64]["ways"][0]["way"] == "chain"
    assert by_batch[1]["plain_tokens_per_s"] == pytest.approx(1 / costs.target_pass(1, 1))
    for each in by_batch.values():
        speeds = [way["speedup"] for way in each["ways"]]
        assert speeds == sorted(speeds, reverse=True)


def test_no_gpu_asks_for_no_model():
    assert cost_model(EvalConfig(), {}, SHAPE) is None


@pytest.mark.parametrize(
    ("config", "words"),
    [
        pytest.param({"num_experts": 8}, "experts", id="experts"),
        pytest.param({"num_hidden_layers": 2}, "num_attention_heads", id="a-size-is-missing"),
    ],
)
def test_a_target_of_unknown_sizes_is_an_error(config: dict[str, Any], words: str):
    with pytest.raises(TargetError, match=f"{words}.*--speed-target"):
        cost_model(EvalConfig(gpu="h100"), config, SHAPE)
    found = cost_model(EvalConfig(gpu="h100", speed_target="qwen3-4b"), config, SHAPE)
    assert found is not None
    assert found.target == TARGETS["qwen3-4b"]
