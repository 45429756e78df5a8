"""Hashes of a target's files. The cache keeps those of large files, by path, size and modification time."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ...data.cache.storage.base import Storage
from ...data.cache.work import note_hashes, read_hashes

HASH_BLOCK = 1 << 22
KEPT_BYTES = 64 << 20
"""Files from this size on are kept; the others are quickly hashed again."""
RECENT_SECONDS = 60.0
"""The hash of a file that changed later than this before it was hashed is not kept, as the next change may have the
same time."""


class FileHashes:
    """SHA-256 of files, each found by reading the file, or known from before."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def of(self, paths: Sequence[Path]) -> list[str]:
        """64 hex digits for each file."""
        with ThreadPoolExecutor(max_workers=4) as pool:
            return list(pool.map(self._hash, paths))

    def load(self, storage: Storage) -> None:
        """Takes over the hashes that the cache keeps.

        Raises:
            CacheCorruptError: the note is damaged.
        """
        self._known |= read_hashes(storage)

    def keep(self, storage: Storage, paths: Sequence[Path]) -> None:
        """Stores the hashes of these files with the cache."""
        keys = [_key(path) for path in paths]
        found = {key: self._known[key] for key in keys if key in self._known}
        kept = read_hashes(storage)
        if not found.items() <= kept.items():
            note_hashes(storage, kept | found)

    def _hash(self, path: Path) -> str:
        key, started = _key(path), time.time()
        if key in self._known:
            return self._known[key]
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(HASH_BLOCK):
                digest.update(block)
        status = path.stat()
        is_settled = key == _key(path) and started - status.st_mtime > RECENT_SECONDS
        if is_settled and status.st_size >= KEPT_BYTES:
            self._known[key] = digest.hexdigest()
        return digest.hexdigest()


FILE_HASHES = FileHashes()
"""The hashes that this process knows."""


def _key(path: Path) -> str:
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
