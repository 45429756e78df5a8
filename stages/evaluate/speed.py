"""What acceptance lengths are worth on a GPU: tokens per second against plain decoding, by a roofline.

A pass takes as long as its memory traffic or its arithmetic, whichever is longer, at the speeds of the GPU's data
sheet. So times are lower bounds, for the target and the drafters alike: kernels reach a part of these speeds, and
starting a kernel takes time. The model says which way of decoding is best at a batch size, not how fast an engine is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ...data.errors import TargetError
from ..drafter.shape import DrafterShape
from .config import EvalConfig
from .ways import Way

BATCHES = (1, 8, 64)
"""Numbers of requests that are decoded together."""
VALUE_BYTES = 2
"""Weights, keys and values are in bfloat16."""


class Gpu(NamedTuple):
    """The speeds of a GPU by its maker's data sheet."""

    bytes_per_s: float
    flops_per_s: float
    """Dense bfloat16."""
    source: str


GPUS = {
    "a100": Gpu(2.039e12, 312e12, "NVIDIA A100 80GB SXM data sheet"),
    "h100": Gpu(3.35e12, 989e12, "NVIDIA H100 SXM data sheet"),
    "h200": Gpu(4.8e12, 989e12, "NVIDIA H200 SXM data sheet"),
    "l40s": Gpu(0.864e12, 362e12, "NVIDIA L40S data sheet"),
}


@dataclass(frozen=True, slots=True)
class DenseSizes:
    """The sizes of a transformer in which every token passes through all weights."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int

    @property
    def layer_weights(self) -> int:
        """Weights of all layers; the SwiGLU block has three matrices."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def head_weights(self) -> int:
        return self.hidden_size * self.vocab_size

    @property
    def cache_values(self) -> int:
        """Keys and values of one token."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


TARGETS = {
    "qwen3-4b": DenseSizes(36, 2560, 32, 8, 128, 9728, 151936),
    "qwen3-8b": DenseSizes(36, 4096, 32, 8, 128, 12288, 151936),
    "qwen3-32b": DenseSizes(64, 5120, 64, 8, 128, 25600, 151936),
    "llama-3.1-8b": DenseSizes(32, 4096, 32, 8, 128, 14336, 128256),
}
"""Sizes from the models' published config.json."""


def sizes_of(config: dict[str, Any]) -> DenseSizes:
    """The sizes of a target from its config.json.

    Raises:
        TargetError: the config lacks a size, or not every token passes through all weights.
    """
    text = config.get("text_config") or config
    if any("expert" in key and value for key, value in text.items()):
        raise TargetError(
            "expected a target in which every token passes through all weights, found one with experts. Name a dense "
            "target of like size: --speed-target."
        )
    try:
        heads, hidden = text["num_attention_heads"], text["hidden_size"]
        return DenseSizes(
            num_layers=text["num_hidden_layers"],
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=text.get("num_key_value_heads") or heads,
            head_dim=text.get("head_dim") or hidden // heads,
            intermediate_size=text["intermediate_size"],
            vocab_size=text["vocab_size"],
        )
    except KeyError as error:
        raise TargetError(
            f"expected {error} in the target's config.json, found none. Name a target of like size: --speed-target."
        ) from None


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds of the passes of a decoding cycle."""

    gpu: Gpu
    target: DenseSizes
    drafter: DenseSizes
    """A drafter's layers are as wide as the target's, and its head is the target's."""
    block_size: int
    context: int
    """Tokens of a request that are in the KV cache."""

    def target_pass(self, batch: int, num_tokens: int | float) -> float:
        """One pass of the target over new tokens of each request."""
        return self._seconds(self.target, batch, batch * num_tokens, batch * num_tokens)

    def drafter_pass(self, batch: int, num_blocks: float, num_rows: float) -> float:
        """One pass of a drafter over blocks of each request, with some rows of the head."""
        return self._seconds(self.drafter, batch, batch * num_blocks * self.block_size, batch * num_rows)

    def _seconds(self, sizes: DenseSizes, batch: int, num_tokens: float, num_rows: float) -> float:
        cached = batch * self.context * sizes.cache_values
        num_bytes = VALUE_BYTES * (sizes.layer_weights + sizes.head_weights + cached)
        of_attention = 2 * sizes.num_layers * sizes.num_heads * sizes.head_dim * self.context
        num_flops = 2 * (num_tokens * (sizes.layer_weights + of_attention) + num_rows * sizes.head_weights)
        return max(num_bytes / self.gpu.bytes_per_s, num_flops / self.gpu.flops_per_s)

    def cycle(self, batch: int, verified: float, passes: dict[str, float]) -> float:
        """Seconds of a cycle that verifies this many nodes after these passes, see `by_nodes` of a replay."""
        first_rows = self.block_size - 1
        seconds = self.drafter_pass(batch, 1, first_rows) + self.target_pass(batch, 1 + verified)
        if num_passes := passes["second_passes"]:
            blocks, rows = passes["second_blocks"] / num_passes, (passes["head_rows"] - first_rows) / num_passes
            seconds += num_passes * self.drafter_pass(batch, blocks, rows)
        return seconds

    def compare(self, by_nodes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """For each batch size: plain decoding, and every way with its speed against plain decoding, the best first."""
        found = []
        for batch in BATCHES:
            plain = self.target_pass(batch, 1)
            rows = []
            for each in by_nodes:
                seconds = self.cycle(batch, each["verified"], each["passes"])
                way = {name: each[name] for name in ("way", *Way._fields[1:])}
                rows.append({**way, "cycle_s": seconds, "speedup": each["alpha"] * plain / seconds})
            rows.sort(key=lambda row: -row["speedup"])
            found.append({"batch": batch, "plain_tokens_per_s": batch / plain, "ways": rows})
        return found


def cost_model(config: EvalConfig, target_config: dict[str, Any], drafter: DrafterShape) -> CostModel | None:
    """The cost model that the settings ask for; None if they name no GPU.

    Args:
        target_config: the config.json of the cache's target.

    Raises:
        TargetError: the sizes of the target are not known.
    """
    if config.gpu is None:
        return None
    target = sizes_of(target_config) if config.speed_target is None else TARGETS[config.speed_target]
    layers = replace(target, num_layers=drafter.num_layers)
    return CostModel(GPUS[config.gpu], target, layers, drafter.block_size, config.speed_context)


def compare_speeds(model: CostModel, config: EvalConfig, by_nodes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Speeds of all ways against plain decoding, by batch size.

    Args:
        by_nodes: see `ReplayReport.by_nodes`.
    """
    return {
        "gpu": config.gpu,
        "source": f"a roofline at the speeds of the {model.gpu.source}",
        "target": config.speed_target or "the cache's",
        "context": config.speed_context,
        "by_batch": model.compare(by_nodes),
    }
