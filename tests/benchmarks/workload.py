"""Synthetic states of the shape of real targets, and a cache full of them."""

# T tokens, K layers, H hidden width
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vpd.data.cache.cache import CHUNK_TOKENS, Cache
from vpd.data.cache.manifest import CacheManifest
from vpd.data.cache.sequence import NewSequence
from vpd.data.cache.writer import StateWriter

GIB, MIB = 1 << 30, 1 << 20
POOL_TOKENS = 3072
MEAN_TOKENS = 1000


@dataclass(frozen=True, slots=True)
class Workload:
    """States [T, K, H] in bfloat16, sequences of 600 to 1400 tokens."""

    name: str
    num_layers: int
    hidden_size: int
    num_bytes: int
    has_targets: bool
    """Whether the targets are for this shape."""

    @property
    def token_bytes(self) -> int:
        return 2 * self.num_layers * self.hidden_size

    @property
    def num_sequences(self) -> int:
        return self.num_bytes // (MEAN_TOKENS * self.token_bytes)

    def target(self, value: float) -> float | None:
        return value if self.has_targets else None

    def sequences(self) -> Iterator[dict[str, Any]]:
        """Arguments of `append`; the states are views of one pool, so that making them takes no time."""
        generator = np.random.default_rng(0)
        pool_TKH = torch.empty(POOL_TOKENS, self.num_layers, self.hidden_size, dtype=torch.bfloat16)
        pool_TKH.normal_(generator=torch.Generator().manual_seed(0))
        for i in range(self.num_sequences):
            length = int(generator.integers(600, 1401))
            start = int(generator.integers(POOL_TOKENS - length))
            yield sequence_arguments(f"{i:08d}", pool_TKH[start : start + length])


QWEN3 = Workload("Qwen3-8B-like", 5, 4096, GIB, True)
SMOLLM2 = Workload("SmolLM2-like", 5, 576, GIB // 2, False)


def sequence_arguments(seq_id: str, hidden_TKH: torch.Tensor) -> dict[str, Any]:
    length = len(hidden_TKH)
    return {
        "seq_id": seq_id,
        "source": "synthetic",
        "source_row": 1,
        "hidden_TKH": hidden_TKH,
        "arrays": {
            "token_ids": list(range(length)),
            "loss_mask": [0] * (length // 2) + [1] * (length - length // 2),
            "target_argmax": list(range(length)),
        },
        "prompt_len": length // 2,
        "final_token_id": 2,
        "finish_reason": "stop",
    }


def append(writer: StateWriter, *, hidden_TKH: torch.Tensor, **fields: Any) -> None:
    writer.append(NewSequence(**fields), hidden_TKH)


def make_manifest(num_layers: int, hidden_size: int, codec: str = "raw") -> CacheManifest:
    return CacheManifest.model_validate(
        {
            "target_fingerprint": "0" * 16,
            "tokenizer_hash": "0" * 16,
            "template_hash": "0" * 16,
            "layer_ids": tuple(range(num_layers)),
            "generation": {},
            "engine": {},
            "codec": codec,
            "chunk_tokens": CHUNK_TOKENS,
            "vllm_layer_ids": tuple(range(1, num_layers + 1)),
            "target": "synthetic",
            "num_target_layers": num_layers,
            "hidden_size": hidden_size,
            "vocab_size": 1 << 16,
            "versions": {},
            "rendered_sample": "",
        }
    )


def write_cache(folder: Path, workload: Workload, part_bytes: int, num_sequences: int | None = None) -> Cache:
    """A cache with the first sequences of the workload, or all of them."""
    cache = Cache.create_or_open(folder, make_manifest(workload.num_layers, workload.hidden_size))
    writer = StateWriter(cache, part_bytes, {})
    for sequence in islice(workload.sequences(), num_sequences):
        append(writer, **sequence)
    writer.finish()
    return Cache.open(folder)
