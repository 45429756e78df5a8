"""A large file is hashed once; its hash is used again only if the file can't have changed."""

import hashlib
import os
import time
from pathlib import Path

import pytest
from vpd.data.cache.storage.places import open_storage
from vpd.data.cache.work import HASHES, read_hashes
from vpd.data.errors import CacheCorruptError
from vpd.stages.extract.fingerprint import FileHashes


@pytest.fixture(autouse=True)
def all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vpd.stages.extract.fingerprint.KEPT_BYTES", 1)


def write(path: Path, content: bytes, age: float = 3600.0) -> Path:
    path.write_bytes(content)
    when = int(time.time() - age)
    os.utime(path, (when, when))
    return path


def expected(*contents: bytes) -> list[str]:
    return [hashlib.sha256(content).hexdigest() for content in contents]


def test_a_later_run_does_not_read_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    paths = [write(tmp_path / name, name.encode()) for name in "ab"]
    storage = open_storage(str(tmp_path / "cache"))
    first, later = FileHashes(), FileHashes()
    assert first.of(paths) == expected(b"a", b"b")
    first.keep(storage, paths)
    later.load(storage)
    monkeypatch.setattr("builtins.open", lambda *args: pytest.fail("a file was opened"))
    assert later.of(paths) == first.of(paths) == expected(b"a", b"b")


def test_a_changed_file_is_hashed_again(tmp_path: Path):
    hashes, path = FileHashes(), write(tmp_path / "a", b"one")
    assert hashes.of([path]) == expected(b"one")
    for content, age in ((b"two", 1800.0), (b"three", 1800.0), (b"three", 3600.0)):
        assert hashes.of([write(path, content, age)]) == expected(content)


def test_a_file_that_has_just_changed_is_not_known(tmp_path: Path):
    """A second change within the clock's grain leaves size and time as they are."""
    storage = open_storage(str(tmp_path / "cache"))
    hashes, path = FileHashes(), tmp_path / "a"
    for content in (b"one", b"two"):
        assert hashes.of([write(path, content, 1.0)]) == expected(content)
    hashes.keep(storage, [path])
    assert read_hashes(storage) == {}
    assert not storage.exists(HASHES)


def test_small_files_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vpd.stages.extract.fingerprint.KEPT_BYTES", 4)
    storage, hashes = open_storage(str(tmp_path / "cache")), FileHashes()
    paths = [write(tmp_path / "a", b"one"), write(tmp_path / "b", b"three")]
    hashes.of(paths)
    hashes.keep(storage, paths)
    assert [*read_hashes(storage).values()] == expected(b"three")


def test_the_hashes_of_several_targets_are_kept_together(tmp_path: Path):
    storage, hashes = open_storage(str(tmp_path / "cache")), FileHashes()
    for name in "ab":
        path = write(tmp_path / name, name.encode())
        hashes.of([path])
        hashes.keep(storage, [path])
    assert sorted(read_hashes(storage).values()) == sorted(expected(b"a", b"b"))


def test_a_damaged_note_is_reported(tmp_path: Path):
    storage, hashes = open_storage(str(tmp_path / "cache")), FileHashes()
    path = write(tmp_path / "a", b"one")
    hashes.of([path])
    hashes.keep(storage, [path])
    storage.write(HASHES, storage.read(HASHES).replace(b"a", b"b"))
    with pytest.raises(CacheCorruptError):
        FileHashes().load(storage)
