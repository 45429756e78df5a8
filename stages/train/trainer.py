"""One training run: a drafter, and what changes its weights."""

# T context tokens, D context features, N blocks, G block size, J = G - 1, H hidden width
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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
    CheckpointResult,
    checkpoint_path,
    find_drafter,
    keep_latest,
    list_checkpoints,
    load_state,
    read_result,
    remove_unfinished,
    step_of,
    write_result,
)
from .config import TrainConfig
from .feed import BlockPlan
from .objective import BlockLabels, HeadRows, VocabularySampler, block_loss
from .optimization import WeightAverage, make_optimizers, make_schedules
from .order import DataOrder, counter_generator
from .parallel import PATIENCE, ParallelDrafter, check_joined, check_rendezvous
from .samples import TrainingBlocks, feature_rms, label_tokens
from .steps import count_steps

NAMES_SHOWN = 16
"""Sequences that an error message names."""
MOST_SKIPPED = 100
"""Consecutive skipped steps after which a run ends."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """Figures of one optimizer step, over all processes."""

    loss: float
    grad_norm: float
    accepted_J: list[float]
    """Blocks whose first j + 1 predicted tokens are right."""
    predicted_J: list[float]
    """Blocks that predict at least j + 1 tokens."""

    @property
    def is_finite(self) -> bool:
        return bool(torch.isfinite(torch.tensor([self.loss, self.grad_norm])).all())

    @property
    def num_labels(self) -> int:
        return round(sum(self.predicted_J))


class Evaluator(NamedTuple):
    """How a run's checkpoints are evaluated."""

    alpha_of: Callable[[Path], float]
    """The acceptance length of a checkpoint on held-out sequences."""
    measure: dict[str, Any]
    """JSON values of everything else that alpha depends on."""


class Trainer:
    """The state of a run, and its optimizer steps, checkpoints and evaluations."""

    def __init__(
        self,
        cache: Cache,
        rows: SequenceIndex,
        drafts: FirstDrafts | None,
        shape: DrafterShape,
        config: TrainConfig,
        run: Path,
        read: ReadConfig,
        evaluator: Evaluator | None = None,
        pieces: TargetPieces | None = None,
    ):
        """
        Args:
            drafts: the first drafts; None if no sampler in use reads them.
            evaluator: None: checkpoints are not evaluated.
            pieces: the target's pieces if another trainer has loaded them.

        Raises:
            ConfigError: this process is one of several but can't join the others, or the layers can't be compiled.
        """
        self.evaluator = evaluator
        self.cache, self.rows, self.drafts, self.shape = cache, rows, drafts, shape
        self.config, self.run, self.read = config, run, read
        check_rendezvous()
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # without this, processes without a GPU do not join
            log_with=[*config.trackers] or None,
            project_dir=run if config.trackers else None,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
        check_joined(self.accelerator.num_processes)
        device = self.accelerator.device
        self.device = torch.device("cpu") if device.type == "cpu" else device  # not every call takes cpu:0
        self.dtype = choose_precision(config.precision)
        self.pieces = pieces or TargetPieces.load(cache.target_folder, device=self.device, dtype=self.dtype)
        self.feature_rms_D = feature_rms(cache, rows).to(self.device)
        # A run that is resumed takes its weights from its checkpoint.
        initial = config.model_copy(update={"init": None}) if list_checkpoints(run) else config
        drafter = make_drafter(shape, initial, self.feature_rms_D.cpu(), cache.target_folder).to(self.device).train()
        drafter.attention = choose_attention(config, self.device)
        if config.compile:
            drafter.compile_layers()
        self.drafter = ParallelDrafter(drafter, self.accelerator, config.sharding, self.dtype)
        self.order = DataOrder.of(rows, config.max_len, config.batch_tokens, config.seed)
        self.num_steps = count_steps(config, self.order.steps_per_epoch)
        self.optimizers = make_optimizers(self.drafter.module, config)
        self.schedules = make_schedules(self.optimizers, config, self.num_steps)
        self.average = WeightAverage(self.drafter.module, config.ema) if config.ema else None
        self.vocabulary = None
        if config.num_sampled_tokens:
            self.vocabulary = VocabularySampler(
                self.pieces.head_VH,
                label_tokens(cache, rows),
                config.num_sampled_tokens,
                self.pieces.logits_soft_cap,
            )
        self.step = self.num_skipped = self._skipped_in_a_row = 0
        self.failure: NonFiniteError | None = None
        """Why this run stopped while the runs trained together with it went on."""

    @property
    def plan(self) -> BlockPlan:
        return BlockPlan(self.config, self.drafts, self.shape.block_size, self.shape.mask_token_id)

    def resume(self) -> None:
        """Loads the run's latest checkpoint, if there is one. Any number of processes may have written it.

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
        """Clears the gradients and the step's sums."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self._rows = self._head_rows()
        self._totals = torch.zeros(2 + 2 * (self.shape.block_size - 1), device=self.device, dtype=torch.float64)

    def add_pass(self, blocks: TrainingBlocks | None, last: bool) -> None:
        """Adds the gradient of a pass's summed loss.

        Args:
            blocks: None: this process has no pass, but other processes may have one.
            last: whether the pass ends the step.
        """
        with self.drafter.summing(last):
            if blocks is None:
                if self.accelerator.num_processes > 1:
                    (0.0 * self._states(self._idle_blocks()).sum()).backward()
                return
            parts = block_loss(self._states(blocks), blocks.labels, self._rows, self.config)
            # Not accelerate's backward, which divides by the gradient accumulation steps of its own configuration.
            parts.loss_sum.backward()
        self._totals += torch.cat([part.detach().double().flatten() for part in parts])

    def finish_step(self) -> StepResult | None:
        """Changes the weights.

        Returns:
            None if no sequence of the step has an anchor.

        Raises:
            NonFiniteError: loss or gradient is not finite, and the settings or the number of skipped steps end the run.
        """
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
        """Writes a checkpoint; all processes must call this."""
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

    def evaluate(self) -> float | None:
        """Evaluates the latest checkpoint in the first process, while the others wait.

        Returns:
            The acceptance length; None if there is no evaluator, or the checkpoint was evaluated before.
        """
        alpha = None
        latest = list_checkpoints(self.run)[-1:] if self.accelerator.is_main_process else []
        if self.evaluator is not None and latest:
            alpha_of, measure = self.evaluator
            found = read_result(latest[0])
            if found is None or found.measure != measure:
                alpha = alpha_of(latest[0])
                write_result(latest[0], CheckpointResult(alpha, measure))
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
        # Not accelerate's autocast, which has one type for all runs of a process.
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
        """One block over one token, for a process that must take part in a pass without having one."""
        zeros_NG = torch.zeros(1, self.shape.block_size, dtype=torch.int64, device=self.device)
        features_TD = torch.zeros(1, len(self.feature_rms_D), device=self.device)
        labels = BlockLabels(zeros_NG, zeros_NG.bool(), zeros_NG[:, 0])
        return TrainingBlocks(features_TD, [1], [1], zeros_NG[:, 0], zeros_NG, labels)

    def _head_rows(self) -> HeadRows:
        if self.vocabulary is None:
            return HeadRows(self.pieces.head_VH, None, None, self.pieces.logits_soft_cap)
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


def make_drafter(
    shape: DrafterShape, config: TrainConfig, feature_rms_D: Tensor, target_folder: Path | None = None
) -> Drafter:
    """A new drafter, or the one that `train.init` names, for context features divided by `feature_rms_D`.

    Checkpoints hold the weights for features that are not divided.

    Args:
        target_folder: the cache's `target_folder`, for a drafter that holds copies of the target's weights.

    Raises:
        VpdError: the drafter that `train.init` names has another shape.
    """
    if config.init is not None:
        drafter = load_drafter(find_drafter(config.init), target_folder=target_folder)
        free = {name: getattr(shape, name) for name in ("block_size", "mask_token_id")}
        if drafter.shape.num_target_layers is None:
            free["num_target_layers"] = shape.num_target_layers
        found = replace(drafter.shape, **free)
        if found != shape:
            differing = [name for name in DrafterShape.__slots__ if getattr(found, name) != getattr(shape, name)]
            raise VpdError(
                f"the drafter {config.init} given as train.init differs from this run's in {', '.join(differing)}. "
                "Set the drafter section to its values."
            )
        drafter.fc.weight.mul_(feature_rms_D)
        return drafter.requires_grad_(True)
    drafter = Drafter(shape)
    drafter.init_weights(counter_generator(config.seed, "weights"))
    return drafter


def choose_precision(name: str) -> torch.dtype:
    """What the forward pass computes in."""
    if name == "auto":
        name = "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def choose_attention(config: TrainConfig, device: torch.device) -> str:
    """
    Raises:
        ConfigError: the attention can't be compiled, and `train.compile` is on.
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
