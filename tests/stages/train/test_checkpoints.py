"""Which checkpoints are kept, and which checkpoint is a run's drafter."""

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.tiny import DRAFTER, TRAIN, run_vpd, vpd
from vpd.data.cache.cache import Cache
from vpd.data.cache.drafts import FirstDrafts
from vpd.stages.evaluate.config import EvalConfig
from vpd.stages.evaluate.replay import Replay
from vpd.stages.holdout import split_rows
from vpd.stages.train import checkpoints as checkpoints_module
from vpd.stages.train.checkpoints import (
    CheckpointResult,
    best_checkpoint,
    checkpoint_path,
    find_drafter,
    keep_latest,
    list_checkpoints,
    read_result,
    remove_unfinished,
    write_result,
)

EVALUATED = {"max_steps": 6, "save_every": 2, "keep": 1, "eval_limit": 3}


def add_checkpoints(run: Path, first_run: Path, steps: range) -> None:
    for step in steps:
        shutil.copytree(find_drafter(first_run), checkpoint_path(run, step))


def note_alpha(run: Path, step: int, alpha: float, k: int = 4) -> None:
    write_result(checkpoint_path(run, step), CheckpointResult(alpha, {"k": k}))


def test_the_best_stays_beside_the_latest(tmp_path: Path, first_run: Path):
    add_checkpoints(tmp_path, first_run, range(1, 6))
    assert best_checkpoint(tmp_path) is None
    assert find_drafter(tmp_path).name == "step-0000005"
    for step, alpha in enumerate([1.2, 1.9, 1.9, 1.4, 1.8], start=1):
        note_alpha(tmp_path, step, alpha)
    assert find_drafter(tmp_path).name == "step-0000002"
    keep_latest(tmp_path, 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-0000002", "step-0000004", "step-0000005"]
    note_alpha(tmp_path, 5, 2.0)
    keep_latest(tmp_path, 1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-0000005"]


def test_alphas_of_another_measure_are_not_compared(tmp_path: Path, first_run: Path):
    add_checkpoints(tmp_path, first_run, range(1, 4))
    for step, alpha, k in [(1, 1.9, 8), (2, 1.1, 0), (3, 1.05, 0)]:
        note_alpha(tmp_path, step, alpha, k)
    assert find_drafter(tmp_path).name == "step-0000002"


def test_the_best_of_another_measure_stays(tmp_path: Path, first_run: Path):
    """The other measure may have been set by mistake."""
    add_checkpoints(tmp_path, first_run, range(1, 5))
    for step, alpha, k in [(1, 1.9, 4), (2, 1.1, 4), (3, 1.3, 8), (4, 1.2, 8)]:
        note_alpha(tmp_path, step, alpha, k)
    keep_latest(tmp_path, 1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-0000001", "step-0000003", "step-0000004"]
    assert find_drafter(tmp_path).name == "step-0000003"
    note_alpha(tmp_path, 4, 1.2, 4)  # by the first measure again
    assert find_drafter(tmp_path).name == "step-0000001"


def test_half_a_checkpoint_is_none(tmp_path: Path, first_run: Path, monkeypatch: pytest.MonkeyPatch):
    """A process may be killed while it removes a checkpoint; the next process removes the rest."""
    add_checkpoints(tmp_path, first_run, range(1, 4))

    def half(path: Path, ignore_errors: bool) -> None:
        (path / "config.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints_module, "shutil", SimpleNamespace(rmtree=half))
        with pytest.raises(KeyboardInterrupt):
            keep_latest(tmp_path, 1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-0000002", "step-0000003"]
    checkpoint_path(tmp_path, 4).with_name(".step-0000004.123.tmp").mkdir()
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-0000002", "step-0000003"]


def test_a_checkpoint_that_another_process_reads_may_stay_for_a_while(
    tmp_path: Path, first_run: Path, monkeypatch: pytest.MonkeyPatch
):
    """NFS keeps a removed file that is open under another name, and refuses to remove its folder."""
    add_checkpoints(tmp_path, first_run, range(1, 3))

    def refuse(path: object, **options: object) -> None:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", refuse)
        keep_latest(tmp_path, 1)
        remove_unfinished(tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-0000002"]
    assert len([*(tmp_path / "checkpoints").iterdir()]) == 2
    remove_unfinished(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000002"]


def test_without_the_best_the_latest_counts(tmp_path: Path, first_run: Path):
    add_checkpoints(tmp_path, first_run, range(1, 4))
    note_alpha(tmp_path, 1, 1.5)
    shutil.rmtree(checkpoint_path(tmp_path, 1))
    assert find_drafter(tmp_path).name == "step-0000003"
    note_alpha(tmp_path, 2, 1.1)  # the best of those that remain
    assert find_drafter(tmp_path).name == "step-0000002"


@pytest.mark.parametrize("objective", ["vp", "dflash"])
def test_a_run_keeps_its_checkpoint_of_best_alpha(objective: str, drafted_cache: Path, tmp_path: Path):
    settings = {**DRAFTER, **TRAIN, **EVALUATED, "objective": objective}
    vpd("train", drafted_cache, "--out", tmp_path / "run", **settings)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    alphas = {line["step"]: line["alpha"] for line in lines if "alpha" in line}
    assert sorted(alphas) == [2, 4, 6]
    best_step, best_alpha = max(alphas.items(), key=lambda item: item[1])
    found = find_drafter(tmp_path / "run")
    assert found == checkpoint_path(tmp_path / "run", best_step)
    result = read_result(found)
    assert result is not None
    assert result.alpha == best_alpha
    assert {path.name for path in list_checkpoints(tmp_path / "run")} == {f"step-{step:07d}" for step in {best_step, 6}}
    # The stored alpha equals that of a new replay.
    cache = Cache.open(drafted_cache)
    rows = split_rows(cache, TRAIN["holdout"])[1]
    first, second = (FirstDrafts.open(cache), found) if objective == "vp" else (found, None)
    alpha = Replay(cache, first, second, EvalConfig(limit=3)).run(rows).alpha
    assert alpha["d2sd" if objective == "vp" else "first"] == best_alpha


def test_a_vp_drafter_is_not_evaluated_without_first_drafts(tiny_cache: Path, tmp_path: Path):
    flags = {**DRAFTER, **TRAIN, **EVALUATED, "prefix_sampler": "geometric"}
    outcome = run_vpd("train", tiny_cache, "--out", tmp_path / "run", **flags)
    assert outcome.code == 1
    assert "vpd draft" in outcome.message
    assert not (tmp_path / "run/checkpoints").exists()


def test_held_out_sequences_are_looked_for_before_training(tiny_cache: Path, tmp_path: Path):
    settings = {**DRAFTER, **TRAIN, **EVALUATED, "objective": "dflash", "holdout": 0.0}
    outcome = run_vpd("train", tiny_cache, "--out", tmp_path / "run", **settings)
    assert outcome.code == 1
    assert "expected held-out greedy responses" in outcome.err
    assert not (tmp_path / "run").exists()
