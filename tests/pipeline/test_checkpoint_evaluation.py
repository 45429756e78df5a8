"""A checkpoint's replay, in a run that is stopped, killed or continued."""

import shutil
import signal
from pathlib import Path

import pytest
from support.compare import check_equal_runs, checkpoint_steps, metrics, steps_logged, train
from support.tiny import run_vpd, vpd
from vpd.stages.evaluate.replay import Replay
from vpd.stages.train.trainer import StepResult, Trainer

EVALUATED = {"max_steps": 6, "save_every": 2, "eval_limit": 3}


def test_a_replay_that_was_interrupted_is_done_later(
    drafted_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments = train(drafted_cache, tmp_path / "run", **EVALUATED)
    with monkeypatch.context() as patch:

        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(Replay, "run", killed)
        assert run_vpd(*arguments).code == 130
    assert checkpoint_steps(tmp_path / "run") == [2]
    assert steps_logged(tmp_path / "run") == [1, 2]
    assert run_vpd(*arguments).code == 0
    assert run_vpd(*train(drafted_cache, tmp_path / "unbroken", **EVALUATED)).code == 0
    assert steps_logged(tmp_path / "run") == [1, 2, 2, 3, 4, 4, 5, 6, 6]
    check_equal_runs(tmp_path / "run", tmp_path / "unbroken")


@pytest.mark.parametrize(("limit", "replays"), [(3, 0), (2, 1)])
def test_a_checkpoint_is_evaluated_again_only_with_another_measure(
    limit: int, replays: int, drafted_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert run_vpd(*train(drafted_cache, tmp_path, **EVALUATED)).code == 0
    before = metrics(tmp_path)
    assert run_vpd(*train(drafted_cache, tmp_path, **{**EVALUATED, "eval_limit": limit})).code == 0
    after = metrics(tmp_path)
    assert after[: len(before)] == before
    assert [line.keys() for line in after[len(before) :]] == [{"step", "alpha"}] * replays


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_drafts_that_leave_out_anchors_are_refused_before_training(
    command: str, tiny_cache: Path, first_run: Path, tmp_path: Path
):
    cache = shutil.copytree(tiny_cache, tmp_path / "cache")
    vpd("draft", cache, "--first-drafter", first_run, stride=2)
    out = tmp_path / "run"
    arguments = train(cache, out, **EVALUATED)
    if command == "sweep":
        arguments = ["sweep", cache, "--out", out, "--vary", "train.tau=[7]", "--set", "train.holdout=0.3"]
    outcome = run_vpd(*arguments)
    assert outcome.code == 1
    assert "leave out anchors (stride 2)" in outcome.message
    assert "Remove" in outcome.message
    assert not out.exists()


@pytest.mark.parametrize("step", [1, 2, 6])
def test_a_run_that_stops_leaves_the_replay_to_the_next(
    step: int, drafted_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A machine that is taken away leaves seconds."""
    original = Trainer.finish_step

    def signalled(trainer: Trainer) -> StepResult | None:
        if trainer.step + 1 == step:
            signal.raise_signal(signal.SIGTERM)
        return original(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "finish_step", signalled)
        outcome = run_vpd(*train(drafted_cache, tmp_path / "run", **EVALUATED))
    assert outcome.code == 143
    assert f"stopped after step {step} of 6, which is saved; the same command continues" in outcome.err
    assert steps_logged(tmp_path / "run")[-1] == step
    assert "alpha" not in metrics(tmp_path / "run")[-1]
    assert checkpoint_steps(tmp_path / "run")[-1] == step
    for name in ("run", "undisturbed"):
        assert run_vpd(*train(drafted_cache, tmp_path / name, **EVALUATED)).code == 0
    evaluated = [line for line in metrics(tmp_path / "run") if line["step"] in (2, 4, 6) or "alpha" not in line]
    assert evaluated == metrics(tmp_path / "undisturbed")
