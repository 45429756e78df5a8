"""Whole runs on a tiny cache: the average of the weights, non-finite steps, metrics, compiled layers."""

# N blocks, G block size, J = G - 1, P predicted positions, V vocabulary, H hidden width
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import DRAFTER, TRAIN, snapshot
from support.tracing import trace_compiled_modules
from torch import Tensor
from vpd.data.cache.cache import Cache
from vpd.data.errors import ConfigError, VpdError
from vpd.stages.drafter import model as model_module
from vpd.stages.drafter.attention import Layout, make_layout
from vpd.stages.train import loop as loop_module
from vpd.stages.train import trainer as trainer_module
from vpd.stages.train.checkpoints import checkpoint_path, list_checkpoints, load_state
from vpd.stages.train.config import DrafterSection, TrainConfig
from vpd.stages.train.feed import Feed
from vpd.stages.train.loop import Pace, run_together
from vpd.stages.train.objective import BlockLabels, HeadRows, LossParts, block_loss
from vpd.stages.train.plan import make_trainer
from vpd.stages.train.trainer import Trainer

Line = dict[str, Any]
SETTINGS: Line = {**TRAIN, "holdout": 0.0, "batch_tokens": 150, "prefix": {"sampler": "geometric"}, "max_steps": 4}
TOLERANCE = 1e-5
"""Float32 sums in another order, over a few steps that build on each other."""


def make(cache: Path, run: Path, num_layers: int = 1, **changes: Any) -> Trainer:
    config = TrainConfig.model_validate({**SETTINGS, **changes})
    return make_trainer(Cache.open(cache), run, DrafterSection(**{**DRAFTER, "num_layers": num_layers}), config)


def train(trainer: Trainer, on_step: Callable[[], object] = lambda: None) -> list[Line]:
    """Runs to the last step; returns the metrics of each step."""
    lines: list[Line] = []

    def note(_: Trainer, line: Line) -> None:
        lines.append(line)
        on_step()

    assert run_together([trainer], note)
    return lines


def losses(lines: list[Line]) -> list[float]:
    return [line["loss"] for line in lines]


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.drafter.weights().items()}


def same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# The average of the weights


def test_checkpoints_hold_the_average_and_the_state_both(tiny_cache: Path, tmp_path: Path):
    trainer = make(tiny_cache, tmp_path, ema=0.3, save_every=1, keep=9)
    average = {name: value.double() for name, value in weights(trainer).items()}
    train(trainer)
    checkpoints = list_checkpoints(tmp_path)
    assert len(checkpoints) == 4
    for step, checkpoint in enumerate(checkpoints, start=1):
        state, public = load_state(checkpoint), load_file(checkpoint / "model.safetensors")
        assert average.keys() == state["weights"].keys() == state["average"].keys() == public.keys()
        decay = min(0.3, step / (step + 9))
        for name, current in state["weights"].items():
            average[name] = decay * average[name] + (1 - decay) * current.double()
            torch.testing.assert_close(state["average"][name].double(), average[name], rtol=1e-6, atol=1e-7)
            # Training divides the features by their scale; a checkpoint's weights are for undivided features.
            scale = state["feature_rms"] if name == "fc.weight" else 1.0
            assert torch.equal(public[name], (state["average"][name] / scale).bfloat16())
        # Not in the first steps: the first step of warm-up changes nothing.
        assert step < 3 or not same_weights(state["weights"], state["average"])
    assert same_weights(load_state(checkpoints[-1])["weights"], weights(trainer))


def test_without_an_average_a_checkpoint_holds_the_weights(tiny_cache: Path, tmp_path: Path):
    train(make(tiny_cache, tmp_path))
    (checkpoint,) = list_checkpoints(tmp_path)
    state, public = load_state(checkpoint), load_file(checkpoint / "model.safetensors")
    assert state["average"] is None
    for name, value in state["weights"].items():
        scale = state["feature_rms"] if name == "fc.weight" else 1.0
        assert torch.equal(public[name], (value / scale).bfloat16())


# Steps that are not finite


def spoil(monkeypatch: pytest.MonkeyPatch, trainer: Trainer, bad_step: int, what: str) -> None:
    """Makes the loss or its gradient NaN in one step, counted from 1."""

    def spoiled(states_PH: Tensor, blocks: BlockLabels, rows: HeadRows, config: TrainConfig) -> LossParts:
        parts = block_loss(states_PH, blocks, rows, config)
        if trainer.step + 1 != bad_step:
            return parts
        if what == "loss":
            return parts._replace(loss_sum=parts.loss_sum * math.nan)
        zero = states_PH.sum() * 0
        return parts._replace(loss_sum=parts.loss_sum + zero.abs().sqrt())  # its slope at zero has no end

    monkeypatch.setattr(trainer_module, "block_loss", spoiled)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_skipped_step_changes_no_weight(
    optimizer: str, what: str, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings: Line = {"optimizer": optimizer, "weight_decay": 0.1, "warmup": 0.0, "save_every": 3}
    trainer = make(tiny_cache, tmp_path, non_finite="skip", **settings)
    spoil(monkeypatch, trainer, 2, what)
    after = [weights(trainer)]
    lines = train(trainer, lambda: after.append(weights(trainer)))
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["num_skipped"] for line in lines] == [0, 1, 1, 1]
    finite = [math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in lines]
    assert finite == [True, False, True, True]
    assert math.isfinite(lines[1]["loss"]) == (what == "gradient")
    assert [same_weights(one, other) for one, other in pairwise(after)] == [
        False,
        True,
        False,
        False,
    ]
    assert all(torch.isfinite(value).all() for value in after[-1].values())
    # The count continues from the checkpoint before the last step.
    state = load_state(checkpoint_path(tmp_path, 3))
    assert state["num_skipped"] == 1
    assert same_weights(state["weights"], after[3])


def test_a_skipped_step_does_not_move_the_average(tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainer = make(tiny_cache, tmp_path, non_finite="skip", ema=0.5, warmup=0.0)
    spoil(monkeypatch, trainer, 3, "loss")
    averages: list[dict[str, Tensor]] = []

    def note() -> None:
        assert trainer.average is not None
        averages.append({name: value.clone() for name, value in trainer.average.weights.items()})

    train(trainer, note)
    assert [same_weights(one, other) for one, other in pairwise(averages)] == [False, True, False]


def test_a_run_that_only_skips_ends(tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trainer_module, "MOST_SKIPPED", 3)
    trainer = make(tiny_cache, tmp_path, non_finite="skip", lr=1e30, clip=1e30, warmup=0.0, max_steps=20)
    with pytest.raises(VpdError, match=r"^step 4: .* So were 3 steps in a row\. Lower train\.lr"):
        train(trainer)


def test_processes_with_other_checkpoints_are_refused(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two machines that do not share the folder of --out: only the first has a checkpoint."""
    trainer = make(tiny_cache, tmp_path, save_every=2, max_steps=2)
    train(trainer)
    others = SimpleNamespace(num_processes=2, is_main_process=True, gather=lambda own: torch.cat([own, own * 0]))
    monkeypatch.setattr(trainer, "accelerator", others)
    with pytest.raises(ConfigError, match=r"checkpoints of different steps in .*: 2, 0, by rank"):
        trainer.resume()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_run_that_must_stop_names_the_sequences_and_keeps_its_state(
    what: str, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    unbroken = train(make(tiny_cache, tmp_path / "unbroken", save_every=1))
    run = tmp_path / "run"
    trainer = make(tiny_cache, run, save_every=1)
    before: list[tuple[dict[str, str], dict[str, Tensor]]] = []
    save = trainer.save

    def noted() -> None:
        save()
        before.append((snapshot(run), weights(trainer)))

    with monkeypatch.context() as patch:
        spoil(patch, trainer, 3, what)
        patch.setattr(trainer, "save", noted)
        with pytest.raises(
            VpdError, match=r"^step 3: the loss or its gradient is not finite.*no step was taken"
        ) as info:
            train(trainer)
    names = [trainer.rows[index].seq_id for index in trainer.order.indices(2)]
    message = str(info.value)
    assert f"Sequences: {', '.join(names)}. Check these" in message
    assert "non_finite to skip" in message
    files, weights_before = before[-1]
    assert len(before) == 2
    assert same_weights(weights(trainer), weights_before)
    assert snapshot(run) == files
    assert [path.name for path in list_checkpoints(run)] == ["step-0000001", "step-0000002"]
    # Without the cause, the run continues like an unbroken one.
    assert losses(train(make(tiny_cache, run, save_every=1))) == losses(unbroken[2:])


def test_accelerate_s_own_settings_do_not_scale_gradients(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    expected = train(make(tiny_cache, tmp_path / "plain"))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    found = train(make(tiny_cache, tmp_path / "accumulating"))
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in found] == [line[name] for line in expected]


def test_a_message_names_a_few_of_many_sequences(tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trainer_module, "NAMES_SHOWN", 3)
    trainer = make(tiny_cache, tmp_path, batch_tokens=10**6)
    spoil(monkeypatch, trainer, 1, "loss")
    names = [trainer.rows[index].seq_id for index in trainer.order.indices(0)]
    with pytest.raises(VpdError, match=rf"Sequences: {', '.join(names[:3])} and {len(names) - 3} others\."):
        train(trainer)
    assert list_checkpoints(tmp_path) == []


# Metrics


class Counts(NamedTuple):
    """Blocks whose first j + 1 predicted tokens are right, and blocks that predict at least j + 1, j = 0..G-2."""

    right_J: list[int]
    predicted_J: list[int]

    def add(self, states_PH: Tensor, labels: BlockLabels, head_VH: Tensor) -> None:
        states = iter(states_PH.detach())
        for row, is_predicted in zip(labels.labels_NG.tolist(), labels.predicted_NG.tolist(), strict=True):
            predicted = [label for label, wanted in zip(row, is_predicted, strict=True) if wanted]
            chosen = [int((head_VH @ next(states)).argmax()) for _ in predicted]
            for j in range(len(predicted)):
                self.predicted_J[j] += 1
                self.right_J[j] += chosen[: j + 1] == predicted[: j + 1]


@pytest.mark.parametrize(
    "changes", [{"objective": "dflash"}, {"tokens_per_pass": 100}], ids=["dflash", "several-passes"]
)
def test_acceptance_is_as_counted_block_by_block(
    changes: Line, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trainer = make(tiny_cache, tmp_path, **changes, lr=1e-2, max_steps=128)
    by_step: dict[int, Counts] = {}
    num_passes = 0

    def counted(states_PH: Tensor, blocks: BlockLabels, rows: HeadRows, config: TrainConfig) -> LossParts:
        nonlocal num_passes
        num_passes += 1
        J = DRAFTER["block_size"] - 1
        counts = by_step.setdefault(trainer.step + 1, Counts([0] * J, [0] * J))
        counts.add(states_PH, blocks, rows.head_VH)
        return block_loss(states_PH, blocks, rows, config)

    monkeypatch.setattr(trainer_module, "block_loss", counted)
    lines = train(trainer)
    assert num_passes > 16 or "tokens_per_pass" not in changes
    for line in lines:
        right_J, predicted_J = by_step[line["step"]]
        assert line["accept_rate"] == [right / count for right, count in zip(right_J, predicted_J, strict=True)]
        assert line["accept_length"] == sum(right_J) / predicted_J[0]
        assert line["num_labels"] == sum(predicted_J)
    # Some are right, and fewer at later positions.
    assert any(0 < right[2] < right[0] < predicted[0] for right, predicted in by_step.values())


def test_a_rate_without_a_block_is_none(tiny_cache: Path, tmp_path: Path):
    """With one anchor in a step, some steps predict a single token."""
    trainer = make(
        tiny_cache, tmp_path, num_anchors=1, batch_tokens=1, max_steps=12, prefix={"sampler": "geometric", "beta": 1}
    )
    rates = [line["accept_rate"] for line in train(trainer)]
    assert {rate[0] for rate in rates} <= {0.0, 1.0}
    assert any(rate[2] is None for rate in rates)
    for rate in rates:
        assert rate == sorted(rate, key=lambda value: value is None)


def test_waiting_is_a_share_of_the_time(tiny_cache: Path, tmp_path: Path):
    for line in train(make(tiny_cache, tmp_path, save_every=2, log_every=3, max_steps=8)):
        assert 0 <= line["data_wait"] <= 1
        assert line["tokens_per_second"] > 0


def test_the_pace_is_that_of_the_steps_without_checkpoints(monkeypatch: pytest.MonkeyPatch):
    clock, feed = SimpleNamespace(now=100.0), SimpleNamespace(seconds_waited=7.0)
    monkeypatch.setattr(loop_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    pace = Pace(cast(Feed, feed))
    for seconds, waited, num_tokens, checkpoint_seconds in [
        (2.0, 0.5, 30, 0.0),
        (1.0, 0.25, 10, 50.0),
        (5.0, 3.25, 60, 0.0),
    ]:
        clock.now += seconds
        feed.seconds_waited += waited
        pace.add(num_tokens)
        if checkpoint_seconds:
            clock.now += checkpoint_seconds
            pace.restart()
    assert (pace.tokens_per_second, pace.data_wait) == (100 / 8, 4 / 8)


# Implementations that must agree


PASSES: Line = {"num_layers": 3, "batch_tokens": 450, "tokens_per_pass": 500, "max_steps": 6}
"""Some passes have one sequence with few blocks; others have several, with more block positions than a tile has."""


@pytest.fixture(scope="module")
def eager(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of a run with eager attention, the reference."""
    return losses(train(make(tiny_cache, tmp_path_factory.mktemp("eager"), attention="eager", **PASSES)))


def test_structured_attention_trains_like_eager(eager: list[float], tiny_cache: Path, tmp_path: Path):
    lines = train(make(tiny_cache, tmp_path, attention="structured", **PASSES))
    assert losses(lines) == pytest.approx(eager, rel=TOLERANCE)
    assert len(set(eager)) == 6


# PyTorch reads the gradients of the tensors that it traces.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("attention", ["eager", "flex"])
def test_compiled_layers_train_like_others(
    attention: str, eager: list[float], tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    graphs, layouts = trace_compiled_modules(monkeypatch), note_layouts(monkeypatch)
    lines = train(make(tiny_cache, tmp_path, attention=attention, compile=True, **PASSES))
    assert losses(lines) == pytest.approx(eager, rel=TOLERANCE)
    assert {layout.is_small for layout in layouts} == {True, False}
    assert len({(len(layout.starts_N), layout.num_tokens) for layout in layouts if not layout.is_small}) > 5
    # The first layer needs no gradient of its inputs, and the last layer computes only the wanted positions.
    assert len(graphs) == 3


def note_layouts(monkeypatch: pytest.MonkeyPatch) -> list[Layout]:
    """A list that collects the layouts of all later forward passes."""
    layouts: list[Layout] = []

    def note(*arguments: Any) -> Layout:
        layouts.append(make_layout(*arguments))
        return layouts[-1]

    monkeypatch.setattr(model_module, "make_layout", note)
    return layouts


on_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, auto is flex")


@pytest.mark.parametrize("attention", ["structured", pytest.param("auto", marks=on_a_gpu)])
def test_what_cannot_be_compiled_is_refused(attention: str, tiny_cache: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"train\.compile: expected attention flex or eager, found structured"):
        make(tiny_cache, tmp_path, compile=True, attention=attention)
