"""The engines that can run a target, by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from ...data.errors import ExtractionError
from ...data.registry import Registry
from .engine import Engine, EngineClass, Sampling

if TYPE_CHECKING:
    from .config import ExtractConfig
    from .target import Target


class EngineEntry(NamedTuple):
    """Where an engine's class is; its module is imported when the engine is used."""

    place: str
    """`module:name` of an `EngineClass`; a leading dot means this folder."""
    install: str
    """What to install if the engine's package is missing."""


ENGINES: Registry[EngineEntry] = Registry("engine")
ENGINES.add("vllm", EngineEntry(".vllm.engine:VllmEngine", install="vpd[extract] for CUDA or vpd[extract-cpu]"))
ENGINES.add("transformers", EngineEntry(".transformers_engine:TransformersEngine", install="vpd"))


def make_engine(target: Target, layer_ids: Sequence[int], config: ExtractConfig) -> Engine:
    """Starts the engine that the settings name.

    Raises:
        ExtractionError: the engine's package can't be imported.
        VpdError: the engine can't start on this target or with these settings.
    """
    with _explained_import(config.engine) as engine_class:
        return engine_class(
            target,
            layer_ids,
            plan_sampling(config),
            dtype=config.dtype,
            max_len=config.max_len,
            engine_args=config.engine_args | ({"trust_remote_code": True} if config.trusts_target_code else {}),
        )


def plan_engine(config: ExtractConfig) -> dict[str, Any]:
    """What decides the states that the engine will give; known before the engine starts.

    Raises:
        ExtractionError: the engine's module can't be imported.
    """
    with _explained_import(config.engine) as engine_class:
        args = sorted(config.engine_args.items())
        decisive_args = {name: value for name, value in args if name not in engine_class.neutral_args}
        return {"name": config.engine, "version": engine_class.version(), "dtype": config.dtype, "args": decisive_args}


def plan_sampling(config: ExtractConfig) -> Sampling:
    """Given answers are a prefill, whose one new token is always the greedy choice."""
    temperature = config.temperature if config.mode == "generate" else 0.0
    return Sampling(temperature=temperature, top_p=config.top_p, top_k=config.top_k, seed=config.seed)


@contextmanager
def _explained_import(name: str) -> Iterator[EngineClass]:
    """Imports an engine's class for the block, and explains an ImportError, the block's included.

    Raises:
        ExtractionError: the engine's package can't be imported.
    """
    entry = ENGINES[name]
    module, _, class_name = entry.place.partition(":")
    try:
        yield getattr(import_module(module, __package__), class_name)
    except ImportError as error:
        others = " or ".join(other for other in ENGINES if other != name)
        raise ExtractionError(
            f"the engine {name} was asked for, but importing it failed ({error}). Install {entry.install}, or choose "
            f"--engine {others}."
        ) from error
