"""The audit and the probe: good states pass, and each fault is found in its place."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.extracting import make_config, run
from support.tiny import PROMPTS, vpd
from torch import Tensor
from vpd.data.cache.cache import Cache
from vpd.data.cache.storage.local import LocalStorage
from vpd.data.cache.work import PROBE, read_audits
from vpd.data.errors import ExtractionError
from vpd.stages.extract.audit import audit, is_audited
from vpd.stages.extract.compare_states import compare_states
from vpd.stages.extract.engine import Completion, Engine, EngineRequest, Sampling
from vpd.stages.extract.engines import make_engine
from vpd.stages.extract.probe import TEXT, probe
from vpd.stages.extract.target import Target, load_target
from vpd.stages.extract.transformers_engine import TransformersEngine

LAYERS = (0, 2, 3)
GREEDY = Sampling(temperature=0, top_p=1, top_k=0, seed=0)


class Changed:
    """An engine whose states are changed after it has computed them."""

    def __init__(self, engine: Engine, change: Any = lambda states_TKH: states_TKH):
        self.engine, self.change = engine, change
        self.facts: dict[str, Any] = engine.facts | {"name": "another"}

    @property
    def num_in_flight(self) -> int:
        return self.engine.num_in_flight

    def submit(self, request: EngineRequest) -> None:
        self.engine.submit(request)

    def poll(self) -> list[Completion]:
        return [replace(each, hidden_TKH=self.change(each.hidden_TKH)) for each in self.engine.poll()]

    def close(self) -> None:
        self.engine.close()


def make(folder: Path, layers: tuple[int, ...] = LAYERS) -> TransformersEngine:
    return TransformersEngine(load_target(str(folder)), layers, GREEDY, dtype="float32")


# How alike


def test_likeness_is_that_of_the_formulas():
    generator = torch.Generator().manual_seed(0)
    expected = torch.randn(5, 2, 7, generator=generator)
    found = expected + 0.1 * torch.randn(5, 2, 7, generator=generator)
    likeness = compare_states(found, expected)
    for t in range(5):
        for k in range(2):
            a, b = found[t, k].double(), expected[t, k].double()
            assert likeness.relative_error_TK[t, k] == pytest.approx(float((a - b).norm() / b.norm()), rel=1e-5)
            rms = torch.stack([(expected[:, k, h].double() ** 2).mean().sqrt() for h in range(7)])
            cosine = float((a / rms) @ (b / rms) / ((a / rms).norm() * (b / rms).norm()))
            assert likeness.cosine_TK[t, k] == pytest.approx(cosine, rel=1e-5)


def test_the_share_is_that_of_the_sequences_and_grows_by_more_of_them():
    ids = [f"{i:016x}" for i in range(4000)]
    few, many = ({each for each in ids if is_audited(each, share)} for share in (0.05, 0.2))
    assert few < many
    assert abs(len(few) / 4000 - 0.05) < 0.015
    assert abs(len(many) / 4000 - 0.2) < 0.03
    assert [is_audited(ids[0], share) for share in (0.0, 1.0)] == [False, True]


# The audit


def test_a_cache_is_audited_after_its_extraction(tiny_llama: Path, tiny_prompts: Path, tmp_path: Path):
    cache = tmp_path / "cache"
    report = run(tiny_llama, tiny_prompts, cache, audit=1.0)
    (noted,) = read_audits(LocalStorage(cache))
    assert report.audit is not None
    assert noted == report.audit
    assert (noted["num_sequences"], noted["num_tokens"]) == (len(PROMPTS), Cache.open(cache).num_tokens)
    assert 0 < noted["worst_relative_error"] < 2**-6  # the states are rounded to bfloat16 a second time
    assert noted["mean_relative_error"] < noted["worst_relative_error"]
    assert noted["mean_whitened_cosine"] > 0.9999
    assert noted["argmax_agreement"] == 1.0
    assert vpd("inspect", cache)["audits"] == [noted]


def test_no_share_no_audit(tiny_llama: Path, tiny_prompts: Path, tmp_path: Path):
    assert run(tiny_llama, tiny_prompts, tmp_path / "cache", audit=0.0).audit is None
    assert read_audits(LocalStorage(tmp_path / "cache")) == []


def test_what_differs_is_reported_with_its_place(tiny_llama: Path, tiny_prompts: Path, tmp_path: Path):
    run(tiny_llama, tiny_prompts, tmp_path / "cache", audit=0.0)
    cache = Cache.open(tmp_path / "cache")
    rows = list(cache.rows)[:3]
    calls: list[int] = []

    def spoil(states_TKH: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            states_TKH = states_TKH.clone()
            states_TKH[4, 1] *= -1
        return states_TKH

    engine = make_engine(load_target(str(tiny_llama)), cache.manifest.layer_ids, make_config())
    found = audit(Changed(engine, spoil), cache, rows)
    assert found["worst_relative_error"] == pytest.approx(2, rel=0.02)
    assert found["worst"] == {"seq_id": rows[1].seq_id, "position": 4, "layer": cache.manifest.layer_ids[1]}


def test_states_that_do_not_come_are_an_error(tiny_llama: Path, tiny_prompts: Path, tmp_path: Path):
    run(tiny_llama, tiny_prompts, tmp_path / "cache", audit=0.0)
    cache = Cache.open(tmp_path / "cache")
    engine = make_engine(load_target(str(tiny_llama)), cache.manifest.layer_ids, make_config())
    with pytest.raises(ExtractionError, match=f"audit of {cache.rows[0].seq_id} failed"):
        audit(Changed(engine, lambda states_TKH: None), cache, list(cache.rows))


# The probe


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    (tmp_path / "cache").mkdir()
    return LocalStorage(tmp_path / "cache")


def test_a_good_engine_passes_and_is_noted_once(tiny_qwen3: Path, storage: LocalStorage):
    target = load_target(str(tiny_qwen3))
    probe(Changed(make(tiny_qwen3)), target, LAYERS, storage)
    noted = storage.read(PROBE)
    probe(Changed(make(tiny_qwen3)), target, LAYERS, storage)
    assert storage.read(PROBE) == noted


def test_a_probe_takes_no_token_without_an_embedding(tiny_qwen3: Path, storage: LocalStorage):
    """Some tokenizers have tokens beyond the target's vocabulary."""
    target = load_target(str(tiny_qwen3))
    known = probe_ids(target)
    beyond = target.vocab_size
    target.tokenizer.add_tokens([f"<|spare {i}|>" for i in range(beyond - len(target.tokenizer))])
    target.tokenizer.add_tokens(["Every"])
    assert beyond in probe_ids(target)
    assert beyond not in known
    probe(make(tiny_qwen3), target, LAYERS, storage)


def probe_ids(target: Target) -> list[int]:
    return target.tokenizer(TEXT, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("shifted", [(1, 2, 3), (0, 1, 3), (0, 2, 2)])
def test_other_layers_are_found_by_their_states(shifted: tuple[int, ...], tiny_qwen3: Path, storage: LocalStorage):
    wrong = next(asked for asked, got in zip(LAYERS, shifted, strict=True) if asked != got)
    with pytest.raises(ExtractionError, match=f"states for layer {wrong} are not those"):
        probe(Changed(make(tiny_qwen3, shifted)), load_target(str(tiny_qwen3)), LAYERS, storage)
    assert not storage.exists(PROBE)


def test_a_later_engine_is_compared_with_the_first(tiny_qwen3: Path, storage: LocalStorage):
    """This is the only check of a target that is too large to load twice."""
    target = load_target(str(tiny_qwen3))
    probe(make(tiny_qwen3), target, LAYERS, storage)
    with pytest.raises(ExtractionError, match="layer 2 are not like those"):
        probe(Changed(make(tiny_qwen3, (0, 1, 3))), target, LAYERS, storage)
