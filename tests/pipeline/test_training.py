"""Where the metrics of a run go beside its metrics.jsonl."""

import importlib.util
import json
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from compare import metrics, train
from place import check_message
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import run_vpd
from vpd.pipeline.training import plain_values

SETTINGS: dict[str, Any] = {"max_steps": 5, "batch_tokens": 100}


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """From a figure's name to its steps and values, as TensorBoard shows them."""
    found = EventAccumulator(str(folder)).Reload()
    return {tag: [(each.step, each.value) for each in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def flatten(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list):
        for i, each in enumerate(value):
            yield from flatten(each, f"{name}/{i + 1}")
    elif value is not None:
        yield name, value


@pytest.mark.parametrize("log_every", [1, 2])
def test_tensorboard_shows_the_metrics(log_every: int, drafted_cache: Path, tmp_path: Path):
    run = tmp_path / "run"
    settings = SETTINGS | {"log_every": log_every}
    assert run_vpd(*train(drafted_cache, run, **settings, trackers="tensorboard")).code == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == {1: [1, 2, 3, 4, 5], 2: [2, 4, 5]}[log_every]
    expected: dict[str, list[tuple[int, Any]]] = {}
    for line in lines:
        for key, value in line.items():
            for name, plain in flatten(value, key):
                # Events hold float32.
                expected.setdefault(name, []).append((line["step"], pytest.approx(plain, rel=1e-6)))
    assert {"loss", "lr", "grad_norm", "accept_rate/1", "accept_rate/3"} < expected.keys()
    assert read_events(run / "run") == expected


def test_a_tracker_changes_nothing_of_the_run(drafted_cache: Path, tmp_path: Path):
    """And a run may be continued with other ones."""
    for name, flags in (("with", {"trackers": "tensorboard"}), ("without", {})):
        assert run_vpd(*train(drafted_cache, tmp_path / name, **SETTINGS, **flags)).code == 0
    assert metrics(tmp_path / "with") == metrics(tmp_path / "without")
    assert run_vpd(*train(drafted_cache, tmp_path / "with", **SETTINGS)).code == 0


def test_each_run_of_a_sweep_has_events_of_its_own(drafted_cache: Path, tmp_path: Path):
    settings = {"drafter.block_size": 4, "drafter.num_layers": 1, "train.max_steps": 3, "train.log_every": 1}
    settings |= {"train.holdout": 0.3, "train.num_anchors": 32, "train.trackers": "[tensorboard]"}
    flags = [flag for name, value in settings.items() for flag in ("--set", f"{name}={value}")]
    outcome = run_vpd("sweep", drafted_cache, "--out", tmp_path, "--vary", "train.lr=[0.01,0.0001]", *flags)
    assert outcome.code == 0
    for name in ("lr=0.01", "lr=0.0001"):
        shown = read_events(tmp_path / name / name)["loss"]
        assert shown == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in metrics(tmp_path / name)]
        assert len(shown) == 3


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_a_tracker_that_is_not_installed_is_named(
    command: str, drafted_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    original = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in ("wandb", "trackio") else original(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    named = ["--set", "train.trackers=[wandb,tensorboard,trackio]"]
    if command == "train":
        arguments = [*train(drafted_cache, tmp_path / "run", **SETTINGS), *named]
    else:
        arguments = ["sweep", drafted_cache, "--out", tmp_path / "run", "--vary", "train.tau=[7]", *named]
    outcome = run_vpd(*arguments)
    check_message(outcome, 2, ["train.trackers", "wandb, trackio is not installed", "metrics.jsonl"])
    assert not list(tmp_path.rglob("*.*"))


# Values as trackers take them


class Case(NamedTuple):
    id: str
    values: dict[str, Any]
    expected: dict[str, Any]


CASES = [
    Case("nothing", {}, {}),
    Case(
        "plain",
        {"a": 1, "b": 0.5, "c": "text", "d": False, "e": 0},
        {"a": 1, "b": 0.5, "c": "text", "d": False, "e": 0},
    ),
    Case("none", {"a": None, "b": {"c": None}, "d": [None, 2]}, {"d/2": 2}),
    Case("nested", {"a": {"b": {"c": 1}, "d": 2}, "e": 3}, {"a/b/c": 1, "a/d": 2, "e": 3}),
    Case("list", {"rate": [0.5, 0.25]}, {"rate/1": 0.5, "rate/2": 0.25}),
    Case("tuple", {"train": {"betas": (0.9, 0.95)}}, {"train/betas/1": 0.9, "train/betas/2": 0.95}),
    Case("empty", {"a": [], "b": {}}, {}),
    Case("nested-in-list", {"a": [{"b": 1}, [2, 3]]}, {"a/1/b": 1, "a/2/1": 2, "a/2/2": 3}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_values_are_flattened(case: Case):
    assert plain_values(case.values) == case.expected
