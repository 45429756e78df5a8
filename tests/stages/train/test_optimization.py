"""Optimizers, schedules and the average of the weights against their formulas, written out in float64."""

# A rows and B columns of a matrix
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import get_scheduler
from vpd.stages.train.config import TrainConfig
from vpd.stages.train.optimization import SCHEDULES, WeightAverage, make_optimizers, make_schedules

LR, DECAY, BETAS = 0.01, 0.3, (0.8, 0.9)
ADAM_EPS = 1e-8
MUON_MOMENTUM, NEWTON_SCHULZ, NUM_ITERATIONS = 0.95, (3.4445, -4.7750, 2.0315), 5
"""The values of https://kellerjordan.github.io/posts/muon/, which torch uses."""
SHAPES = [(8, 24), (24, 8), (16, 16), (1, 12)]


class Weights(nn.Module):
    """Matrices of several shapes, a vector, and a matrix that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator))

        self.matrices = nn.ParameterList(draw(*shape) for shape in SHAPES)
        self.vector = draw(9)
        self.frozen = draw(3, 4).requires_grad_(False)

    @property
    def trained(self) -> list[nn.Parameter]:
        return [*self.matrices, self.vector]


def make_config(**settings: Any) -> TrainConfig:
    return TrainConfig.model_validate({"lr": LR, "weight_decay": DECAY, "betas": BETAS, **settings})


def train(model: Weights, optimizers: list[Optimizer], num_steps: int) -> list[list[np.ndarray]]:
    """Takes steps along random gradients; returns the gradients of each step."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(num_steps):
        for parameter in model.trained:
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 10.0 ** torch.randint(
                -3, 3, parameter.shape, generator=generator
            )
        found.append([as_float64(parameter.grad) for parameter in model.trained])
        for optimizer in optimizers:
            optimizer.step()
    return found


def as_float64(tensor: Tensor | None) -> np.ndarray:
    assert tensor is not None
    return tensor.detach().double().numpy().copy()


def adamw(weight: np.ndarray, gradients: list[np.ndarray], decay: float) -> np.ndarray:
    """Algorithm 2 of arXiv 1711.05101; the weight decay is multiplied by the learning rate, as torch does."""
    mean, square = np.zeros_like(weight), np.zeros_like(weight)
    for step, gradient in enumerate(gradients, start=1):
        mean = BETAS[0] * mean + (1 - BETAS[0]) * gradient
        square = BETAS[1] * square + (1 - BETAS[1]) * gradient**2
        direction = mean / (1 - BETAS[0] ** step) / (np.sqrt(square / (1 - BETAS[1] ** step)) + ADAM_EPS)
        weight = weight - LR * decay * weight - LR * direction
    return weight


def orthogonalised(matrix: np.ndarray) -> np.ndarray:
    """The result of the Newton-Schulz iteration, which changes only the singular values."""
    left, values, right = np.linalg.svd(matrix / np.linalg.norm(matrix), full_matrices=False)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NUM_ITERATIONS):
        values = a * values + b * values**3 + c * values**5
    return left @ np.diag(values) @ right


def muon_directions(gradients: list[np.ndarray]) -> list[np.ndarray]:
    """The direction of each step with Nesterov's momentum, without the learning rate."""
    buffer, found = np.zeros_like(gradients[0]), []
    for gradient in gradients:
        buffer = MUON_MOMENTUM * buffer + gradient
        found.append(orthogonalised(gradient + MUON_MOMENTUM * buffer))
    return found


# Optimizers


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_trained_weight_has_one_optimizer_and_no_other_has_any(optimizer: str):
    model = Weights()
    optimizers = make_optimizers(model, make_config(optimizer=optimizer))
    held = [id(parameter) for each in optimizers for group in each.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.trained)


@pytest.mark.parametrize("num_steps", [1, 4])
def test_adamw_decays_the_matrices_alone(num_steps: int):
    model = Weights()
    before = [as_float64(parameter) for parameter in model.trained]
    frozen = model.frozen.clone()
    gradients = train(model, make_optimizers(model, make_config()), num_steps)
    for i, parameter in enumerate(model.trained):
        expected = adamw(before[i], [step[i] for step in gradients], DECAY if parameter.dim() == 2 else 0.0)
        np.testing.assert_allclose(as_float64(parameter), expected, rtol=2e-6, atol=2e-6)
    assert torch.equal(model.frozen, frozen)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_muon_moves_matrices_along_the_orthogonalised_momentum(num_steps: int):
    model = Weights()
    before = [as_float64(parameter) for parameter in model.matrices]
    gradients = train(model, make_optimizers(model, make_config(optimizer="muon")), num_steps)
    for i, parameter in enumerate(model.matrices):
        expected, rate = before[i], 0.2 * LR * math.sqrt(max(parameter.shape))
        directions = muon_directions([step[i] for step in gradients])
        for direction in directions:
            expected = expected - LR * DECAY * expected - rate * direction
        # The iteration runs in bfloat16, which has 8 bits; its starting values differ by 1e-3.
        error = np.linalg.norm(as_float64(parameter) - expected)
        assert error < 0.03 * rate * np.linalg.norm(np.stack(directions))


def test_muon_leaves_vectors_to_adamw_without_decay():
    model = Weights()
    before = as_float64(model.vector)
    gradients = train(model, make_optimizers(model, make_config(optimizer="muon")), 4)
    expected = adamw(before, [step[-1] for step in gradients], 0.0)
    np.testing.assert_allclose(as_float64(model.vector), expected, rtol=2e-6, atol=2e-6)


def test_a_step_of_muon_is_as_large_as_one_of_adamw():
    """The root mean square of AdamW's steps is 0.2 to 0.4 times the learning rate (arXiv 2502.16982, Eq. 4).

    The iteration leaves singular values between 0.68 and 1.13 where those of the gradient are not tiny.
    """
    generator = torch.Generator().manual_seed(2)
    for shape in [(40, 120), (120, 40), (64, 64)]:
        model = nn.Linear(shape[1], shape[0], bias=False)
        before = model.weight.detach().clone()
        left, _, right = torch.linalg.svd(torch.randn(*shape, generator=generator), full_matrices=False)
        model.weight.grad = left @ torch.diag(torch.linspace(0.3, 3, min(shape))) @ right
        (muon, _) = make_optimizers(Pair(model), make_config(optimizer="muon", weight_decay=0.0))
        muon.step()
        rms = (model.weight.detach() - before).square().mean().sqrt().item()
        assert 0.68 < rms / (0.2 * LR) < 1.13


class Pair(nn.Module):
    """A layer and a norm, so that AdamW has a parameter too."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.norm = layer, nn.RMSNorm(4)


# Schedules


def factor(schedule: str, step: int, num_warmup: int, num_steps: int) -> float:
    if step < num_warmup:
        return step / num_warmup
    progress = (step - num_warmup) / (num_steps - num_warmup)
    return {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}[schedule]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("warmup", [0.0, 0.26, 0.5])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rates_rise_and_fall_as_the_formula_says(schedule: str, warmup: float, optimizer: str):
    config = make_config(schedule=schedule, warmup=warmup, optimizer=optimizer)
    optimizers = make_optimizers(Weights(), config)
    schedules = make_schedules(optimizers, config, num_steps=10)
    assert len(schedules) == len(optimizers)
    for step in range(11):
        expected = LR * factor(schedule, step, {0.0: 0, 0.26: 3, 0.5: 5}[warmup], 10)
        rates = [group["lr"] for each in optimizers for group in each.param_groups]
        assert rates == pytest.approx([expected] * 2, rel=1e-12, abs=1e-18)
        for each in (*optimizers, *schedules):
            each.step()


@pytest.mark.parametrize("num_steps", [1, 7, 40])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(
    ("schedule", "theirs"), [*zip(SCHEDULES, ("cosine", "linear", "constant_with_warmup"), strict=True)]
)
def test_learning_rates_are_those_of_transformers_to_the_last_bit(
    schedule: str, theirs: str, warmup: float, num_steps: int
):
    config = make_config(schedule=schedule, warmup=warmup, optimizer="adamw")
    (one,), (other,) = make_optimizers(Weights(), config), make_optimizers(Weights(), config)
    (ours,) = make_schedules([one], config, num_steps)
    expected = get_scheduler(theirs, other, round(warmup * num_steps), num_steps)
    for _ in range(num_steps + 2):
        assert ours.get_last_lr() == expected.get_last_lr()
        for each in (one, other, ours, expected):
            each.step()


# The average


@pytest.mark.parametrize("decay", [0.05, 0.5, 0.9, 0.999])
def test_the_average_is_that_of_the_loop(decay: float):
    model = Weights()
    average = WeightAverage(model, decay)
    names = [name for name, _ in model.named_parameters()]
    expected = {name: as_float64(parameter) for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(3)
    largest = 0.0
    for step in range(1, 31):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        current = {name: as_float64(parameter) for name, parameter in model.named_parameters()}
        average.update(model, step)
        kept = min(decay, step / (step + 9))
        for name in names:
            expected[name] = kept * expected[name] + (1 - kept) * current[name]
            largest = max(largest, float(np.abs(current[name]).max()))
            assert np.array_equal(as_float64(model.get_parameter(name)), current[name])
    assert [*average.weights] == names
    for name in names:
        assert average.weights[name].dtype == torch.float32
        # Each step rounds a difference, a product and a sum; errors of earlier steps decay.
        bound = 3 * 2.0**-24 * 2 * largest / (1 - min(decay, 30 / 39))
        np.testing.assert_allclose(as_float64(average.weights[name]), expected[name], rtol=0, atol=bound)


def test_the_average_starts_from_a_copy_and_soon_forgets_it():
    model = Weights()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    average = WeightAverage(model, 0.999)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(average.weights[name], value) for name, value in start.items())
    share = 1.0
    for step in range(1, 41):
        average.update(model, step)
        share *= step / (step + 9)
    # 1e-1 after the first step, and 1e-8 after forty.
    for name, value in start.items():
        torch.testing.assert_close(average.weights[name], share * value, rtol=1e-4, atol=0)
    assert share < 1e-8
