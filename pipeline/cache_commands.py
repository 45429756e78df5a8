"""The commands that look after caches, once their settings are known."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..data.cache.cache import Cache
from ..data.cache.codecs import CodecName
from ..data.cache.maintenance.repair import repair
from ..data.cache.maintenance.transfer import TransferReport
from ..data.cache.maintenance.transfer import merge as merge_caches
from ..data.cache.maintenance.transfer import recode as recode_cache
from ..data.cache.maintenance.verify import VerifyReport, count_parts
from ..data.cache.maintenance.verify import verify as verify_cache
from ..data.cache.manifest import CacheManifest
from ..data.cache.storage.local import LocalStorage
from ..data.cache.storage.places import open_storage
from ..data.errors import ConfigError
from ..data.prompts.records import PromptSet
from ..stages.extract.engines import make_engine
from ..stages.extract.estimate import (
    CODECS,
    Lengths,
    Pilot,
    cache_bytes,
    choose_evenly,
    expected_lengths,
    free_bytes,
    run_pilot,
)
from ..stages.extract.plan import make_chat, plan_extraction, plan_layers, plan_manifest, plan_prompts
from ..stages.extract.target import Target, load_target
from ..stages.train.cost import training_cost
from ..stages.train.plan import shape_for
from .commands import emit
from .config import VpdConfig
from .inspect import describe_cache, format_bytes, make_console, print_cache
from .progress import ProgressReport

MIB = 1 << 20
SECONDS_PER_HOUR = 3600


def verify(place: str, mend: bool, num_threads: int, as_json: bool) -> None:
    """Exit code 1 if anything is wrong, mended or not."""
    storage = open_storage(place)
    with ProgressReport("verify", count_parts(storage), "bytes") as progress:
        found = verify_cache(storage, num_threads, progress.advance)
    result: dict[str, Any] = {"cache": place, **found.to_json()}
    lines = [problem.what for problem in found.problems] + [f"note: {note}" for note in found.notes]
    if found.problems and mend:
        mended = repair(storage, found)
        result["repair"] = {name: getattr(mended, name) for name in type(mended).__slots__}
        lines.append(
            f"repaired: {len(mended.parts)} parts put into quarantine, {mended.num_kept} of their sequences kept, "
            f"{len(mended.lost)} lost{': ' if mended.lost else ''}{', '.join(mended.lost)}; {mended.num_drafts_parts} "
            "parts of first drafts removed."
        )
        if mended.num_untold:
            lines.append(f"which sequences {mended.num_untold} of them held can't be told any more.")
        lacks = bool(mended.lost or mended.num_untold or mended.target_removed)
        lines.append(_what_next(lacks, bool(mended.num_drafts_parts)))
    lines.append(summary(place, found, mend))
    emit(result, as_json, "\n".join(line for line in lines if line))
    if found.problems:
        sys.exit(1)


def _what_next(extract: bool, draft: bool) -> str:
    steps = ["the cache's vpd extract command makes again what is lost"] * extract
    steps += ["vpd draft completes the first drafts"] * draft
    return f"next: {'; then '.join(steps)}." if steps else ""


def summary(place: str, found: VerifyReport, mend: bool) -> str:
    checked = f"{found.num_sequences} sequences in {found.num_parts} parts, {found.num_bytes / MIB:.1f} MiB"
    if not found.problems:
        return f"{place}: {checked}: all as written."
    bad = {seq_id for problem in found.problems for seq_id in problem.sequences}
    advice = "" if mend else " Mend it with --repair."
    return f"{place}: {checked}: {len(found.problems)} problems, {len(bad)} sequences can't be read.{advice}"


def inspect(place: str, as_json: bool) -> None:
    found = describe_cache(Cache.open(place))
    if as_json:
        emit(found, True, "")
    else:
        print_cache(found, make_console())


def recode(place: str, out: str, codec: CodecName, part_mib: int, as_json: bool) -> None:
    check_distinct(place, out)
    source = Cache.open(place)
    with ProgressReport("recode", len(source), "tokens") as progress:
        report = recode_cache(source, out, codec, part_mib * MIB, on_sequence=progress.advance)
    result = transfer_facts(out, report) | {
        "codec": codec,
        "num_bytes_before": source.num_bytes,
        "cosine_mean": report.cosine_mean,
        "cosine_worst": report.cosine_worst,
    }
    likeness = "nothing to compare with before"
    if report.cosine_mean is not None:
        likeness = (
            f"whitened cosine with the states before {report.cosine_mean:.5f} in the mean, {report.cosine_worst:.5f} "
            "for the worst of a thousand tokens and layers"
        )
    size = f"{format_bytes(result['num_bytes'])} ({format_bytes(result['num_bytes_before'])} before)"
    emit(result, as_json, f"{describe_transfer(result)} as {codec}, {size}; {likeness}; {describe_drafts(report)}.")


def merge(places: tuple[str, ...], out: str, as_json: bool) -> None:
    check_distinct(*places, out)
    sources = [Cache.open(place) for place in places]
    with ProgressReport("merge", sum(map(len, sources)), "tokens") as progress:
        report = merge_caches(sources, out, progress.advance)
    result = transfer_facts(out, report)
    left_out = f"left out: {report.num_present} present, {report.num_same_content} with the same content"
    size = format_bytes(result["num_bytes"])
    emit(result, as_json, f"{describe_transfer(result)}, {size}; {left_out}; {describe_drafts(report)}.")


def check_distinct(*places: str) -> None:
    """
    Raises:
        ConfigError: two of them are one place.
    """
    seen: set[str] = set()
    for place in places:
        storage = open_storage(place)
        name = str(storage.root.resolve()) if isinstance(storage, LocalStorage) else storage.place
        if name in seen:
            raise ConfigError(f"expected each cache once, and another one at --out, found {place} twice.")
        seen.add(name)


def transfer_facts(place: str, report: TransferReport) -> dict[str, Any]:
    cache = Cache.open(place)
    return {
        "cache": place,
        "num_sequences": len(cache),
        "num_tokens": cache.num_tokens,
        "num_bytes": cache.num_bytes,
        "num_copied": report.num_copied,
        "num_present": report.num_present,
        "num_same_content": report.num_same_content,
        "num_drafts_parts": report.num_drafts_parts,
        "num_drafts_missing": report.num_drafts_missing,
    }


def describe_transfer(result: dict[str, Any]) -> str:
    return (
        f"{result['cache']}: {result['num_sequences']} sequences, {result['num_copied']} of them copied now, "
        f"{result['num_tokens']} tokens"
    )


def describe_drafts(report: TransferReport) -> str:
    missing = f", {report.num_drafts_missing} missing: vpd draft makes them" if report.num_drafts_missing else ""
    return f"first drafts of {report.num_drafts_parts} parts copied{missing}"


def estimate(target_name: str, prompt_files: tuple[str, ...], out: str, config: VpdConfig, as_json: bool) -> None:
    settings, wanted = config.extract, config.estimate
    prompts = plan_prompts(prompt_files, settings)
    target = load_target(target_name, settings.adapter)
    layer_ids, chat = plan_layers(target, settings), make_chat(target, settings)
    manifest = plan_manifest(target, layer_ids, chat, prompts, settings)
    chosen = sample_records(prompts, wanted.sample)
    scale = len(prompts.records) / len(chosen.records)
    storage = open_storage(out)
    plan = plan_extraction(out, manifest, chosen, chat, target, settings)
    pilot = None
    if wanted.pilot and plan.conversations:
        near = storage.root if isinstance(storage, LocalStorage) else Path.cwd()
        some = choose_evenly(plan, wanted.pilot)
        pilot = run_pilot(lambda: make_engine(target, layer_ids, settings), some, manifest, settings, near)
    response = settings.response_tokens or (pilot.response_tokens if pilot is not None else None)
    num_sequences = wanted.num_sequences or round(len(plan.conversations) * scale)
    lengths = expected_lengths(plan.conversations, response, num_sequences)
    rate = wanted.tokens_per_second or (pilot.tokens_per_second if pilot is not None else None)
    result = {
        "cache": out,
        "num_sequences": lengths.num_sequences,
        "num_present": round(plan.report.num_present * scale),
        "num_tokenized": len(plan.conversations),
        "num_tokens": round(lengths.total),
        "response_tokens": response if settings.mode == "generate" else None,
        "bytes": bytes_by_codec(lengths, manifest, pilot),
        "codec": settings.codec,
        "free_bytes": free_bytes(storage),
        "tokens_per_second": rate,
        "hours": None if rate is None else lengths.total / rate / SECONDS_PER_HOUR,
        "training": estimate_training(lengths, manifest, target, config),
    }
    if as_json:
        emit(result, True, "")
    else:
        print_estimate(result, config, make_console())


def estimate_training(
    lengths: Lengths, manifest: CacheManifest, target: Target, config: VpdConfig
) -> dict[str, Any] | None:
    """What a run of `vpd train` over the cache will take; None without a sequence."""
    if not len(lengths.num_tokens):
        return None
    wanted = config.estimate
    shape = shape_for(manifest, target.config.to_dict(), config.drafter, mask_token_id=0)
    cost = training_cost(shape, config.train, lengths.num_tokens, lengths.num_sequences)
    found = {"num_steps": cost.num_steps, "num_tokens": round(cost.num_tokens), "flops": cost.flops}
    if wanted.utilisation is None:
        return found
    hours = cost.gpu_hours(wanted.tflops, wanted.utilisation)
    rate = cost.num_tokens / (hours * SECONDS_PER_HOUR)
    bytes_per_token = cache_bytes(lengths, manifest, config.extract.codec) / lengths.total
    return {**found, "gpu_hours": hours, "tokens_per_second": rate, "bytes_per_second": rate * bytes_per_token}


def sample_records(prompts: PromptSet, number: int | None) -> PromptSet:
    """That many of the records, evenly chosen; all if there are fewer."""
    number = min(number or len(prompts.records), len(prompts.records))
    chosen = [i * len(prompts.records) // number for i in range(number)]
    return replace(prompts, records=tuple(prompts.records[i] for i in chosen))


def bytes_by_codec(lengths: Lengths, manifest: CacheManifest, pilot: Pilot | None) -> dict[str, int]:
    shares = {} if pilot is None else pilot.shares
    return {codec: cache_bytes(lengths, manifest, codec, shares.get(codec)) for codec in CODECS}


def print_estimate(found: dict[str, Any], config: VpdConfig, console: Console) -> None:
    """The estimate as a table."""
    settings, wanted = config.extract, config.estimate
    table = Table(title=f"extraction into {found['cache']}", show_header=False, title_justify="left")
    table.add_row("sequences", f"{found['num_sequences']} to come, {found['num_present']} there")
    length = f"at most: answers of up to {settings.max_new_tokens} tokens"
    if found["response_tokens"] is not None:
        length = f"answers of {found['response_tokens']:.0f} tokens"
    if settings.mode == "given":
        length = "answers as given"
    table.add_row("tokens", f"{found['num_tokens']} ({found['num_tokenized']} records tokenized; {length})")
    for codec, size in found["bytes"].items():
        fits = "" if found["free_bytes"] is None or size <= found["free_bytes"] else "  more than is free"
        chosen = "  <- chosen" if codec == found["codec"] else ""
        table.add_row(f"as {codec}", f"{format_bytes(size):>11}{chosen}{fits}")
    table.add_row("free", "unknown" if found["free_bytes"] is None else f"{format_bytes(found['free_bytes']):>11}")
    rate = found["tokens_per_second"]
    if rate is None:
        table.add_row("hours", "unknown: give --tokens-per-second, or measure with --pilot")
    else:
        table.add_row("hours", f"{found['hours']:.2f} at {rate:.0f} tokens/s")
    if training := found["training"]:
        table.add_row("training", f"{training['num_steps']} steps, {training['flops']:.2e} operations at most")
    if training and wanted.utilisation is None:
        table.add_row("GPU hours", "unknown: give --utilisation, the share of a GPU's peak that training reaches")
    elif training:
        table.add_row(
            "GPU hours", f"{training['gpu_hours']:.2f} at {wanted.utilisation:.0%} of {wanted.tflops:.0f} TFLOPS"
        )
        reading = f"{training['tokens_per_second']:.0f} tokens/s, {format_bytes(training['bytes_per_second'])}/s"
        table.add_row("a GPU reads", f"{reading} as {found['codec']}")
    console.print(table)
