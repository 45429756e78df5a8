"""Local servers in place of buckets, and a cache for them."""

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.buckets import PART_BYTES, SEQUENCES, write_drafts
from support.servers import RangeServer, S3Server
from support.tiny import fill_cache
from vpd.data.cache.cache import Cache
from vpd.data.cache.storage.local import LocalStorage
from vpd.data.cache.target_files import store_target_files


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    """A local S3 server, which the storages of a module's tests use."""
    with S3Server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def place(s3: S3Server, user_cache: Path) -> str:
    """A new place in the bucket."""
    return s3.place(f"caches/{uuid.uuid4().hex[:8]}")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local cache of several parts, all in its snapshot, with first drafts and the target's pieces."""
    folder = tmp_path_factory.mktemp("original") / "cache"
    fill_cache(folder, SEQUENCES, PART_BYTES)
    write_drafts(Cache.open(folder), seed=0)
    pieces = tmp_path_factory.mktemp("pieces")
    (pieces / "config.json").write_text("{}")
    (pieces / "more").mkdir()
    (pieces / "more/pieces.safetensors").write_bytes(bytes(range(256)) * 100)
    store_target_files(LocalStorage(folder), pieces)
    return folder


@pytest.fixture
def server(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user_cache: Path) -> Iterator[RangeServer]:
    """A server of a copy of `original`, in the bucket's folder `cache`."""
    shutil.copytree(original, tmp_path / "bucket/cache")
    with RangeServer(tmp_path / "bucket", page_size=2) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    return tmp_path / "user-cache/vpd"
