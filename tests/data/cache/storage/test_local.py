"""A folder of this machine: reads into many buffers at once, and locks that show which writers are alive."""

import errno
import fcntl
import os
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vpd.data.cache.storage import locks
from vpd.data.cache.storage.local import LocalFile, LocalStorage
from vpd.data.cache.storage.locks import LOCK, SECONDS_TO_LOCK, SECONDS_UNTIL_ABANDONED, FolderLock, is_alive, this_host

CONTENT = bytes(range(256)) * 40


@pytest.mark.parametrize("num_missing", [0, 1, 5000])
@pytest.mark.parametrize("longest", [None, 1000, 7])
def test_more_buffers_than_one_call_takes_are_filled_in_order(
    longest: int | None, num_missing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The read is complete even if a call returns fewer bytes than asked for."""
    preadv = os.preadv

    def read_some(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        room, some = longest or len(CONTENT), list[memoryview]()
        for buffer in buffers:
            some.append(buffer[:room])
            room -= len(some[-1])
        return preadv(descriptor, some, offset)

    monkeypatch.setattr(os, "preadv", read_some)
    (tmp_path / "file").write_bytes(CONTENT[: len(CONTENT) - num_missing])
    memory = bytearray(len(CONTENT) - 3)
    starts = [0, *range(2, len(memory), 3), len(memory)]
    assert len(starts) > 2 * os.sysconf("SC_IOV_MAX")
    buffers = [memoryview(memory)[start:end] for start, end in pairwise(starts)]
    found = LocalFile(tmp_path / "file").read_into(buffers, 3)
    assert found == len(memory) - num_missing
    assert memory == CONTENT[3 : len(CONTENT) - num_missing] + bytes(num_missing)


def test_a_file_is_created_once_though_a_server_answers_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A server makes the link, gets the same request again, and then finds the link."""
    link = os.link

    def ask_twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", ask_twice)
    storage = LocalStorage(tmp_path)
    storage.create("lease.json", b"mine")
    with pytest.raises(FileExistsError):
        storage.create("lease.json", b"yours")
    assert [path.name for path in tmp_path.iterdir()] == ["lease.json"]
    assert storage.read("lease.json") == b"mine"


def test_a_closed_file_gives_its_descriptor_back(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"x")
    before = os.listdir("/proc/self/fd")
    for _ in range(50):
        LocalFile(tmp_path / "file").tail(1)
    assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.mark.parametrize("seen", ["", "hidden"])
def test_a_folder_may_disappear_during_the_check(seen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The folder's writer has published it, or another process removes it."""
    folder = tmp_path / "parts/p.zarr"
    (folder / "hidden").mkdir(parents=True)
    (folder / LOCK).write_text("elsewhere")
    scandir = os.scandir

    def scan_late(path: Any) -> Any:
        if not isinstance(path, int) and Path(path) == folder / seen:
            (tmp_path / "parts/p.zarr").rename(tmp_path / "published")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan_late)
    LocalStorage(tmp_path).remove_leftovers("parts", set)
    monkeypatch.undo()
    assert {path.name for path in tmp_path.rglob("*")} == {"parts", "published", LOCK, "hidden"}


def test_a_leftover_that_is_added_to_while_it_is_removed_may_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("a", "b"):
        (tmp_path / "parts" / name).mkdir(parents=True)
        os.utime(tmp_path / "parts" / name, (0, 0))
    rmdir = os.rmdir

    def remove_late(path: Any, **options: Any) -> None:
        if Path(path).name == "a":
            (tmp_path / "parts/a/late").touch()
        rmdir(path, **options)

    monkeypatch.setattr(os, "rmdir", remove_late)
    storage = LocalStorage(tmp_path)
    storage.remove_leftovers("parts", set)
    assert list(storage.walk("parts")) == ["parts/a/late"]
    assert storage.list_folder("parts") == ["a"]


@pytest.mark.parametrize("begun", [False, True])
def test_the_writer_of_a_new_folder_has_time_to_lock_it(begun: bool, tmp_path: Path):
    if begun:
        (tmp_path / LOCK).touch()
    assert is_alive(tmp_path)
    then = time.time() - 2 * SECONDS_TO_LOCK
    for path in (*tmp_path.iterdir(), tmp_path):
        os.utime(path, (then, then))
    assert not is_alive(tmp_path)


def test_a_folder_is_alive_as_long_as_its_lock_is_held(tmp_path: Path):
    lock = FolderLock(tmp_path)
    assert is_alive(tmp_path)
    assert is_alive(tmp_path)  # the check does not take the lock
    lock.release()
    assert not is_alive(tmp_path)


@pytest.mark.parametrize(
    ("age_s", "alive"),
    [(0, True), (SECONDS_UNTIL_ABANDONED - 60, True), (SECONDS_UNTIL_ABANDONED + 60, False)],
)
@pytest.mark.parametrize("changed", ["lock", "data"])
def test_a_writer_on_another_host_is_alive_until_nothing_changes_for_a_day(
    changed: str, age_s: int, alive: bool, tmp_path: Path
):
    """Not every shared file system shows the locks of other hosts."""
    (tmp_path / LOCK).write_text("elsewhere")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/0").write_bytes(b"x")
    long_ago, then = time.time() - 2 * SECONDS_UNTIL_ABANDONED, time.time() - age_s
    for path in (tmp_path / LOCK, tmp_path / "hidden/0", tmp_path / "hidden", tmp_path):
        os.utime(path, (long_ago, long_ago))
    assert not is_alive(tmp_path)
    os.utime(tmp_path / (LOCK if changed == "lock" else "hidden/0"), (then, then))
    assert is_alive(tmp_path) == alive


# File systems of other kinds


@pytest.fixture
def nfs_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux' NFS client: an exclusive lock needs a file open for writing, a shared lock a file open for reading."""
    flock = fcntl.flock

    def refuse(file: Any, operation: int) -> None:
        mode = fcntl.fcntl(file.fileno(), fcntl.F_GETFL) & os.O_ACCMODE
        for kind, wrong in ((fcntl.LOCK_EX, os.O_RDONLY), (fcntl.LOCK_SH, os.O_WRONLY)):
            if operation & kind and mode == wrong:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("nfs_locks")
def test_locks_work_on_nfs(tmp_path: Path):
    lock = FolderLock(tmp_path)
    assert is_alive(tmp_path)
    lock.release()
    (tmp_path / LOCK).chmod(0o444)
    assert not is_alive(tmp_path)
    (tmp_path / LOCK).chmod(0o644)
    (tmp_path / LOCK).write_text("elsewhere")
    assert is_alive(tmp_path)


def test_a_file_system_without_locks_can_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(file: Any, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock = FolderLock(tmp_path)
    assert is_alive(tmp_path)
    lock.release()
    make_older(tmp_path, SECONDS_UNTIL_ABANDONED - 60)
    assert is_alive(tmp_path)
    make_older(tmp_path, SECONDS_UNTIL_ABANDONED + 60)
    assert not is_alive(tmp_path)


def test_a_host_of_the_same_name_is_another_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The other host's lock can't be seen from here."""
    monkeypatch.setattr(locks, "this_host", lambda: f"{this_host()}-other")
    lock = FolderLock(tmp_path)
    lock.release()
    assert not is_alive(tmp_path)
    monkeypatch.undo()
    assert is_alive(tmp_path)


@pytest.mark.parametrize("ahead_s", [-3 * SECONDS_UNTIL_ABANDONED, 0, 3 * SECONDS_UNTIL_ABANDONED])
@pytest.mark.parametrize("age_s", [0, SECONDS_UNTIL_ABANDONED - 60, SECONDS_UNTIL_ABANDONED + 60])
def test_the_file_servers_clock_may_be_wrong(age_s: int, ahead_s: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / LOCK).write_text("elsewhere")
    make_older(tmp_path, age_s)
    stat = os.stat

    def stat_by_server(*arguments: Any, **options: Any) -> Any:
        found = stat(*arguments, **options)
        fields = {name: getattr(found, name) for name in dir(found) if name.startswith("st_")}
        return SimpleNamespace(**fields | {"st_mtime": found.st_mtime + ahead_s})

    monkeypatch.setattr(os, "stat", stat_by_server)
    alive = is_alive(tmp_path)
    monkeypatch.undo()
    assert alive == (age_s < SECONDS_UNTIL_ABANDONED)


def test_a_process_that_is_killed_while_it_reads_the_clock_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "parts/p"
    folder.mkdir(parents=True)
    seen: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.extend(os.listdir(folder.parent)))
    assert is_alive(folder)
    assert seen == ["p"]


def make_older(folder: Path, age_s: float) -> None:
    then = time.time() - age_s
    for path in (*folder.iterdir(), folder):
        os.utime(path, (then, then))
