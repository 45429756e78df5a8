"""Stage two: the training loop, for one run or for several runs that read the same sequences together."""

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
    must_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Trains runs that read the same sequences to their last step; returns whether everything is done.

    A trainer that fails keeps its error in `failure`, and the others go on. If a run ends before its latest
    checkpoint is evaluated, the checkpoint is evaluated when the run is resumed.

    Args:
        on_step: gets the metrics of each trainer's step, unless the step had nothing to learn from.
        on_alpha: gets the acceptance length of each trainer's checkpoint, in the first process.
        must_stop: asked after every step. If it is true in any process, all trainers save and stop.

    Raises:
        NonFiniteError: the last trainer that was left has failed.
    """
    lead = trainers[0]
    evaluate_all(trainers, on_alpha)
    steps = range(lead.step, lead.num_steps)
    with open_feed(trainers, steps) as feed:
        pace = Pace(feed)
        for step in steps:
            results = run_step(trainers, feed)
            pace.add(lead.order.num_tokens(step))
            stopping = bool(_sum(lead.accelerator, int(must_stop())))
            report_step(trainers, results, pace, on_step)
            if (step + 1) % lead.config.log_every == 0:
                pace = Pace(feed)
            saved = [trainer for trainer in trainers if trainer.failure is None and (stopping or is_save_due(trainer))]
            for trainer in saved:
                trainer.save()
            if stopping:
                return step + 1 == lead.num_steps and all(trainer.evaluator is None for trainer in saved)
            evaluate_all(saved, on_alpha)
            if saved:
                pace.restart()
    return True


def open_feed(trainers: Sequence[Trainer], steps: range) -> Feed:
    """The passes of these steps for all trainers; the first trainer's settings say how the cache is read."""
    lead = trainers[0]
    plans = [trainer.plan for trainer in trainers]
    process, num_processes = lead.accelerator.process_index, lead.accelerator.num_processes
    return Feed(lead.cache, lead.rows, lead.order, plans, lead.read, lead.device, steps, process, num_processes)


def report_step(
    trainers: Sequence[Trainer],
    results: Sequence[StepResult | None],
    pace: Pace,
    on_step: Callable[[Trainer, dict[str, Any]], None],
) -> None:
    """Passes on the metrics of each trainer that had something to learn from."""
    for trainer, result in zip(trainers, results, strict=True):
        if result is not None:
            on_step(trainer, metrics(trainer, result, pace))


def is_save_due(trainer: Trainer) -> bool:
    return trainer.step % trainer.config.save_every == 0 or trainer.step == trainer.num_steps


def evaluate_all(trainers: Sequence[Trainer], on_alpha: Callable[[Trainer, float], None]) -> None:
    """Evaluates each trainer's latest checkpoint where that is still to be done."""
    for trainer in trainers:
        alpha = trainer.evaluate()
        if alpha is not None:
            on_alpha(trainer, alpha)


def run_step(trainers: Sequence[Trainer], feed: Feed) -> list[StepResult | None]:
    """One optimizer step of each trainer over the next passes; None of a trainer that has failed or learned nothing."""
    lead = trainers[0]
    for trainer in trainers:
        if trainer.failure is None:
            trainer.begin_step()
    done = own_done = False
    while not done:
        found = Pass([], last=True) if own_done else feed.take()
        own_done = found.last
        # With shards, all processes must make the same number of passes.
        num_waiting = _sum(lead.accelerator, int(not own_done)) if lead.drafter.is_sharded else int(not own_done)
        done = num_waiting == 0
        for i, trainer in enumerate(trainers):
            if trainer.failure is None:
                trainer.add_pass(found.blocks[i] if found.blocks else None, done)
    return [finish_step(trainer, trainers) for trainer in trainers]


def finish_step(trainer: Trainer, trainers: Sequence[Trainer]) -> StepResult | None:
    """The result of `Trainer.finish_step`; None if the trainer has failed, now or before.

    Raises:
        NonFiniteError: the trainer fails now, and all others have failed before.
    """
    if trainer.failure is not None:
        return None
    try:
        return trainer.finish_step()
    except NonFiniteError as error:
        trainer.failure = error.with_traceback(None)  # the traceback would keep the step's tensors in memory
        if all(other.failure is not None for other in trainers):
            raise
        return None


class Pace:
    """Speed of the steps since this object was made; time spent on checkpoints does not count."""

    def __init__(self, feed: Feed):
        self.feed, self.num_tokens, self.seconds = feed, 0, 0.0
        self.waited = feed.seconds_waited
        self.restart()

    def restart(self) -> None:
        """Leaves out the time since the last step."""
        self.since = time.monotonic()

    def add(self, num_tokens: int) -> None:
        """Counts a step that has just ended."""
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


def metrics(trainer: Trainer, result: StepResult, pace: Pace) -> dict[str, Any]:
    """The logged figures of a step."""
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
