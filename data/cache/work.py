"""Records of an extraction's finished work units: what need not be tried again. No reader of states needs them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..errors import CacheCorruptError
from .records import parse_record
from .storage import Storage

WORK, DONE = "work", ".done.json"


def finished_units(storage: Storage) -> dict[str, dict[str, str]]:
    """The finished units, and for each the records that gave no sequence and never will: id -> reason.

    Raises:
        CacheCorruptError: a record of a unit is damaged.
    """
    return {name.removesuffix(DONE): parse_unit(storage, name, content) for name, content in read_units(storage)}


def damaged_units(storage: Storage) -> Iterator[tuple[str, CacheCorruptError]]:
    """Files of units whose record is not as it was written, and what is wrong."""
    for name, content in read_units(storage):
        try:
            parse_unit(storage, name, content)
        except CacheCorruptError as error:
            yield f"{WORK}/{name}", error


def read_units(storage: Storage) -> list[tuple[str, bytes]]:
    names = [name for name in storage.list_folder(WORK) if name.endswith(DONE)]
    return list(zip(names, storage.read_all([f"{WORK}/{name}" for name in names]), strict=True))


def parse_unit(storage: Storage, name: str, content: bytes) -> dict[str, str]:
    record: dict[str, Any] = parse_record(
        content, storage.locate(f"{WORK}/{name}"), "the record of a finished work unit"
    )
    return record["skipped"]
