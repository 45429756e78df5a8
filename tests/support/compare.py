"""Comparison of training runs by their folders."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vpd.stages.drafter.checkpoint import WEIGHTS
from vpd.stages.train.checkpoints import list_checkpoints, load_state

from support.tiny import DRAFTER, TRAIN, as_flags, same_bits

CLOCK = {"tokens_per_second", "data_wait"}
MASK = {"drafter.mask_token_id": 300}
"""The first id that no token of the tiny tokenizer uses. Given so, no process needs transformers to find that id."""


def train(cache: Path, run: Path, **settings: Any) -> list[object]:
    """Arguments of a training run of a tiny drafter."""
    return ["train", cache, "--out", run, "--json", *as_flags({**DRAFTER, **MASK, **TRAIN, **settings})]


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the metrics that depend on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


def steps_logged(run: Path) -> list[int]:
    return [line["step"] for line in metrics(run)]


def checkpoint_steps(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(run)]


def weights(run: Path) -> dict[str, Tensor]:
    """The float32 weights of the latest checkpoint."""
    return load_state(list_checkpoints(run)[-1])["weights"]


def check_equal_states(one: Any, other: Any) -> None:
    """Equality of nested values, tensors bit for bit."""
    if isinstance(one, Tensor):
        assert same_bits(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            check_equal_states(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for ours, theirs in zip(one, other, strict=True):
            check_equal_states(ours, theirs)
    else:
        assert one == other


def check_equal_runs(one: Path, other: Path) -> None:
    """Equality of the metrics, except those of the clock, and of all that a checkpoint holds, bit for bit."""
    assert metrics(one) == metrics(other)
    checkpoints = [list_checkpoints(run)[-1] for run in (one, other)]
    assert checkpoints[0].name == checkpoints[1].name
    assert (checkpoints[0] / WEIGHTS).read_bytes() == (checkpoints[1] / WEIGHTS).read_bytes()
    check_equal_states(*map(load_state, checkpoints))


def check_close_runs(one: Path, other: Path, steps: int) -> None:
    """Equality of metrics and weights up to rounding: sums are computed in another order."""
    assert steps_logged(one) == steps_logged(other) == [*range(1, steps + 1)]
    for ours, theirs in zip(metrics(one), metrics(other), strict=True):
        for name in ("epoch", "lr", "num_labels", "num_skipped"):
            assert ours[name] == theirs[name], name
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        # On a CPU a float32 norm over all weights is not more exact.
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        # Adam divides by the gradient's size, so the rounding of a tiny gradient is a visible share of a step.
        assert torch.linalg.vector_norm(value - theirs[name]) < 1e-4 * torch.linalg.vector_norm(theirs[name]), name


def cut_short(run: Path, copy: Path, step: int) -> Path:
    """A copy of a run as it was right after the checkpoint of a step."""
    shutil.copytree(run, copy)
    for path, found in zip(list_checkpoints(copy), checkpoint_steps(copy), strict=True):
        if found > step:
            shutil.rmtree(path)
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:step]))
    return copy
