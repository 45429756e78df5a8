"""An extraction, from its arguments to a cache: the same steps in every worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..data.cache.manifest import CacheManifest
from ..stages.config import ExtractConfig
from ..stages.extract.engine import Engine
from ..stages.extract.plan import (
    ExtractPlan,
    make_chat,
    make_engine,
    open_cache,
    plan_extraction,
    plan_layers,
    plan_manifest,
    plan_prompts,
)
from ..stages.extract.probe import probe
from ..stages.extract.run import extract
from ..stages.extract.sink import ExtractReport
from ..stages.extract.target import Target, load_target


@dataclass(frozen=True, slots=True)
class ExtractJob:
    """What `vpd extract` was asked for."""

    target: str
    prompts: tuple[str, ...]
    out: str
    settings: ExtractConfig


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job whose target is found and whose records are checked; nothing is written yet."""

    job: ExtractJob
    target: Target
    layer_ids: tuple[int, ...]
    manifest: CacheManifest
    plan: ExtractPlan


def prepare(job: ExtractJob) -> Prepared:
    """
    Raises:
        VpdError: the target, the prompts or the cache can't be used as asked.
    """
    settings = job.settings
    prompts = plan_prompts(job.prompts, settings)
    target = load_target(job.target)
    layer_ids = plan_layers(target, settings)
    chat = make_chat(target, settings)
    manifest = plan_manifest(target, layer_ids, chat, prompts, settings)
    plan = plan_extraction(job.out, manifest, prompts, chat, target, settings)
    return Prepared(job, target, layer_ids, manifest, plan)


def work_on(
    prepared: Prepared,
    on_sequence: Callable[[int, str], None] = lambda num_tokens, note: None,
    must_stop: Callable[[], bool] = lambda: False,
) -> ExtractReport:
    """One worker's part of the job; all of it if there is no other."""
    settings = prepared.job.settings
    cache = open_cache(prepared.job.out, prepared.manifest, prepared.target)

    def start_engine() -> Engine:
        engine = make_engine(prepared.target, prepared.layer_ids, settings)
        try:
            probe(engine, prepared.target, prepared.layer_ids, cache.storage)
        except BaseException:
            engine.close()
            raise
        return engine

    return extract(
        start_engine,
        cache,
        prepared.plan,
        settings,
        on_sequence,
        must_stop,
    )
