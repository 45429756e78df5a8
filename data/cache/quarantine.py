"""What must not be trained on: bad sequences are listed, bad parts put aside."""

from __future__ import annotations

import json
from typing import Any

from .storage import Storage

QUARANTINE = "quarantine.jsonl"
"""One line a sequence: `seq_id`, `source`, `row`, `reason`."""
QUARANTINED_PARTS = "quarantine"
"""Folder of parts that were taken out of the cache."""


def list_quarantined(storage: Storage, entries: list[dict[str, Any]]) -> None:
    """Adds sequences to the list; with none, it is not begun."""
    if not entries:
        return
    listed = storage.read(QUARANTINE) if storage.exists(QUARANTINE) else b""
    storage.write(QUARANTINE, listed + "".join(json.dumps(entry) + "\n" for entry in entries).encode())
