"""A part: a Zarr group with one writer, published as a whole by its commit record."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from ..errors import CacheCorruptError
from .files import fsync_folder, fsync_tree, write_bytes_durably, write_text_durably
from .shard import ArraySpec, ShardWriter

PARTS, COMMITS = "parts", "commits"
ASIDE = ".writing-"
LOCK = "writer.lock"


class PartWriter:
    """Writes arrays of the same rows aside, then publishes them: fsync, rename, commit record.

    `root` holds `parts/<name>.zarr` and `commits/<name>.json`; only what a commit lists exists for readers.
    """

    def __init__(self, root: Path, specs: Iterable[ArraySpec], name: str | None = None):
        self.root = root
        self.name = name or f"part-{uuid.uuid4().hex[:12]}"
        self.num_rows = 0
        self._aside = root / PARTS / f"{ASIDE}{self.name}-{uuid.uuid4().hex[:8]}"
        self._aside.mkdir(parents=True)
        # Held while the writer lives, so that another process does not take the folder for a dead writer's.
        self._lock = open(self._aside / LOCK, "w")  # noqa: SIM115
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._writers = {spec.name: ShardWriter(self._aside, spec) for spec in specs}

    @property
    def path(self) -> Path:
        return part_path(self.root, self.name)

    def append(self, arrays: Mapping[str, np.ndarray]) -> int:
        """Appends the same number of rows to every array; returns the first row's number, a chunk's start."""
        if arrays.keys() != self._writers.keys() or len({len(rows) for rows in arrays.values()}) != 1:
            raise ValueError(f"expected rows for {sorted(self._writers)} of one length, got {sorted(arrays)}")
        first_row = self.num_rows
        for name, rows in arrays.items():
            self._writers[name].append(rows)
        (self.num_rows,) = {writer.num_rows for writer in self._writers.values()}
        return first_row

    def commit(self, facts: Mapping[str, Any], extra_files: Mapping[str, bytes] | None = None) -> None:
        """Publishes the part. `extra_files` (path below `root` -> content) are written before the commit record."""
        for writer in self._writers.values():
            writer.close()
        group = {"zarr_format": 3, "node_type": "group", "attributes": {}}
        (self._aside / "zarr.json").write_text(json.dumps(group, indent=2))
        fsync_tree(self._aside)
        files = {
            str((self.path / file.relative_to(self._aside)).relative_to(self.root)): describe_file(file)
            for file in sorted(self._aside.rglob("*"))
            if file.is_file() and file.name != LOCK
        }
        os.rename(self._aside, self.path)
        fsync_folder(self.path.parent)
        for name, content in (extra_files or {}).items():
            write_bytes_durably(self.root / name, content)
            files[name] = describe_file(self.root / name)
        record = {"part": self.name, **facts, "num_rows": self.num_rows, "files": files}
        write_text_durably(commit_path(self.root, self.name), json.dumps(record, indent=1))
        (self.path / LOCK).unlink()
        self._lock.close()

    def abandon(self) -> None:
        """Drops what was written."""
        for writer in self._writers.values():
            writer.abandon()
        self._lock.close()
        shutil.rmtree(self._aside, ignore_errors=True)


def part_path(root: Path, name: str) -> Path:
    return root / PARTS / f"{name}.zarr"


def commit_path(root: Path, name: str) -> Path:
    return root / COMMITS / f"{name}.json"


def describe_file(path: Path) -> dict[str, Any]:
    """Size in bytes and crc32c of a file."""
    checksum = google_crc32c.Checksum()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            checksum.update(block)
    return {"bytes": path.stat().st_size, "crc32c": checksum.hexdigest().decode()}


def committed_parts(root: Path) -> list[dict[str, Any]]:
    """All commit records below `root`, by name.

    Raises:
        CacheCorruptError: a file there is no commit record.
    """
    return [_read_commit(path) for path in sorted((root / COMMITS).glob("[!.]*.json"))]


def _read_commit(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except ValueError:
        record = None
    if not isinstance(record, dict) or record.get("part") != path.stem or not isinstance(record.get("files"), dict):
        raise CacheCorruptError(
            f"{path} is not the commit record of a part. Restore it, or remove it and make the part again."
        )
    return record


def remove_uncommitted(root: Path) -> int:
    """Removes what no commit lists and no living writer holds; returns the number of parts removed."""
    removed = 0
    for folder in (root / PARTS).glob("*"):
        # In this order: a writer lets its lock go only after its commit record is there.
        if not _is_being_written(folder) and not commit_path(root, folder.name.removesuffix(".zarr")).exists():
            shutil.rmtree(folder)
            removed += 1
    return removed


def _is_being_written(folder: Path) -> bool:
    try:
        with open(folder / LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
