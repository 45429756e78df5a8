"""Extraction on a Ray cluster of this machine, with real processes."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.tiny import run_vpd, write_jsonl
from support.workers import NUM_RECORDS, arguments, check_same
from vpd.data.cache.work import DONE, WORK
from vpd.pipeline.ray_workers import extract_on_ray
from vpd.stages.extract.units import LEASE, WORKER

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, of its processes and files


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    os.environ["OMP_NUM_THREADS"] = "1"
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield ray
    ray.shutdown()


def kill_a_worker(folder: Path, killed: list[int]) -> None:
    """Kills the first worker that holds a unit."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and not killed:
        for lease in (folder / WORK).glob(f"*{LEASE}"):
            try:
                name = json.loads(lease.read_text())["worker"]
                pid = json.loads((folder / WORK / f"{name}{WORKER}").read_text())["pid"]
            except FileNotFoundError:
                continue
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
            return
        time.sleep(0.005)


def test_a_worker_that_is_killed_is_replaced(
    cluster: Any, tiny_llama: Path, many_prompts: Path, alone: Path, tmp_path: Path
):
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker, args=(tmp_path / "cache", killed))
    killer.start()
    resources = ["--ray", 3, "--ray-gpus", 0, "--ray-cpus", 1]
    outcome = run_vpd(*arguments(tiny_llama, many_prompts, tmp_path / "cache"), *resources)
    killer.join()
    assert killed, outcome.err
    assert outcome.code == 0, outcome.err
    assert outcome.result["num_sequences"] == NUM_RECORDS
    check_same(tmp_path / "cache", alone)


def kill_an_engine(folder: Path, killed: list[int]) -> None:
    """Kills the engine of the first worker that writes."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and not killed:
        time.sleep(0.005)
        if not any((folder / "parts").glob("*")):
            continue
        with suppress(FileNotFoundError, psutil.NoSuchProcess):
            for note in (folder / WORK).glob(f"*{WORKER}"):
                for process in psutil.Process(json.loads(note.read_text())["pid"]).children(recursive=True):
                    if process.name().startswith("VLLM::Engine"):
                        process.kill()
                        killed.append(process.pid)


@pytest.mark.engine
def test_a_worker_whose_engine_is_killed_is_replaced(cluster: Any, tiny_llama: Path, tmp_path: Path):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"why {i}?"} for i in range(240)])
    killed: list[int] = []
    killer = threading.Thread(target=kill_an_engine, args=(tmp_path / "cache", killed))
    killer.start()
    engine_args = "{enforce_eager: true, kv_cache_memory_bytes: 268435456, max_num_seqs: 2}"
    args = arguments(tiny_llama, prompts, tmp_path / "cache", engine="vllm")
    resources = ["--ray", 1, "--ray-gpus", 0, "--ray-cpus", 1]
    outcome = run_vpd(*args, *resources, "--set", f"extract.engine_args={engine_args}")
    killer.join()
    assert killed, outcome.err
    assert outcome.code == 0, outcome.err
    assert outcome.result["num_sequences"] == 240
    assert 0 < outcome.result["num_written"] < 240, "what the second engine wrote"


def test_a_signal_ends_all_workers(cluster: Any, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    num_records = 5 * NUM_RECORDS  # more than the workers extract before they are stopped
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"why {i}?"} for i in range(num_records)])
    out = tmp_path / "cache"
    args = [*arguments(tiny_llama, prompts, out, stop_seconds=1), "--ray", 2, "--ray-gpus", 0]

    def stopped(job: Any, prepared: Any, resources: Any, must_stop: Any) -> Any:
        """As if a signal came with the first finished unit."""
        return extract_on_ray(job, prepared, resources, lambda: any((out / WORK).glob(f"*{DONE}")))

    with monkeypatch.context() as patch:
        patch.setattr("vpd.pipeline.commands.extract.extract_on_ray", stopped)
        patch.setattr("vpd.pipeline.ray_workers.SECONDS_BETWEEN_POLLS", 0.05)
        patch.setattr("vpd.pipeline.ray_workers.SECONDS_TO_END", 0.5)  # a worker that starts late misses the first
        outcome = run_vpd(*args)
    assert outcome.code == 0, outcome.err
    assert 0 < outcome.result["num_left"] < num_records
    assert outcome.result["num_sequences"] == num_records - outcome.result["num_left"]
    assert run_vpd(*args).result["num_sequences"] == num_records


def test_what_a_worker_finds_wrong_is_reported(cluster: Any, tiny_llama: Path, many_prompts: Path, tmp_path: Path):
    wrong = write_jsonl(tmp_path / "engine.jsonl", [{"prompt": "why?"}])
    args = arguments(tiny_llama, wrong, tmp_path / "cache")
    outcome = run_vpd(*args, "--ray", 2, "--ray-gpus", 0, "--set", "extract.engine_args={batch_size: 0}")
    assert outcome.code == 2
    assert "expected a batch_size of at least 1, got 0" in outcome.err
    assert "Traceback" not in outcome.err
