"""What is in a cache: facts for machines, tables for people."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..data.cache.cache import Cache
from ..data.cache.drafts import NOT_DRAFTED, FirstDrafts, list_drafts
from ..data.cache.maintenance.quarantine import read_quarantined
from ..data.cache.part import read_commit
from ..data.cache.reader import CachedTokens
from ..data.cache.target_files import target_folder
from ..data.cache.work import read_audits
from ..stages.drafter.target_pieces import PIECES, load_tokenizer

MAX_BINS = 10
BAR_WIDTH = 30
SAMPLE_TOKENS = 400
KIB = 1024
CUT_CHARACTER = "\ufffd"
"""What a tokenizer gives for bytes that are no whole character."""


def accept_length_histogram(cache: Cache, drafts: FirstDrafts) -> dict[int, int]:
    """Number of anchors by accept length of the first draft, in the parts that are drafted."""
    counts = np.zeros(NOT_DRAFTED + 1, np.int64)
    for row in cache.rows:
        if row.part in drafts.parts:
            counts += np.bincount(drafts.accept_lengths(row).numpy(), minlength=len(counts))
    return {length: int(count) for length, count in enumerate(counts[:NOT_DRAFTED]) if count}


def length_histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Number of sequences by length in tokens, in at most MAX_BINS bins of a round width."""
    shortest, longest = int(lengths.min()), int(lengths.max())
    widths = (w * 10**e for e in range(12) for w in (1, 2, 5))
    width = next(width for width in widths if longest // width - shortest // width < MAX_BINS)
    first = shortest // width
    counts = enumerate(np.bincount(lengths // width - first), start=first)
    return [{"from": i * width, "to": (i + 1) * width - 1, "sequences": int(n)} for i, n in counts]


def describe_drafts(cache: Cache, fingerprint: str) -> dict[str, Any]:
    """One first drafter's drafts."""
    drafts = FirstDrafts.open(cache, fingerprint)
    histogram = accept_length_histogram(cache, drafts)
    num_anchors = sum(histogram.values())
    mean = sum(length * count for length, count in histogram.items()) / num_anchors if num_anchors else None
    commits = [read_commit(cache.storage, drafts.root, name) for name in sorted(drafts.parts.values())]
    return {
        "fingerprint": fingerprint,
        **drafts.facts,
        "num_parts_missing": len(drafts.missing_parts()),
        "num_bytes": sum(file["bytes"] for record in commits for file in record["files"].values()),
        "num_anchors": num_anchors,
        "mean_accept_length": mean,
        "accept_lengths": histogram,
    }


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
    """The text of a sequence's first SAMPLE_TOKENS tokens as runs of (text, supervised)."""
    tokenizer = load_tokenizer(target_folder(cache.storage, without=PIECES))
    ids, mask = tokens.token_ids_S[:SAMPLE_TOKENS].tolist(), tokens.loss_mask_S[:SAMPLE_TOKENS].tolist()

    def decode(end: int) -> str:
        return str(tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False))

    # Each run is what its tokens add to the text before them: by themselves, some tokenizers would drop a space. A
    # character that ends in the next run belongs there.
    starts = [i for i in range(len(ids)) if i == 0 or mask[i] != mask[i - 1]]
    text = decode(len(ids))
    cuts = [*(len(decode(start).rstrip(CUT_CHARACTER)) for start in starts), len(text)]
    return [(text[begin:end], mask[i]) for i, (begin, end) in zip(starts, pairwise(cuts), strict=True)]


def count_quarantined(cache: Cache) -> dict[str, int]:
    """Sequences that were taken out and are still lacking, by reason."""
    reasons = {entry["seq_id"]: entry["reason"] for entry in read_quarantined(cache.storage)}
    present = set(cache.rows.strings("seq_id"))
    return dict(Counter(reason for seq_id, reason in reasons.items() if seq_id not in present).most_common())


def describe_cache(cache: Cache) -> dict[str, Any]:
    """Everything that `vpd inspect` says."""
    sizes, sample = bytes_by_array(cache), cache.read_tokens(cache.rows[0])
    num_bytes = sum(sizes.values())
    return {
        "cache": cache.place,
        **cache.manifest.model_dump(mode="json", exclude={"rendered_sample"}),
        "fingerprint": cache.fingerprint,
        "num_parts": len(cache.parts),
        "num_sequences": len(cache),
        "num_tokens": cache.num_tokens,
        "num_supervised": int(cache.rows.column("num_supervised").sum()),
        "num_bytes": num_bytes,
        "bytes_per_token": num_bytes / cache.num_tokens,
        "bytes_by_array": sizes,
        "finish_reasons": dict(Counter(cache.rows.strings("finish_reason"))),
        "lengths": length_histogram(cache.rows.column("num_tokens")),
        "audits": read_audits(cache.storage),
        "quarantined": count_quarantined(cache),
        "first_drafters": [describe_drafts(cache, name) for name in list_drafts(cache.storage)],
        "sample": {
            "seq_id": sample.row.seq_id,
            "num_tokens": len(sample.token_ids_S),
            "num_shown": min(len(sample.token_ids_S), SAMPLE_TOKENS),
            "runs": [{"text": text, "supervised": supervised} for text, supervised in mark_sample(cache, sample)],
        },
    }


def bar(count: int, total: int) -> str:
    return "#" * round(BAR_WIDTH * count / total) if total else ""


def format_bytes(number: float) -> str:
    """A size in a unit that leaves it few digits: `43.0 MiB`."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while number >= KIB and len(units) > 1:
        number, units = number / KIB, units[1:]
    return f"{number:.0f} {units[0]}" if units[0] == "bytes" else f"{number:.1f} {units[0]}"


def make_console() -> Console:
    """Standard output, on which a path or a text is never taken for markup."""
    return Console(highlight=False, markup=False, emoji=False)


def print_cache(found: dict[str, Any], console: Console) -> None:
    """The facts as tables."""
    console.print(found["cache"], soft_wrap=True)
    table = Table(show_header=False)
    table.add_row("target", f"{found['target']} ({found['target_fingerprint']})")
    table.add_row("layers", f"{found['layer_ids']} (vLLM: {found['vllm_layer_ids']}) of {found['num_target_layers']}")
    table.add_row("states", f"{len(found['layer_ids'])} x {found['hidden_size']}, codec {found['codec']}")
    table.add_row("generation", ", ".join(f"{name} {value}" for name, value in found["generation"].items()))
    table.add_row("engine", ", ".join(f"{name} {value}" for name, value in found["engine"].items()))
    table.add_row("made with", ", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    table.add_row("fingerprint", found["fingerprint"])
    table.add_row("parts", str(found["num_parts"]))
    table.add_row("sequences", f"{found['num_sequences']} ({_counts(found['finish_reasons'])})")
    table.add_row("tokens", f"{found['num_tokens']} with states; {found['num_supervised']} supervised")
    table.add_row("bytes", f"{format_bytes(found['num_bytes'])}, {found['bytes_per_token']:.0f} bytes a token")
    for name, size in found["bytes_by_array"].items():
        table.add_row(f"  {name}", f"{format_bytes(size):>11} {bar(size, found['num_bytes'])}")
    for entry in found["lengths"]:
        first, last = entry["from"], entry["to"]
        label = f"length {first}" if first == last else f"length {first}-{last}"
        table.add_row(label, f"{entry['sequences']:7d} {bar(entry['sequences'], found['num_sequences'])}")
    for audit in found["audits"]:
        table.add_row(
            "second look",
            f"{audit['num_sequences']} sequences, relative error at worst {audit['worst_relative_error']:.1e}, mean "
            f"{audit['mean_relative_error']:.1e}; {audit['argmax_agreement']:.2%} of the choices agree",
        )
    for reason, count in found["quarantined"].items():
        table.add_row("in quarantine", f"{count} sequences: {reason}")
    console.print(table)
    for drafts in found["first_drafters"]:
        print_drafts(drafts, console)
    print_sample(found["sample"], console)


def print_drafts(drafts: dict[str, Any], console: Console) -> None:
    console.print(f"first drafts {drafts['fingerprint']} of {drafts['name']}", soft_wrap=True)
    table = Table(show_header=False)
    table.add_row("block size", f"{drafts['block_size']}, stride {drafts['stride']}")
    if drafts["num_parts_missing"]:
        table.add_row("parts missing", f"{drafts['num_parts_missing']}: run vpd draft again")
    table.add_row("bytes", format_bytes(drafts["num_bytes"]))
    table.add_row("anchors", str(drafts["num_anchors"]))
    if drafts["num_anchors"]:
        table.add_row("mean accept length", f"{drafts['mean_accept_length']:.3f}")
    for length, count in drafts["accept_lengths"].items():
        share = count / drafts["num_anchors"]
        table.add_row(f"accept length {length}", f"{count:7d} {share:6.1%} {bar(count, drafts['num_anchors'])}")
    console.print(table)


def print_sample(sample: dict[str, Any], console: Console) -> None:
    """A sequence's text; what is supervised in brackets, and green where there are colours."""
    shown = f"the first {sample['num_shown']} of " if sample["num_shown"] < sample["num_tokens"] else ""
    console.print(f"sample {sample['seq_id']}, {shown}{sample['num_tokens']} tokens, supervised ones in [brackets]:")
    for run in sample["runs"]:
        console.print(Text(f"[{run['text']}]", "green") if run["supervised"] else run["text"], end="", soft_wrap=True)
    console.print()


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
