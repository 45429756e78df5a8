"""From the name of a place to its storage."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from ...errors import ConfigError
from .base import Storage
from .local import LocalStorage


def open_storage(place: str | Path) -> Storage:
    """The storage of a folder (a path, or `file://`), or of a prefix in a bucket (`s3://`, `gs://`, `az://`).

    Raises:
        ConfigError: the place has another scheme, a query or a fragment, or is `file://` with a host.
    """
    url = urlsplit(str(place)) if "://" in str(place) else urlsplit("")
    if not url.scheme:
        return LocalStorage(Path(place))
    if url.query or url.fragment or str(place).endswith(("?", "#")):
        raise ConfigError(
            f"expected ? and # of a place written as %3F and %23, since they end the path of a URL, found {place}. A "
            "folder can be named by its path, without file://."
        )
    if url.scheme == "file" and url.netloc in ("", "localhost"):
        return LocalStorage(Path(unquote(url.path)))
    if url.scheme == "file":
        raise ConfigError(f"expected a folder of this machine, such as file:///data/cache, found {place}.")
    if url.scheme not in ("s3", "gs", "az"):
        raise ConfigError(f"expected a folder or a place at s3://, gs://, az:// or file://, found {place}.")
    from .bucket import ObjectStorage

    return ObjectStorage(str(place))
