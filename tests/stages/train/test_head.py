"""The chunked head and its sampled vocabulary against the full softmax written out."""

# P positions, V vocabulary, H hidden width
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from vpd.stages.drafter import target_pieces
from vpd.stages.train.objective import HeadRows, VocabularySampler, head_losses

P, V, H = 11, 23, 6


class Head(NamedTuple):
    states_PH: Tensor
    labels_P: Tensor
    weights_P: Tensor
    """Factors of the positions' losses."""
    head_VH: Tensor


@pytest.fixture
def head() -> Head:
    generator = torch.Generator().manual_seed(0)
    states_PH, head_VH = torch.randn(P, H, generator=generator), torch.randn(V, H, generator=generator)
    labels_P = torch.randint(V, (P,), generator=generator)
    labels_P[::3] = (states_PH @ head_VH.T).argmax(dim=1)[::3]
    return Head(states_PH, labels_P, torch.rand(P, generator=generator), head_VH)


def full_losses(head: Head) -> tuple[Tensor, Tensor]:
    """Cross-entropy over all logits in float64, and the gradient of its weighted sum."""
    states_PH = head.states_PH.double().requires_grad_()
    losses_P = F.cross_entropy(states_PH @ head.head_VH.double().T, head.labels_P, reduction="none")
    (gradient_PH,) = torch.autograd.grad(losses_P @ head.weights_P.double(), states_PH)
    return losses_P.detach(), gradient_PH


def found_losses(head: Head, rows: HeadRows) -> tuple[Tensor, Tensor, list[bool]]:
    """Losses, the gradient of their weighted sum, and which labels are the most likely token."""
    states_PH = head.states_PH.clone().requires_grad_()
    result = head_losses(states_PH, head.labels_P, rows)
    (gradient_PH,) = torch.autograd.grad(result.loss_P @ head.weights_P, states_PH)
    assert not result.right_P.requires_grad
    return result.loss_P.detach(), gradient_PH, result.right_P.tolist()


def all_rows(head: Head) -> HeadRows:
    return HeadRows(head.head_VH, None, None)


def every_token_sampled(head: Head) -> HeadRows:
    """A sample of all tokens, in another order than the vocabulary's."""
    occurring = head.labels_P.unique()
    return VocabularySampler(head.head_VH, occurring, V).draw(torch.Generator().manual_seed(0))


# Sums of 6 products and of 23 exponentials in float32 with logits below 10: errors of about 1e-6.
TOLERANCE = 1e-5


@pytest.mark.parametrize("positions_per_chunk", [1024, P, 4, 1])
@pytest.mark.parametrize("rows_of", [all_rows, every_token_sampled], ids=["all-rows", "every-token-sampled"])
def test_loss_and_gradient_are_those_of_the_full_cross_entropy(
    head: Head, rows_of, positions_per_chunk: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(target_pieces, "LOGITS_ON_CPU", positions_per_chunk * V)
    loss_P, gradient_PH, right = found_losses(head, rows_of(head))
    expected_P, expected_PH = full_losses(head)
    torch.testing.assert_close(loss_P.double(), expected_P, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(gradient_PH.double(), expected_PH, rtol=TOLERANCE, atol=TOLERANCE)
    likeliest = [max(range(V), key=lambda v: float(head.head_VH[v] @ state)) for state in head.states_PH]
    expected_right = [label == token for label, token in zip(head.labels_P.tolist(), likeliest, strict=True)]
    assert right == expected_right
    assert 0 < sum(expected_right) < P


@pytest.mark.parametrize("soft_cap", [0.5, 3.0, 30.0])
def test_a_capped_head_has_the_loss_of_capped_logits(head: Head, soft_cap: float):
    states_PH = head.states_PH.double().requires_grad_()
    logits_PV = soft_cap * torch.tanh(states_PH @ head.head_VH.double().T / soft_cap)
    expected_P = F.cross_entropy(logits_PV, head.labels_P, reduction="none")
    (expected_PH,) = torch.autograd.grad(expected_P @ head.weights_P.double(), states_PH)
    sampled = VocabularySampler(head.head_VH, head.labels_P.unique(), V, soft_cap)
    for rows in (all_rows(head)._replace(soft_cap=soft_cap), sampled.draw(torch.Generator().manual_seed(0))):
        loss_P, gradient_PH, _ = found_losses(head, rows)
        torch.testing.assert_close(loss_P.double(), expected_P.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient_PH.double(), expected_PH, rtol=1e-4, atol=1e-5)


def test_no_position_gives_no_loss(head: Head):
    states_PH = head.states_PH[:0].clone().requires_grad_()
    result = head_losses(states_PH, head.labels_P[:0], all_rows(head))
    result.loss_P.sum().backward()
    assert (len(result.loss_P), len(result.right_P)) == (0, 0)
    assert states_PH.grad is not None


def test_bfloat16_rows_give_float32_losses(head: Head):
    # bfloat16 has 8 bits: logits below 10, and so the losses, have errors of about 0.02. A gradient is also multiplied
    # by a head row of size 1 or 2.
    loss_P, gradient_PH, _ = found_losses(head, HeadRows(head.head_VH.bfloat16(), None, None))
    expected_P, expected_PH = full_losses(head)
    assert (loss_P.dtype, gradient_PH.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(loss_P.double(), expected_P, rtol=0, atol=0.05)
    torch.testing.assert_close(gradient_PH.double(), expected_PH, rtol=0, atol=0.05)


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
    expected = []
    for state, label in zip(states_PH, head.labels_P, strict=True):
        likeness = (head.head_VH[present].double() @ state).exp()
        expected.append(-((head.head_VH[label].double() @ state).exp() / (scale * likeness).sum()).log())
    expected_P = torch.stack(expected)
    (expected_PH,) = torch.autograd.grad(expected_P @ head.weights_P.double(), states_PH)
    loss_P, gradient_PH, _ = found_losses(head, rows)
    torch.testing.assert_close(loss_P.double(), expected_P.detach(), rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(gradient_PH.double(), expected_PH, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("num_sampled", [1, 4])
def test_the_sampled_denominator_is_the_full_one_on_average(head: Head, num_sampled: int):
    sampler = VocabularySampler(head.head_VH, occurring_tokens(head), num_sampled)
    generator = torch.Generator().manual_seed(1)
    state_1H, label_1 = head.states_PH[:1], head.labels_P[:1]
    label_logit = float(head.head_VH[label_1[0]].double() @ state_1H[0].double())
    denominators = []
    for _ in range(1500):
        loss = float(head_losses(state_1H, label_1, sampler.draw(generator)).loss_P)
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
    # Three tokens: the label, which is the likeliest, and a sample of one of the two others, which counts double in the
    # softmax's denominator. Scaling must not change which token is the likeliest.
    head_VH = torch.tensor([[1.0], [0.9], [0.9]])
    rows = VocabularySampler(head_VH, torch.tensor([0]), 1).draw(torch.Generator().manual_seed(0))
    assert head_losses(torch.ones(1, 1), torch.tensor([0]), rows).right_P.tolist() == [True]
