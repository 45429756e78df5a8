"""Writers that are killed, run out of disk, or work at the same time: nothing is lost, doubled, or torn."""

import os
import random
import resource
import time
from contextlib import closing
from pathlib import Path

import pytest
from support import crash
from support.tiny import EXTRACT, as_flags, fill_cache, run_vpd
from vpd.data.cache.cache import Cache
from vpd.data.cache.maintenance.verify import verify
from vpd.data.cache.reader import Request, read_ahead
from vpd.data.cache.storage.local import LocalStorage
from vpd.data.cache.storage.locks import SECONDS_TO_LOCK
from vpd.data.errors import CacheNotFoundError

NUM_KILLS = 50
NUM_SEQUENCES = 24

Contents = dict[str, tuple[bytes, list[int], list[int]]]


def contents(cache: Cache) -> Contents:
    """The bytes of every sequence, all checksums verified; no sequence may be there twice."""
    found: Contents = {}
    with closing(read_ahead(cache.states, map(Request, cache.rows))) as sequences:
        for sequence in sequences:
            assert sequence.row.seq_id not in found
            states = sequence.stored_TKW.numpy().tobytes()
            found[sequence.row.seq_id] = (states, sequence.token_ids_S.tolist(), sequence.target_argmax_T.tolist())
    assert len(cache.all_rows) == len(cache.rows), "written twice"
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Contents, float]:
    """What an undisturbed run writes, and its seconds."""
    folder = tmp_path_factory.mktemp("undisturbed") / "cache"
    crash.start(crash.write, folder.with_name("warm-up"), "s", 1).join()
    started = time.monotonic()
    process = crash.start(crash.write, folder, "s", NUM_SEQUENCES)
    process.join()
    assert process.exitcode == 0
    return contents(Cache.open(folder)), time.monotonic() - started


def test_a_killed_writer_loses_nothing_that_a_resume_does_not_write(
    undisturbed: tuple[Contents, float], tmp_path: Path
):
    expected, seconds = undisturbed
    chance = random.Random(7)
    kills = completed = 0
    folder = tmp_path / "cache0"
    while kills < NUM_KILLS:
        process = crash.start(crash.write, folder, "s", NUM_SEQUENCES)
        if crash.kill_at_random(process, chance, seconds):
            kills += 1
            check_not_torn(folder, expected)
            continue
        assert process.exitcode == 0
        assert contents(Cache.open(folder)) == expected
        completed += 1
        folder = tmp_path / f"cache{completed}"
    make_older(folder, SECONDS_TO_LOCK)
    crash.write(folder, "s", NUM_SEQUENCES)
    assert contents(Cache.open(folder)) == expected
    assert {path.name[0] for path in (folder / "parts").iterdir()} == {"p"}, "leftovers of dead writers"


def make_older(folder: Path, seconds: float) -> None:
    """Dates all that a folder holds back: a writer killed before it could lock its folder counts as dead by then."""
    for path in folder.rglob("*"):
        changed = path.stat().st_mtime - seconds
        os.utime(path, (changed, changed))


def check_not_torn(folder: Path, expected: Contents) -> None:
    """After a kill, a reader sees some of the sequences of an undisturbed run, and nothing else."""
    try:
        found = contents(Cache.open(folder, allow_empty=True))
    except CacheNotFoundError:
        return
    assert found.items() <= expected.items()


def test_a_full_disk_ends_clearly_and_the_cache_goes_on(undisturbed: tuple[Contents, float], tmp_path: Path):
    expected, _ = undisturbed
    folder = tmp_path / "cache"
    (first,) = fill_cache(folder, crash.sequences("s", 3))
    ours, theirs = crash.CONTEXT.Pipe()
    crash.start(crash.write_with_limit, folder, "s", NUM_SEQUENCES, 9_000, theirs).join()
    kind, message = ours.recv()
    assert kind == "StorageError"
    for words in (str(folder), "File too large", "can be used", "same command continues"):
        assert words in message
    assert Cache.open(folder).parts == [first]
    assert [path.name for path in (folder / "parts").iterdir()] == [f"{first}.zarr"]
    crash.write(folder, "s", NUM_SEQUENCES)
    assert contents(Cache.open(folder)) == expected
    assert [p.what for p in verify(LocalStorage(folder)).problems if "target" not in p.what] == []


def test_two_writers_and_a_reader_at_once(tmp_path: Path):
    folder = tmp_path / "cache"
    fill_cache(folder, crash.sequences("early", 4))
    early = Cache.open(folder)
    before = contents(early)
    writers = [crash.start(crash.write, folder, prefix, NUM_SEQUENCES) for prefix in "ab"]
    seen = 0
    while any(writer.is_alive() for writer in writers):
        now = contents(Cache.open(folder))
        assert before.items() <= now.items()
        assert len(now) >= seen
        seen = len(now)
        assert contents(early) == before
    assert [writer.exitcode for writer in writers] == [0, 0]
    after = contents(Cache.open(folder))
    names = [f"{prefix}{i}" for prefix in "ab" for i in range(NUM_SEQUENCES)]
    assert sorted(after) == sorted([*before, *names])
    assert contents(early) == before


def test_the_command_reports_a_full_disk(tiny_llama: Path, tiny_prompts: Path, tmp_path: Path):
    arguments = ["extract", tiny_llama, tiny_prompts, "--out", tmp_path / "cache", *as_flags(EXTRACT)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        outcome = run_vpd(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert outcome.code == 1
    assert "can't be written to" in outcome.message
    assert run_vpd(*arguments).code == 0
    assert verify(LocalStorage(tmp_path / "cache")).problems == []
