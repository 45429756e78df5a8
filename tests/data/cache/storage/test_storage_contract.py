"""The contract of all storages: folders, buckets, and local copies of a bucket's parts."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support.buckets import read_ranges
from vpd.data.cache.storage import bucket as object_storage
from vpd.data.cache.storage import locks
from vpd.data.cache.storage.base import Storage
from vpd.data.cache.storage.bucket import ObjectStorage
from vpd.data.cache.storage.local import LocalStorage
from vpd.data.cache.storage.mirror import MirroredStorage
from vpd.data.errors import StorageError


@pytest.fixture(params=["folder", "bucket", "mirror"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return LocalStorage(tmp_path / "cache")
    remote = ObjectStorage(request.getfixturevalue("place"))
    return remote if request.param == "bucket" else MirroredStorage(remote, tmp_path / "mirror", 1 << 20)


@pytest.fixture
def a_day_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes all files look a day old."""
    monkeypatch.setattr(object_storage, "SECONDS_UNTIL_ABANDONED", -1)
    monkeypatch.setattr(locks, "SECONDS_TO_LOCK", -1)


NAMES = ["record.json", "parts/p.zarr/hidden/c/0"]
NAME = pytest.mark.parametrize("name", NAMES, ids=["record", "part"])


MISSING: dict[str, Callable[[Storage, str], object]] = {
    "read": lambda storage, name: storage.read(name),
    "size": lambda storage, name: storage.size(name),
    "open and read_into": lambda storage, name: read_ranges(storage, name, 0, 1),
    "open and tail": lambda storage, name: storage.open(name).tail(1),
    "move": lambda storage, name: storage.move(name, f"{name}.moved"),
}


@NAME
@pytest.mark.parametrize("use", MISSING.values(), ids=MISSING)
def test_a_file_that_is_not_there_is_an_error(use: Callable[[Storage, str], object], name: str, storage: Storage):
    storage.write("other", b"")
    with pytest.raises(FileNotFoundError) as caught:
        use(storage, name)
    assert not isinstance(caught.value, StorageError)
    assert name in str(caught.value)


@NAME
def test_what_is_not_there_is_not_listed_and_can_be_removed(name: str, storage: Storage):
    for _ in range(2):  # first where nothing is, then where something else is
        assert not storage.exists(name)
        assert storage.list_folder(name) == []
        assert list(storage.walk(name)) == []
        storage.remove(name)
        assert storage.remove_leftovers(name, set) == 0
        storage.write("other", b"")


@NAME
def test_a_file_is_what_was_written_last(name: str, storage: Storage):
    storage.write(name, b"before")
    assert storage.read(name) == b"before"
    storage.write(name, b"0123456789")
    assert (storage.read(name), storage.size(name), storage.exists(name)) == (b"0123456789", 10, True)
    assert read_ranges(storage, name, 2, 3, 4) == (7, [b"234", b"5678"])
    assert read_ranges(storage, name, 7, 2, 2) == (3, [b"78", b"9\0"])
    assert read_ranges(storage, name, 10, 1) == (0, [b"\0"])
    assert read_ranges(storage, name, 0) == (0, [])
    file = storage.open(name)
    assert (file.tail(4), file.tail(10), file.tail(99)) == ((10, b"6789"), (10, b"0123456789"), (10, b"0123456789"))
    assert name in storage.locate(name)


@NAME
def test_a_file_can_be_empty(name: str, storage: Storage):
    storage.write(name, b"")
    assert (storage.read(name), storage.size(name), storage.exists(name)) == (b"", 0, True)
    assert storage.open(name).tail(4) == (0, b"")
    assert read_ranges(storage, name, 0, 4) == (0, [b"\0" * 4])


def test_folders_list_what_is_directly_in_them(storage: Storage):
    for name in ("a/2", "a/10", "a/b/c/d", "a/b/e", "ab/f", "a/.hidden", "g"):
        storage.write(name, name.encode())
    assert storage.list_folder("a") == ["10", "2", "b"]
    assert storage.list_folder("a/b") == ["c", "e"]
    assert storage.list_folder("") == ["a", "ab", "g"]
    assert storage.list_folder("g") == []
    assert sorted(storage.walk("a")) == ["a/.hidden", "a/10", "a/2", "a/b/c/d", "a/b/e"]
    assert len(list(storage.walk(""))) == 7
    assert (storage.exists("a"), storage.exists("a/b"), storage.exists("b")) == (True, True, False)


@NAME
def test_a_file_is_created_once(name: str, storage: Storage):
    storage.create(name, b"one")
    with pytest.raises(FileExistsError):
        storage.create(name, b"other")
    assert storage.read(name) == b"one"
    assert list(storage.walk("")) == [name]


def fill(storage: Storage) -> None:
    for name in ("parts/p.zarr/hidden/c/0", "parts/p.zarr/zarr.json", "parts/p.zarr2/zarr.json", "parts/p"):
        storage.write(name, name.encode())
        assert storage.read(name) == name.encode()


def test_files_and_folders_are_moved(storage: Storage):
    fill(storage)
    storage.move("parts/p.zarr", "quarantine/q.zarr")
    storage.move("parts/p", "parts/moved/p")
    assert sorted(storage.walk("")) == [
        "parts/moved/p",
        "parts/p.zarr2/zarr.json",
        "quarantine/q.zarr/hidden/c/0",
        "quarantine/q.zarr/zarr.json",
    ]
    assert storage.read("quarantine/q.zarr/zarr.json") == b"parts/p.zarr/zarr.json"
    for gone in ("parts/p.zarr/zarr.json", "parts/p"):
        with pytest.raises(FileNotFoundError):
            storage.read(gone)


def test_files_and_folders_are_removed(storage: Storage):
    fill(storage)
    storage.remove("parts/p.zarr")
    storage.remove("parts/p")
    assert list(storage.walk("")) == ["parts/p.zarr2/zarr.json"]
    assert not storage.exists("parts/p.zarr")
    for gone in ("parts/p.zarr/zarr.json", "parts/p"):
        with pytest.raises(FileNotFoundError):
            storage.read(gone)


def test_a_folder_is_written_and_published(storage: Storage):
    writer = storage.write_folder("parts/p.zarr")
    file = writer.open("hidden/c/0")
    file.write(b"abc")
    file.write(memoryview(b"defg"))
    file.close()
    writer.write("zarr.json", b"{}")
    writer.publish()
    assert storage.list_folder("parts") == ["p.zarr"]
    assert storage.read("parts/p.zarr/hidden/c/0") == b"abcdefg"
    assert storage.read("parts/p.zarr/zarr.json") == b"{}"
    writer.release()
    assert sorted(storage.walk("")) == ["parts/p.zarr/hidden/c/0", "parts/p.zarr/zarr.json"]


def test_a_folder_that_is_abandoned_leaves_nothing(storage: Storage):
    writer = storage.write_folder("parts/p.zarr")
    for name in ("a", "b"):
        file = writer.open(name)
        file.write(b"abc")
        file.close()
    writer.write("zarr.json", b"{}")
    writer.abandon()
    assert list(storage.walk("")) == []
    assert storage.list_folder("parts") == []


def write_part(storage: Storage, name: str) -> None:
    writer = storage.write_folder(name)
    writer.write("zarr.json", b"{}")
    writer.publish()
    writer.release()


@pytest.mark.usefixtures("a_day_later")
def test_folders_of_dead_writers_are_removed_unless_they_are_listed(storage: Storage):
    for name in ("kept.zarr", "dead.zarr", "dead-too.zarr"):
        write_part(storage, f"parts/{name}")
    storage.write("parts/stray", b"")
    assert storage.remove_leftovers("parts", lambda: {"kept.zarr"}) == 2
    assert storage.list_folder("parts") == ["kept.zarr", "stray"]
    assert storage.remove_leftovers("parts", lambda: {"kept.zarr"}) == 0


def test_the_folder_of_a_living_writer_is_kept(storage: Storage):
    writer = storage.write_folder("parts/p.zarr")
    writer.write("zarr.json", b"{}")
    assert storage.remove_leftovers("parts", set) == 0
    writer.publish()
    assert storage.remove_leftovers("parts", set) == 0
    assert storage.read("parts/p.zarr/zarr.json") == b"{}"
    writer.release()


@pytest.mark.usefixtures("a_day_later")
def test_what_is_listed_while_leftovers_are_sought_is_kept(storage: Storage):
    """The listing comes after the check for dead writers, not before."""
    write_part(storage, "parts/p.zarr")

    def listed() -> set[str]:
        return {"p.zarr"} if storage.exists("commits/p.json") else set()

    storage.write("commits/p.json", b"{}")
    assert storage.remove_leftovers("parts", listed) == 0
    assert storage.exists("parts/p.zarr/zarr.json")
