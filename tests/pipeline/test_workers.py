"""Any number of workers on one cache: what they write together is what one writes alone, whoever dies."""

import json
import signal
from pathlib import Path

from forks import Forks, Process
from tiny import vpd
from vpd.data.cache.work import DONE, WORK
from vpd.stages.extract.units import LEASE, WORKER
from workers import NUM_RECORDS, SETTINGS, UNIT, arguments, check_same, wait_until


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
