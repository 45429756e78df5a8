"""Caches in buckets, on a local S3 server."""

# T tokens, K layers, H hidden width
import json
import threading
import urllib.request
import uuid
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.buckets import (
    CHUNK_BYTES,
    FACTS,
    FINGERPRINT,
    SEQUENCES,
    H,
    K,
    check_sequences,
    objects,
    random_drafts,
    read_ranges,
    write_cache,
    write_drafts,
)
from support.servers import RangeServer, S3Server
from support.tiny import DRAFTER, EXTRACT, TRAIN, Damage, make_manifest, make_sequence, same_bits, snapshot, vpd
from vpd.data.cache.array_spec import ArraySpec
from vpd.data.cache.arrays import NOT_DRAFTED
from vpd.data.cache.cache import CHUNK_TOKENS, Cache
from vpd.data.cache.drafts import FirstDrafts
from vpd.data.cache.maintenance.repair import repair
from vpd.data.cache.maintenance.verify import verify
from vpd.data.cache.part import PartWriter
from vpd.data.cache.reader import Request, read_ahead
from vpd.data.cache.storage import bucket as object_storage
from vpd.data.cache.storage.places import open_storage
from vpd.data.cache.target_files import store_target_files, target_folder
from vpd.data.errors import CacheCorruptError, ConfigError, StorageError

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
    # Without ranges from the end, the reader asks for the size first.
    assert (storage.open("file").tail(4), storage.open("file").tail(99)) == ((10, b"6789"), (10, b"0123456789"))
    with pytest.raises(FileNotFoundError):
        storage.read("missing")
    if scheme != "az":  # the server does not know the listings of Azure
        check_sequences(Cache.open(storage), SEQUENCES)


# Caches


class Uuids:
    """Stands for the module `uuid`, and gives the same ids every time."""

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
    with closing(read_ahead(remote.states, map(Request, remote.rows))) as sequences:
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
    cache = Cache.create_or_open(place, make_manifest())
    with suppress(KeyboardInterrupt), PartWriter(cache.storage, "", cache.specs.values()) as writer:
        writer.append({name: np.zeros((10, *spec.row_shape), spec.dtype) for name, spec in cache.specs.items()})
        raise KeyboardInterrupt
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
    monkeypatch.setattr(object_storage, "UPLOAD_BYTES", 5 << 20)  # only the last piece of an S3 upload may be smaller
    sequences = [make_sequence(name, 1500, K, 1024) for name in ("a", "b")]
    write_cache(place, sequences, part_bytes=1 << 30, hidden_size=1024)
    cache = Cache.open(place)
    (part,) = cache.parts
    key = f"{place.removeprefix('s3://')}/parts/{part}.zarr/hidden/c/0/0/0"
    with urllib.request.urlopen(urllib.request.Request(f"{s3.url}/{key}", method="HEAD")) as answer:
        assert answer.headers["ETag"].endswith('-3"')
        assert int(answer.headers["Content-Length"]) > 12 << 20
    check_sequences(cache, sequences)


def test_a_damaged_cache_in_a_bucket_is_repaired(place: str):
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


# A whole run


def run_all(place: object, folder: Path, target: Path, prompts: Path, **read: Any) -> dict[str, Any]:
    """Extracts, drafts, trains both drafters and evaluates; returns the results."""
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
