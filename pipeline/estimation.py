"""Facts about an extraction and a training run before they start, as `vpd estimate --json` gives them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data.cache.codecs import CODECS
from ..data.cache.manifest import CacheManifest
from ..data.cache.storage.base import Storage
from ..data.cache.storage.places import open_storage
from ..data.prompts.records import PromptSet
from ..stages.extract.engines import make_engine
from ..stages.extract.estimate import (
    Lengths,
    Pilot,
    cache_bytes,
    choose_evenly,
    expected_lengths,
    run_pilot,
)
from ..stages.extract.inputs import make_chat, plan_prompts
from ..stages.extract.manifest import plan_layers, plan_manifest
from ..stages.extract.plan import plan_extraction
from ..stages.extract.target import Target, load_target
from ..stages.train.cost import training_cost
from ..stages.train.plan import shape_for
from .config import VpdConfig
from .extraction import ExtractJob, Prepared

SECONDS_PER_HOUR = 3600


def estimate_facts(target_name: str, prompt_files: tuple[str, ...], out: str, config: VpdConfig) -> dict[str, Any]:
    """All that `vpd estimate` shows. With `estimate.pilot`, some records are extracted to measure."""
    settings, wanted = config.extract, config.estimate
    prompts = plan_prompts(prompt_files, settings)
    target = load_target(target_name, settings.adapter)
    layer_ids, chat = plan_layers(target, settings), make_chat(target, settings)
    manifest = plan_manifest(target, layer_ids, chat, prompts, settings)
    chosen = sample_records(prompts, wanted.sample)
    scale = len(prompts.records) / len(chosen.records)
    storage = open_storage(out)
    plan = plan_extraction(out, manifest, chosen, chat, target, settings)
    prepared = Prepared(ExtractJob(target_name, prompt_files, out, settings), target, layer_ids, manifest, plan)
    pilot = pilot_extraction(prepared, storage, wanted.pilot) if wanted.pilot and plan.conversations else None
    response = settings.response_tokens or (pilot.response_tokens if pilot is not None else None)
    num_sequences = wanted.num_sequences or round(len(plan.conversations) * scale)
    lengths = expected_lengths(plan.conversations, response, num_sequences)
    rate = wanted.tokens_per_second or (pilot.tokens_per_second if pilot is not None else None)
    return {
        "cache": out,
        "num_sequences": lengths.num_sequences,
        "num_present": round(plan.report.num_present * scale),
        "num_tokenized": len(plan.conversations),
        "num_tokens": round(lengths.total),
        "response_tokens": response if settings.mode == "generate" else None,
        "bytes": bytes_by_codec(lengths, manifest, pilot),
        "codec": settings.codec,
        "free_bytes": storage.free_bytes(),
        "tokens_per_second": rate,
        "hours": None if rate is None else lengths.total / rate / SECONDS_PER_HOUR,
        "training": training_facts(lengths, manifest, target, config),
    }


def sample_records(prompts: PromptSet, number: int | None) -> PromptSet:
    """That many of the records, evenly chosen; all of them if there are fewer, or if no number is given."""
    number = min(number or len(prompts.records), len(prompts.records))
    chosen = [i * len(prompts.records) // number for i in range(number)]
    return replace(prompts, records=tuple(prompts.records[i] for i in chosen))


def pilot_extraction(prepared: Prepared, storage: Storage, number: int) -> Pilot:
    """Extracts that many of the records into a temporary folder near the cache, or here if the cache is remote."""
    settings = prepared.job.settings
    near = storage.local_folder or Path.cwd()
    return run_pilot(
        lambda: make_engine(prepared.target, prepared.layer_ids, settings),
        choose_evenly(prepared.plan, number),
        prepared.manifest,
        settings,
        near,
    )


def bytes_by_codec(lengths: Lengths, manifest: CacheManifest, pilot: Pilot | None) -> dict[str, int]:
    """Bytes of the cache with each codec; a pilot gives the share that compression leaves."""
    shares = {} if pilot is None else pilot.shares
    return {codec: cache_bytes(lengths, manifest, codec, shares.get(codec)) for codec in CODECS}


def training_facts(
    lengths: Lengths, manifest: CacheManifest, target: Target, config: VpdConfig
) -> dict[str, Any] | None:
    """What a run of `vpd train` over the cache will take; None if there is no sequence."""
    if not len(lengths.num_tokens):
        return None
    wanted = config.estimate
    shape = shape_for(manifest, target.config.to_dict(), config.drafter, mask_token_id=0)
    cost = training_cost(shape, config.train, lengths.num_tokens, lengths.num_sequences)
    found = {"num_steps": cost.num_steps, "num_tokens": round(cost.num_tokens), "flops": cost.flops}
    if wanted.utilization is None:
        return found
    hours = cost.gpu_hours(wanted.tflops, wanted.utilization)
    rate = cost.num_tokens / (hours * SECONDS_PER_HOUR)
    bytes_per_token = cache_bytes(lengths, manifest, config.extract.codec) / lengths.total
    return {**found, "gpu_hours": hours, "tokens_per_second": rate, "bytes_per_second": rate * bytes_per_token}
