"""Any number of workers on one cache: what they write together is what one writes alone, whoever dies."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import SECONDS, Forks, Process
from tiny import EXTRACT, vpd, write_jsonl
from vpd.data.cache.store import Cache
from vpd.stages.extract.units import DONE, LEASE, WORK, WORKER

NUM_RECORDS, UNIT = 60, 4
SETTINGS: dict[str, Any] = {**EXTRACT, "unit_records": UNIT, "lease_seconds": 2.0, "max_in_flight": 2}


def arguments(target: Path, prompts: Path, out: Path, **changes: Any) -> list[object]:
    flags = [each for name, value in (SETTINGS | changes).items() for each in (f"--{name.replace('_', '-')}", value)]
    return ["extract", target, prompts, "--out", out, "--json", *flags]


@pytest.fixture(scope="module")
def many_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = [{"prompt": f"what is the sum of {i} and {i * i % 7}?"} for i in range(NUM_RECORDS)]
    return write_jsonl(tmp_path_factory.mktemp("many") / "prompts.jsonl", records)


@pytest.fixture(scope="module")
def alone(tiny_llama: Path, many_prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "cache"
    assert vpd("extract", tiny_llama, many_prompts, "--out", folder, **SETTINGS)["num_written"] == NUM_RECORDS
    return folder


def contents(folder: Path) -> dict[str, tuple[list[int], torch.Tensor]]:
    cache = Cache.open(folder)
    found = {row.seq_id: cache.read(row) for row in cache.rows}
    return {seq_id: (each.token_ids_S.tolist(), each.hidden_TKH.clone()) for seq_id, each in found.items()}


def check_same(folder: Path, expected: Path) -> None:
    ours, theirs = contents(folder), contents(expected)
    assert ours.keys() == theirs.keys()
    for seq_id, (token_ids, hidden_TKH) in ours.items():
        assert token_ids == theirs[seq_id][0]
        assert torch.equal(hidden_TKH, theirs[seq_id][1])
    left = [path.name for path in (folder / WORK).iterdir() if not path.name.endswith(DONE)]
    assert [name for name in left if name.endswith(LEASE)] == []


def wait_until(condition: Callable[[], bool], processes: list[Process]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, [process.wait() for process in processes]
        time.sleep(0.005)


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


def test_a_finished_extraction_is_not_begun_again(tiny_llama: Path, many_prompts: Path, alone: Path):
    found = vpd("extract", tiny_llama, many_prompts, "--out", alone, **SETTINGS)
    assert (found["num_written"], found["num_present"]) == (0, NUM_RECORDS)
    assert len(list((alone / WORK).glob(f"*{DONE}"))) == NUM_RECORDS // UNIT
