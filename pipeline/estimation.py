"""Facts about an extraction and a training run before they start, as `vpd estimate --json` gives them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from ..data.cache.codecs import CODECS
from ..data.cache.manifest import MANIFEST_NAME, CacheManifest
from ..data.cache.storage.base import Storage
from ..data.cache.storage.places import open_storage
from ..stages.extract.engines import make_engine
from ..stages.extract.estimate import (
    Lengths,
    Pilot,
    cache_bytes,
    choose_evenly,
    expected_lengths,
    run_pilot,
)
from ..stages.extract.inputs import make_chat, plan_prompts, with_template_end
from ..stages.extract.manifest import plan_layers, plan_manifest
from ..stages.extract.plan import CHECKED_ROWS, ExtractPlan, plan_extraction
from ..stages.extract.target import Target, load_target
from ..stages.train.cost import training_cost
from ..stages.train.plan import shape_for
from .config import VpdConfig
from .extraction import ExtractJob, Prepared
from .first_record import show_first_record

SECONDS_PER_HOUR = 3600


def estimate_facts(target_name: str, prompt_files: tuple[str, ...], out: str, config: VpdConfig) -> dict[str, Any]:
    """All that `vpd estimate` shows. With `estimate.pilot`, some records are extracted to measure.

    Without a pilot, the target's config and tokenizer are enough, so its weights are neither fetched nor read.
    """
    settings, wanted = config.extract, config.estimate
    prompts = plan_prompts(prompt_files, settings)
    trusted = settings.trusts_target_code
    target = load_target(target_name, settings.adapter, weights=wanted.pilot > 0, trust_remote_code=trusted)
    layer_ids, chat = plan_layers(target, settings), make_chat(target, settings, out)
    target = with_template_end(target, chat)
    storage = open_storage(out)
    manifest = plan_manifest(target, layer_ids, chat, prompts, settings, known_fingerprint(storage))
    show_first_record(manifest)
    plan = plan_extraction(out, manifest, prompts, chat, target, settings, wanted.sample or CHECKED_ROWS)
    prepared = Prepared(ExtractJob(target_name, prompt_files, out, settings), target, layer_ids, manifest, plan)
    pilot = pilot_extraction(prepared, storage, wanted.pilot) if wanted.pilot and plan.conversations else None
    response = settings.response_tokens or (pilot.response_tokens if pilot is not None else None)
    lengths = expected_lengths(plan.conversations, response, wanted.num_sequences or plan.num_expected)
    return {
        "cache": out,
        "num_records": len(prompts),
        "num_sampled": plan.sample.num_rows,
        "num_sequences": lengths.num_sequences,
        "num_present": plan.report.num_present + round(plan.sample.num_present * plan.scale),
        "left_out": left_out(plan),
        "first_left_out": [*(plan.report.left_out.firsts | plan.sample.left_out.firsts).values()],
        "num_tokenized": len(plan.conversations),
        "num_tokens": round(lengths.total),
        "response_tokens": response if settings.mode == "generate" else None,
        "bytes": bytes_by_codec(lengths, manifest, pilot),
        "codec": settings.codec,
        "free_bytes": storage.free_bytes(),
        **rate_facts(lengths, pilot, config),
        "training": training_facts(lengths, manifest, target, config),
    }


def known_fingerprint(storage: Storage) -> str:
    """The target's fingerprint in the cache, so that the weights need not be hashed; empty if there is no cache."""
    return CacheManifest.read(storage).target_fingerprint if storage.exists(MANIFEST_NAME) else ""


def left_out(plan: ExtractPlan) -> dict[str, int]:
    """Records that will not give a sequence, by reason, as many as the sample lets expect."""
    found = plan.report.left_out.counts.copy()
    for reason, count in (plan.sample.left_out.counts + Counter(plan.sample.hopeless.values())).items():
        found[reason] += round(count * plan.scale)
    return {reason: count for reason, count in found.items() if count}


def rate_facts(lengths: Lengths, pilot: Pilot | None, config: VpdConfig) -> dict[str, Any]:
    """The rate of a worker, where the rate is from, and the hours that all workers take together."""
    wanted, args = config.estimate, config.extract.engine_args
    rate = wanted.tokens_per_second or (pilot.tokens_per_second if pilot is not None else None)
    source = "--tokens-per-second" if wanted.tokens_per_second else None
    if source is None and pilot is not None:
        source = f"a pilot of {pilot.num_sequences} sequences on this machine"
    num_gpus_of_worker = args.get("tensor_parallel_size", 1) * args.get("pipeline_parallel_size", 1)
    num_workers = 1 if wanted.gpus is None else wanted.gpus / num_gpus_of_worker
    return {
        "tokens_per_second": rate,
        "rate_source": source,
        "gpus": wanted.gpus,
        "num_workers": num_workers,
        "hours": None if rate is None else lengths.total / rate / num_workers / SECONDS_PER_HOUR,
    }


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
    wall = {"hours": hours / wanted.gpus} if wanted.gpus is not None else {}
    return {**found, "gpu_hours": hours, **wall, "tokens_per_second": rate, "bytes_per_second": rate * bytes_per_token}
