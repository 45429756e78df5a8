"""Durable files: write under another name, sync the file, rename it, sync the folder."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from ...errors import ConfigError


def require_folder(path: Path) -> None:
    """Checks that a place for output is a folder, or free.

    Raises:
        ConfigError: something else is there.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"expected a folder, or nothing yet, at {path}, found a file. Choose another --out.")


def fsync_folder(folder: Path) -> None:
    """Makes renames and new names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Makes every file and folder below `folder` durable."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(parent, name), "rb") as file:
                os.fsync(file.fileno())
        fsync_folder(Path(parent))


def write_bytes_durably(path: Path, content: bytes) -> None:
    """Replaces a file as a whole: a reader sees the old content or the new content, even after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:  # a full disk, for example
        aside.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_text_durably(path: Path, content: str) -> None:
    write_bytes_durably(path, content.encode())
