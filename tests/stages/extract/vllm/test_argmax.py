"""The target's choices from its last layer's states, for every kind of final norm and LM head."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.kinds import KINDS, save_kind
from support.tiny import VOCAB
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from vpd.data.errors import TargetError
from vpd.stages.extract.target import load_target
from vpd.stages.extract.vllm.argmax import ArgmaxHead, make_final_norm

LEAST_GAP = 1e-3
"""Least difference between the two best logits; a smaller one may be a tie within rounding."""


def states_and_logits(folder: Path) -> tuple[Tensor, Tensor]:
    """Output of the last layer [T, H], and the whole model's logits [T, V]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    caught: list[Tensor] = []

    def catch(layer: nn.Module, arguments: object, output: Tensor | tuple[Tensor, ...]) -> None:
        caught.append(output if isinstance(output, Tensor) else output[0])

    model.model.layers[-1].register_forward_hook(catch)
    token_ids = torch.randint(VOCAB, (1, 300), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        logits_TV = model(token_ids).logits[0]
    return caught[0][0], logits_TV


@pytest.mark.parametrize("name", KINDS)
def test_choices_are_those_of_the_whole_model(name: str, tmp_path: Path):
    folder = save_kind(name, tmp_path / "target")
    states_TH, logits_TV = states_and_logits(folder)
    best_T2 = logits_TV.topk(2, dim=-1).values
    clear_T = best_T2[:, 0] - best_T2[:, 1] > LEAST_GAP * logits_TV.std()
    assert clear_T.float().mean() > 0.98
    found_T = ArgmaxHead(load_target(str(folder)))(states_TH, tokens_per_chunk=77)
    assert torch.equal(found_T[clear_T], logits_TV.argmax(dim=-1)[clear_T])
    assert len(set(found_T.tolist())) > 20


def test_a_class_without_one_final_norm_is_named(tiny_llama: Path):
    target = load_target(str(tiny_llama))
    normless = replace(target)
    normless.__dict__["architecture"] = replace(target.architecture, norm=None)
    with pytest.raises(TargetError, match=r"expected one final norm .* llama, found none.*--engine transformers"):
        make_final_norm(normless, {})
