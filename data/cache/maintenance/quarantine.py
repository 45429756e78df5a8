"""The quarantine: damaged parts, and lists of bad sequences. Training reads neither."""

from __future__ import annotations

import json
import uuid
from typing import Any

from ..storage.base import Storage

QUARANTINE = "quarantine"
"""Folder of the parts that a repair took out of the cache, and of lists of sequences."""
LISTS = f"{QUARANTINE}/sequences"
"""Folder of the lists. A line of a list is a sequence: `seq_id`, `source`, `row`, `reason`. A list has one writer."""


def list_quarantined(storage: Storage, entries: list[dict[str, Any]]) -> None:
    """Writes a list with these sequences, if there are any."""
    if entries:
        content = "".join(json.dumps(entry) + "\n" for entry in entries).encode()
        storage.write(f"{LISTS}/{uuid.uuid4().hex[:12]}.jsonl", content)


def read_quarantined(storage: Storage) -> list[dict[str, Any]]:
    """The entries of all lists. A sequence that was tried again may be listed twice, or be in the cache now."""
    contents = storage.read_all([f"{LISTS}/{name}" for name in storage.list_folder(LISTS)])
    return [json.loads(line) for content in contents for line in content.splitlines()]
