"""A target that two processes share: the states are the same, and only one process sends them."""

import os
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from support.extracting import answer
from vpd.stages.extract.engine import EngineRequest, Sampling
from vpd.stages.extract.target import load_target
from vpd.stages.extract.transformers_engine import TransformersEngine
from vpd.stages.extract.vllm.engine import VllmEngine

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, seed=0)
ENGINE_ARGS = {
    "enforce_eager": True,
    "kv_cache_memory_bytes": 1 << 28,
    "max_num_seqs": 4,
    "tensor_parallel_size": 2,
}
PROMPT_LENS = (1, 16, 17, 70, 40)
BF16_UNIT = 2.0**-7


class CountingQueue(SimpleQueue[Any]):
    num_put = 0

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        self.num_put += 1
        super().put(item)


@pytest.mark.engine
def test_states_of_two_ranks(tiny_llama: Path, vllm_imported: None, monkeypatch: pytest.MonkeyPatch):
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
    target = load_target(str(tiny_llama))
    every_layer = range(target.num_layers)
    generator = torch.Generator().manual_seed(3)
    requests = [
        EngineRequest(
            key=str(length),
            prompt_ids=torch.randint(3, 290, (length,), generator=generator).tolist(),
            max_new_tokens=8,
            capture=True,
        )
        for length in PROMPT_LENS
    ]
    expected = answer(TransformersEngine(target, every_layer, GREEDY, dtype="float32"), requests)
    engine = VllmEngine(target, every_layer, GREEDY, dtype="float32", max_len=128, engine_args=ENGINE_ARGS)
    engine._receiver._queue = states = CountingQueue()
    try:
        found = answer(engine, requests)
    finally:
        engine.close()
    assert states.num_put == len(requests)
    for key, theirs in expected.items():
        ours = found[key]
        assert ours.output_ids == theirs.output_ids
        assert ours.hidden_TKH is not None
        torch.testing.assert_close(ours.hidden_TKH, theirs.hidden_TKH, rtol=BF16_UNIT, atol=1e-3)
