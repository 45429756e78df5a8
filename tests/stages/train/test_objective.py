"""The objective: weights and totals against a loop over blocks and positions."""

# N blocks, G block size, V vocabulary, H hidden width
import math
from itertools import takewhile
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vpd.stages.train.config import TrainConfig
from vpd.stages.train.objective import (
    BlockLabels,
    HeadRows,
    LossParts,
    VocabularySampler,
    block_loss,
    position_weights,
)


class Blocks(NamedTuple):
    """Blocks with at least one label past their prefix."""

    block_size: int
    num_labels: list[int]
    prefixes: list[int]
    tau: float

    @property
    def labeled_NG(self) -> Tensor:
        return torch.tensor([[0 < k <= labels for k in range(self.block_size)] for labels in self.num_labels])

    @property
    def weights_NG(self) -> Tensor:
        labels_NG = torch.zeros_like(self.labeled_NG, dtype=torch.int64)
        return position_weights(BlockLabels(labels_NG, self.labeled_NG, torch.tensor(self.prefixes)), self.tau)


@st.composite
def some_blocks(draw: st.DrawFn) -> Blocks:
    block_size = draw(st.integers(2, 10))
    num_labels = draw(st.lists(st.integers(1, block_size - 1), min_size=1, max_size=6))
    prefixes = [draw(st.integers(0, labels - 1)) for labels in num_labels]
    return Blocks(block_size, num_labels, prefixes, draw(st.floats(0.5, 50)))


def eq7(blocks: Blocks) -> list[list[float]]:
    """w_k = exp(-(k - l - 1) / tau) for labeled k = l+1..G-1."""
    rows = []
    for labels, prefix in zip(blocks.num_labels, blocks.prefixes, strict=True):
        row = [0.0] * blocks.block_size
        for k in range(prefix + 1, labels + 1):
            row[k] = math.exp(-(k - prefix - 1) / blocks.tau)
        rows.append(row)
    return rows


@settings(deadline=None, max_examples=80)
@given(some_blocks())
def test_position_weights_are_eq_7(blocks: Blocks):
    # Exponents of at most 20 in float32: relative errors of 20 * 2^-24.
    for found, expected in zip(blocks.weights_NG.tolist(), eq7(blocks), strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=0)


def test_the_first_predicted_position_weighs_one():
    labeled_NG = torch.tensor([[False, True, True, True]])
    weights = position_weights(BlockLabels(torch.zeros(1, 4, dtype=torch.int64), labeled_NG, torch.tensor([1])), 7.0)
    assert weights[0, :3].tolist() == [0, 0, 1]
    assert float(weights[0, 3]) == pytest.approx(math.exp(-1 / 7))


# The whole loss

N, G, V, H = 6, 6, 19, 7
NUM_LABELS, PREFIXES = [5, 5, 5, 3, 1, 5], [0, 2, 4, 1, 0, 0]


class World(NamedTuple):
    states_NGH: Tensor
    labels_NG: Tensor
    head_VH: Tensor

    @property
    def labels(self) -> BlockLabels:
        k_G = torch.arange(G)
        labeled_NG = (k_G > 0) & (k_G <= torch.tensor(NUM_LABELS)[:, None])
        return BlockLabels(self.labels_NG, labeled_NG, torch.tensor(PREFIXES))


@pytest.fixture
def world() -> World:
    generator = torch.Generator().manual_seed(0)
    states_NGH, head_VH = torch.randn(N, G, H, generator=generator), torch.randn(V, H, generator=generator)
    likeliest_NG = (states_NGH @ head_VH.T).argmax(dim=2)
    labels_NG = torch.randint(V, (N, G), generator=generator)
    # Positions where the drafter is right: all of one block, the first ones of other blocks.
    for block, positions in {0: range(6), 1: range(4), 3: [2], 5: [1, 2]}.items():
        labels_NG[block, positions] = likeliest_NG[block, positions]
    return World(states_NGH, labels_NG, head_VH)


class Softmax(NamedTuple):
    """The tokens over which a softmax runs, and the number of tokens that each stands for."""

    stands_for: dict[int, float]

    def log_probs(self, head_VH: Tensor, state_H: Tensor) -> dict[int, Tensor]:
        likeness = {
            token: count * (head_VH[token].double() @ state_H).exp() for token, count in self.stands_for.items()
        }
        total = torch.stack([*likeness.values()]).sum()
        return {token: (value / total).log() for token, value in likeness.items()}

    def likeliest(self, head_VH: Tensor, state_H: Tensor) -> int:
        return max(self.stands_for, key=lambda token: float(head_VH[token].double() @ state_H.detach()))


def whole(world: World) -> tuple[HeadRows, Softmax]:
    return HeadRows(world.head_VH, None, None), Softmax(dict.fromkeys(range(V), 1.0))


def sampled(world: World) -> tuple[HeadRows, Softmax]:
    occurring = world.labels_NG.unique()
    rows = VocabularySampler(world.head_VH, occurring, 2).draw(torch.Generator().manual_seed(4))
    assert rows.row_of_token is not None
    share = (V - len(occurring)) / 2
    present = (rows.row_of_token >= 0).nonzero().flatten().tolist()
    return rows, Softmax({token: 1.0 if token in occurring.tolist() else share for token in present})


def slow_loss(world: World, states_NGH: Tensor, softmax: Softmax, config: TrainConfig) -> tuple[Tensor, list[int]]:
    """The mean loss, and the number of leading right tokens of each block."""
    sums, weight_sums, accepted = [], [], []
    for n in range(N):
        positions = range(PREFIXES[n] + 1, NUM_LABELS[n] + 1)
        log_probs = {k: softmax.log_probs(world.head_VH, states_NGH[n, k]) for k in positions}
        loss = {k: -log_probs[k][int(world.labels_NG[n, k])] for k in positions}
        right = {k: softmax.likeliest(world.head_VH, states_NGH[n, k]) == int(world.labels_NG[n, k]) for k in positions}
        weight = {k: math.exp(-(k - PREFIXES[n] - 1) / config.tau) for k in positions}
        total = sum(w * loss[k] for k, w in weight.items())
        sums.append(total)
        weight_sums.append(sum(weight.values()))
        accepted.append(len(list(takewhile(right.__getitem__, positions))))
    if config.normalize == "block":
        return torch.stack([total / weight for total, weight in zip(sums, weight_sums, strict=True)]).mean(), accepted
    return torch.stack(sums).sum() / sum(weight_sums), accepted


class Option(NamedTuple):
    id: str
    settings: dict[str, Any]


OPTIONS = [
    Option("decay", {}),
    Option("short-decay", {"tau": 1.5}),
]


@pytest.mark.parametrize("cut", [0, 2, 5])
@pytest.mark.parametrize("normalize", ["block", "batch"])
@pytest.mark.parametrize("vocabulary", [whole, sampled], ids=["whole", "sampled"])
@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.id)
def test_loss_and_gradient_are_those_of_the_loop(
    world: World, option: Option, vocabulary: Any, normalize: str, cut: int
):
    config = TrainConfig.model_validate({"normalize": normalize, **option.settings})
    rows, softmax = vocabulary(world)
    # A step of two passes, each with some of the blocks; their sums are added at the end.
    states_NGH = world.states_NGH.clone().requires_grad_()
    labels = world.labels
    passes = [part for part in (slice(0, cut), slice(cut, None)) if len(states_NGH[part])]
    parts = []
    for part in passes:
        some = BlockLabels(*(field[part] for field in labels))
        parts.append(block_loss(states_NGH[part].flatten(0, 1)[some.predicted_P], some, rows, config))
    totals = LossParts(*(torch.stack(found).sum(dim=0) for found in zip(*parts, strict=True)))
    loss = totals.loss_sum / totals.denominator
    (gradient_NGH,) = torch.autograd.grad(loss, states_NGH)

    slow_NGH = world.states_NGH.double().requires_grad_()
    expected, accepted = slow_loss(world, slow_NGH, softmax, config)
    (expected_NGH,) = torch.autograd.grad(expected, slow_NGH)
    # Sums of about ten float32 terms below 10.
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(gradient_NGH.double(), expected_NGH, rtol=1e-5, atol=2e-6)
    predicted = [labels - prefix for labels, prefix in zip(NUM_LABELS, PREFIXES, strict=True)]
    assert totals.accepted_J.tolist() == [sum(length > j for length in accepted) for j in range(G - 1)]
    assert totals.predicted_J.tolist() == [sum(length > j for length in predicted) for j in range(G - 1)]
    assert len({*accepted}) > 3


def test_the_cases_differ(world: World):
    losses = set()
    for option in OPTIONS:
        for normalize in ("block", "batch"):
            config = TrainConfig.model_validate({"normalize": normalize, **option.settings})
            for _, softmax in (whole(world), sampled(world)):
                losses.add(float(slow_loss(world, world.states_NGH.double(), softmax, config)[0]))
    assert len(losses) == 2 * 2 * len(OPTIONS)
