"""`vpd estimate`."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from ..config import VpdConfig
from ..estimation import estimate_facts
from ..output import emit, format_bytes, make_console


def run_estimate(target: str, prompts: tuple[str, ...], out: str, config: VpdConfig, as_json: bool) -> None:
    found = estimate_facts(target, prompts, out, config)
    if as_json:
        emit(found, True, "")
    else:
        make_console().print(table_of_estimate(found, config))


def table_of_estimate(found: dict[str, Any], config: VpdConfig) -> Table:
    table = Table(title=f"extraction into {found['cache']}", show_header=False, title_justify="left")
    table.add_row("sequences", f"{found['num_sequences']:,} to come, {found['num_present']:,} there")
    if found["left_out"]:
        table.add_row("left out", ", ".join(f"{reason}: {count:,}" for reason, count in found["left_out"].items()))
    for message in found["first_left_out"]:
        table.add_row("  first of its kind", message)
    if found["num_sampled"] < found["num_records"]:
        table.add_row("by a sample", f"{found['num_sampled']:,} of {found['num_records']:,} records, evenly chosen")
    lengths = describe_lengths(found, config)
    table.add_row("tokens", f"{found['num_tokens']:,} ({found['num_tokenized']:,} records tokenized; {lengths})")
    for codec, size in found["bytes"].items():
        fits = "" if found["free_bytes"] is None or size <= found["free_bytes"] else "  more than is free"
        chosen = "  <- chosen" if codec == found["codec"] else ""
        table.add_row(f"as {codec}", f"{format_bytes(size):>11}{chosen}{fits}")
    table.add_row("free", "unknown" if found["free_bytes"] is None else f"{format_bytes(found['free_bytes']):>11}")
    if (rate := found["tokens_per_second"]) is None:
        table.add_row("time", "unknown: give --tokens-per-second, or measure with --pilot")
    else:
        gpus = "" if found["gpus"] is None else f" on {found['gpus']:,} GPUs"
        table.add_row(
            "time", f"{describe_hours(found['hours'])}{gpus}, at {rate:,.0f} tokens/s ({found['rate_source']})"
        )
    add_training(table, found, config)
    return table


def describe_lengths(found: dict[str, Any], config: VpdConfig) -> str:
    """How the lengths of the answers are known."""
    if config.extract.mode == "given":
        return "answers as given"
    if found["response_tokens"] is not None:
        return f"answers of {found['response_tokens']:.0f} tokens"
    return f"at most: answers of up to {config.extract.max_new_tokens:,} tokens"


def describe_hours(hours: float) -> str:
    """In the two largest units that matter, such as `2 days 3 h`."""
    minutes = round(hours * 60)
    if minutes < 1:
        return f"{hours * 3600:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{round(hours) // 24:,} days {round(hours) % 24} h"


def add_training(table: Table, found: dict[str, Any], config: VpdConfig) -> None:
    """What training over the cache will take."""
    training, wanted = found["training"], config.estimate
    if training is None:
        return
    table.add_row("training", f"{training['num_steps']:,} steps, {training['flops']:.2e} operations at most")
    if wanted.utilization is None:
        table.add_row("GPU hours", "unknown: give --utilization, the share of a GPU's peak that training reaches")
        return
    gpus = "" if wanted.gpus is None else f", {describe_hours(training['hours'])} on {wanted.gpus:,} GPUs"
    share = f"{wanted.utilization:.0%} of {wanted.tflops:,.0f} TFLOPS"
    table.add_row("GPU hours", f"{training['gpu_hours']:,.2f} at {share}{gpus}")
    reading = f"{training['tokens_per_second']:,.0f} tokens/s, {format_bytes(training['bytes_per_second'])}/s"
    table.add_row("a GPU reads", f"{reading} as {found['codec']}")
