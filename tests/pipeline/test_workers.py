"""Any number of workers on one cache: what they write together is what one writes alone, whoever dies."""

import json
import signal
import threading
from collections.abc import Callable
from itertools import accumulate, chain, cycle
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from support.forks import Forks, Process
from support.tiny import EXTRACT, PROMPTS, vpd, write_jsonl
from support.workers import NUM_RECORDS, SETTINGS, UNIT, arguments, check_same, wait_until
from vpd.data.cache.cache import Cache
from vpd.data.cache.work import DONE, WORK
from vpd.data.errors import StorageError
from vpd.pipeline.extraction import ExtractJob, drafting_beside, prepare
from vpd.pipeline.ray_workers import add_report, run_worker
from vpd.stages.draft.first_draft import FirstDrafting
from vpd.stages.extract.config import ExtractConfig
from vpd.stages.extract.units import LEASE, WORKER


def worker_of(folder: Path, process: Process) -> str | None:
    """The name under which a process claims units."""
    for path in (folder / WORK).glob(f"*{WORKER}"):
        if json.loads(path.read_text())["pid"] == process.pid:
            return path.name.removesuffix(WORKER)
    return None


def holds_a_unit(folder: Path, process: Process) -> bool:
    name = worker_of(folder, process)
    try:
        owners = [json.loads(path.read_text())["worker"] for path in (folder / WORK).glob(f"*{LEASE}")]
    except FileNotFoundError:  # finished meanwhile
        return False
    return name is not None and name in owners


def test_three_workers_of_which_one_is_killed(
    tiny_llama: Path, many_prompts: Path, alone: Path, forks: Forks, tmp_path: Path
):
    out = tmp_path / "cache"
    processes = [forks.start(arguments(tiny_llama, many_prompts, out)) for _ in range(3)]
    wait_until(lambda: out.exists() and holds_a_unit(out, processes[0]), processes)
    processes[0].send(signal.SIGKILL)
    assert processes[0].wait().code == -signal.SIGKILL
    results = [process.result() for process in processes[1:]]
    assert sum(result["num_written"] for result in results) >= NUM_RECORDS - 2 * UNIT
    assert min(result["num_written"] for result in results) > 0
    check_same(out, alone)


def test_a_worker_that_hangs_is_taken_for_dead(
    tiny_llama: Path, many_prompts: Path, alone: Path, forks: Forks, tmp_path: Path
):
    out = tmp_path / "cache"
    hanging = forks.start(arguments(tiny_llama, many_prompts, out))
    wait_until(lambda: out.exists() and holds_a_unit(out, hanging), [hanging])
    hanging.send(signal.SIGSTOP)
    try:
        assert forks.start(arguments(tiny_llama, many_prompts, out)).result()["num_written"] > 0
        check_same(out, alone)
    finally:
        hanging.send(signal.SIGCONT)
    assert hanging.wait().code == 0  # what it still writes is there twice, and counts once
    check_same(out, alone)


def test_a_signal_ends_a_worker_in_good_order(
    tiny_llama: Path, many_prompts: Path, alone: Path, forks: Forks, tmp_path: Path
):
    out = tmp_path / "cache"
    process = forks.start(arguments(tiny_llama, many_prompts, out))
    wait_until(lambda: any((out / WORK).glob(f"*{DONE}")), [process])
    process.send(signal.SIGTERM)
    outcome = process.wait()
    assert outcome.code == 0
    left = outcome.result["num_left"]
    assert 0 < left < NUM_RECORDS
    assert f"stopped; {left} sequences are left, the same command continues." in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.result["num_written"] == NUM_RECORDS - left
    assert list((out / WORK).glob(f"*{LEASE}")) == list((out / WORK).glob(f"*{WORKER}")) == []
    assert forks.start(arguments(tiny_llama, many_prompts, out)).result()["num_written"] == left
    check_same(out, alone)


class FailingDrafting:
    """Drafting that fails three times, once with an error that is a bug."""

    def __init__(self) -> None:
        self.errors: list[Exception] = [StorageError("no answer"), RuntimeError("a bug"), OSError("once more")]
        self.has_gone_on = threading.Event()

    def run(self, cache: Cache, must_stop: Callable[[], bool]) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.has_gone_on.set()


def test_drafting_beside_the_engine_outlives_an_error_and_shows_the_first(
    tiny_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("vpd.pipeline.extraction.SECONDS_BETWEEN_DRAFTINGS", 0.01)
    drafting = FailingDrafting()
    with drafting_beside(str(tiny_cache), cast(FirstDrafting, drafting), lambda: False):
        assert drafting.has_gone_on.wait(10)
    shown = capsys.readouterr().err
    assert shown.count("vpd: ") == 1
    assert "no answer" in shown


class Pauses(threading.Event):
    """Notes how long it is waited for, and is not waited for the first three times."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.noted.append(timeout)
        return super().wait(0 if len(self.noted) <= 3 else None)


def test_drafting_beside_the_engine_opens_a_large_cache_rarely(tiny_cache: Path, monkeypatch: pytest.MonkeyPatch):
    clock = accumulate(chain([0.0], cycle([8.0, 1.0])))  # Opening takes 8 s.
    monkeypatch.setattr("vpd.pipeline.extraction.time", SimpleNamespace(monotonic=clock.__next__))
    pauses = Pauses()
    threads = SimpleNamespace(Thread=threading.Thread, Event=lambda: pauses)
    monkeypatch.setattr("vpd.pipeline.extraction.threading", threads)
    drafting = SimpleNamespace(run=lambda cache, must_stop: None)
    with drafting_beside(str(tiny_cache), cast(FirstDrafting, drafting), lambda: False):
        wait_until(lambda: len(pauses.noted) == 4, [])
    assert pauses.noted == [5, 160, 160, 160]


def test_what_planning_left_out_is_counted_once_by_any_number_of_workers(tiny_llama: Path, tmp_path: Path):
    records = [*PROMPTS[:2], PROMPTS[0], {"prompt": "fox " * 200}]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", records)
    # An answer of one token leaves nothing to train on, which the first worker finds.
    settings = ExtractConfig(**{**EXTRACT, "skip_bad": True, "max_new_tokens": 1})
    job = ExtractJob(str(tiny_llama), (str(prompts),), str(tmp_path / "cache"), settings)
    report = prepare(job).plan.report
    for _ in range(3):
        add_report(report, run_worker(job))
    assert report.skipped == {"duplicate": 1, "too long": 1, "empty response": 2}


def test_a_finished_extraction_is_not_begun_again(tiny_llama: Path, many_prompts: Path, alone: Path):
    found = vpd("extract", tiny_llama, many_prompts, "--out", alone, **SETTINGS)
    assert (found["num_written"], found["num_present"]) == (0, NUM_RECORDS)
    assert len(list((alone / WORK).glob(f"*{DONE}"))) == NUM_RECORDS // UNIT
