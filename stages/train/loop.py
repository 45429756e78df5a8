"""Stage two: trains drafters from a cache, without the target."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from ...data.errors import NonFiniteError
from .feed import Feed, Pass
from .trainer import StepResult, Trainer


def run_together(
    trainers: Sequence[Trainer],
    on_step: Callable[[Trainer, dict[str, Any]], None],
    on_alpha: Callable[[Trainer, float], None] = lambda trainer, alpha: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Runs trainers that read the same sequences to their last step; returns whether all is done.

    A trainer that fails has its error as `failure`, and the others go on. A checkpoint that has not been judged when
    a run ends is judged when it goes on.

    Args:
        on_step: gets the metrics of each trainer's step that had something to learn from.
        on_alpha: gets the acceptance length of each trainer's checkpoint, in the first process.
        should_stop: asked after every step; if it is true in any process, all save and stop.

    Raises:
        NonFiniteError: the last trainer that was left has failed.
    """
    lead = trainers[0]
    accelerator = lead.accelerator
    judge_all(trainers, on_alpha)
    steps = range(lead.step, lead.num_steps)
    plans = [trainer.plan for trainer in trainers]
    with Feed(
        lead.cache,
        lead.rows,
        lead.order,
        plans,
        lead.read,
        lead.device,
        steps,
        accelerator.process_index,
        accelerator.num_processes,
    ) as feed:
        pace = Pace(feed)
        for step in steps:
            results = run_step(trainers, feed)
            pace.add(lead.order.num_tokens(step))
            stop = bool(int(_sum(accelerator, int(should_stop()))))
            found = [metrics(trainer, result, pace) for trainer, result in zip(trainers, results, strict=True)]
            if (step + 1) % lead.config.log_every == 0:
                pace = Pace(feed)
            for trainer, result, line in zip(trainers, results, found, strict=True):
                if result is not None:
                    on_step(trainer, line)
            saved = [trainer for trainer in trainers if trainer.failure is None and (stop or is_save_due(trainer))]
            for trainer in saved:
                trainer.save()
            if stop:
                return step + 1 == lead.num_steps and all(trainer.evaluation is None for trainer in saved)
            judge_all(saved, on_alpha)
            if saved:
                pace.restart()
    return True


def is_save_due(trainer: Trainer) -> bool:
    return trainer.step % trainer.config.save_every == 0 or trainer.step == trainer.num_steps


def judge_all(trainers: Sequence[Trainer], on_alpha: Callable[[Trainer, float], None]) -> None:
    for trainer in trainers:
        alpha = trainer.judge()
        if alpha is not None:
            on_alpha(trainer, alpha)


def run_step(trainers: Sequence[Trainer], feed: Feed) -> list[StepResult | None]:
    """One optimizer step of each trainer over the next passes."""
    lead = trainers[0]
    for trainer in trainers:
        if trainer.failure is None:
            trainer.begin_step()
    done = own_done = False
    while not done:
        found = Pass([], last=True) if own_done else feed.take()
        own_done = found.last
        # Shards come together in every pass, so all processes make the same number of them.
        waiting = _sum(lead.accelerator, int(not own_done)) if lead.drafter.is_sharded else int(not own_done)
        done = waiting == 0
        for i, trainer in enumerate(trainers):
            if trainer.failure is None:
                trainer.add_pass(found.blocks[i] if found.blocks else None, done)
    return [finish_step(trainer, trainers) for trainer in trainers]


def finish_step(trainer: Trainer, trainers: Sequence[Trainer]) -> StepResult | None:
    """What `Trainer.finish_step` gives; None of a trainer that has failed, now or before."""
    if trainer.failure is not None:
        return None
    try:
        return trainer.finish_step()
    except NonFiniteError as error:
        trainer.failure = error.with_traceback(None)  # which would hold on to all of the step
        if all(other.failure is not None for other in trainers):
            raise
        return None


class Pace:
    """Speed of the steps since it was made, without checkpoints."""

    def __init__(self, feed: Feed):
        self.feed, self.num_tokens, self.seconds = feed, 0, 0.0
        self.waited = feed.seconds_waited
        self.restart()

    def restart(self) -> None:
        self.since = time.monotonic()

    def add(self, num_tokens: int) -> None:
        now = time.monotonic()
        self.seconds += now - self.since
        self.since, self.num_tokens = now, self.num_tokens + num_tokens

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def data_wait(self) -> float:
        """Share of the time in which this process waited for sequences."""
        return (self.feed.seconds_waited - self.waited) / self.seconds


def metrics(trainer: Trainer, result: StepResult | None, pace: Pace) -> dict[str, Any]:
    """What is told about a step."""
    if result is None:
        return {}
    pairs = zip(result.accepted_J, result.predicted_J, strict=True)
    return {
        "step": trainer.step,
        "epoch": trainer.step / trainer.order.steps_per_epoch,
        "loss": result.loss,
        "accept_length": sum(result.accepted_J) / result.predicted_J[0],
        "accept_rate": [accepted / predicted if predicted else None for accepted, predicted in pairs],
        "lr": trainer.schedules[0].get_last_lr()[0],
        "grad_norm": result.grad_norm,
        "num_labels": result.num_labels,
        "num_skipped": trainer.num_skipped,
        "tokens_per_second": pace.tokens_per_second,
        "data_wait": pace.data_wait,
    }


def _sum(accelerator: Accelerator, value: int) -> int:
    """The sum of a number over all processes."""
    if accelerator.num_processes == 1:
        return value
    return int(cast(Tensor, accelerator.reduce(torch.tensor(value, device=accelerator.device), "sum")))
