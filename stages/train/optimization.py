"""Optimizers, learning rate schedules, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .config import TrainConfig

SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "cosine": lambda step, num_steps: 0.5 * (1.0 + math.cos(math.pi * (step / max(1, num_steps)))),
    "linear": lambda step, num_steps: (num_steps - step) / max(1, num_steps),
    "constant": lambda step, num_steps: 1.0,
}
"""Schedule -> share of the learning rate in a step; steps are counted from the end of the warmup."""


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[Optimizer]:
    """AdamW for all weights, or Muon for the matrices and AdamW for the rest; only matrices decay."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.dim() == 2]
    others = [parameter for parameter in parameters if parameter.dim() != 2]
    if config.optimizer == "muon":
        # Scaled so that a step is as large as AdamW's, and AdamW's learning rates fit.
        muon = Muon(matrices, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
        return [muon, AdamW(others, lr=config.lr, betas=config.betas, weight_decay=0.0)]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [AdamW(groups, lr=config.lr, betas=config.betas)]


def make_schedules(optimizers: Iterable[Optimizer], config: TrainConfig, num_steps: int) -> list[LRScheduler]:
    """One learning rate schedule for each optimizer: a linear warmup, then the schedule of the settings.

    The schedules are those of transformers' `get_scheduler`, whose import takes longer than that of all else that
    training needs.
    """
    num_warmup, schedule = round(config.warmup * num_steps), SCHEDULES[config.schedule]

    def share(step: int) -> float:
        if step < num_warmup:
            return step / num_warmup
        return max(0.0, schedule(step - num_warmup, num_steps - num_warmup))

    return [LambdaLR(each, share) for each in optimizers]


class WeightAverage:
    """The exponential moving average of the weights of a model in training."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def update(self, model: nn.Module, step: int) -> None:
        """Adds the weights after a step, counted from 1. Early steps weigh more, so that the start fades soon."""
        decay = min(self.decay, step / (step + 9))
        weights = [parameter.detach() for parameter in model.parameters()]
        get_ema_multi_avg_fn(decay)([*self.weights.values()], weights, step)
