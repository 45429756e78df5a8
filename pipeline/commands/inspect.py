"""`vpd inspect`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...data.cache.cache import Cache
from ...data.cache.manifest import FirstRecord
from ..cache_facts import cache_facts
from ..first_record import print_first_record
from ..output import bar, emit, format_bytes, make_console


def run_inspect(place: str, as_json: bool) -> None:
    found = cache_facts(Cache.open(place))
    if as_json:
        emit(found, True, "")
    else:
        print_cache(found, make_console())


def print_cache(found: dict[str, Any], console: Console) -> None:
    """The facts as tables, then the sample."""
    console.print(found["cache"], soft_wrap=True)
    table = Table(show_header=False)
    add_origin(table, found)
    add_sizes(table, found)
    for audit in found["audits"]:
        table.add_row(
            "second extraction",
            f"{audit['num_sequences']} sequences, relative error at worst {audit['worst_relative_error']:.1e}, mean "
            f"{audit['mean_relative_error']:.1e}; {audit['argmax_agreement']:.2%} of the choices agree",
        )
    for reason, count in found["quarantined"].items():
        table.add_row("in quarantine", f"{count} sequences: {reason}")
    console.print(table)
    for drafts in found["first_drafters"]:
        print_drafts(drafts, console)
    print_sample(found["sample"], console)
    if found["first_record"] is not None:
        print_first_record(FirstRecord(**found["first_record"]), console)


def add_origin(table: Table, found: dict[str, Any]) -> None:
    """What the cache was made from, and with what."""
    table.add_row("target", f"{found['target']} ({found['target_fingerprint']})")
    table.add_row("layers", f"{found['layer_ids']} (vLLM: {found['vllm_layer_ids']}) of {found['num_target_layers']}")
    table.add_row("states", f"{len(found['layer_ids'])} x {found['hidden_size']}, codec {found['codec']}")
    for label, key in (("generation", "generation"), ("engine", "engine"), ("made with", "versions")):
        table.add_row(label, pairs(found[key]))
    table.add_row("fingerprint", found["fingerprint"])


def add_sizes(table: Table, found: dict[str, Any]) -> None:
    """Numbers of sequences, tokens and bytes, and the lengths of sequences."""
    table.add_row("parts", str(found["num_parts"]))
    table.add_row("sequences", f"{found['num_sequences']} ({pairs(found['finish_reasons'])})")
    table.add_row("tokens", f"{found['num_tokens']} with states; {found['num_supervised']} supervised")
    table.add_row("bytes", f"{format_bytes(found['num_bytes'])}, {found['bytes_per_token']:.0f} bytes a token")
    for name, size in found["bytes_by_array"].items():
        table.add_row(f"  {name}", f"{format_bytes(size):>11} {bar(size, found['num_bytes'])}")
    for entry in found["lengths"]:
        first, last = entry["from"], entry["to"]
        label = f"length {first}" if first == last else f"length {first}-{last}"
        table.add_row(label, f"{entry['sequences']:7d} {bar(entry['sequences'], found['num_sequences'])}")


def print_drafts(drafts: dict[str, Any], console: Console) -> None:
    """One first drafter's drafts as a table."""
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
    """A sequence's text; what is supervised is in brackets, and green where there are colors."""
    shown = f"the first {sample['num_shown']} of " if sample["num_shown"] < sample["num_tokens"] else ""
    console.print(f"sample {sample['seq_id']}, {shown}{sample['num_tokens']} tokens, supervised ones in [brackets]:")
    for run in sample["runs"]:
        console.print(Text(f"[{run['text']}]", "green") if run["supervised"] else run["text"], end="", soft_wrap=True)
    console.print()


def pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
