"""The objective: weights, totals and the chunked head against formulas written out."""

# N blocks, G block size, P labelled positions, V vocabulary, H hidden width
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from vpd.stages.train import objective
from vpd.stages.train.objective import (
    HeadRows,
    VocabularySampler,
    head_loss,
    normalised,
    position_weights,
)


class Blocks(NamedTuple):
    """Blocks with at least one label past their prefix."""

    block_size: int
    num_labels: list[int]
    prefixes: list[int]
    tau: float

    @property
    def labelled_NG(self) -> Tensor:
        return torch.tensor([[0 < k <= labels for k in range(self.block_size)] for labels in self.num_labels])

    @property
    def weights_NG(self) -> Tensor:
        return position_weights(self.labelled_NG, torch.tensor(self.prefixes), self.tau)


@st.composite
def some_blocks(draw: st.DrawFn) -> Blocks:
    block_size = draw(st.integers(2, 10))
    num_labels = draw(st.lists(st.integers(1, block_size - 1), min_size=1, max_size=6))
    prefixes = [draw(st.integers(0, labels - 1)) for labels in num_labels]
    return Blocks(block_size, num_labels, prefixes, draw(st.floats(0.5, 50)))


def eq7(blocks: Blocks) -> list[list[float]]:
    """w_k = exp(-(k - l - 1) / tau) for k = l+1..G-1, where there is a label."""
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
    weights = position_weights(torch.tensor([[False, True, True, True]]), torch.tensor([1]), 7.0)
    assert weights[0, :3].tolist() == [0, 0, 1]
    assert float(weights[0, 3]) == pytest.approx(math.exp(-1 / 7))


@settings(deadline=None, max_examples=80)
@given(some_blocks(), st.sampled_from(["block", "batch"]), st.integers(0, 100), st.integers(0, 6))
def test_the_total_over_several_sequences_is_the_mean_loss(blocks: Blocks, normalise: str, seed: int, cut: int):
    # As in a step: the blocks come in two sequences, each normalised by itself, and sums meet only at the end.
    losses = torch.rand(len(blocks.num_labels), blocks.block_size, generator=torch.Generator().manual_seed(seed))
    total = denominator = 0.0
    for part in (slice(0, cut), slice(cut, None)):
        if len(blocks.weights_NG[part]):
            weights_NG, share = normalised(blocks.weights_NG[part], normalise)
            total += float((weights_NG * losses[part]).sum())
            denominator += float(share)
    weights, losses_NG = eq7(blocks), losses.tolist()
    weighted = [
        sum(weight * loss for weight, loss in zip(row, row_losses, strict=True))
        for row, row_losses in zip(weights, losses_NG, strict=True)
    ]
    if normalise == "block":
        expected = sum(value / sum(row) for value, row in zip(weighted, weights, strict=True)) / len(weights)
    else:
        expected = sum(weighted) / sum(map(sum, weights))
    assert total / denominator == pytest.approx(expected, rel=1e-5)


# The head

P, V, H = 11, 23, 6


class Head(NamedTuple):
    states_PH: Tensor
    labels_P: Tensor
    weights_P: Tensor
    head_VH: Tensor


@pytest.fixture
def head() -> Head:
    generator = torch.Generator().manual_seed(0)
    states_PH, head_VH = torch.randn(P, H, generator=generator), torch.randn(V, H, generator=generator)
    labels_P = torch.randint(V, (P,), generator=generator)
    labels_P[::3] = (states_PH @ head_VH.T).argmax(dim=1)[::3]
    return Head(states_PH, labels_P, torch.rand(P, generator=generator), head_VH)


def full_loss(head: Head, scale: float = 1.0) -> tuple[float, Tensor]:
    """Weighted cross-entropy over all logits in float64, and `scale` times its gradient."""
    states_PH = head.states_PH.double().requires_grad_()
    losses_P = F.cross_entropy(states_PH @ head.head_VH.double().T, head.labels_P, reduction="none")
    loss = (losses_P * head.weights_P.double()).sum()
    (gradient_PH,) = torch.autograd.grad(loss * scale, states_PH)
    return float(loss.detach()), gradient_PH


def all_rows(head: Head) -> HeadRows:
    return HeadRows(head.head_VH, None, None)


def every_token_sampled(head: Head) -> HeadRows:
    """A sample that leaves nothing out, its rows in another order than the vocabulary's."""
    occurring = head.labels_P.unique()
    return VocabularySampler(head.head_VH, occurring, V).draw(torch.Generator().manual_seed(0))


# Sums of 6 products and of 23 exponentials in float32, where no logit exceeds 10: errors of some 1e-6.
TOLERANCE = 1e-5


@pytest.mark.parametrize("positions_per_chunk", [1024, P, 4, 1])
@pytest.mark.parametrize("rows_of", [all_rows, every_token_sampled], ids=["all-rows", "every-token-sampled"])
def test_loss_and_gradient_are_those_of_the_full_cross_entropy(
    head: Head, rows_of, positions_per_chunk: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(objective, "POSITIONS_PER_CHUNK", positions_per_chunk)
    states_PH = head.states_PH.clone().requires_grad_()
    result = head_loss(states_PH, head.labels_P, head.weights_P, rows_of(head))
    (result.loss_sum * 3.0).backward()
    expected, gradient_PH = full_loss(head, scale=3.0)
    assert states_PH.grad is not None
    assert float(result.loss_sum.detach()) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(states_PH.grad.double(), gradient_PH, rtol=TOLERANCE, atol=TOLERANCE)
    likeliest = [max(range(V), key=lambda v: float(head.head_VH[v] @ state)) for state in head.states_PH]
    expected_right = [label == token for label, token in zip(head.labels_P.tolist(), likeliest, strict=True)]
    assert result.right_P.tolist() == expected_right
    assert 0 < sum(expected_right) < P


def test_a_position_of_weight_zero_counts_for_nothing(head: Head):
    weights_P = head.weights_P.clone()
    weights_P[2] = 0
    states_PH = head.states_PH.clone().requires_grad_()
    head_loss(states_PH, head.labels_P, weights_P, all_rows(head)).loss_sum.backward()
    assert states_PH.grad is not None
    assert bool((states_PH.grad[2] == 0).all())
    assert bool((states_PH.grad[3] != 0).all())


def test_bfloat16_rows_give_float32_sums(head: Head):
    # bfloat16 keeps 8 bits: logits below 10 are off by some 0.02, and so are the 11 losses (their weighted sum is
    # near 20); a gradient also passes a head row of size 1 or 2.
    states_PH = head.states_PH.clone().requires_grad_()
    rows = HeadRows(head.head_VH.bfloat16(), None, None)
    loss = head_loss(states_PH, head.labels_P, head.weights_P, rows).loss_sum
    loss.backward()
    expected, gradient_PH = full_loss(head)
    assert states_PH.grad is not None
    assert (loss.dtype, states_PH.grad.dtype) == (torch.float32, torch.float32)
    assert float(loss.detach()) == pytest.approx(expected, rel=0.02)
    torch.testing.assert_close(states_PH.grad.double(), gradient_PH, rtol=0, atol=0.05)


# Sampled vocabulary


def occurring_tokens(head: Head) -> Tensor:
    return torch.cat([head.labels_P, torch.tensor([0, V - 1])]).unique()


@pytest.mark.parametrize("num_sampled", [0, 1, 5, V])
def test_a_sample_holds_every_occurring_token_and_distinct_others(head: Head, num_sampled: int):
    occurring = occurring_tokens(head)
    num_others = V - len(occurring)
    rows = VocabularySampler(head.head_VH, occurring, num_sampled).draw(torch.Generator().manual_seed(3))
    assert rows.row_of_token is not None
    assert rows.log_scale_V is not None
    rows_of = rows.row_of_token.tolist()
    present = [token for token in range(V) if rows_of[token] >= 0]
    assert set(occurring.tolist()) <= set(present)
    assert sorted(rows_of[token] for token in present) == list(range(len(rows.head_VH)))
    num_sampled = min(num_sampled, num_others)
    assert len(present) == len(occurring) + num_sampled
    for token in present:
        assert torch.equal(rows.head_VH[rows_of[token]], head.head_VH[token])
        stands_for = 1 if token in occurring.tolist() else num_others / num_sampled
        assert math.exp(float(rows.log_scale_V[rows_of[token]])) == pytest.approx(stands_for)


def test_the_sampled_loss_and_gradient_are_those_of_the_scaled_softmax(head: Head):
    occurring = occurring_tokens(head)
    rows = VocabularySampler(head.head_VH, occurring, 3).draw(torch.Generator().manual_seed(3))
    assert rows.row_of_token is not None
    present = [token for token in range(V) if rows.row_of_token[token] >= 0]
    scale = torch.tensor([1.0 if t in occurring.tolist() else (V - len(occurring)) / 3 for t in present]).double()
    states_PH = head.states_PH.double().requires_grad_()
    expected = torch.zeros((), dtype=torch.float64)
    for state, label, weight in zip(states_PH, head.labels_P, head.weights_P, strict=True):
        likeness = (head.head_VH[present].double() @ state).exp()
        label_likeness = (head.head_VH[label].double() @ state).exp()
        expected = expected - weight * (label_likeness / (scale * likeness).sum()).log()
    expected.backward()
    found_PH = head.states_PH.clone().requires_grad_()
    found = head_loss(found_PH, head.labels_P, head.weights_P, rows).loss_sum
    found.backward()
    assert found_PH.grad is not None
    assert states_PH.grad is not None
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(found_PH.grad.double(), states_PH.grad, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("num_sampled", [1, 4])
def test_the_sampled_denominator_is_the_full_one_on_average(head: Head, num_sampled: int):
    sampler = VocabularySampler(head.head_VH, occurring_tokens(head), num_sampled)
    generator = torch.Generator().manual_seed(1)
    state_1H, label_1 = head.states_PH[:1], head.labels_P[:1]
    label_logit = float(head.head_VH[label_1[0]].double() @ state_1H[0].double())
    denominators = []
    for _ in range(1500):
        loss = float(head_loss(state_1H, label_1, torch.ones(1), sampler.draw(generator)).loss_sum)
        denominators.append(math.exp(loss + label_logit))
    full = math.fsum(math.exp(float(row.double() @ state_1H[0].double())) for row in head.head_VH)
    mean = sum(denominators) / len(denominators)
    deviation = (sum((value - mean) ** 2 for value in denominators) / len(denominators)) ** 0.5
    assert deviation > 0
    assert abs(mean - full) < 4.5 * deviation / len(denominators) ** 0.5


def test_draws_follow_the_generator(head: Head):
    sampler = VocabularySampler(head.head_VH, occurring_tokens(head), 4)
    first, same, other = (sampler.draw(torch.Generator().manual_seed(seed)).row_of_token for seed in (1, 1, 2))
    assert first is not None
    assert same is not None
    assert other is not None
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_a_sampled_token_does_not_win_by_the_tokens_it_stands_for():
    # Three tokens: the label, likelier than any other, and a sample of one of the two others, which counts double
    # in the softmax's denominator. Whether a label is the most likely token is a matter of its logit.
    head_VH = torch.tensor([[1.0], [0.9], [0.9]])
    rows = VocabularySampler(head_VH, torch.tensor([0]), 1).draw(torch.Generator().manual_seed(0))
    assert head_loss(torch.ones(1, 1), torch.tensor([0]), torch.ones(1), rows).right_P.tolist() == [True]
