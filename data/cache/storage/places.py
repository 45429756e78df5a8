"""From the name of a place to its storage."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from ...errors import ConfigError
from .base import Storage
from .local import LocalStorage


def open_storage(place: str | Path) -> Storage:
    """A folder (a path, or `file://`), or a bucket with a prefix (`s3://`, `gs://`, `az://`).

    Raises:
        ConfigError: another scheme, or a `file://` with a host.
    """
    url = urlsplit(str(place)) if "://" in str(place) else urlsplit("")
    if not url.scheme:
        return LocalStorage(Path(place))
    if url.scheme == "file" and url.netloc in ("", "localhost"):
        return LocalStorage(Path(unquote(url.path)))
    if url.scheme == "file":
        raise ConfigError(f"expected a folder of this machine, such as file:///data/cache, found {place}.")
    if url.scheme not in ("s3", "gs", "az"):
        raise ConfigError(f"expected a folder or a place at s3://, gs://, az:// or file://, found {place}.")
    from .bucket import ObjectStorage

    return ObjectStorage(str(place))
