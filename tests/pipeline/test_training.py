"""Where the metrics of a run go beside its metrics.jsonl."""

import importlib.util
import json
import shutil
import uuid
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import wandb
from support.compare import metrics, train
from support.place import check_message
from support.tiny import run_vpd
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trackio.sqlite_storage import SQLiteStorage
from vpd.pipeline.training import plain_values
from wandb.errors import UsageError

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
        step = line.pop("step")
        for key, value in line.items():
            for name, plain in flatten(value, key):
                # Events hold float32.
                expected.setdefault(name, []).append((step, pytest.approx(plain, rel=1e-6)))
    assert {"loss", "lr", "grad_norm", "accept_rate/1", "accept_rate/3"} < expected.keys()
    assert read_events(run / "vpd") == expected


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
        shown = read_events(tmp_path / name / "vpd")["loss"]
        assert shown == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in metrics(tmp_path / name)]
        assert len(shown) == 3


def test_each_run_of_a_sweep_is_one_run_of_each_tracker(
    drafted_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also where it is continued, and beside a run of the same name elsewhere."""
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", tmp_path), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, str(value))
    started: list[wandb.Run] = []
    logged: list[tuple[str, int, float]] = []
    init, log = wandb.init, wandb.Run.log

    def noted_init(**settings: Any) -> wandb.Run:
        started.append(init(**settings))
        return started[-1]

    def noted_log(run: wandb.Run, values: dict[str, Any], step: int) -> None:
        log(run, values, step)
        logged.append((run.id, step, values["loss"]))

    monkeypatch.setattr(wandb, "init", noted_init)
    monkeypatch.setattr(wandb.Run, "log", noted_log)
    project = uuid.uuid4().hex  # trackio keeps the projects of all processes in one place
    settings = {"train.max_steps": 3, "train.save_every": 2, "train.log_every": 1, "train.holdout": 0.3}
    settings |= {"drafter.block_size": 4, "drafter.num_layers": 1, "train.num_anchors": 32}
    settings |= {"train.trackers": "[wandb,trackio]", "train.project": project}
    flags = [flag for name, value in settings.items() for flag in ("--set", f"{name}={value}")]
    for out in ("a", "a", "b"):
        outcome = run_vpd(
            "sweep", drafted_cache, "--out", tmp_path / out, "--vary", "train.lr=[0.01,0.0001]", *flags, "--json"
        )
        assert outcome.code == 0
        assert json.loads(outcome.out)
        for checkpoint in tmp_path.glob("a/*/checkpoints/step-0000003"):
            shutil.rmtree(checkpoint)
    folders = [tmp_path / out / name for out in ("a", "b") for name in ("lr=0.01", "lr=0.0001")]
    ids = [json.loads((folder / "provenance.json").read_text())["run_id"] for folder in folders]
    names = [f"{folder.name}-{run_id}" for folder, run_id in zip(folders, ids, strict=True)]
    assert len({*ids}) == 4
    assert [run.id for run in started] == [*ids[:2], *ids]
    assert [run.name for run in started] == [*names[:2], *names]
    assert {run.project for run in started} == {project}
    assert sorted(SQLiteStorage.get_runs(project)) == sorted(names)
    for folder, name, run in zip(folders, names, started[2:], strict=True):
        assert run.config["train/lr"] == float(folder.name.partition("=")[2])
        expected = {line["step"]: line["loss"] for line in metrics(folder)}
        assert {step: loss for run_id, step, loss in logged if run_id == run.id} == expected
        assert {log["step"]: log["loss"] for log in SQLiteStorage.get_logs(project, name)} == expected


def test_a_tracker_that_does_not_start_says_why(drafted_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(**_: Any) -> None:
        raise UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    outcome = run_vpd(*train(drafted_cache, tmp_path / "run", **SETTINGS, trackers="wandb"))
    check_message(outcome, 2, ["train.trackers", "wandb", "did not start", "No API key configured."])
    assert run_vpd(*train(drafted_cache, tmp_path / "run", **SETTINGS)).code == 0


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
