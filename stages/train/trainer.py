"""One training run: a drafter, and what changes its weights."""

# T context tokens, N blocks, G block size, D context features, H hidden width, J = G-1
from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor

from ...data.cache.cache import Cache
from ...data.cache.drafts import FirstDrafts
from ...data.cache.index import SequenceIndex
from ...data.errors import ConfigError, NonFiniteError, VpdError
from ..config import ReadConfig
from ..drafter.checkpoint import load_drafter, save_drafter
from ..drafter.model import Drafter
from ..drafter.shape import DrafterShape
from ..drafter.target_pieces import TargetPieces
from .checkpoints import (
    STATE,
    STATE_VERSION,
    Judgement,
    checkpoint_path,
    find_drafter,
    keep_latest,
    list_checkpoints,
    load_state,
    note_judgement,
    read_judgement,
    remove_unfinished,
    step_of,
)
from .config import TrainConfig
from .feed import BlockPlan
from .objective import BlockLabels, HeadRows, VocabularySampler, block_loss
from .optimization import WeightAverage, make_optimizers, make_schedules
from .order import DataOrder, counter_generator
from .parallel import ParallelDrafter
from .samples import TrainingBlocks, feature_rms, label_tokens

NAMES_SHOWN = 16
PATIENCE = timedelta(hours=6)
"""How long processes wait for each other: the first alone writes checkpoints and replays with them."""
MOST_SKIPPED = 100
"""Steps in a row that may be skipped."""
RENDEZVOUS = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where torchrun and MPI tell how many processes there are."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step saw, over all processes."""

    loss: float
    grad_norm: float
    accepted_J: list[float]
    """Blocks whose first j + 1 predicted tokens are right."""
    predicted_J: list[float]
    """Blocks that predict so many."""

    @property
    def is_finite(self) -> bool:
        return bool(torch.isfinite(torch.tensor([self.loss, self.grad_norm])).all())

    @property
    def num_labels(self) -> int:
        return round(sum(self.predicted_J))


class Evaluation(NamedTuple):
    """How a run's checkpoints are judged."""

    alpha_of: Callable[[Path], float]
    """The acceptance length of a checkpoint on held-out sequences."""
    measure: dict[str, Any]
    """What it depends on beside the checkpoint."""


class Trainer:
    """Everything that a run holds: drafter, optimizers, schedules, data order."""

    def __init__(
        self,
        cache: Cache,
        rows: SequenceIndex,
        drafts: FirstDrafts | None,
        shape: DrafterShape,
        config: TrainConfig,
        run: Path,
        read: ReadConfig,
        evaluation: Evaluation | None = None,
        pieces: TargetPieces | None = None,
    ):
        """
        Args:
            evaluation: None: acceptance lengths are not asked for.
            pieces: the target's, where another trainer has loaded them.
        """
        self.evaluation = evaluation
        self.cache, self.rows, self.drafts, self.shape = cache, rows, drafts, shape
        self.config, self.run, self.read = config, run, read
        check_rendezvous()
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # several processes without a GPU are else not joined
            log_with=[*config.trackers] or None,
            project_dir=run if config.trackers else None,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
        check_joined(self.accelerator.num_processes)
        device = self.accelerator.device
        self.device = torch.device("cpu") if device.type == "cpu" else device  # cpu:0 is not a device everywhere
        self.dtype = choose_precision(config.precision)
        self.pieces = pieces or TargetPieces.load(cache.target_folder, device=self.device, dtype=self.dtype)
        self.feature_rms_D = feature_rms(cache, rows).to(self.device)
        # A run that goes on has weights of its own.
        initial = config.model_copy(update={"init": None}) if list_checkpoints(run) else config
        drafter = make_drafter(shape, initial, self.feature_rms_D.cpu()).to(self.device).train()
        drafter.attention = choose_attention(config, self.device)
        if config.compile:
            drafter.compile_layers()
        self.drafter = ParallelDrafter(drafter, self.accelerator, config.sharding, self.dtype)
        self.order = DataOrder.of(rows, config.max_len, config.batch_tokens, config.seed)
        self.num_steps = config.max_steps or max(1, round(config.epochs * self.order.steps_per_epoch))
        self.optimizers = make_optimizers(self.drafter.module, config)
        self.schedules = make_schedules(self.optimizers, config, self.num_steps)
        self.average = WeightAverage(self.drafter.module, config.ema) if config.ema else None
        self.vocabulary = None
        if config.num_sampled_tokens:
            self.vocabulary = VocabularySampler(
                self.pieces.head_VH, label_tokens(cache, rows), config.num_sampled_tokens
            )
        self.step = self.num_skipped = self._skipped_in_a_row = 0
        self.failure: NonFiniteError | None = None
        """Why it stopped while others that it runs together with went on."""

    @property
    def plan(self) -> BlockPlan:
        return BlockPlan(self.config, self.drafts, self.shape.block_size, self.shape.mask_token_id)

    def resume(self) -> None:
        """Goes on from the run's latest checkpoint, if there is one, made by any number of processes.

        Raises:
            ConfigError: processes have found different checkpoints.
        """
        if self.accelerator.is_main_process:
            remove_unfinished(self.run)
        checkpoints = list_checkpoints(self.run)
        self._check_alike(len(checkpoints) and step_of(checkpoints[-1]))
        if not checkpoints:
            return
        state = load_state(checkpoints[-1])
        self.drafter.load_weights(state["weights"])
        self.feature_rms_D = state["feature_rms"].to(self.device)
        self.drafter.load_optimizer_state(self.optimizers, state["optimizer"])
        for schedule, found in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(found)
        if self.average is not None:
            self.average.weights = self.drafter.like_parameters(state["average"])
        self.step, self.num_skipped = state["step"], state["num_skipped"]

    def _check_alike(self, step: int) -> None:
        own = torch.tensor([step], device=self.device)
        steps = cast(Tensor, self.accelerator.gather(own)).tolist() if self.accelerator.num_processes > 1 else [step]
        if len({*steps}) > 1:
            raise ConfigError(
                f"the processes found checkpoints of different steps in {self.run}: {', '.join(map(str, steps))}, by "
                "rank. Give an --out that all machines share, or copy the checkpoints to each."
            )

    def begin_step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self._rows = self._head_rows()
        self._totals = torch.zeros(2 + 2 * (self.shape.block_size - 1), device=self.device, dtype=torch.float64)

    def add_pass(self, blocks: TrainingBlocks | None, last: bool) -> None:
        """Adds a pass's gradient of the summed loss. None: there is nothing, but other processes may have a pass."""
        with self.drafter.summing(last):
            if blocks is None:
                if self.accelerator.num_processes > 1:
                    (0.0 * self._states(self._idle_blocks()).sum()).backward()
                return
            parts = block_loss(self._states(blocks), blocks.labels, self._rows, self.config)
            # Not by accelerate, which divides by what its own configuration says of accumulation.
            parts.loss_sum.backward()
        self._totals += torch.cat([part.detach().double().flatten() for part in parts])

    def finish_step(self) -> StepResult | None:
        """Changes the weights; None if no sequence of the step has an anchor."""
        totals = cast(Tensor, self.accelerator.reduce(self._totals, "sum")).tolist()
        (loss_sum, denominator), counts = totals[:2], totals[2:]
        self.step += 1
        result = None
        if denominator:
            grad_norm = self.drafter.finish_gradients(denominator, self.config.clip)
            J = len(counts) // 2
            result = StepResult(loss_sum / denominator, grad_norm, counts[:J], counts[J:])
        if result is not None and not result.is_finite:
            if self.config.non_finite == "stop":
                raise self._not_finite(result)
            self.num_skipped += 1
        taken = result is not None and result.is_finite
        self._skipped_in_a_row = 0 if taken or result is None else self._skipped_in_a_row + 1
        if result is not None and self._skipped_in_a_row == MOST_SKIPPED:
            raise self._not_finite(result)
        for optimizer in self.optimizers:
            if not taken:
                optimizer.zero_grad()  # without gradients a step changes nothing
            optimizer.step()
        for schedule in self.schedules:
            schedule.step()
        if self.average is not None and taken:
            self.average.update(self.drafter.module, self.step)
        return result

    def save(self) -> None:
        """Writes a checkpoint, with all processes at work."""
        weights = self.drafter.weights()
        optimizer = self.drafter.optimizer_state(self.optimizers)
        average = None if self.average is None else self.drafter.whole(self.average.weights)
        if self.accelerator.is_main_process:
            state = {
                "version": STATE_VERSION,
                "step": self.step,
                "num_skipped": self.num_skipped,
                "weights": weights,
                "average": average,
                "feature_rms": self.feature_rms_D.cpu(),
                "optimizer": optimizer,
                "schedules": [schedule.state_dict() for schedule in self.schedules],
            }
            self._write(weights if average is None else average, state)
        self.accelerator.wait_for_everyone()

    def judge(self) -> float | None:
        """The latest checkpoint's acceptance length, found by one process while the others wait.

        None if it is not asked for, or has been found before.
        """
        alpha = None
        latest = list_checkpoints(self.run)[-1:] if self.accelerator.is_main_process else []
        if self.evaluation is not None and latest:
            alpha_of, measure = self.evaluation
            found = read_judgement(latest[0])
            if found is None or found.measure != measure:
                alpha = alpha_of(latest[0])
                note_judgement(latest[0], Judgement(alpha, measure))
                keep_latest(self.run, self.config.keep)
        self.accelerator.wait_for_everyone()
        return alpha

    def _write(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        vp = self.config.objective == "vp"
        config = self.shape.to_json(
            training_mode="vp_drafter" if vp else "dflash",
            prefix_weight_base=self.config.prefix.beta if vp else None,
        )
        path = checkpoint_path(self.run, self.step)
        public = {**weights, "fc.weight": weights["fc.weight"] / self.feature_rms_D.cpu()}
        save_drafter(public, path, config, {STATE: state})
        keep_latest(self.run, self.config.keep)

    def _states(self, blocks: TrainingBlocks) -> Tensor:
        # Not accelerate's, which knows one type for a process, where the runs of a sweep may differ.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.drafter.module(
                blocks.features_TD.float() / self.feature_rms_D,
                blocks.num_tokens,
                self.pieces.embed_VH[blocks.block_ids_NG],
                blocks.anchors_N,
                blocks.num_blocks,
                blocks.labels.predicted_P,
            )

    def _idle_blocks(self) -> TrainingBlocks:
        """One block over one token, which stand for nothing."""
        zeros_NG = torch.zeros(1, self.shape.block_size, dtype=torch.int64, device=self.device)
        features_TD = torch.zeros(1, len(self.feature_rms_D), device=self.device)
        labels = BlockLabels(zeros_NG, zeros_NG.float())
        return TrainingBlocks(features_TD, [1], [1], zeros_NG[:, 0], zeros_NG, labels)

    def _head_rows(self) -> HeadRows:
        if self.vocabulary is None:
            return HeadRows(self.pieces.head_VH, None, None)
        return self.vocabulary.draw(counter_generator(self.config.seed, "vocabulary", self.step))

    def _not_finite(self, result: StepResult) -> NonFiniteError:
        indices = self.order.indices(self.step - 1)
        names = [self.rows[index].seq_id for index in indices[:NAMES_SHOWN]]
        others = f" and {len(indices) - len(names)} others" if len(indices) > len(names) else ""
        return NonFiniteError(
            f"step {self.step}: the loss or its gradient is not finite (loss {result.loss}, gradient norm "
            f"{result.grad_norm}); no step was taken. Sequences: {', '.join(names)}{others}. "
            + (
                "Check these, lower train.lr, or set train.non_finite to skip."
                if self.config.non_finite == "stop"
                else f"So were {MOST_SKIPPED} steps in a row. Lower train.lr, with another --out."
            )
        )


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


def check_rendezvous() -> None:
    """
    Raises:
        ConfigError: this is one of several processes, but not told how to find the others.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    missing = [name for name in RENDEZVOUS if name not in os.environ]
    if size != "1" and missing:
        raise ConfigError(
            f"WORLD_SIZE is {size}, which makes this one of several processes, but {', '.join(missing)} is not set, so "
            "it can't join them. Start them with torchrun or --num-processes, or unset WORLD_SIZE to train alone."
        )


def check_joined(num_processes: int) -> None:
    """
    Raises:
        ConfigError: a launcher has started another number of processes than work together.
    """
    if num_processes > 1 and os.environ.get("WORLD_SIZE") == str(num_processes):
        return  # MPI may have started one torchrun on each machine, and tells the number of these
    for name in WORLD_SIZES:
        if int(size := os.environ.get(name, "1")) not in (1, num_processes):
            raise ConfigError(
                f"{name} makes this one of {size} processes, but it "
                + ("trains alone" if num_processes == 1 else f"works with {num_processes}")
                + ", and all would write one folder. Start them with torchrun or --num-processes, or unset "
                f"{name} to train alone."
            )


def choose_precision(name: str) -> torch.dtype:
    """What the forward pass computes in."""
    if name == "auto":
        name = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
    return {"float32": torch.float32, "bf16": torch.bfloat16}[name]


def choose_attention(config: TrainConfig, device: torch.device) -> str:
    """
    Raises:
        ConfigError: it can't be compiled.
    """
    name = config.attention
    if name == "auto":
        name = "flex" if device.type == "cuda" else "structured"
    if config.compile and name == "structured":
        raise ConfigError(
            "train.compile: expected attention flex or eager, found structured, whose loop over blocks has another "
            "form in every pass. Leave compile off, or set train.attention."
        )
    return name
