"""`vpd recode` and `vpd merge`: caches made from caches."""

from __future__ import annotations

from typing import Any

from ...data.cache.cache import Cache
from ...data.cache.maintenance.transfer import TransferReport, merge, recode
from ...data.cache.storage.places import open_storage
from ...data.errors import ConfigError
from ..output import emit, format_bytes
from ..progress import ProgressReport

MIB = 1 << 20


def run_recode(place: str, out: str, codec: str, part_mib: int, as_json: bool) -> None:
    check_distinct(place, out)
    source = Cache.open(place)
    with ProgressReport("recode", len(source), "tokens") as progress:
        report = recode(source, out, codec, part_mib * MIB, on_sequence=progress.advance)
    result = transfer_facts(out, report) | {
        "codec": codec,
        "num_bytes_before": source.num_bytes,
        "cosine_mean": report.cosine_mean,
        "cosine_worst": report.cosine_worst,
    }
    emit(result, as_json, describe_recoding(result))


def run_merge(places: tuple[str, ...], out: str, as_json: bool) -> None:
    check_distinct(*places, out)
    sources = [Cache.open(place) for place in places]
    with ProgressReport("merge", sum(map(len, sources)), "tokens") as progress:
        report = merge(sources, out, progress.advance)
    result = transfer_facts(out, report)
    emit(result, as_json, describe_merge(result))


def check_distinct(*places: str) -> None:
    """
    Raises:
        ConfigError: two places are the same.
    """
    seen: set[str] = set()
    for place in places:
        storage = open_storage(place)
        name = storage.identity()
        if name in seen:
            raise ConfigError(f"expected each cache once, and another place at --out, found {place} twice.")
        seen.add(name)


def transfer_facts(place: str, report: TransferReport) -> dict[str, Any]:
    """What is now at a place, and what was copied there."""
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


def describe_recoding(result: dict[str, Any]) -> str:
    likeness = "no states to compare"
    if result["cosine_mean"] is not None:
        likeness = (
            f"whitened cosine between the states before and after: mean {result['cosine_mean']:.5f}, "
            f"{result['cosine_worst']:.5f} at the worst thousandth of tokens and layers"
        )
    size = f"{format_bytes(result['num_bytes'])} ({format_bytes(result['num_bytes_before'])} before)"
    return f"{describe_copies(result)} as {result['codec']}, {size}; {likeness}; {describe_drafts(result)}."


def describe_merge(result: dict[str, Any]) -> str:
    left_out = f"left out: {result['num_present']} present, {result['num_same_content']} with the same content"
    return f"{describe_copies(result)}, {format_bytes(result['num_bytes'])}; {left_out}; {describe_drafts(result)}."


def describe_copies(result: dict[str, Any]) -> str:
    return (
        f"{result['cache']}: {result['num_sequences']} sequences, {result['num_copied']} of them copied now, "
        f"{result['num_tokens']} tokens"
    )


def describe_drafts(result: dict[str, Any]) -> str:
    missing = f", {result['num_drafts_missing']} missing: complete them with vpd draft"
    return f"first drafts of {result['num_drafts_parts']} parts copied{missing if result['num_drafts_missing'] else ''}"
