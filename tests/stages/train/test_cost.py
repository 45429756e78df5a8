"""The cost of training against PyTorch's count of operations, and against a loop over sequences."""

# T context tokens, N blocks, G block size
from dataclasses import replace

import pytest
import torch
from support.plain_drafter import random_drafter
from support.tiny import SHAPE
from torch.utils.flop_counter import FlopCounterMode
from vpd.stages.train.config import TrainConfig
from vpd.stages.train.cost import training_cost, training_flops


@pytest.mark.parametrize(
    ("num_layers", "num_tokens", "num_blocks", "num_labels"), [(1, 7, 1, 3), (2, 40, 5, 9), (3, 5, 12, 12)]
)
def test_operations_are_those_that_pytorch_counts(num_layers: int, num_tokens: int, num_blocks: int, num_labels: int):
    """One block per sequence, at the end of its context, so that attention masks nothing."""
    shape = replace(SHAPE, num_layers=num_layers)
    drafter = random_drafter(shape)
    drafter.attention = "structured"
    G, H = shape.block_size, shape.hidden_size
    head_VH = torch.randn(shape.vocab_size, H)
    with FlopCounterMode(display=False) as counter:
        for _ in range(num_blocks):
            context = drafter.context(torch.randn(num_tokens, len(shape.target_layer_ids) * H))
            states_NGH = drafter(torch.randn(1, G, H), torch.tensor([num_tokens]), context)
            states_NGH.sum().backward()
        labeled_PH = torch.randn(num_labels, H, requires_grad=True)
        (labeled_PH @ head_VH.T).sum().backward()
    found = training_flops(shape, num_blocks * num_tokens, num_blocks, num_labels, num_blocks * num_tokens)
    assert counter.get_total_flops() == found


def test_a_run_costs_what_its_sequences_do():
    config = TrainConfig(max_len=50, num_anchors=30, batch_tokens=100, epochs=2.0, holdout=0.25)
    lengths = [10.0, 40.0, 80.0, 20.0]
    cost = training_cost(SHAPE, config, lengths, 400)
    read = [min(length, 50) for length in lengths]
    assert cost.num_steps == 2 * -(-300 * sum(read) // 4 // 100)
    assert cost.num_tokens == pytest.approx(2 * 300 * sum(read) / 4)
    expected = 0.0
    for length in read:
        blocks = min(length, 30)
        expected += training_flops(SHAPE, length, blocks, blocks * (SHAPE.block_size - 1), blocks * length / 2)
    assert cost.flops == pytest.approx(expected * 2 * 300 / 4)
    assert cost.gpu_hours(tflops=2.0, utilization=0.5) == pytest.approx(cost.flops / 1e12 / 3600)


def test_steps_given_are_steps_paid():
    config = TrainConfig(batch_tokens=100, max_steps=7, holdout=0.0)
    cost = training_cost(SHAPE, config, [50.0], 10)
    assert (cost.num_steps, cost.num_tokens) == (7, 7 * 100)
