"""Caches in buckets: the contract of every storage, caches written to and read from a local S3, and what they cost."""

# T tokens, K layers, H hidden width
import json
import shutil
import threading
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from servers import RangeServer, S3Server
from tiny import (
    DRAFTER,
    EXTRACT,
    TRAIN,
    Damage,
    fill_cache,
    make_manifest,
    make_sequence,
    run_vpd,
    same_bits,
    snapshot,
    vpd,
)
from vpd.data.cache import object_storage
from vpd.data.cache.drafts import NOT_DRAFTED, FirstDrafts, empty_drafts
from vpd.data.cache.mirror import MirroredStorage
from vpd.data.cache.object_storage import ObjectStorage
from vpd.data.cache.part import PartWriter
from vpd.data.cache.reader import Request, read_ahead
from vpd.data.cache.repair import repair
from vpd.data.cache.shard import ArraySpec
from vpd.data.cache.storage import LocalStorage, Storage, open_storage
from vpd.data.cache.store import CHUNK_TOKENS, Cache
from vpd.data.cache.target_files import store_target_files, target_folder
from vpd.data.cache.verify import verify
from vpd.data.cache.writer import StateWriter
from vpd.data.errors import CacheCorruptError, CacheNotFoundError, ConfigError, StorageError

K, H = 2, 8
CHUNK_BYTES = CHUNK_TOKENS * K * H * 2 + 4
LENGTHS = [40, 70, 64, 1, 130]
SEQUENCES = [make_sequence(f"s{i}", length, K, H) for i, length in enumerate(LENGTHS)]
PART_BYTES = 3 * CHUNK_BYTES
PARTS_MADE = 2
"""The sequences have one chunk, two, one, one and three: s0 and s1 fill a part, and the others the next one."""
FACTS: dict[str, Any] = {"block_size": 4, "stride": 1}
FINGERPRINT = "abcd0001"


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    """A local S3 that this module's storages talk to, unless a test says otherwise."""
    with S3Server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def place(s3: S3Server) -> str:
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
def server(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    """A server of a copy of `original`, in the bucket's folder `cache`."""
    shutil.copytree(original, tmp_path / "bucket/cache")
    with RangeServer(tmp_path / "bucket", page_size=2) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture(autouse=True)
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    return tmp_path / "user-cache/vpd"


def write_drafts(cache: Cache, seed: int) -> None:
    """Random first drafts of every part."""
    rng = np.random.default_rng(seed)
    drafts = FirstDrafts.create_or_open(cache, FINGERPRINT, FACTS)
    for part in drafts.missing_parts():
        writer = drafts.writer(part)
        for row in cache.rows_of_part(part):
            writer.append(random_drafts(rng, row.num_tokens, drafts))
        writer.commit({})


def random_drafts(rng: np.random.Generator, num_tokens: int, drafts: FirstDrafts) -> dict[str, np.ndarray]:
    arrays = empty_drafts(num_tokens, drafts.specs)
    arrays["accept_len"][:] = rng.integers(drafts.block_size, size=num_tokens)
    arrays["tokens"][:] = rng.integers(50, size=arrays["tokens"].shape)
    return arrays


def write_cache(
    place: str | Path, sequences: list[dict[str, Any]], part_bytes: int = PART_BYTES, **changes: Any
) -> None:
    writer = StateWriter(Cache.create_or_open(place, make_manifest(**changes)), part_bytes, {})
    for sequence in sequences:
        writer.append(**sequence)
    writer.finish()


def check_sequences(cache: Cache, sequences: list[dict[str, Any]]) -> None:
    """Checks that a cache without loss holds these sequences and no others."""
    rows = sorted(cache.rows, key=lambda row: row.seq_id)
    assert [row.seq_id for row in rows] == sorted(sequence["seq_id"] for sequence in sequences)
    expected = {sequence["seq_id"]: sequence for sequence in sequences}
    with closing(read_ahead(cache, map(Request, rows))) as found:
        for read in found:
            written = expected[read.row.seq_id]
            assert same_bits(read.hidden_TKH, written["hidden_TKH"])
            assert read.token_ids_S.tolist() == [*written["token_ids"], written["final_token_id"]]
            assert read.target_argmax_T.tolist() == written["target_argmax"]


def objects(place: str) -> dict[str, bytes]:
    storage = open_storage(place)
    return {name: storage.read(name) for name in storage.walk("")}


# The contract of every storage


@pytest.fixture(params=["folder", "bucket", "mirror"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return LocalStorage(tmp_path / "cache")
    remote = ObjectStorage(request.getfixturevalue("place"))
    return remote if request.param == "bucket" else MirroredStorage(remote, tmp_path / "mirror", 1 << 20)


@pytest.fixture
def a_day_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a day had passed since anything was written to a bucket."""
    monkeypatch.setattr(object_storage, "SECONDS_UNTIL_ABANDONED", -1)


NAMES = ["record.json", "parts/p.zarr/hidden/c/0"]
NAME = pytest.mark.parametrize("name", NAMES, ids=["record", "part"])


def read_ranges(storage: Storage, name: str, offset: int, *lengths: int) -> tuple[int, list[bytes]]:
    buffers = [bytearray(length) for length in lengths]
    found = storage.open(name).read_into([memoryview(buffer) for buffer in buffers], offset)
    return found, [bytes(buffer) for buffer in buffers]


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
    for _ in range(2):  # in a place where nothing is, and in one where something else is
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
    """The list is asked for when it is known who is dead, not before."""
    write_part(storage, "parts/p.zarr")

    def listed() -> set[str]:
        return {"p.zarr"} if storage.exists("commits/p.json") else set()

    storage.write("commits/p.json", b"{}")
    assert storage.remove_leftovers("parts", listed) == 0
    assert storage.exists("parts/p.zarr/zarr.json")


# Places


def test_places_with_file_are_folders(tmp_path: Path):
    folder = tmp_path / "with space"
    write_cache(folder.as_uri(), SEQUENCES)
    assert "%20" in folder.as_uri()
    check_sequences(Cache.open(folder), SEQUENCES)
    check_sequences(Cache.open(f"file://localhost{folder.as_uri().removeprefix('file://')}"), SEQUENCES)
    assert Cache.open(folder.as_uri()).place == str(folder)


@pytest.mark.parametrize("wrong", ["http://host/cache", "s3a://bucket/cache", "file://data/cache"])
def test_other_places_are_refused(wrong: str):
    with pytest.raises(ConfigError, match=wrong):
        open_storage(wrong)


def test_a_place_that_makes_no_sense_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(StorageError, match=r"az://container/cache can't be opened: .*Account must be specified$"):
        open_storage("az://container/cache")
    with pytest.raises(StorageError, match="s3:// can't be opened"):
        open_storage("s3://")


def google(server: RangeServer) -> dict[str, str]:
    account = {"gcs_base_url": server.url, "disable_oauth": True}
    account |= {"client_email": "", "private_key": "", "private_key_id": ""}
    return {"GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(account), "GOOGLE_ALLOW_HTTP": "true"}


def azure(server: RangeServer) -> dict[str, str]:
    account = {"AZURE_STORAGE_ACCOUNT_NAME": "account", "AZURE_STORAGE_ACCOUNT_KEY": "dGVzdA=="}
    return account | {"AZURE_ENDPOINT": server.url, "AZURE_ALLOW_HTTP": "true"}


@pytest.mark.parametrize(("scheme", "account"), [("s3", None), ("gs", google), ("az", azure)], ids=["s3", "gs", "az"])
def test_every_kind_of_bucket_is_read(
    scheme: str, account: Callable[[RangeServer], dict[str, str]] | None, server: RangeServer, monkeypatch
):
    for name, value in (account(server) if account is not None else {}).items():
        monkeypatch.setenv(name, value)
    storage = open_storage(f"{scheme}://bucket/cache")
    (server.folder / "cache/file").write_bytes(b"0123456789")
    assert (storage.read("file"), storage.size("file")) == (b"0123456789", 10)
    assert read_ranges(storage, "file", 8, 1, 4) == (2, [b"8", b"9\0\0\0"])
    assert read_ranges(storage, "file", 10, 4) == (0, [b"\0" * 4])
    # A store that does not count from the end is asked for the size first.
    assert (storage.open("file").tail(4), storage.open("file").tail(99)) == ((10, b"6789"), (10, b"0123456789"))
    with pytest.raises(FileNotFoundError):
        storage.read("missing")
    if scheme != "az":  # whose listings the server does not speak
        check_sequences(Cache.open(storage), SEQUENCES)


# Caches


class Uuids:
    """Stands in for the module `uuid`, with the same ids every time."""

    def __init__(self) -> None:
        self.count = 0

    def uuid4(self) -> uuid.UUID:
        self.count += 1
        return uuid.UUID(int=self.count << 80)


@pytest.mark.parametrize("codec", ["raw", "lossless", "round4", "round3", "fp8", "int4"])
def test_a_cache_in_a_bucket_holds_the_bytes_of_a_local_one(
    codec: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "local"
    for where in (folder, place):
        monkeypatch.setattr("vpd.data.cache.part.uuid", Uuids())
        write_cache(where, SEQUENCES, part_bytes=CHUNK_BYTES, codec=codec)
    assert len(Cache.open(folder).parts) > 1
    found = objects(place)
    assert found.keys() == snapshot(folder).keys()
    assert all((folder / name).read_bytes() == content for name, content in found.items())
    local, remote = Cache.open(folder), Cache.open(place)
    assert list(remote.rows) == list(local.rows)
    assert (remote.fingerprint, remote.num_bytes) == (local.fingerprint, local.num_bytes)
    with closing(read_ahead(remote, map(Request, remote.rows))) as sequences:
        for sequence in sequences:
            expected = local.read(sequence.row)
            assert same_bits(sequence.hidden_TKH, expected.hidden_TKH)
            assert same_bits(sequence.token_ids_S, expected.token_ids_S)
            assert same_bits(sequence.loss_mask_S, expected.loss_mask_S)
            assert same_bits(sequence.target_argmax_T, expected.target_argmax_T)


def test_a_cache_in_a_bucket_is_continued(place: str):
    write_cache(place, SEQUENCES[:2])
    write_cache(place, SEQUENCES[2:])
    check_sequences(Cache.open(place), SEQUENCES)


def test_two_writers_at_once(place: str):
    shared = make_sequence("shared", 30, K, H)
    halves = [[*SEQUENCES[:3], shared], [*SEQUENCES[3:], shared]]
    failed: list[BaseException] = []
    ready = threading.Barrier(2)

    def write(sequences: list[dict[str, Any]]) -> None:
        try:
            ready.wait()
            write_cache(place, sequences, part_bytes=1)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(half,)) for half in halves]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    cache = Cache.open(place)
    assert (len(cache.all_rows), len(cache.parts)) == (7, 7)
    check_sequences(cache, [*SEQUENCES, shared])


def test_a_commit_record_is_written_once(place: str):
    storage = open_storage(place)
    spec = ArraySpec("token_ids", (), "int32", CHUNK_TOKENS)
    writers = [PartWriter(storage, "", [spec], name="part-x") for _ in range(2)]
    for writer in writers:
        writer.append({"token_ids": np.zeros(3, np.int32)})
    writers[0].commit({"note": "first"})
    with pytest.raises(FileExistsError, match=r"commits/part-x\.json exists"):
        writers[1].commit({"note": "second"})
    record = json.loads(storage.read("commits/part-x.json"))
    assert record["note"] == "first"
    assert {name: storage.size(name) for name in record["files"]} == {
        name: described["bytes"] for name, described in record["files"].items()
    }


def test_a_part_that_is_abandoned_leaves_nothing(place: str):
    writer = StateWriter(Cache.create_or_open(place, make_manifest()), PART_BYTES, {})
    writer.append(**SEQUENCES[0])
    writer.abandon()
    assert objects(place).keys() == {"dataset.json"}


def test_a_part_without_commit_record_is_invisible_and_removed_after_a_day(place: str, monkeypatch: pytest.MonkeyPatch):
    write_cache(place, SEQUENCES[:2])
    (kept,) = Cache.open(place).parts
    storage = open_storage(place)
    for file in storage.walk(f"parts/{kept}.zarr"):
        storage.write(file.replace(kept, "part-dead"), b"")
    storage.write("index/part-dead.parquet", b"")
    check_sequences(Cache.open(place), SEQUENCES[:2])
    Cache.create_or_open(place, make_manifest())
    assert storage.list_folder("parts") == sorted(["part-dead.zarr", f"{kept}.zarr"])
    monkeypatch.setattr(object_storage, "SECONDS_UNTIL_ABANDONED", -1)
    Cache.create_or_open(place, make_manifest())
    assert storage.list_folder("parts") == [f"{kept}.zarr"]
    assert not storage.exists("index/part-dead.parquet")
    check_sequences(Cache.open(place), SEQUENCES[:2])


def test_a_shard_larger_than_the_upload_buffer_goes_up_in_pieces(
    place: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(object_storage, "UPLOAD_BYTES", 5 << 20)  # S3 takes no smaller pieces but for the last
    sequences = [make_sequence(name, 1500, K, 1024) for name in ("a", "b")]
    write_cache(place, sequences, part_bytes=1 << 30, hidden_size=1024)
    cache = Cache.open(place)
    (part,) = cache.parts
    key = f"{place.removeprefix('s3://')}/parts/{part}.zarr/hidden/c/0/0/0"
    with urllib.request.urlopen(urllib.request.Request(f"{s3.url}/{key}", method="HEAD")) as answer:
        assert answer.headers["ETag"].endswith('-3"')
        assert int(answer.headers["Content-Length"]) > 12 << 20
    check_sequences(cache, sequences)


def test_a_damaged_cache_in_a_bucket_is_mended(place: str):
    write_cache(place, SEQUENCES)
    storage, cache = open_storage(place), Cache.open(place)
    (row,) = (row for row in cache.rows if row.seq_id == "s2")
    name = f"parts/{row.part}.zarr/hidden/c/0/0/0"
    content = bytearray(storage.read(name))
    content[row.hidden_offset + 100] ^= 1
    storage.write(name, bytes(content))
    found = verify(storage)
    assert {seq_id for problem in found.problems for seq_id in problem.sequences} == {"s2"}
    report = repair(storage, found)
    assert (report.parts, report.num_kept, report.lost) == ([row.part], 2, ["s2"])
    check_sequences(Cache.open(place), [sequence for sequence in SEQUENCES if sequence["seq_id"] != "s2"])
    write_cache(place, [SEQUENCES[2]])
    check_sequences(Cache.open(place), SEQUENCES)


# First drafts and target files


def test_first_drafts_in_a_bucket(place: str):
    write_cache(place, SEQUENCES)
    cache = Cache.open(place)
    write_drafts(cache, seed=0)
    found = FirstDrafts.open(cache)
    assert (found.fingerprint, found.facts, found.missing_parts()) == (FINGERPRINT, FACTS, [])
    rng = np.random.default_rng(0)
    for part in cache.parts:
        for row in cache.rows_of_part(part):
            expected = random_drafts(rng, row.num_tokens, found)
            read = found.read(row)
            assert same_bits(read.accept_len_T, torch.from_numpy(expected["accept_len"]))
            assert same_bits(read.tokens_TGA, torch.from_numpy(expected["tokens"]))
            assert same_bits(read.probs_TGA, torch.from_numpy(expected["probs"]))
            assert (found.accept_lengths(row) != NOT_DRAFTED).all()


@pytest.mark.parametrize(
    "ending",
    [
        pytest.param(PartWriter.commit, id="both-commit"),
        pytest.param(lambda writer, facts: writer.abandon(), id="one-gives-up"),
    ],
)
def test_two_that_draft_at_once_do_each_other_no_harm(ending: Callable[..., object], place: str):
    write_cache(place, SEQUENCES[:1])
    cache = Cache.open(place)
    (row,) = cache.rows
    drafts = [FirstDrafts.create_or_open(cache, FINGERPRINT, FACTS) for _ in range(2)]
    arrays = [random_drafts(np.random.default_rng(seed), row.num_tokens, drafts[0]) for seed in range(2)]
    first, second = (found.writer(row.part) for found in drafts)
    for writer, rows in zip((first, second), arrays, strict=True):
        writer.append(rows)
    first.commit({})
    with suppress(FileExistsError):
        ending(second, {})
    read = FirstDrafts.open(cache).read(row)
    assert any(
        same_bits(read.accept_len_T, torch.from_numpy(rows["accept_len"]))
        and same_bits(read.tokens_TGA, torch.from_numpy(rows["tokens"]))
        for rows in arrays
    )


def test_target_files_are_stored_in_a_bucket(place: str, tmp_path: Path, user_cache: Path):
    pieces = tmp_path / "pieces"
    (pieces / "more").mkdir(parents=True)
    (pieces / "config.json").write_text("{}")
    (pieces / "more/empty").write_bytes(b"")
    storage = open_storage(place)
    for content in (b"before", b"after" * 1000):
        (pieces / "pieces.safetensors").write_bytes(content)
        store_target_files(storage, pieces)
        found = target_folder(storage)
        assert snapshot(found) == snapshot(pieces)
        assert found.is_relative_to(user_cache)


def test_target_files_are_fetched_once_and_verified(server: RangeServer, user_cache: Path, original: Path):
    storage = open_storage(f"{server.place}/cache")
    found = target_folder(storage)
    assert snapshot(found) == snapshot(original / "target")
    assert len(server.take_requests()) == 3  # the record, and each of two files
    assert target_folder(storage) == found
    assert [request.key for request in server.take_requests()] == ["cache/target.json"]
    (found / "more/pieces.safetensors").write_bytes(b"damaged")
    assert snapshot(target_folder(storage)) == snapshot(original / "target")
    assert len(server.take_requests()) == 2
    assert not list(user_cache.rglob("*.tmp"))


@pytest.mark.parametrize("damage", [Damage("flipped", 0.5), Damage("cut", 0.5, cut=True), Damage("missing", None)])
def test_damaged_target_files_are_an_error(damage: Damage, server: RangeServer, user_cache: Path):
    damage.apply(server.folder / "cache/target/more/pieces.safetensors")
    with pytest.raises(CacheCorruptError, match=r"s3://bucket/cache/target/more/pieces\.safetensors"):
        target_folder(open_storage(f"{server.place}/cache"))
    assert not list(user_cache.rglob("*.tmp"))


# Damage, and stores that fail


@pytest.mark.parametrize(
    "damage",
    [
        Damage("flipped", 0.4),
        Damage("cut", 0.2, cut=True),
        Damage("emptied", 0.0, cut=True),
        Damage("missing", None),
    ],
    ids=lambda damage: damage.id,
)
@pytest.mark.parametrize("array", ["hidden/c/0/0/0", "token_ids/c/0", "hidden/zarr.json"])
def test_a_damaged_object_is_an_error_that_names_it(array: str, damage: Damage, server: RangeServer):
    cache = Cache.open(f"{server.place}/cache")
    row = cache.rows[0]
    name = f"cache/parts/{row.part}.zarr/{array}"
    damage.apply(server.folder / name)
    sequences = read_ahead(cache, map(Request, cache.rows_of_part(row.part)))
    with closing(sequences), pytest.raises(CacheCorruptError) as caught:
        list(sequences)
    assert f"s3://bucket/{name}" in str(caught.value)


def test_a_shard_that_is_cut_after_it_was_opened_is_an_error(server: RangeServer):
    cache = Cache.open(f"{server.place}/cache")
    row = cache.rows[0]
    cache.read(row)
    Damage("emptied", 0.0, cut=True).apply(server.folder / f"cache/parts/{row.part}.zarr/hidden/c/0/0/0")
    with pytest.raises(CacheCorruptError, match=r"expected \d+ bytes at offset 0, found 0"):
        cache.read(row)


@pytest.mark.parametrize("lost", ["commits", "parts"])
def test_what_the_snapshot_lists_and_the_bucket_lost_is_an_error(lost: str, server: RangeServer):
    shutil.rmtree(server.folder / "cache" / lost)
    with pytest.raises(CacheCorruptError, match=f"s3://bucket/cache: the .* of {PARTS_MADE} committed parts is gone"):
        Cache.open(f"{server.place}/cache")


def test_there_is_no_cache_where_nothing_is(place: str):
    with pytest.raises(CacheNotFoundError, match=f"expected a cache at {place}, found no dataset.json there"):
        Cache.open(place)


@pytest.mark.usefixtures("s3")
def test_a_missing_bucket_is_named(tmp_path: Path):
    storage = open_storage("s3://no-such-bucket/cache")
    for use in (
        lambda: storage.write("name", b""),
        lambda: storage.create("name", b""),
        lambda: storage.exists("name"),
        lambda: Cache.create_or_open(storage, make_manifest()),
    ):
        with pytest.raises(StorageError, match="expected a bucket at s3://no-such-bucket/cache, found none"):
            use()
    with pytest.raises(CacheNotFoundError, match="s3://no-such-bucket/cache"):
        Cache.open(storage)


def test_answers_that_fail_are_asked_for_again(server: RangeServer):
    cache = Cache.open(f"{server.place}/cache")
    server.num_failing = 2
    check_sequences(cache, SEQUENCES)
    assert server.num_failing == 0


def test_a_record_whose_answer_was_lost_is_created(server: RangeServer):
    storage = open_storage(f"{server.place}/cache")
    server.num_failing = 1
    storage.create("record", b"content")
    with pytest.raises(FileExistsError):
        storage.create("record", b"other")
    assert (server.folder / "cache/record").read_bytes() == b"content"


def test_a_commit_whose_answers_are_lost_loses_nothing(server: RangeServer):
    """Whether the commit record is there can't be known, so what it may list is kept."""
    storage = ObjectStorage(f"{server.place}/cache", max_retries=0)
    writer = PartWriter(storage, "", [ArraySpec("token_ids", (), "int32", CHUNK_TOKENS)], name="part-x")
    writer.append({"token_ids": np.zeros(3, np.int32)})
    create = storage.create

    def fail_from_here(name: str, content: bytes) -> None:
        server.num_failing = 1 << 30
        create(name, content)

    storage.create = fail_from_here
    with pytest.raises(StorageError):
        writer.commit({})
    server.num_failing = 0
    files = json.loads(storage.read("commits/part-x.json"))["files"]
    assert all(storage.size(name) == described["bytes"] for name, described in files.items())


IMPATIENT = {"max_retries": 2, "retry_timeout": timedelta(seconds=5)}


def test_a_store_that_is_down_is_an_error_after_the_retries(server: RangeServer):
    storage = ObjectStorage(f"{server.place}/cache", **IMPATIENT)
    cache = Cache.open(storage)
    writer = StateWriter(cache, PART_BYTES, {})
    writer.append(**make_sequence("more", 10, K, H))
    server.take_requests()
    server.num_failing = 1 << 30
    with pytest.raises(StorageError) as caught:
        cache.read(cache.rows[0])
    assert len(server.take_requests()) == 1 + 2
    message = str(caught.value)
    assert message.startswith("s3://bucket/cache/commits/part-")
    assert "500 Internal Server Error" in message
    assert "Check credentials, endpoint" in message
    assert "Debug source" not in message
    with pytest.raises(StorageError):
        writer.commit()
    # Of the other uploads, none is tried; then one listing asks what there is to remove.
    assert len(server.take_requests()) == 2 * (1 + 2)


def test_a_command_says_that_the_store_is_down(server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server.stop()
    monkeypatch.setattr(ObjectStorage.__init__, "__defaults__", tuple(IMPATIENT.values()))
    outcome = run_vpd("train", f"{server.place}/cache", "--out", tmp_path / "run")
    assert outcome.code == 1
    assert outcome.message.startswith("s3://bucket/cache/dataset.json: the store did not do what was asked: ")


# What reading costs

PER_CACHE = 5
"""The manifest, the snapshot, and the listings of index, commit records and parts."""
PER_PART = 11
"""The commit record, the chunk index of the states, three arrays of tokens; to verify it, its index and five records
of Zarr."""
PER_PART_UNVERIFIED = 5


@pytest.mark.parametrize(("verify", "per_part"), [(True, PER_PART), (False, PER_PART_UNVERIFIED)])
def test_a_sequence_is_one_request(verify: bool, per_part: int, server: RangeServer):
    server.page_size = 1000
    cache = Cache.open(f"{server.place}/cache")
    opened = server.take_requests()
    assert len(opened) == PER_CACHE
    assert not any(request.key.startswith(("cache/parts/p", "cache/commits/p")) for request in opened)
    rows = [*cache.rows, *cache.rows]
    with closing(read_ahead(cache, (Request(row, verify) for row in rows), num_threads=1)) as sequences:
        assert sum(1 for _ in sequences) == len(rows)
    requests = server.take_requests()
    ranges = [(request.key, request.range) for request in requests if "/hidden/c/" in request.key]
    footers = [key for key, wanted in ranges if wanted is not None and wanted.startswith("bytes=-")]
    assert len(footers) == len(cache.parts)
    hidden = [(key, wanted) for key, wanted in ranges if not str(wanted).startswith("bytes=-")]
    assert hidden == [
        (
            f"cache/parts/{row.part}.zarr/hidden/c/0/0/0",
            f"bytes={row.hidden_offset}-{row.hidden_offset + row.hidden_length - 1}",
        )
        for row in rows
    ]
    assert len(requests) == len(rows) + per_part * len(cache.parts)
    assert len(set(requests) - set(map(tuple, hidden))) == len(requests) - len(cache.rows)


def test_first_drafts_are_two_requests_a_sequence(server: RangeServer):
    cache = Cache.open(f"{server.place}/cache")
    drafts = FirstDrafts.open(cache)
    for row in cache.rows:
        drafts.accept_lengths(row)
    server.take_requests()
    for row in cache.rows:
        drafts.accept_lengths(row)
    assert server.take_requests() == []
    for row in cache.rows:
        drafts.read(row)
    assert len(server.take_requests()) == 2 * len(cache.rows)


# A whole run


def run_all(place: object, folder: Path, target: Path, prompts: Path, **read: Any) -> dict[str, Any]:
    """Extracts, drafts, trains both drafters and evaluates; what came out."""
    first, second = folder / "first", folder / "second"
    extracted = vpd("extract", target, prompts, "--out", place, **EXTRACT | {"part_mib": 64})
    vpd("train", place, "--out", first, objective="dflash", max_steps=3, **DRAFTER, **TRAIN)
    drafted = vpd("draft", place, "--first-drafter", first, **read)
    vpd("train", place, "--out", second, first_drafter=first, max_steps=3, **DRAFTER, **TRAIN, **read)
    result = vpd("eval", place, "--first-drafter", first, "--drafter", second, **read)
    metrics = [map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) for run in (first, second)]
    losses = [[entry["loss"] for entry in run] for run in metrics]
    counts = {name: extracted[name] for name in ("num_sequences", "num_tokens", "num_written")}
    verified = vpd("verify", place)
    return {"counts": counts, "drafts": drafted, "losses": losses, "eval": result, "problems": verified["problems"]}


def test_a_whole_run_on_a_bucket_equals_a_local_one(place: str, tmp_path: Path, tiny_llama: Path, tiny_prompts: Path):
    local = run_all(tmp_path / "cache", tmp_path / "local", tiny_llama, tiny_prompts)
    read = {"local_parts": tmp_path / "parts"}
    remote = run_all(place, tmp_path / "remote", tiny_llama, tiny_prompts, **read)
    assert remote == local
    assert (len(local["losses"][0]), local["problems"]) == (3, [])
    assert list((tmp_path / "parts").rglob("*.zarr/hidden/c/0/0/0"))
