"""SmolLM2-135M-Instruct under the real vLLM: states, and decoding with drafters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.live import check_replay_equals_decoding
from transformers import AutoModelForCausalLM
from vpd.data.cache.arrays import NO_CHOICE
from vpd.data.cache.cache import Cache

pytestmark = [pytest.mark.engine, pytest.mark.smollm2]
BFLOAT16_UNIT = 2.0**-7


def test_smollm2_generated_states_equal_a_reforward(smollm2_run: dict[str, Any]):
    cache = Cache.open(smollm2_run["cache_folder"])
    model = AutoModelForCausalLM.from_pretrained(smollm2_run["target_folder"], dtype=torch.float32)
    assert cache.manifest.layer_ids == (1, 14, 27)
    for row in cache.rows[:3]:
        sequence = cache.read(row)
        ids_T = sequence.token_ids_S[: row.num_tokens]
        with torch.inference_mode():
            out = model(ids_T[None], output_hidden_states=True)
        for k, layer_id in enumerate(cache.manifest.layer_ids):
            ours, theirs = sequence.hidden_TKH[:, k].float(), out.hidden_states[layer_id + 1][0]
            error = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)
            assert error.max() < 2 * BFLOAT16_UNIT, f"layer {layer_id}: {error.max():.4f}"
        answer = slice(row.prompt_len - 1, None)
        assert torch.equal(sequence.target_argmax_T[answer], out.logits[0, answer].argmax(dim=-1))
        assert (sequence.target_argmax_T[: answer.start] == NO_CHOICE).all()
        assert torch.equal(sequence.token_ids_S[row.prompt_len :], sequence.target_argmax_T[row.prompt_len - 1 :])


@pytest.mark.parametrize("policy", ["paper", "runner-up"])
def test_smollm2(smollm2_run: dict[str, Path], policy: str):
    alpha = check_replay_equals_decoding(smollm2_run, policy=policy, num_sequences=2, max_new_tokens=24)
    assert alpha["first"] > 1.1
