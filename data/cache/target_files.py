"""The target's config, tokenizer and pieces, stored with the cache: `target/`, described by `target.json`."""

from __future__ import annotations

import os
import tempfile
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import CacheCorruptError
from ..hashing import hash_text
from .part import reporting_full_disk
from .records import FileDigest, dump_record, parse_record
from .storage.base import Storage

TARGET, RECORD_NAME = "target", "target.json"
PIECES = "pieces.safetensors"
"""The file of weights among them."""
PIECE_FACTS = "pieces.json"
"""What the target does around its embedding and its head, as JSON; there is no such file if it does nothing."""
BLOCK_BYTES = 8 << 20
BLOCKS_AT_ONCE = 4
TARGET_ADVICE = "Run the cache's vpd extract command again: it stores the target's pieces again."


def store_target_files(storage: Storage, folder: Path) -> None:
    """Copies a folder's files into the cache; `target.json`, which describes the files, comes last."""
    storage.remove(RECORD_NAME)
    storage.remove(TARGET)
    writer = storage.write_folder(TARGET)
    files: dict[str, Any] = {}
    try:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            target = writer.open(name)
            digest = FileDigest()
            with open(path, "rb") as source:
                while block := source.read(BLOCK_BYTES):
                    target.write(block)
                    digest.update(block)
            target.close()
            files[f"{TARGET}/{name}"] = digest.describe()
        writer.publish()
    except BaseException:
        writer.abandon()
        raise
    storage.write(RECORD_NAME, dump_record({"files": files}))
    writer.release()


def read_target_record(storage: Storage) -> dict[str, Any]:
    """The files that `target/` must hold: name -> size and hash.

    Raises:
        CacheCorruptError: the record is missing or damaged.
    """
    place = f"{storage.place}/{RECORD_NAME}"
    try:
        return parse_record(storage.read(RECORD_NAME), place, "the record of the target's pieces")["files"]
    except FileNotFoundError:
        raise CacheCorruptError(
            f"expected the target's pieces in {storage.place}, found none.", TARGET_ADVICE
        ) from None


def target_folder(storage: Storage, without: str | None = None) -> Path:
    """A local folder with the target's pieces, every file verified; the pieces of a bucket are downloaded once.

    Args:
        without: name of a file that the caller does not need, such as a large one.

    Raises:
        CacheCorruptError: a file is missing, or not what was written.
    """
    files = read_target_record(storage)
    local = storage.local_folder
    if is_remote := local is None:
        # The name is a hash of the content: caches of one target share a folder, caches of two targets never do.
        local = user_cache() / "vpd" / hash_text(dump_record(files).decode())
    # A file of facts that the record does not list is of another target.
    for name, described in {f"{TARGET}/{PIECE_FACTS}": None, **files}.items():
        path = local / name
        if name == f"{TARGET}/{without}" or describe_file(path) == described:
            continue
        if is_remote and described is not None:
            try:
                download(storage, name, path, described["bytes"])
            except FileNotFoundError:
                raise CacheCorruptError(f"{storage.locate(name)} is missing.", TARGET_ADVICE) from None
        if describe_file(path) != described:
            raise CacheCorruptError(f"{storage.locate(name)} is not what was written.", TARGET_ADVICE)
    return local / TARGET


def user_cache() -> Path:
    """The folder for what can be fetched again: XDG_CACHE_HOME, or `.cache` of the user's home."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named)
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # a user without an account and without HOME, as in some containers
        return Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"


def describe_file(path: Path) -> dict[str, Any] | None:
    """The description of a local file in a record: size and hash; None if there is no file."""
    if not path.is_file():
        return None
    digest = FileDigest()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.describe()


def download(storage: Storage, name: str, path: Path, size: int) -> None:
    """Copies a file of this size to the local disk, several blocks at once; the copy appears as a whole.

    Raises:
        FileNotFoundError: the file is not there.
        CacheCorruptError: the file is shorter.
        StorageError: the local disk is full.
    """
    file = storage.open(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")

    def copy_block(target: int, offset: int) -> None:
        block = memoryview(bytearray(min(BLOCK_BYTES, size - offset)))
        if file.read_into([block], offset) < len(block):
            raise CacheCorruptError(f"{storage.locate(name)}: expected {size} bytes, found fewer.")
        os.pwrite(target, block, offset)

    try:
        with reporting_full_disk(str(path.parent)), open(aside, "wb") as target:
            os.posix_fallocate(target.fileno(), 0, max(size, 1))
            os.ftruncate(target.fileno(), size)
            with ThreadPoolExecutor(BLOCKS_AT_ONCE) as pool:
                list(pool.map(lambda offset: copy_block(target.fileno(), offset), range(0, size, BLOCK_BYTES)))
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
