"""What extraction asks of an engine, and what it gets back."""

# T tokens that entered the target, K captured layers, H hidden width
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """Continue `prompt_ids`, and hand over the target's states if `capture`."""

    key: str
    prompt_ids: list[int]
    max_new_tokens: int
    """With 1 this is a prefill: the one new token is the target's choice after the prompt."""
    capture: bool
    supervised: Sequence[int] = ()
    """1 for the prompt's supervised tokens, before which the target's choices are wanted; empty: there is none."""


ABORTED = "abort"


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A request that has ended."""

    key: str
    prompt_ids: list[int]
    output_ids: list[int]
    """New tokens; the last of them never entered the target."""
    finish_reason: str
    """`stop` or `length`; `ABORTED`: the engine gave the request up, and nothing of it counts."""
    hidden_TKH: Tensor | None
    """bfloat16 states of the T = len(prompt_ids) + len(output_ids) - 1 tokens, on the CPU; None if not captured."""
    argmax_T: Tensor | None
    """int64: the target's greedy choice after each of the T tokens, from its states.

    `NO_CHOICE` where nobody asked for it, or where greedy sampling says it anyway: it is then the next token.
    """
    fault: str = ""
    """What is wrong with what the engine gave, so that it must not be used; empty: nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the target chooses its tokens; temperature 0 is greedy."""

    temperature: float
    top_p: float
    top_k: int
    seed: int

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def seed_of(self, key: str) -> int:
        """A request's own seed, whatever worker runs it, and beside whatever others."""
        return int.from_bytes(hashlib.sha256(f"{self.seed} {key}".encode()).digest()[:4])


class Engine(Protocol):
    """Runs the target. Requests are answered in any order."""

    facts: dict[str, Any]
    """Name, version, dtype, arguments: for the commit records of the parts it made."""

    @property
    def num_in_flight(self) -> int:
        """Requests submitted and not yet handed back."""
        ...

    def submit(self, request: EngineRequest) -> None: ...

    def poll(self) -> list[Completion]:
        """Does some work; returns what has finished since the last call."""
        ...

    def close(self) -> None: ...


def engine_facts(name: str, version: str, dtype: torch.dtype, args: dict[str, Any] | None) -> dict[str, Any]:
    return {"name": name, "version": version, "dtype": str(dtype).removeprefix("torch."), "args": args or {}}


NEUTRAL_ARGS = {
    "async_scheduling",
    "batch_size",
    "cpu_offload_gb",
    "disable_log_stats",
    "distributed_executor_backend",
    "enable_chunked_prefill",
    "enforce_eager",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "load_format",
    "max_num_batched_tokens",
    "max_num_seqs",
    "num_gpu_blocks_override",
    "pipeline_parallel_size",
    "tensor_parallel_size",
}
"""Engine arguments that say where and how fast it computes, not what: they may differ within a cache."""


def decisive_args(args: dict[str, Any]) -> dict[str, Any]:
    """The engine arguments that can change what is computed."""
    return {name: value for name, value in sorted(args.items()) if name not in NEUTRAL_ARGS}
