"""What is in a cache: facts for machines, tables for people."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..data.cache.drafts import NOT_DRAFTED, FirstDrafts, list_drafts
from ..data.cache.reader import CachedTokens
from ..data.cache.store import Cache
from ..stages.drafter.target_pieces import load_tokenizer

MAX_BINS = 10
BAR_WIDTH = 30
SAMPLE_TOKENS = 400


def accept_length_histogram(cache: Cache, drafts: FirstDrafts) -> dict[int, int]:
    """Number of anchors by accept length of the first draft."""
    counts: Counter[int] = Counter()
    for row in cache.rows:
        accept_len_T = drafts.accept_lengths(row)
        counts.update(accept_len_T[accept_len_T != NOT_DRAFTED].tolist())
    return dict(sorted(counts.items()))


def length_histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Number of sequences by length in tokens, in at most MAX_BINS bins of a round width."""
    longest = int(lengths.max())
    width = next(w * 10**e for e in range(12) for w in (1, 2, 5) if longest < w * 10**e * MAX_BINS)
    counts = np.bincount(lengths // width)
    return [{"from": i * width, "to": (i + 1) * width - 1, "sequences": int(n)} for i, n in enumerate(counts)]


def describe_drafts(cache: Cache, fingerprint: str) -> dict[str, Any]:
    """One first drafter's drafts."""
    drafts = FirstDrafts.open(cache, fingerprint)
    facts = {"fingerprint": fingerprint, **drafts.facts, "num_parts_missing": len(drafts.missing_parts())}
    if facts["num_parts_missing"]:
        return facts
    histogram = accept_length_histogram(cache, drafts)
    num_anchors = sum(histogram.values())
    mean = sum(length * count for length, count in histogram.items()) / num_anchors if num_anchors else None
    return facts | {"num_anchors": num_anchors, "mean_accept_length": mean, "accept_lengths": histogram}


def bytes_by_array(cache: Cache) -> dict[str, int]:
    """Bytes of all parts of states by array; `index` and `other` are the rest."""
    sizes: Counter[str] = Counter()
    for record in cache.commits().values():
        for file, described in record["files"].items():
            names = file.split("/")
            array = "index" if names[0] == "index" else names[2] if len(names) > 3 else "other"
            sizes[array] += described["bytes"]
    return dict(sizes.most_common())


def mark_sample(cache: Cache, tokens: CachedTokens) -> list[tuple[str, bool]]:
    """A sequence's text as runs of (text, supervised)."""
    tokenizer = load_tokenizer(cache.target_folder)
    ids, mask = tokens.token_ids_S[:SAMPLE_TOKENS].tolist(), tokens.loss_mask_S[:SAMPLE_TOKENS].tolist()
    starts = [i for i in range(len(ids)) if i == 0 or mask[i] != mask[i - 1]]
    spans = zip(starts, [*starts[1:], len(ids)], strict=True)
    return [(str(tokenizer.decode(ids[start:end])), mask[start]) for start, end in spans]


def describe_cache(cache: Cache) -> dict[str, Any]:
    """Everything that `vpd inspect` says."""
    manifest, lengths = cache.manifest, cache.rows.column("num_tokens")
    sample = cache.read_tokens(cache.rows[0])
    return {
        "cache": cache.place,
        **manifest.model_dump(mode="json", exclude={"rendered_sample"}),
        "fingerprint": cache.fingerprint,
        "num_parts": len(cache.parts),
        "num_sequences": len(cache),
        "num_tokens": cache.num_tokens,
        "num_supervised": int(cache.rows.column("num_supervised").sum()),
        "num_bytes": cache.num_bytes,
        "bytes_per_token": cache.num_bytes / cache.num_tokens,
        "bytes_by_array": bytes_by_array(cache),
        "finish_reasons": dict(Counter(cache.rows.strings("finish_reason"))),
        "lengths": length_histogram(lengths),
        "first_drafters": [describe_drafts(cache, name) for name in list_drafts(cache.storage)],
        "sample": {
            "seq_id": sample.row.seq_id,
            "runs": [{"text": text, "supervised": supervised} for text, supervised in mark_sample(cache, sample)],
        },
    }


def bar(count: int, total: int) -> str:
    return "#" * round(BAR_WIDTH * count / total) if total else ""


def print_cache(found: dict[str, Any], console: Console) -> None:
    """The facts as tables."""
    table = Table(title=found["cache"], show_header=False, title_justify="left")
    table.add_row("target", f"{found['target']} ({found['target_fingerprint']})")
    table.add_row("layers", f"{found['layer_ids']} (vLLM: {found['vllm_layer_ids']}) of {found['num_target_layers']}")
    table.add_row("states", f"{len(found['layer_ids'])} x {found['hidden_size']}, codec {found['codec']}")
    table.add_row("generation", ", ".join(f"{name} {value}" for name, value in found["generation"].items()))
    table.add_row("made with", ", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    table.add_row("fingerprint", found["fingerprint"])
    table.add_row("parts", str(found["num_parts"]))
    table.add_row("sequences", f"{found['num_sequences']} ({_counts(found['finish_reasons'])})")
    table.add_row("tokens", f"{found['num_tokens']}, {found['num_supervised']} supervised")
    table.add_row("bytes", f"{found['num_bytes'] / 2**20:.1f} MiB, {found['bytes_per_token']:.0f} a token")
    for name, size in found["bytes_by_array"].items():
        table.add_row(f"  {name}", f"{size / 2**20:.2f} MiB {bar(size, found['num_bytes'])}")
    for entry in found["lengths"]:
        label = f"length {entry['from']}-{entry['to']}"
        table.add_row(label, f"{entry['sequences']:6d} {bar(entry['sequences'], found['num_sequences'])}")
    console.print(table)
    for drafts in found["first_drafters"]:
        print_drafts(drafts, console)
    console.print(f"sample {found['sample']['seq_id']}, supervised tokens in [green]\\[green][/green]:")
    for run in found["sample"]["runs"]:
        text = escape(run["text"])
        console.print(f"[green]\\[{text}][/green]" if run["supervised"] else text, end="")
    console.print()


def print_drafts(drafts: dict[str, Any], console: Console) -> None:
    title = f"first drafts {drafts['fingerprint']} of {drafts['name']}"
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_row("block size", f"{drafts['block_size']}, stride {drafts['stride']}")
    if drafts["num_parts_missing"]:
        table.add_row("parts missing", f"{drafts['num_parts_missing']}: run vpd draft again")
    else:
        table.add_row("anchors", str(drafts["num_anchors"]))
        for length, count in drafts["accept_lengths"].items():
            share = count / drafts["num_anchors"]
            table.add_row(f"accept length {length}", f"{count:7d} {share:6.1%} {bar(count, drafts['num_anchors'])}")
    console.print(table)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
