"""Writing: only committed parts exist, a living writer's part is kept, a dead writer's part is removed."""

# K layers, H hidden width
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from support.tiny import append, chunk_bytes, fill_cache, make_manifest, make_sequence, same_bits, snapshot
from vpd.data.cache import writer as writer_module
from vpd.data.cache.arrays import state_specs
from vpd.data.cache.cache import CHUNK_TOKENS, Cache
from vpd.data.cache.part import PartWriter, open_part, remove_uncommitted
from vpd.data.cache.storage import local as storage_module
from vpd.data.cache.storage.local import LocalStorage
from vpd.data.cache.storage.locks import is_alive
from vpd.data.cache.writer import StateWriter
from vpd.data.errors import CacheNotFoundError

K, H = 2, 8
SPECS = state_specs(make_manifest())


def open_writer(folder: Path, part_bytes: int = 1 << 20) -> StateWriter:
    return StateWriter(Cache.create_or_open(folder, make_manifest()), part_bytes, {})


def ids(cache: Cache) -> set[str]:
    return {row.seq_id for row in cache.rows}


def part_folders(folder: Path) -> set[str]:
    return {path.name for path in (folder / "parts").iterdir()}


WRITER = """
import os, sys
import torch
from vpd.data.cache.storage.local import LocalStorage
from vpd.data.cache.cache import Cache
from vpd.data.cache.sequence import NewSequence
from vpd.data.cache.writer import StateWriter
cache = Cache.open(sys.argv[1])
writer = StateWriter(Cache.create_or_open(sys.argv[1], cache.manifest), 1 << 20, {})
arrays = {name: [1] * 9 for name in ("token_ids", "loss_mask", "target_argmax")}
sequence = NewSequence(
    seq_id="of-child", source="", source_row=0, arrays=arrays, prompt_len=0, final_token_id=None, finish_reason="given"
)
writer.append(sequence, torch.zeros(9, 2, 8).bfloat16())
print("open", flush=True)
sys.stdin.readline()
LocalStorage.create = lambda *arguments: os._exit(9)  # a crash between the rename and the commit record
writer.commit()
"""


@contextmanager
def writing_child(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that writes a part. After a line on its input, it dies just before the commit record."""
    command = [sys.executable, "-c", WRITER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "open\n"
            yield child
        finally:
            child.kill()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A cache of two sequences in one part."""
    fill_cache(tmp_path / "cache", [make_sequence(name, length, K, H) for name, length in (("a", 40), ("b", 70))])
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of two sequences in one part, and a part whose writer died before the commit record."""
    folder = tmp_path_factory.mktemp("crashed") / "cache"
    fill_cache(folder, [make_sequence(name, 40, K, H) for name in "ab"])
    with writing_child(folder) as child:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.close()
        assert child.wait() == 9
    return folder


# Parts


def test_a_new_part_starts_when_one_is_full(tmp_path: Path):
    chunks = [1, 1, 2, 3, 1, 1]
    writer = open_writer(tmp_path, 3 * chunk_bytes(K, H))
    committed = [append(writer, **make_sequence(str(i), count * CHUNK_TOKENS, K, H)) for i, count in enumerate(chunks)]
    # 1 + 1 + 2 and 3 reach three chunks; 1 + 1 do not.
    assert [name is not None for name in committed] == [False, False, True, True, False, False]
    assert set(Cache.open(tmp_path).parts) == {committed[2], committed[3]}
    last = writer.commit()
    assert writer.commit() is None
    cache = Cache.open(tmp_path)
    found = [sorted(row.seq_id for row in cache.rows_of_part(str(name))) for name in (committed[2], committed[3], last)]
    assert found == [["0", "1", "2"], ["3"], ["4", "5"]]


def test_a_writer_of_many_parts_rarely_lists_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lists: list[str] = []
    list_folder = LocalStorage.list_folder

    def noted(storage: LocalStorage, name: str) -> list[str]:
        lists.append(name)
        return list_folder(storage, name)

    writer = open_writer(tmp_path, 1)
    for i in range(4):
        append(writer, **make_sequence(f"a{i}", 10, K, H))
    monkeypatch.setattr(writer_module, "COMMITS_PER_LISTING", 2)
    monkeypatch.setattr(LocalStorage, "list_folder", noted)
    looks: list[int] = []
    for i in range(12):
        lists.clear()
        append(writer, **make_sequence(f"b{i}", 10, K, H))
        looks.append(lists.count("commits") > 0)
    # The writer lists the parts after 3 commits, when it knows 4 parts; after 4 more, of 7; after 6 more, of 11.
    assert looks == [False, False, True, False, False, False, True, *5 * [False]]
    writer.finish()
    assert len(Cache.open(tmp_path)) == 16
    assert [path.name[:12] for path in (tmp_path / "index").glob("all-*")] == ["all-00000016"]


def test_the_commit_record_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before: list[dict[str, str]] = []
    create = LocalStorage.create

    def look_then_create(storage: LocalStorage, name: str, content: bytes) -> None:
        with pytest.raises(CacheNotFoundError):
            Cache.open(tmp_path)
        before.append(snapshot(tmp_path))
        create(storage, name, content)
        before.append(snapshot(tmp_path))
        Cache.open(tmp_path)

    writer = open_writer(tmp_path)
    append(writer, **make_sequence("a", 10, K, H))
    monkeypatch.setattr(LocalStorage, "create", look_then_create)
    name = writer.commit()
    assert len(before) == 2
    assert before[0].items() < before[1].items()
    assert before[1].keys() - before[0].keys() == {f"commits/{name}.json"}
    # After that, the lock is removed and a snapshot is written.
    after = snapshot(tmp_path)
    assert before[1].keys() - after.keys() == {f"parts/{name}.zarr/writer.lock"}
    assert [path[:10] for path in after.keys() - before[1].keys()] == ["index/all-"]


def test_a_part_that_an_exception_ends_leaves_nothing(tmp_path: Path):
    Cache.create_or_open(tmp_path, make_manifest())
    with suppress(KeyboardInterrupt), PartWriter(LocalStorage(tmp_path), "", SPECS.values()) as writer:
        writer.append({name: np.zeros((10, *spec.row_shape), spec.dtype) for name, spec in SPECS.items()})
        raise KeyboardInterrupt
    assert snapshot(tmp_path).keys() == {"dataset.json"}


def test_a_writer_may_have_a_name_of_its_own(tmp_path: Path):
    writer = PartWriter(LocalStorage(tmp_path), "", SPECS.values(), "part-x")
    writer.append({name: np.zeros((10, *spec.row_shape), spec.dtype) for name, spec in SPECS.items()})
    writer.commit({})
    assert part_folders(tmp_path) == {"part-x.zarr"}
    assert open_part(LocalStorage(tmp_path), "", "part-x", SPECS.values(), [], verify=True).num_rows == CHUNK_TOKENS


def test_states_of_another_shape_are_refused_and_leave_what_was_committed(folder: Path):
    writer = open_writer(folder)
    with pytest.raises(ValueError, match="hidden: expected rows"):
        append(writer, **make_sequence("c", 10, K, H + 1))
    assert len(part_folders(folder)) == 1
    append(writer, **make_sequence("d", 10, K, H))
    writer.commit()
    assert ids(Cache.open(folder)) == {"a", "b", "d"}


# Interruptions


@pytest.mark.parametrize(
    ("place", "count", "whole"),
    [
        pytest.param("parts", 1, False, id="the-part-was-published"),
        pytest.param("index", 1, False, id="its-index-was-written"),
        pytest.param("commits", 1, False, id="its-commit-record-was-written-aside"),
        pytest.param("commits", 2, True, id="its-commit-record-was-written"),
    ],
)
def test_an_interrupted_commit_leaves_the_part_whole_or_nothing(
    place: str, count: int, whole: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """The interruption comes just after a folder is made durable."""
    fsync_folder, seen = storage_module.fsync_folder, Counter[Path]()

    def interrupt(path: Path) -> None:
        fsync_folder(path)
        seen[path] += 1
        if path == folder / place and seen[path] == count:
            raise KeyboardInterrupt

    sequence = make_sequence("c", 70, K, H)
    writer = open_writer(folder)
    append(writer, **sequence)
    with monkeypatch.context() as patch:
        patch.setattr("vpd.data.cache.storage.local.fsync_folder", interrupt)
        patch.setattr("vpd.data.cache.storage.files.fsync_folder", interrupt)
        with pytest.raises(KeyboardInterrupt):
            writer.commit()
    for cache in (Cache.open(folder), Cache.create_or_open(folder, make_manifest())):
        assert ids(cache) == {"a", "b"} | ({"c"} if whole else set())
        found = {row.seq_id: cache.read(row).hidden_TKH for row in cache.rows}
        assert "c" not in found or same_bits(found["c"], sequence["hidden_TKH"])
    assert part_folders(folder) == {f"{name}.zarr" for name in Cache.open(folder).parts}
    assert not list(folder.rglob("writer.lock"))


# What no commit lists


def test_a_part_without_commit_record_is_invisible_and_then_removed(crashed: Path, tmp_path: Path):
    folder = shutil.copytree(crashed, tmp_path / "cache")
    (kept,) = Cache.open(folder).parts
    assert ids(Cache.open(folder)) == {"a", "b"}
    (lost,) = part_folders(folder) - {f"{kept}.zarr"}  # readers remove nothing
    assert (folder / "parts" / lost / "hidden/c/0/0/0").exists()
    cache = Cache.create_or_open(folder, make_manifest())
    assert ids(cache) == {"a", "b"}
    assert part_folders(folder) == {f"{kept}.zarr"}


def test_after_opening_for_writing_every_file_is_listed(crashed: Path, tmp_path: Path):
    folder = shutil.copytree(crashed, tmp_path / "cache")
    (part,) = Cache.open(folder).parts
    left = shutil.copytree(folder / "parts" / f"{part}.zarr", folder / "parts/.writing-part-0123-4567")
    for path in (*left.rglob("*"), left):
        os.utime(path, (0, 0))  # else its writer may be about to lock it
    cache = Cache.create_or_open(folder, make_manifest())
    listed = {path for record in cache.commits().values() for path in record["files"]}
    listed |= {f"commits/{name}.json" for name in cache.parts} | {"dataset.json"}
    listed |= {f"index/{path.name}" for path in (folder / "index").glob("all-*")}
    assert snapshot(folder).keys() == listed
    assert len(listed) == 5 + 2 * len(SPECS)


def test_the_part_of_a_living_writer_of_this_process_is_kept(folder: Path):
    writer = open_writer(folder)
    append(writer, **make_sequence("d", 10, K, H))
    before = part_folders(folder)
    assert len(Cache.create_or_open(folder, make_manifest())) == 2
    assert part_folders(folder) == before
    sequence = make_sequence("e", 20, K, H)
    append(writer, **sequence)
    writer.commit()
    cache = Cache.open(folder)
    assert ids(cache) == {"a", "b", "d", "e"}
    (row,) = (row for row in cache.rows if row.seq_id == "e")
    assert same_bits(cache.read(row).hidden_TKH, sequence["hidden_TKH"])


def test_the_part_of_another_process_is_kept_while_it_lives(folder: Path):
    committed = part_folders(folder)
    with writing_child(folder) as child:
        (unfinished,) = part_folders(folder) - committed
        Cache.create_or_open(folder, make_manifest())
        assert part_folders(folder) == committed | {unfinished}
        child.kill()
        child.wait()
        assert len(Cache.create_or_open(folder, make_manifest())) == 2
        assert part_folders(folder) == committed


def test_a_part_that_is_committed_during_the_clean_up_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The part's writer commits, and releases the lock, between the two checks of the clean-up."""
    published, may_commit = threading.Event(), threading.Event()
    create = LocalStorage.create

    def wait_then_create(storage: LocalStorage, name: str, content: bytes) -> None:
        published.set()
        assert may_commit.wait(timeout=30)
        create(storage, name, content)

    writer = open_writer(folder)
    append(writer, **make_sequence("c", 10, K, H))
    monkeypatch.setattr(LocalStorage, "create", wait_then_create)
    committing = threading.Thread(target=writer.commit)
    committing.start()
    assert published.wait(timeout=30)

    def commit_then_look(path: Path) -> bool:
        may_commit.set()
        committing.join()
        return is_alive(path)

    monkeypatch.setattr("vpd.data.cache.storage.local.is_alive", commit_then_look)
    assert remove_uncommitted(LocalStorage(folder)) == 0
    assert ids(Cache.open(folder)) == {"a", "b", "c"}
