"""What must not be trained on: bad sequences are listed, bad parts put aside."""

from __future__ import annotations

import json
import uuid
from typing import Any

from ..storage.base import Storage

QUARANTINE = "quarantine"
"""Folder of parts that were taken out of the cache, and of lists of sequences."""
LISTS = f"{QUARANTINE}/sequences"
"""One line a sequence: `seq_id`, `source`, `row`, `reason`. Each list has one writer."""


def list_quarantined(storage: Storage, entries: list[dict[str, Any]]) -> None:
    """Adds a list of sequences; with none, there is no list."""
    if entries:
        content = "".join(json.dumps(entry) + "\n" for entry in entries).encode()
        storage.write(f"{LISTS}/{uuid.uuid4().hex[:12]}.jsonl", content)


def read_quarantined(storage: Storage) -> list[dict[str, Any]]:
    """The entries of all lists; a sequence that was tried again may be there twice, or in the cache by now."""
    contents = storage.read_all([f"{LISTS}/{name}" for name in storage.list_folder(LISTS)])
    return [json.loads(line) for content in contents for line in content.splitlines()]
