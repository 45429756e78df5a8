"""Damage in buckets, stores that fail, and the requests that reading takes."""

import json
import shutil
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from support.buckets import PART_BYTES, PARTS_MADE, SEQUENCES, H, K, check_sequences
from support.servers import RangeServer
from support.tiny import Damage, append, make_manifest, make_sequence, run_vpd
from vpd.data.cache.array_spec import ArraySpec
from vpd.data.cache.cache import CHUNK_TOKENS, Cache
from vpd.data.cache.drafts import FirstDrafts
from vpd.data.cache.part import PartWriter
from vpd.data.cache.reader import Request, read_ahead
from vpd.data.cache.storage.bucket import ObjectStorage
from vpd.data.cache.storage.places import open_storage
from vpd.data.cache.writer import StateWriter
from vpd.data.errors import CacheCorruptError, CacheNotFoundError, StorageError

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
    sequences = read_ahead(cache.states, map(Request, cache.rows_of_part(row.part)))
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
    """The writer can't know whether the commit record is there, so it keeps the files that the record may list."""
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
    append(writer, **make_sequence("more", 10, K, H))
    server.take_requests()
    server.num_failing = 1 << 30
    with pytest.raises(StorageError) as caught:
        cache.read(cache.rows[0])
    assert len(server.take_requests()) == 1 + 2
    message = str(caught.value)
    assert message.startswith("s3://bucket/cache/commits/part-")
    assert "500 Internal Server Error" in message
    assert "Check the credentials, the endpoint" in message
    assert "Debug source" not in message
    with pytest.raises(StorageError):
        writer.commit()
    # The writer tries none of the other uploads; then one listing finds what to remove.
    assert len(server.take_requests()) == 2 * (1 + 2)


def test_a_command_says_that_the_store_is_down(server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server.stop()
    monkeypatch.setattr(ObjectStorage.__init__, "__defaults__", tuple(IMPATIENT.values()))
    outcome = run_vpd("train", f"{server.place}/cache", "--out", tmp_path / "run")
    assert outcome.code == 1
    words = "s3://bucket/cache/dataset.json: the store refused a request, or did not answer: "
    assert outcome.message.startswith(words)


# What reading costs

PER_CACHE = 5
"""The manifest, the snapshot, and the listings of index, commit records and parts."""
PER_PART = 11
"""The commit record, the chunk index of the states, three arrays of tokens; with verification also the part's index and
five records of Zarr."""
PER_PART_UNVERIFIED = 5


@pytest.mark.parametrize(("verify", "per_part"), [(True, PER_PART), (False, PER_PART_UNVERIFIED)])
def test_a_sequence_is_one_request(verify: bool, per_part: int, server: RangeServer):
    server.page_size = 1000
    cache = Cache.open(f"{server.place}/cache")
    opened = server.take_requests()
    assert len(opened) == PER_CACHE
    assert not any(request.key.startswith(("cache/parts/p", "cache/commits/p")) for request in opened)
    rows = [*cache.rows, *cache.rows]
    with closing(read_ahead(cache.states, (Request(row, verify) for row in rows), num_threads=1)) as sequences:
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
