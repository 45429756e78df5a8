"""Stage two: trains a drafter from a cache, without the target."""

# T context tokens, N blocks, G block size, D context features, H hidden width
from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import get_scheduler

from ...data.cache.drafts import FirstDrafts
from ...data.cache.index import SequenceRow
from ...data.cache.reader import CachedSequence, Request, read_ahead
from ...data.cache.store import Cache
from ...data.errors import VpdError
from ..config import ReadConfig, TrainConfig
from ..drafter.checkpoint import load_drafter, save_drafter
from ..drafter.model import Drafter
from ..drafter.shape import DrafterShape
from ..drafter.target_pieces import TargetPieces
from .checkpoints import (
    STATE,
    STATE_VERSION,
    checkpoint_path,
    find_drafter,
    keep_latest,
    list_checkpoints,
    load_state,
    note_alpha,
)
from .objective import HeadRows, VocabularySampler, block_loss
from .samples import (
    DataOrder,
    SequenceBlocks,
    TrainingBlocks,
    counter_generator,
    draw_blocks,
    feature_rms,
    label_tokens,
    pack,
)

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step saw, over all processes."""

    loss: float
    grad_norm: float
    first_accuracy: float
    """Share of blocks whose first predicted token is right: the chance that a branch gains a token."""
    num_labels: int


class Trainer:
    """Everything that a run holds: drafter, optimizer, schedule, data order."""

    def __init__(
        self,
        cache: Cache,
        rows: Sequence[SequenceRow],
        drafts: FirstDrafts | None,
        shape: DrafterShape,
        config: TrainConfig,
        run: Path,
        read: ReadConfig,
        evaluate: Callable[[Path], float] | None = None,
    ):
        """
        Args:
            evaluate: the acceptance length of a checkpoint on held-out sequences; None: it is not asked for.
        """
        self.evaluate = evaluate
        self.cache, self.rows, self.drafts, self.shape = cache, rows, drafts, shape
        self.config, self.run, self.read = config, run, read
        self.accelerator = Accelerator(mixed_precision=choose_precision(config.precision))
        self.device = self.accelerator.device
        dtype = torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else torch.float32
        self.pieces = TargetPieces.load(cache.target_folder, device=self.device, dtype=dtype)
        self.feature_rms_D = feature_rms(cache, rows).to(self.device)
        self.drafter = make_drafter(shape, config, self.feature_rms_D.cpu()).to(self.device).train()
        self.optimizer = torch.optim.AdamW(
            self.drafter.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        per_step = config.batch_size * self.accelerator.num_processes
        self.order = DataOrder(len(rows), per_step, config.seed)
        self.num_steps = config.max_steps or max(1, round(config.epochs * self.order.steps_per_epoch))
        self.schedule = get_scheduler(
            SCHEDULES[config.schedule], self.optimizer, round(config.warmup * self.num_steps), self.num_steps
        )
        self.vocabulary = None
        if config.num_sampled_tokens:
            self.vocabulary = VocabularySampler(
                self.pieces.head_VH, label_tokens(cache, rows), config.num_sampled_tokens
            )
        self.step = 0

    def resume(self) -> None:
        """Goes on from the run's latest checkpoint, if there is one."""
        checkpoints = list_checkpoints(self.run)
        if not checkpoints:
            return
        state = load_state(checkpoints[-1])
        self.drafter.load_state_dict(state["weights"])
        self.feature_rms_D = state["feature_rms"].to(self.device)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step = state["step"]

    def train(self, on_step: Callable[[dict[str, Any]], None]) -> None:
        """Runs to the last step; `on_step` gets the metrics of each step that had something to learn from."""
        started, num_labels = time.monotonic(), 0
        with closing(
            read_ahead(self.cache, self.requests(), self.read.num_threads, self.read.num_buffers)
        ) as sequences:
            while self.step < self.num_steps:
                result = self.train_step(sequences)
                self.step += 1
                found: dict[str, Any] = {}
                if result is not None:
                    num_labels += result.num_labels
                    found = self.metrics(result, num_labels / (time.monotonic() - started))
                if self.step % self.config.save_every == 0 or self.step == self.num_steps:
                    found |= self.save()
                if result is not None:
                    on_step(found)

    def own_indices(self, step: int) -> list[int]:
        """This process's share of a step's sequences."""
        return self.order.indices(step)[self.accelerator.process_index :: self.accelerator.num_processes]

    def requests(self) -> Iterator[Request]:
        """What this process reads from here to the last step, in order."""
        for step in range(self.step, self.num_steps):
            verify = self.read.verify == "always"
            verify |= self.read.verify == "first-epoch" and step < self.order.steps_per_epoch
            for index in self.own_indices(step):
                yield Request(self.rows[index], verify)

    def train_step(self, sequences: Iterator[CachedSequence]) -> StepResult | None:
        """One optimizer step over the next sequences; None if no sequence of the step has an anchor."""
        self.optimizer.zero_grad()
        rows = self.head_rows()
        totals = torch.zeros(5, device=self.device, dtype=torch.float64)
        indices = self.own_indices(self.step)
        for blocks in self.passes(islice(sequences, len(indices))):
            totals += self.backward(blocks, rows)
        totals = self.sum_over_processes(totals)
        loss_sum, denominator, num_right, num_blocks, num_labels = totals.tolist()
        grad_norm = 0.0
        if num_blocks:
            grad_norm = self.average_gradient(denominator)
            self.check_finite(loss_sum, grad_norm, indices)
        # Without a gradient this changes no weight, and the schedule goes on.
        self.optimizer.step()
        self.schedule.step()
        if not num_blocks:
            return None
        return StepResult(loss_sum / denominator, grad_norm, num_right / num_blocks, int(num_labels))

    def passes(self, sequences: Iterator[CachedSequence]) -> Iterator[TrainingBlocks]:
        """The blocks of a step's sequences, packed up to `tokens_per_pass`."""
        block_size, mask_token_id = self.shape.block_size, self.shape.mask_token_id
        waiting: list[SequenceBlocks] = []
        num_waiting = 0
        for sequence in sequences:
            drawn = draw_blocks(sequence, self.drafts, self.config, block_size, self.step, self.device)
            if drawn is None:
                continue
            size = len(drawn.features_TD) + drawn.tokens_NG.numel()
            if waiting and num_waiting + size > self.config.tokens_per_pass:
                yield pack(waiting, self.config, block_size, mask_token_id)
                waiting, num_waiting = [], 0
            waiting.append(drawn)
            num_waiting += size
        if waiting:
            yield pack(waiting, self.config, block_size, mask_token_id)

    def head_rows(self) -> HeadRows:
        if self.vocabulary is None:
            return HeadRows(self.pieces.head_VH, None, None)
        return self.vocabulary.draw(counter_generator(self.config.seed, "vocabulary", self.step))

    def backward(self, blocks: TrainingBlocks, rows: HeadRows) -> Tensor:
        """Adds a pass's gradient of the summed loss; returns its share of the step's totals."""
        with self.accelerator.autocast():
            features_TD = blocks.features_TD.float() / self.feature_rms_D
            context = self.drafter.context(features_TD, blocks.num_tokens)
            embedded_NGH = self.pieces.embed_VH[blocks.block_ids_NG]
            states_NGH = self.drafter(embedded_NGH, blocks.anchors_N, context, blocks.num_blocks)
        parts = block_loss(states_NGH, blocks.labels, rows, self.config)
        self.accelerator.backward(parts.loss_sum)
        return torch.stack([part.detach().double() for part in parts])

    def average_gradient(self, denominator: float) -> float:
        """Sums the gradient over processes, divides it by the step's denominator and clips it; returns its norm."""
        for parameter in self.drafter.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = self.sum_over_processes(parameter.grad) / denominator
        return float(torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), self.config.clip))

    def sum_over_processes(self, value: Tensor) -> Tensor:
        return cast(Tensor, self.accelerator.reduce(value, "sum"))

    def check_finite(self, loss_sum: float, grad_norm: float, indices: list[int]) -> None:
        if not torch.isfinite(torch.tensor([loss_sum, grad_norm])).all():
            names = ", ".join(self.rows[index].seq_id for index in indices)
            raise VpdError(
                f"step {self.step + 1}: the loss or its gradient is not finite (loss {loss_sum}, gradient norm "
                f"{grad_norm}); no step was taken. Sequences: {names}. Lower train.lr, or check these sequences."
            )

    def metrics(self, result: StepResult, labels_per_second: float) -> dict[str, Any]:
        return {
            "step": self.step,
            "loss": result.loss,
            "first_accuracy": result.first_accuracy,
            "lr": self.schedule.get_last_lr()[0],
            "grad_norm": result.grad_norm,
            "num_labels": result.num_labels,
            "labels_per_second": labels_per_second,
        }

    def save(self) -> dict[str, float]:
        """Writes a checkpoint; returns its acceptance length, if that is asked for."""
        if not self.accelerator.is_main_process:
            return {}
        state = {
            "version": STATE_VERSION,
            "step": self.step,
            "weights": self.drafter.state_dict(),
            "feature_rms": self.feature_rms_D,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        vp = self.config.objective == "vp"
        config = self.shape.to_json(
            training_mode="vp_drafter" if vp else "dflash",
            prefix_weight_base=self.config.prefix.beta if vp else None,
        )
        weights = {**self.drafter.state_dict(), "fc.weight": self.drafter.fc.weight / self.feature_rms_D}
        save_drafter(weights, checkpoint_path(self.run, self.step), config, {STATE: state})
        found = {}
        if self.evaluate is not None:
            found["alpha"] = self.evaluate(checkpoint_path(self.run, self.step))
            note_alpha(self.run, self.step, found["alpha"])
        keep_latest(self.run, self.config.keep)
        return found


def make_drafter(shape: DrafterShape, config: TrainConfig, feature_rms_D: Tensor) -> Drafter:
    """A new drafter, or the one that `train.init` names, for context features divided by `feature_rms_D`.

    Checkpoints hold the weights for the features as they are.
    """
    if config.init is not None:
        drafter = load_drafter(find_drafter(config.init))
        if replace(drafter.shape, block_size=shape.block_size, mask_token_id=shape.mask_token_id) != shape:
            differing = [n for n in DrafterShape.__slots__ if getattr(drafter.shape, n) != getattr(shape, n)]
            raise VpdError(
                f"the drafter {config.init} given as train.init differs from this run's in {', '.join(differing)}. "
                "Set the drafter section to its values."
            )
        drafter.fc.weight.mul_(feature_rms_D)
        return drafter.requires_grad_(True)
    drafter = Drafter(shape)
    drafter.init_weights(counter_generator(config.seed, "weights"))
    return drafter


def choose_precision(name: str) -> str:
    if name == "auto":
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    return {"float32": "no", "bf16": "bf16"}[name]
