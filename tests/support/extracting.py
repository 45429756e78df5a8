"""Extraction as `vpd extract` does it, with an engine that tests can wrap."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vpd.data.cache.cache import Cache
from vpd.data.cache.reader import CachedSequence
from vpd.stages.extract.config import ExtractConfig
from vpd.stages.extract.engine import Completion, Engine, EngineRequest
from vpd.stages.extract.engines import make_engine
from vpd.stages.extract.inputs import make_chat, plan_prompts, with_template_end
from vpd.stages.extract.manifest import open_cache, plan_layers, plan_manifest
from vpd.stages.extract.plan import plan_extraction
from vpd.stages.extract.run import extract
from vpd.stages.extract.sink import ExtractReport
from vpd.stages.extract.target import load_target

from support.tiny import EXTRACT, NUM_LAYERS

Wrap = Callable[[Engine], Engine]


def make_config(**changes: Any) -> ExtractConfig:
    return ExtractConfig(**{"layer_ids": list(range(NUM_LAYERS)), **EXTRACT, **changes})


def run(
    target_folder: Path, prompt_file: Path, out: Path, wrap: Wrap = lambda engine: engine, **changes: Any
) -> ExtractReport:
    """The steps of `vpd extract`, with the engine wrapped."""
    config = make_config(**changes)
    target = load_target(str(target_folder), config.adapter, trust_remote_code=config.trusts_target_code)
    layer_ids, chat = plan_layers(target, config), make_chat(target, config, out)
    target = with_template_end(target, chat)
    prompts = plan_prompts([prompt_file], config)
    manifest = plan_manifest(target, layer_ids, chat, prompts, config)
    plan = plan_extraction(out, manifest, prompts, chat, target, config)
    cache = open_cache(out, manifest, target)
    return extract(lambda: wrap(make_engine(target, layer_ids, config)), cache, plan, config)


def answer(engine: Engine, requests: list[EngineRequest]) -> dict[str, Completion]:
    """Key -> completion of these requests."""
    for request in requests:
        engine.submit(request)
    done: dict[str, Completion] = {}
    while engine.num_in_flight:
        done |= {completion.key: completion for completion in engine.poll()}
    return done


def by_row(folder: Path) -> dict[int, CachedSequence]:
    """Line number of the record -> sequence."""
    cache = Cache.open(folder, allow_empty=True)
    return {row.source_row: cache.read(row) for row in cache.rows}


def tokens(folder: Path) -> dict[str, list[int]]:
    """Id -> token ids of every sequence of a cache."""
    cache = Cache.open(folder, allow_empty=True)
    return {row.seq_id: cache.read(row).token_ids_S.tolist() for row in cache.rows}


def no_engine(engine: Engine) -> Engine:
    """For `wrap`, where the engine must not start."""
    raise AssertionError("the engine was started")
