"""The real vLLM against transformers: states of every layer, tokens, choices."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing
from multiprocessing.connection import Client
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from support.extracting import answer, make_config
from support.in_process import in_process
from support.kinds import save_kind
from support.tiny import write_jsonl
from vpd.data.cache.arrays import NO_CHOICE
from vpd.data.errors import ConfigError, EngineDiedError, ExtractionError
from vpd.stages.extract.engine import ABORTED, Completion, Engine, EngineRequest, Sampling
from vpd.stages.extract.engines import make_engine
from vpd.stages.extract.target import load_target
from vpd.stages.extract.transformers_engine import TransformersEngine
from vpd.stages.extract.vllm.engine import CHECK_EVERY, CHECKED_REQUESTS, VllmEngine, refuse_reserved
from vpd.stages.extract.vllm.receiver import StateReceiver

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, seed=0)
ENGINE_ARGS: dict[str, Any] = {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 28, "max_num_seqs": 16}
PROMPT_LENS = (1, 3, 16, 17, 64, 70)
# Both engines compute in float32 and differ by about 1e-5; rounding to bfloat16 turns that into one unit at most.
BF16_UNIT = 2.0**-7


def start(folder: Path) -> tuple[VllmEngine, TransformersEngine]:
    target = load_target(str(folder))
    every_layer = range(target.num_layers)
    reference = TransformersEngine(target, every_layer, GREEDY, dtype="float32")
    return VllmEngine(target, every_layer, GREEDY, dtype="float32", max_len=128, engine_args=ENGINE_ARGS), reference


@pytest.fixture(scope="module")
def apart(tiny_llama: Path, vllm_imported: None) -> Iterator[tuple[VllmEngine, TransformersEngine]]:
    """vLLM in processes of its own, beside transformers."""
    engine, reference = start(tiny_llama)
    yield engine, reference
    engine.close()


@pytest.fixture(scope="module")
def inside(tiny_qwen3: Path, vllm_imported: None) -> Iterator[tuple[VllmEngine, TransformersEngine]]:
    """vLLM in this process, with a target of another architecture."""
    with in_process():
        engine, reference = start(tiny_qwen3)
    yield engine, reference
    engine.close()


@pytest.fixture(params=["apart", "inside"])
def engines(request: pytest.FixtureRequest) -> tuple[Engine, Engine]:
    return request.getfixturevalue(request.param)


@pytest.mark.engine
@pytest.mark.parametrize("max_new_tokens", [1, 20], ids=["prefill", "generate"])
def test_same_states_tokens_and_choices(engines: tuple[Engine, Engine], max_new_tokens: int):
    engine, reference = engines
    generator = torch.Generator().manual_seed(3)
    requests = [
        EngineRequest(
            key=f"{max_new_tokens}-{length}",
            prompt_ids=torch.randint(3, 290, (length,), generator=generator).tolist(),
            max_new_tokens=max_new_tokens,
            capture=True,
            supervised=[i % 3 == 0 for i in range(length)],
        )
        for length in (*PROMPT_LENS, *range(20, 20 + CHECKED_REQUESTS))
    ]
    found, expected = answer(engine, requests), answer(reference, requests)
    assert found.keys() == expected.keys()
    num_checked: list[int] = []
    for key, theirs in expected.items():
        ours = found[key]
        assert (ours.output_ids, ours.finish_reason) == (theirs.output_ids, theirs.finish_reason)
        assert ours.hidden_TKH is not None
        assert theirs.hidden_TKH is not None
        assert ours.argmax_T is not None
        assert theirs.argmax_T is not None
        torch.testing.assert_close(ours.hidden_TKH, theirs.hidden_TKH, rtol=BF16_UNIT, atol=1e-3)
        computed_T = ours.argmax_T != NO_CHOICE
        assert torch.equal(ours.argmax_T[computed_T], theirs.argmax_T[computed_T])
        generated = slice(len(ours.prompt_ids) - 1, None)
        assert computed_T[: generated.start].tolist() == [i % 3 == 0 for i in range(1, len(ours.prompt_ids))]
        if computed_T[generated].any():
            num_checked.append(int(computed_T[generated].sum()))
            assert num_checked[-1] in (len(ours.output_ids) // CHECK_EVERY, -(-len(ours.output_ids) // CHECK_EVERY))
    if max_new_tokens >= CHECK_EVERY:
        assert 1 <= len(num_checked) <= 2


@pytest.mark.engine
def test_uncaptured_requests_bring_tokens_alone(engines: tuple[Engine, Engine]):
    request = EngineRequest(key="plain", prompt_ids=[5, 6, 7], max_new_tokens=4, capture=False)
    ours, theirs = (answer(engine, [request])["plain"] for engine in engines)
    assert (ours.output_ids, ours.hidden_TKH) == (theirs.output_ids, None)


def pids_of(engine: VllmEngine) -> list[int]:
    client: Any = engine._engine.engine_core
    return [process.pid for process in client.resources.engine_manager.processes]


@pytest.mark.engine
def test_a_signal_to_all_processes_leaves_the_engine_at_work(apart: tuple[VllmEngine, TransformersEngine]):
    engine, reference = apart
    request = EngineRequest(key="signalled", prompt_ids=[5, 6, 7], max_new_tokens=60, capture=True)
    engine.submit(request)
    assert engine.poll() == []
    for pid in pids_of(engine):  # each signal comes from another process, which the engine does not obey
        subprocess.run(["sh", "-c", f"kill -TERM {pid}; kill -INT {pid}"], check=True)
    done: list[Completion] = []
    while not done:
        done = engine.poll()
    (theirs,) = answer(reference, [request]).values()
    assert (done[0].output_ids, done[0].finish_reason, done[0].fault) == (theirs.output_ids, theirs.finish_reason, "")


@pytest.mark.engine
def test_what_the_engine_gives_up_is_aborted(apart: tuple[VllmEngine, TransformersEngine]):
    """As when a signal ends the engine: one request is half-way, the others wait."""
    engine, _ = apart
    for i in range(ENGINE_ARGS["max_num_seqs"] + 2):
        engine.submit(EngineRequest(key=f"given up {i}", prompt_ids=[5, 6, 7, i], max_new_tokens=100, capture=True))
    assert engine.poll() == []
    client: Any = engine._engine.engine_core
    client.call_utility("pause_scheduler", "abort", False)
    done: list[Completion] = []
    while engine.num_in_flight:
        done += engine.poll()
    client.call_utility("resume_scheduler")
    assert len(done) == ENGINE_ARGS["max_num_seqs"] + 2
    assert {(each.finish_reason, each.hidden_TKH, each.argmax_T) for each in done} == {(ABORTED, None, None)}
    assert "abort" in done[0].fault
    assert engine._receiver.received == {}
    (late,) = answer(engine, [EngineRequest(key="late", prompt_ids=[5, 6], max_new_tokens=3, capture=True)]).values()
    assert (late.finish_reason, late.fault) == ("length", "")


@pytest.mark.engine
def test_a_killed_engine_is_an_error_that_says_what_to_do(apart: tuple[VllmEngine, TransformersEngine]):
    """This test ends these engines, so it is their last one."""
    engine, _ = apart
    errors: SimpleQueue[BaseException] = SimpleQueue()

    def poll_on() -> None:
        try:
            while True:
                engine.poll()
        except BaseException as error:
            errors.put(error)

    engine.submit(EngineRequest(key="long", prompt_ids=[5, 6, 7], max_new_tokens=100, capture=True))
    threading.Thread(target=poll_on, daemon=True).start()
    for pid in pids_of(engine):
        os.kill(pid, signal.SIGKILL)
    error = errors.get(timeout=60)
    assert isinstance(error, EngineDiedError)
    assert "run the same command again" in str(error)
    with pytest.raises(EngineDiedError, match="run the same command again"):
        engine.submit(EngineRequest(key="late", prompt_ids=[5], max_new_tokens=1, capture=False))


@pytest.mark.engine
def test_why_an_engine_does_not_start_is_reported_and_standard_output_stays_clean(tmp_path: Path):
    """vLLM's class for this kind does not give its layers' states, and another class may not take its place."""
    target = save_kind("Gemma 3", tmp_path / "target")
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "name a fox"}])
    command = [sys.executable, "-m", "vpd.pipeline.cli", "extract", target, prompts, "--out", tmp_path / "cache"]
    flags = ["--json", "--max-len", "64", "--layer-ids", "0,2,5"]
    arguments = [
        flag
        for each in ("enforce_eager=true", f"kv_cache_memory_bytes={1 << 28}", "model_impl=vllm")
        for flag in ("--engine-arg", each)
    ]
    done = subprocess.run([*map(str, command), *flags, *arguments], capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert done.stdout == ""
    messages, _, paragraph = done.stderr.rpartition("vpd: error:")
    assert "eagle" in messages.lower()
    assert "eagle" in paragraph.partition("Its own messages")[0].lower()  # the engine's reason, in vpd's own words too
    assert "--engine transformers" in paragraph


@pytest.mark.parametrize("name", ["enable_prefix_caching", "max_model_len", "speculative_config"])
def test_reserved_engine_arguments_are_refused(name: str):
    with pytest.raises(ConfigError, match=name):
        refuse_reserved({name: 1})


@pytest.fixture
def long_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files whose path is too long for a local socket."""
    folder = tmp_path / ("scratch-of-a-user/" * 6)
    folder.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_long_path_of_temporary_files_is_not_used_for_sockets(long_scratch: Path):
    assert len(str(long_scratch)) > 107
    with closing(StateReceiver()) as receiver:
        Client(receiver.address, authkey=receiver.authkey).close()
    assert not Path(receiver.address).parent.exists()


def test_vllm_missing_is_named(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    with pytest.raises(ExtractionError, match=r"engine vllm was asked for.*extract-cpu.*--engine transformers"):
        make_engine(load_target(str(tiny_llama)), (1,), make_config(engine="vllm"))
