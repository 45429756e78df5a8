"""The engines that run a target."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from .config import ExtractConfig
from .engine import Engine, Sampling, decisive_args
from .target import Target
from .transformers_engine import TransformersEngine
from .vllm.engine import VllmEngine, vllm_version


def make_engine(target: Target, layer_ids: tuple[int, ...], config: ExtractConfig) -> Engine:
    """Starts the engine that the config names."""
    sampling = plan_sampling(config)
    if config.engine == "transformers":
        return TransformersEngine(target, layer_ids, sampling, dtype=config.dtype, engine_args=config.engine_args)
    return VllmEngine(
        target, layer_ids, sampling, dtype=config.dtype, max_len=config.max_len, engine_args=config.engine_args
    )


def plan_engine(config: ExtractConfig) -> dict[str, Any]:
    """What of the engine decides the states; known before it starts."""
    version = vllm_version() if config.engine == "vllm" else metadata.version("transformers")
    args = decisive_args(config.engine_args)
    return {"name": config.engine, "version": version, "dtype": config.dtype, "args": args}


def plan_sampling(config: ExtractConfig) -> Sampling:
    """A prefill of given responses always asks for the greedy choice after the last token."""
    temperature = config.temperature if config.mode == "generate" else 0.0
    return Sampling(temperature=temperature, top_p=config.top_p, top_k=config.top_k, seed=config.seed)
