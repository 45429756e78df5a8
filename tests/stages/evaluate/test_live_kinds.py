"""What the live check asks of the target, for targets that keep their past in different ways."""

from pathlib import Path

import pytest
import torch
from support.extracting import answer
from support.kinds import save_kind
from support.own_code import save_own_code
from support.tiny import NUM_LAYERS
from vpd.stages.drafter.blocks import NO_TOKEN
from vpd.stages.drafter.target_pieces import TargetPieces
from vpd.stages.evaluate.config import EvalConfig
from vpd.stages.evaluate.live import LiveDecoder
from vpd.stages.extract.engine import EngineRequest, Sampling
from vpd.stages.extract.layer_outputs import LayerOutputs
from vpd.stages.extract.target import load_target
from vpd.stages.extract.transformers_engine import TransformersEngine, load_model

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, seed=0)
LAYER_IDS = (0, 2, NUM_LAYERS - 1)
PROMPT_IDS = list(range(20, 45))
OTHER = 19
"""A token that none of the answers begins with."""
BF16_UNIT = 2.0**-7


# Full attention, a sliding window, experts, recurrent layers of two forms, a text tower, and code of the folder.
@pytest.mark.parametrize(
    "name", ["Llama, tied", "Gemma 3", "gpt-oss", "DeepSeek-V3", "Qwen3-Next", "Bamba", "Qwen3-VL", "own code"]
)
def test_verification_commits_the_answer_and_gives_its_states(
    name: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    is_own = name == "own code"
    folder = save_own_code(tiny_llama, tmp_path, monkeypatch) if is_own else save_kind(name, tmp_path / "target")
    target = load_target(str(folder), trust_remote_code=is_own)
    engine = TransformersEngine(target, LAYER_IDS, GREEDY, dtype="float32")
    requests = [EngineRequest(key="answer", prompt_ids=PROMPT_IDS, max_new_tokens=9, capture=True)]
    expected = answer(engine, requests)["answer"]
    answer_ids = expected.output_ids
    assert len(answer_ids) == 9
    assert OTHER not in answer_ids

    model = load_model(target, torch.float32).eval()
    outputs = LayerOutputs(model, NUM_LAYERS, LAYER_IDS)
    pieces = TargetPieces(torch.zeros(1, 1), torch.zeros(1, 1))
    # The drafters have no part in verification.
    decoder = LiveDecoder(model, pieces, None, None, outputs, EvalConfig())  # pyright: ignore[reportArgumentType]
    with torch.inference_mode():
        choices, features, past = decoder.step([PROMPT_IDS], 0, None)
        tokens, parts = [*PROMPT_IDS, int(choices[0, -1])], [features[0]]
        for right in (2, 0, 3):  # tokens of the best candidate that are the target's
            rest = answer_ids[len(tokens) - len(PROMPT_IDS) :]
            candidates = [[OTHER, OTHER, NO_TOKEN], [*rest[:right], OTHER, OTHER, OTHER][:3]]
            committed = decoder.verify(tokens, torch.tensor(candidates), past)
            assert committed == rest[: right + 1]
            _, features, past = decoder.step([[tokens[-1], *committed[:-1]]], len(tokens) - 1, past)
            tokens += committed
            parts.append(features[0])
    assert tokens == [*PROMPT_IDS, *answer_ids[: len(tokens) - len(PROMPT_IDS)]]
    assert expected.hidden_TKH is not None
    states_TD = torch.cat(parts)
    # Both are rounded to bfloat16, after sums in another order.
    torch.testing.assert_close(
        states_TD, expected.hidden_TKH.flatten(1).float()[: len(states_TD)], rtol=BF16_UNIT, atol=1e-3
    )
