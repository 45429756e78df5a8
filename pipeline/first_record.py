"""Shows how the first record was read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .output import make_console

if TYPE_CHECKING:
    from rich.console import Console

    from ..data.cache.manifest import CacheManifest, FirstRecord


def show_first_record(manifest: CacheManifest) -> None:
    """Prints the first record on standard error, as the target will read it."""
    if manifest.first_record is not None:
        print_first_record(manifest.first_record, make_console(stderr=True))


def print_first_record(record: FirstRecord, console: Console) -> None:
    """The text, whose supervised part is in double brackets and green where there are colors; then the keys."""
    from rich.text import Text

    console.print(
        f"first record ({record.source}, row {record.row}) as the target reads it, supervised in [[brackets]]:",
        soft_wrap=True,
    )
    for text, is_supervised in record.runs:
        console.print(Text(f"[[{text}]]", "green") if is_supervised else Text(text), end="", soft_wrap=True)
    console.print()
    for label, names in (("keys used", record.used), ("left out", record.left_out), ("rules applied", record.rules)):
        console.print(f"{label}: {', '.join(names) or 'none'}", soft_wrap=True)
    for note in record.notes:
        console.print(note, soft_wrap=True)
