"""Requests that run together have the same results as alone."""

from pathlib import Path

import pytest
import torch
from support.extracting import answer
from support.tiny import VOCAB, make_tokenizer
from transformers import MambaConfig, MambaForCausalLM
from vpd.data.errors import ConfigError, TargetError
from vpd.stages.extract.engine import Completion, EngineRequest, Sampling
from vpd.stages.extract.target import load_target
from vpd.stages.extract.transformers_engine import TransformersEngine, sample

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, seed=0)
PROMPTS = [([5, 6, 7, 8], 6), ([9], 12), ([11, 12, 13, 14, 15, 16, 17, 18, 19], 1), ([20, 21], 9), ([5, 6], 3)]


def answers(target_folder: Path, batch_size: int) -> dict[str, Completion]:
    engine = TransformersEngine(
        load_target(str(target_folder)), [0, 3, 5], GREEDY, dtype="float32", engine_args={"batch_size": batch_size}
    )
    requests = [
        EngineRequest(key=str(i), prompt_ids=prompt_ids, max_new_tokens=max_new_tokens, capture=i != 3)
        for i, (prompt_ids, max_new_tokens) in enumerate(PROMPTS)
    ]
    return answer(engine, requests)


@pytest.mark.parametrize("batch_size", [2, 5, 64])
def test_a_batch_answers_as_one_by_one(tiny_llama: Path, batch_size: int):
    alone, together = answers(tiny_llama, 1), answers(tiny_llama, batch_size)
    assert set(alone) == set(together) == {"0", "1", "2", "3", "4"}
    for key, expected in alone.items():
        found = together[key]
        assert (found.output_ids, found.finish_reason) == (expected.output_ids, expected.finish_reason)
        if expected.hidden_TKH is None:
            assert found.hidden_TKH is found.argmax_T is None
            continue
        assert found.hidden_TKH is not None
        assert found.argmax_T is not None
        assert len(found.hidden_TKH) == len(found.prompt_ids) + len(found.output_ids) - 1
        # States are bfloat16: sums in another order move them by a rounding.
        torch.testing.assert_close(found.hidden_TKH.float(), expected.hidden_TKH.float(), rtol=1e-2, atol=1e-3)
        assert expected.argmax_T is not None
        assert torch.equal(found.argmax_T, expected.argmax_T)


def test_a_batch_of_nothing_is_refused(tiny_llama: Path):
    with pytest.raises(ConfigError, match="batch_size"):
        answers(tiny_llama, 0)


def test_each_row_is_sampled_from_its_own_distribution():
    logits_BV = torch.tensor([[0.0, 9.0, 8.9, -5.0], [3.0, 0.0, 0.0, 2.9]]).repeat(4000, 1)
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=2, seed=0)
    drawn = sample(logits_BV, sampling, torch.Generator().manual_seed(0)).view(-1, 2)
    for column, (one, other) in enumerate([(1, 2), (0, 3)]):
        share = float((drawn[:, column] == one).float().mean())
        assert set(drawn[:, column].tolist()) == {one, other}
        # Of two logits 0.1 apart, the larger has probability 1 / (1 + exp(-0.1)) = 0.525; 4,000 draws: sd 0.008.
        assert abs(share - 0.525) < 0.035


def test_a_target_without_a_key_value_cache_is_refused(tmp_path: Path):
    config = MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=4, bos_token_id=None, eos_token_id=1)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    make_tokenizer().save_pretrained(tmp_path / "mamba")
    engine = TransformersEngine(load_target(str(tmp_path / "mamba")), [1], GREEDY, dtype="float32")
    engine.submit(EngineRequest(key="a", prompt_ids=[3, 4], max_new_tokens=1, capture=True))
    with pytest.raises(TargetError, match="key-value cache, found MambaForCausalLM"):
        engine.poll()
