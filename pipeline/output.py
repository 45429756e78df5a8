"""What the commands print on standard output."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

KIB = 1024
BAR_WIDTH = 30


def emit(result: dict[str, Any], as_json: bool, text: str) -> None:
    """Prints a result: one JSON object for machines, or a text for people."""
    click.echo(json.dumps(result) if as_json else text)


def describe_firsts(firsts: list[str]) -> str:
    """Messages about records that were skipped, one a line."""
    return "".join(f"\n  first of its kind: {message}" for message in firsts)


def make_console(stderr: bool = False) -> Console:
    """Standard output or standard error, taking no path and no text for markup."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def format_bytes(number: float) -> str:
    """A size in the unit that leaves it few digits: `43.0 MiB`."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while number >= KIB and len(units) > 1:
        number, units = number / KIB, units[1:]
    return f"{number:.0f} {units[0]}" if units[0] == "bytes" else f"{number:.1f} {units[0]}"


def bar(count: int, total: int) -> str:
    """A bar for a share of a total, of at most BAR_WIDTH characters."""
    return "#" * round(BAR_WIDTH * count / total) if total else ""
