"""Opening a cache as the settings of `read` ask for."""

from __future__ import annotations

from pathlib import Path

from ..data.cache.cache import Cache
from ..data.cache.storage.mirror import MirroredStorage
from ..data.cache.storage.places import open_storage
from ..stages.config import ReadConfig


def open_for_reading(place: str, config: ReadConfig) -> Cache:
    """The cache at a place; a remote one is read through local copies of its parts if the config names a folder."""
    storage = open_storage(place)
    if config.local_parts is not None and storage.local_folder is None:
        storage = MirroredStorage(storage, Path(config.local_parts), round(config.local_gib * 2**30))
    return Cache.open(storage)
