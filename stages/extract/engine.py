"""What extraction asks of an engine, and what an engine answers."""

# T tokens that entered the target, K captured layers, H hidden width
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .target import Target

ABORTED = "abort"
"""Finish reason of a request that the engine gave up; nothing of its completion may be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """A prompt that the target continues."""

    key: str
    prompt_ids: list[int]
    max_new_tokens: int
    """1 makes the request a prefill: the one new token is the target's choice after the prompt."""
    capture: bool
    """Whether the target's states are wanted."""
    supervised: Sequence[int] = ()
    """For each token of the prompt, 1 if the token is supervised: the target's choice before it is wanted.

    Empty: no token of the prompt is supervised.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A request that has ended."""

    key: str
    prompt_ids: list[int]
    output_ids: list[int]
    """New tokens; the last new token never entered the target."""
    finish_reason: str
    """`stop`, `length` or `ABORTED`."""
    hidden_TKH: Tensor | None
    """bfloat16 states of the T = len(prompt_ids) + len(output_ids) - 1 tokens, on the CPU; None if not captured."""
    argmax_T: Tensor | None
    """int64: the target's greedy choice after each of the T tokens, computed from its states; None if not captured.

    `NO_CHOICE` where no choice was asked for. An engine that samples greedily may leave out choices within the answer,
    since such a choice is the answer's next token.
    """
    fault: str = ""
    """What is wrong with the engine's result, which must then not be used; empty: nothing."""


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
        """A request's own seed. Neither the worker nor the requests that run beside it matter."""
        return int.from_bytes(hashlib.sha256(f"{self.seed} {key}".encode()).digest()[:4])


class Engine(Protocol):
    """Runs the target. Requests may end in any order."""

    facts: dict[str, Any]
    """Name, version, dtype and arguments of the engine, for the commit records of the parts that it makes."""

    @property
    def num_in_flight(self) -> int:
        """Number of requests that are submitted and not yet returned."""
        ...

    def submit(self, request: EngineRequest) -> None: ...

    def poll(self) -> list[Completion]:
        """Does some work; returns what has finished since the last call."""
        ...

    def close(self) -> None: ...


class EngineClass(Protocol):
    """What a class of engines offers: a call starts an engine."""

    neutral_args: frozenset[str]
    """Engine arguments that decide where and how fast the engine computes, not what it computes.

    They may differ between the runs that write one cache.
    """

    def version(self) -> str:
        """Version of the package that computes the states; a static method, called before an engine starts."""
        ...

    def __call__(
        self,
        target: Target,
        layer_ids: Sequence[int],
        sampling: Sampling,
        *,
        dtype: str,
        max_len: int,
        engine_args: dict[str, Any],
    ) -> Engine:
        """
        Args:
            layer_ids: layers whose outputs are captured, 0-based.
            dtype: type that the target computes in, such as "bfloat16"; "auto" = the target's own.
            max_len: longest sequence, in tokens that enter the target.
            engine_args: arguments that only this engine knows.

        Raises:
            ImportError: the engine's package is not installed.
            VpdError: the engine can't start on this target or with these arguments.
        """
        ...


def engine_facts(name: str, version: str, dtype: torch.dtype, args: dict[str, Any]) -> dict[str, Any]:
    """The value of `Engine.facts`."""
    return {"name": name, "version": version, "dtype": str(dtype).removeprefix("torch."), "args": args}
