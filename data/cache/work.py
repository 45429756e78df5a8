"""Notes of an extraction: finished work units, audits, the probe, hashes of files. Readers of states need none."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import CacheCorruptError
from .records import dump_record, parse_record
from .storage.base import Storage

WORK, DONE = "work", ".done.json"
AUDITS = "audits"
"""Folder with one record for each run that audited some of its sequences."""
PROBE = "probe.json"
"""States of a short text; every later engine must compute the same states."""
HASHES = f"{WORK}/hashes.json"
"""Hashes of the target's files, so that no later run reads these files to hash them."""


def finished_units(storage: Storage) -> list[str]:
    return [name.removesuffix(DONE) for name in storage.list_folder(WORK) if name.endswith(DONE)]


def read_units(storage: Storage, unit_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The records of these finished units. `skipped` in each holds the prompts without a sequence, id -> reason.

    Raises:
        CacheCorruptError: a record is damaged.
    """
    names = _unit_files(unit_ids)
    contents = storage.read_all(names)
    return {
        unit_id: _parse(storage, name, content)
        for unit_id, name, content in zip(unit_ids, names, contents, strict=True)
    }


def note_audit(storage: Storage, record: dict[str, Any]) -> None:
    storage.write(f"{AUDITS}/{uuid.uuid4().hex[:12]}.json", dump_record(record))


def read_audits(storage: Storage) -> list[dict[str, Any]]:
    """The records of all audits.

    Raises:
        CacheCorruptError: a record is damaged.
    """
    names = _audit_files(storage)
    return [_parse(storage, name, content) for name, content in zip(names, storage.read_all(names), strict=True)]


def note_probe(storage: Storage, record: dict[str, Any]) -> None:
    storage.write(PROBE, dump_record(record))


def read_probe(storage: Storage) -> dict[str, Any] | None:
    """The record of the probe; None if there is none.

    Raises:
        CacheCorruptError: the record is damaged.
    """
    return _parse(storage, PROBE, storage.read(PROBE)) if storage.exists(PROBE) else None


def note_hashes(storage: Storage, hashes: dict[str, str]) -> None:
    storage.write(HASHES, dump_record({"files": hashes}))


def read_hashes(storage: Storage) -> dict[str, str]:
    """File, with its size and time -> hash; empty if none are kept.

    Raises:
        CacheCorruptError: the record is damaged.
    """
    return _parse(storage, HASHES, storage.read(HASHES))["files"] if storage.exists(HASHES) else {}


def damaged_notes(storage: Storage) -> Iterator[tuple[str, CacheCorruptError]]:
    """The damaged files of notes, and what is wrong with each."""
    single = [name for name in (PROBE, HASHES) if storage.exists(name)]
    names = [*_unit_files(finished_units(storage)), *_audit_files(storage), *single]
    for name, content in zip(names, storage.read_all(names), strict=True):
        try:
            _parse(storage, name, content)
        except CacheCorruptError as error:
            yield name, error


def _unit_files(unit_ids: Sequence[str]) -> list[str]:
    return [f"{WORK}/{unit_id}{DONE}" for unit_id in unit_ids]


def _audit_files(storage: Storage) -> list[str]:
    return [f"{AUDITS}/{name}" for name in storage.list_folder(AUDITS) if name.endswith(".json")]


def _parse(storage: Storage, name: str, content: bytes) -> dict[str, Any]:
    return parse_record(content, storage.locate(name), "a note of an extraction")
