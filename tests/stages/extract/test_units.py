"""A unit has one living worker at a time, and a finished unit has none."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from support.tiny import skipped_by_unit
from vpd.data.cache.records import dump_record
from vpd.data.cache.storage.base import Storage
from vpd.data.cache.storage.places import open_storage
from vpd.data.cache.work import DONE, WORK, finished_units, read_units
from vpd.stages.extract.units import (
    LEASE,
    WORKER,
    PreparedUnit,
    WorkBoard,
    WorkUnit,
    lives_here,
    pid_space,
    start_time,
)

NEVER, SOON = 60.0, 0.2
"""Seconds of silence after which a worker is dead."""
OTHER = "0123456789ab"
"""A worker whose files tests write."""


def make_units(ids: list[str], size: int, left: list[str]) -> list[WorkUnit]:
    """Units of `size` records each, of which those in `left` are left."""
    units: list[WorkUnit] = []
    for start in range(0, len(ids), size):
        chosen = ids[start : start + size]
        named = [SimpleNamespace(record=SimpleNamespace(seq_id=seq_id)) for seq_id in chosen if seq_id in left]
        unit_id = f"unit-{start}"
        units.append(WorkUnit(unit_id, range(start, start + size), PreparedUnit(unit_id, cast(Any, named), chosen)))
    return units


IDS = [f"id-{i:02d}" for i in range(10)]
UNITS = make_units(IDS, 3, IDS)
UNIT_IDS = [unit.unit_id for unit in UNITS]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "cache"))


def make_board(storage: Storage, known: dict[str, dict[str, Any]] | None = None, seconds: float = NEVER) -> WorkBoard:
    return WorkBoard(storage, UNITS, known or {}, seconds)


def claim_all(board: WorkBoard) -> list[str]:
    return [unit.unit_id for unit in iter(board.claim, None)]


def prepared(unit: WorkUnit) -> PreparedUnit:
    assert unit.prepared is not None
    return unit.prepared


def files(storage: Storage, suffix: str) -> list[str]:
    return [name for name in storage.list_folder(WORK) if name.endswith(suffix)]


def write_worker(storage: Storage, *, place: str = "", pid: int | None = None, started: str | None = None) -> None:
    """Writes a new heartbeat of the other worker."""
    pid = os.getpid() if pid is None else pid
    record = {"pid_space": place or pid_space(), "pid": pid, "started": started or start_time(pid)}
    storage.write(f"{WORK}/{OTHER}{WORKER}", dump_record({**record, "beat": os.urandom(4).hex()}))


def write_lease(storage: Storage, unit_id: str) -> None:
    storage.create(f"{WORK}/{unit_id}.0{LEASE}", dump_record({"worker": OTHER}))


# Claims


def test_workers_that_claim_at_once_share_all_units(storage: Storage):
    boards = [make_board(storage) for _ in range(4)]
    start = threading.Barrier(len(boards))

    def claim(board: WorkBoard) -> list[str]:
        start.wait()
        return claim_all(board)

    with ThreadPoolExecutor(len(boards)) as pool:
        claimed = [unit_id for found in pool.map(claim, boards) for unit_id in found]
    assert sorted(claimed) == sorted(UNIT_IDS)
    for board in boards:
        board.close()
    assert storage.list_folder(WORK) == []


def test_what_is_given_back_is_free(storage: Storage):
    with closing(make_board(storage)) as first:
        assert claim_all(first) == UNIT_IDS
        with closing(make_board(storage)) as second:
            assert second.claim() is None
            assert (second.num_units_left, second.num_left) == (len(UNITS), len(IDS))
            first.close()
            assert claim_all(second) == UNIT_IDS
            assert (second.num_units_left, second.num_left) == (0, 0)


def test_a_finished_unit_is_never_claimed_again(storage: Storage):
    with closing(make_board(storage)) as first:
        done = first.claim()
        assert done is not None
        first.finish(prepared(done), {"id-01": "empty response"})
    assert skipped_by_unit(storage) == {done.unit_id: {"id-01": "empty response"}}
    assert files(storage, LEASE) == []
    with closing(make_board(storage)) as second:
        assert claim_all(second) == UNIT_IDS[1:]


def test_a_unit_that_lost_sequences_after_it_was_finished_is_claimed_again(storage: Storage):
    storage.write(f"{WORK}/{UNIT_IDS[2]}{DONE}", dump_record({"skipped": {}}))
    with closing(make_board(storage, known=read_units(storage, finished_units(storage)))) as board:
        assert claim_all(board) == UNIT_IDS


def test_a_unit_that_is_finished_again_keeps_what_was_hopeless_before(storage: Storage):
    storage.write(f"{WORK}/{UNIT_IDS[2]}{DONE}", dump_record({"skipped": {"id-06": "empty response"}}))
    with closing(make_board(storage, known=read_units(storage, [UNIT_IDS[2]]))) as board:
        assert claim_all(board) == UNIT_IDS
        board.finish(prepared(UNITS[2]), {"id-08": "too long after some turns"})
    assert skipped_by_unit(storage) == {UNIT_IDS[2]: {"id-06": "empty response", "id-08": "too long after some turns"}}


def test_workers_share_the_units_that_lost_sequences_after_they_were_finished(storage: Storage):
    with closing(make_board(storage)) as before:
        for unit in iter(before.claim, None):
            before.finish(prepared(unit), {})
    known = read_units(storage, finished_units(storage))
    boards = [make_board(storage, known) for _ in range(3)]
    made: list[str] = []
    while any(board.num_units_left for board in boards):
        for board, unit in [(board, board.claim()) for board in boards]:
            if unit is not None:
                board.finish(prepared(unit), {})
                made.append(unit.unit_id)
    for board in boards:
        board.close()
    assert sorted(made) == sorted(UNIT_IDS)


# Dead workers


def test_a_process_of_this_host_that_ended_is_dead_at_once(storage: Storage):
    write_lease(storage, UNIT_IDS[0])
    with (
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process,
        closing(make_board(storage)) as board,
    ):
        write_worker(storage, pid=process.pid)
        assert claim_all(board) == UNIT_IDS[1:]
        process.kill()
        process.wait()
        assert claim_all(board) == UNIT_IDS[:1]
        assert files(storage, WORKER) == [f"{board._worker}{WORKER}"]


def test_another_process_of_the_same_number_is_not_the_worker(storage: Storage):
    write_lease(storage, UNIT_IDS[0])
    write_worker(storage, started="1")
    with closing(make_board(storage)) as board:
        assert claim_all(board) == UNIT_IDS


def test_a_worker_without_a_file_is_dead(storage: Storage):
    write_lease(storage, UNIT_IDS[0])
    with closing(make_board(storage)) as board:
        assert claim_all(board) == UNIT_IDS


HOST, BOOT, NAMESPACE = pid_space().split(" ")
ELSEWHERE = [f"another-host {BOOT} {NAMESPACE}", f"{HOST} another-boot {NAMESPACE}", f"{HOST} {BOOT} pid:[1]"]


@pytest.mark.parametrize("place", ["", *ELSEWHERE], ids=["here", "host", "boot", "container"])
def test_a_worker_is_dead_after_so_long_a_silence(place: str, storage: Storage):
    write_lease(storage, UNIT_IDS[0])
    started = "1" if place else None  # a process number of another place means nothing here
    write_worker(storage, place=place, started=started)
    with closing(make_board(storage, seconds=SOON)) as board:
        for _ in range(4):  # heartbeats go on for longer than a lease, so the unit stays its own
            assert UNIT_IDS[0] not in claim_all(board)
            time.sleep(SOON / 2)
            write_worker(storage, place=place, started=started)
        assert board.claim() is None
        time.sleep(SOON * 1.5)
        assert claim_all(board) == UNIT_IDS[:1]


def test_a_living_worker_speaks_often_enough(storage: Storage):
    with closing(make_board(storage, seconds=SOON)) as first, closing(make_board(storage, seconds=SOON)) as second:
        assert claim_all(first) == UNIT_IDS
        for _ in range(8):
            assert second.claim() is None
            time.sleep(SOON / 3)


def test_a_worker_without_progress_loses_its_units_and_reports_it(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("vpd.stages.extract.units.HANG_SECONDS", 0.0)
    with closing(make_board(storage, seconds=SOON)) as first, closing(make_board(storage, seconds=SOON)) as second:
        assert claim_all(first) == UNIT_IDS
        for _ in range(8):  # its engine starts, which may take any time
            assert second.claim() is None
            time.sleep(SOON / 3)
        first.note_progress()
        while (taken := second.claim()) is None:
            time.sleep(SOON / 3)
        assert taken.unit_id == UNIT_IDS[0]
        reported = capsys.readouterr().err
        assert reported.count(f"worker {first._worker} (process {os.getpid()}") == 1
        assert all(unit_id in reported for unit_id in UNIT_IDS)
        monkeypatch.setattr("vpd.stages.extract.units.HANG_SECONDS", NEVER)
        first.note_progress()  # the loop goes on: the worker keeps the units that nobody has taken over
        while f"{first._worker}{WORKER}" not in files(storage, WORKER):
            time.sleep(SOON / 3)
        assert second.claim() is None


def test_two_that_find_a_dead_worker_do_not_both_take_its_unit(storage: Storage):
    write_lease(storage, UNIT_IDS[0])
    with closing(make_board(storage)) as first, closing(make_board(storage)) as second:
        assert sorted([*claim_all(first), *claim_all(second)]) == sorted(UNIT_IDS)
        assert claim_all(first) == claim_all(second) == []


def test_lives_here_knows_its_own_process():
    here = {"pid_space": pid_space(), "pid": os.getpid(), "started": start_time(os.getpid())}
    assert lives_here(here)
    assert not lives_here({**here, "started": "1"})
    for place in ELSEWHERE:
        assert lives_here({**here, "pid_space": place, "started": "1"})
    assert start_time(2**22 + 1) is None
