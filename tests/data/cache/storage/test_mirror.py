"""Copies of a remote cache's parts: each file is fetched once, and unused parts make room for others."""

import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support.servers import RangeServer
from support.tiny import Damage, fill_cache, make_sequence, same_bits
from vpd.data.cache.arrays import empty_drafts
from vpd.data.cache.cache import Cache
from vpd.data.cache.drafts import FirstDrafts
from vpd.data.cache.index import SequenceRow
from vpd.data.cache.reader import Request, read_ahead
from vpd.data.cache.storage import mirror as mirror_module
from vpd.data.cache.storage.local import LocalStorage
from vpd.data.cache.storage.mirror import MirroredStorage
from vpd.data.cache.storage.places import open_storage
from vpd.data.errors import CacheCorruptError

K, H = 2, 256
NUM_PARTS = 4
SEQUENCES = [make_sequence(f"s{i}", 70 + i, K, H) for i in range(NUM_PARTS)]
FINGERPRINT = "abcd0001"
LARGE = 1 << 30


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a part for each sequence, and with first drafts."""
    folder = tmp_path_factory.mktemp("original") / "cache"
    fill_cache(folder, SEQUENCES, 1, hidden_size=H)
    cache = Cache.open(folder)
    drafts = FirstDrafts.create_or_open(cache, FINGERPRINT, {"block_size": 4, "stride": 1})
    for part in drafts.missing_parts():
        writer = drafts.writer(part)
        for row in cache.rows_of_part(part):
            writer.append(empty_drafts(row.num_tokens, drafts.specs))
        writer.commit({})
    return folder


@pytest.fixture
def server(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    with RangeServer(original) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    return tmp_path / "mirror"


def open_mirrored(server: RangeServer, mirror: Path, max_bytes: int = LARGE) -> Cache:
    return Cache.open(MirroredStorage(open_storage(server.place), mirror, max_bytes))


def test_the_folder_is_not_measured_for_every_file(
    original: Path, server: RangeServer, mirror: Path, monkeypatch: pytest.MonkeyPatch
):
    looks = note_looks(monkeypatch)
    check_read(open_mirrored(server, mirror), original)
    assert len(looks) == 1  # at the first file
    assert len(local_parts(mirror)) == NUM_PARTS


def note_looks(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Records every search of a folder for parts of states."""
    looks: list[Path] = []
    glob = Path.glob

    def noted(folder: Path, pattern: str) -> Iterator[Path]:
        looks.extend([folder] if pattern == mirror_module.PLACES[0] else [])
        return iter([*glob(folder, pattern)])

    monkeypatch.setattr(Path, "glob", noted)
    return looks


def check_read(cache: Cache, original: Path, num_threads: int = 2) -> None:
    """Checks that a cache gives what the original gives."""
    direct = Cache.open(original)
    assert list(cache.rows) == list(direct.rows)
    with closing(read_ahead(cache.states, map(Request, cache.rows), num_threads)) as sequences:
        for sequence in sequences:
            expected = direct.read(sequence.row)
            assert same_bits(sequence.hidden_TKH, expected.hidden_TKH)
            assert same_bits(sequence.token_ids_S, expected.token_ids_S)


def local_parts(mirror: Path) -> set[str]:
    return {path.name.removesuffix(".zarr") for path in mirror.glob("*/parts/*")}


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def part_bytes(original: Path) -> int:
    """Size of the largest part."""
    return max(size_of(path) for path in (original / "parts").iterdir())


# What is fetched


def test_each_file_of_a_part_is_fetched_once(server: RangeServer, original: Path, mirror: Path):
    cache = open_mirrored(server, mirror)
    for _ in range(2):
        check_read(cache, original)
        drafts = FirstDrafts.open(cache)
        for row in cache.rows:
            drafts.read(row)
    fetched = Counter(request.key for request in server.take_requests() if request.method == "GET")
    files = {path.relative_to(original).as_posix() for path in original.rglob("*.zarr/**/*") if path.is_file()}
    assert {key for key in fetched if "parts/" in key} - {"parts/", f"drafts/{FINGERPRINT}/parts/"} == files
    assert all(fetched[file] == 1 for file in files)
    check_read(open_mirrored(server, mirror), original)
    assert not [request for request in server.take_requests() if ".zarr/" in request.key]


def test_threads_that_want_one_file_fetch_it_once(server: RangeServer, mirror: Path):
    server.latency_s = 0.02
    cache = open_mirrored(server, mirror)
    file = f"parts/{cache.parts[0]}.zarr/hidden/c/0/0/0"
    threads = [threading.Thread(target=cache.storage.read, args=(file,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(request.key == file and request.method == "GET" for request in server.take_requests()) == 1


def test_large_files_are_fetched_in_blocks(tmp_path: Path, mirror: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vpd.data.cache.target_files.BLOCK_BYTES", 1000)
    content = os.urandom(12345)
    remote = LocalStorage(tmp_path / "remote")
    remote.write("parts/p.zarr/hidden/c/0", content)
    storage = MirroredStorage(remote, mirror, LARGE)
    assert storage.read("parts/p.zarr/hidden/c/0") == content
    assert storage.open("parts/p.zarr/hidden/c/0").tail(10) == (12345, content[-10:])


def test_what_is_written_through_a_mirror_replaces_its_copies(tmp_path: Path, mirror: Path):
    storage = MirroredStorage(LocalStorage(tmp_path / "remote"), mirror, LARGE)
    for content in (b"one", b"other"):
        storage.write("parts/p.zarr/a", content)
        assert storage.read("parts/p.zarr/a") == content
    storage.remove("parts")
    writer = storage.write_folder("parts/p.zarr")
    writer.write("a", b"third")
    writer.publish()
    writer.release()
    assert storage.read("parts/p.zarr/a") == b"third"


# What makes room


def test_the_parts_not_used_for_longest_make_room(server: RangeServer, original: Path, mirror: Path):
    limit = 2 * part_bytes(original) + part_bytes(original) // 2
    used: list[str] = []
    for index in (0, 1, 0, 2, 3, 3, 0, 1):
        cache = open_mirrored(server, mirror, limit)
        row = cache.rows[index]
        cache.read(row)
        used = [part for part in used if part != row.part] + [row.part]
        assert size_of(mirror) <= limit
        assert local_parts(mirror) == set(used[-2:])
    fetched = Counter(
        request.key for request in server.take_requests() if request.method == "GET" and "/hidden/c/" in request.key
    )
    counts = {key.split("/")[1].removesuffix(".zarr"): count for key, count in fetched.items()}
    assert [counts[row.part] for row in Cache.open(original).rows] == [2, 2, 1, 1]


def test_all_caches_in_a_folder_share_its_limit(tmp_path: Path, mirror: Path):
    for name in ("one", "other"):
        LocalStorage(tmp_path / name).write("parts/p.zarr/a", name.encode() * 100)
    for name in ("one", "other", "one"):
        storage = MirroredStorage(LocalStorage(tmp_path / name), mirror, 600)
        assert storage.read("parts/p.zarr/a") == name.encode() * 100
        assert size_of(mirror) == 100 * len(name)


def test_mirrors_of_one_folder_keep_its_limit_and_rarely_measure_it(
    tmp_path: Path, mirror: Path, monkeypatch: pytest.MonkeyPatch
):
    remote, num_parts, size = LocalStorage(tmp_path / "remote"), 120, 100
    (tmp_path / "remote/parts").mkdir(parents=True)
    for i in range(num_parts):
        (tmp_path / f"remote/parts/p{i}.zarr").mkdir()
        (tmp_path / f"remote/parts/p{i}.zarr/a").write_bytes(bytes(size))
    monkeypatch.setattr(mirror_module, "SLICES", 4)
    limit, a_slice = 40 * size, 10 * size
    looks = note_looks(monkeypatch)
    mirrors = [MirroredStorage(remote, mirror, limit) for _ in range(2)]
    largest = 0
    for i in range(num_parts):
        mirrors[i % 2].read(f"parts/p{i}.zarr/a")
        largest = max(largest, size_of(mirror))
        assert largest <= limit + 2 * a_slice
    assert largest > limit - 2 * a_slice
    # Each process measures the folder at its first file, and again after a slice at most when the limit is near.
    assert len(looks) <= 2 + 2 * num_parts * size / a_slice


def test_a_part_beyond_the_limit_is_read_all_the_same(server: RangeServer, original: Path, mirror: Path):
    check_read(open_mirrored(server, mirror, 1), original)
    assert len(local_parts(mirror)) <= 2  # one for each thread


def test_who_has_a_file_open_reads_on_when_it_is_removed(server: RangeServer, original: Path, mirror: Path):
    cache = open_mirrored(server, mirror)
    check_read(cache, original)
    shutil.rmtree(mirror)
    server.take_requests()
    check_read(cache, original)
    assert server.take_requests() == []
    check_read(open_mirrored(server, mirror), original)


def test_a_file_that_is_removed_again_and_again_is_read_directly(
    tmp_path: Path, mirror: Path, monkeypatch: pytest.MonkeyPatch
):
    """Removes every copy at once, as another process may that needs all the room."""
    remote = LocalStorage(tmp_path / "remote")
    remote.write("parts/p.zarr/a", b"content")
    storage = MirroredStorage(remote, mirror, 10)
    fetched: list[str] = []

    def download(remote: LocalStorage, name: str, path: Path, size: int) -> None:
        fetched.append(name)

    monkeypatch.setattr("vpd.data.cache.storage.mirror.download", download)
    assert storage.read("parts/p.zarr/a") == b"content"
    assert storage.open("parts/p.zarr/a").tail(3) == (7, b"ent")
    assert set(fetched) == {"parts/p.zarr/a"}
    with pytest.raises(FileNotFoundError, match=r"remote/parts/p\.zarr/b"):
        storage.read("parts/p.zarr/b")


READER = """
import hashlib
import sys
from pathlib import Path
from vpd.data.cache.storage.mirror import MirroredStorage
from vpd.data.cache.storage.places import open_storage
place, mirror, max_bytes = sys.argv[1:]
remote = open_storage(place)
storage = MirroredStorage(remote, Path(mirror), int(max_bytes))
files = {name: remote.read(name) for name in remote.walk("parts")}
print("ready", flush=True)
for _ in range(10):
    for name, content in files.items():
        assert storage.read(name) == content
        assert storage.open(name).tail(4) == (len(content), content[-4:])
print(len(files))
"""


def test_processes_share_a_folder(server: RangeServer, original: Path, mirror: Path):
    """Each process removes the parts of the other to make room for its own."""
    limit = part_bytes(original)
    command = [sys.executable, "-c", READER, server.place, str(mirror), str(limit)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        while child.poll() is None:
            check_read(open_mirrored(server, mirror, limit), original)
        output = child.communicate()
    files = [path for path in (original / "parts").rglob("*") if path.is_file()]
    assert (child.returncode, *output) == (0, f"{len(files)}\n", "")
    assert not list(mirror.rglob("*.tmp"))


# Damage


def copy_of(mirror: Path, row: SequenceRow, array: str) -> Path:
    (path,) = mirror.glob(f"*/parts/{row.part}.zarr/{array}")
    return path


@pytest.mark.parametrize("array", ["hidden/c/0/0/0", "token_ids/c/0", "zarr.json"])
@pytest.mark.parametrize("damage", [Damage("flipped", 0.4), Damage("cut", 0.3, cut=True)], ids=lambda damage: damage.id)
def test_a_damaged_copy_is_an_error_that_names_it(
    damage: Damage, array: str, server: RangeServer, original: Path, mirror: Path
):
    check_read(open_mirrored(server, mirror), original)
    row = Cache.open(original).rows[0]
    path = copy_of(mirror, row, array)
    damage.apply(path)
    cache = open_mirrored(server, mirror)
    with pytest.raises(CacheCorruptError) as caught:
        cache.read(row)
    assert f"the local copy (remove it first: the next run fetches it again) {path}" in str(caught.value)
    path.unlink()
    check_read(open_mirrored(server, mirror), original)


def test_a_file_that_the_bucket_lost_is_an_error(server: RangeServer, original: Path, mirror: Path, tmp_path: Path):
    server.folder = shutil.copytree(original, tmp_path / "bucket")
    row = Cache.open(original).rows[0]
    (server.folder / f"parts/{row.part}.zarr/token_ids/c/0").unlink()
    cache = open_mirrored(server, mirror)
    with pytest.raises(CacheCorruptError, match=rf"s3://bucket/parts/{row.part}\.zarr/token_ids/c/0 is missing"):
        cache.read(row)
    assert not list(mirror.rglob("*.tmp"))
