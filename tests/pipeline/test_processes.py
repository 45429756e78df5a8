"""Training in several processes is training in one, however they are started and wherever it is continued."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import check_close_runs, checkpoint_steps, cut_short, metrics, train, weights
from forks import ENVIRONMENT, Forks
from tiny import TRAIN, run_vpd
from vpd.data.cache.store import Cache
from vpd.pipeline.launch import is_launched
from vpd.stages.config import TrainConfig
from vpd.stages.train.order import DataOrder
from vpd.stages.train.samples import split_rows

SETTINGS: dict[str, Any] = {"max_steps": 6, "save_every": 3, "batch_tokens": 150, "tokens_per_pass": 1}
"""Each sequence takes a pass of its own."""
FEW: dict[str, Any] = {"max_steps": 8, "save_every": 8, "batch_tokens": 70, "ema": 0.5}
"""Steps of one or two sequences."""
FSDP2 = {"sharding": "fsdp2"}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vpd.pipeline.cli"]


@pytest.fixture(scope="module")
def runs(drafted_cache: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of six steps and of few sequences a step, by one process and two."""
    folder = tmp_path_factory.mktemp("runs")
    torchrun = subprocess.Popen(
        [sys.executable, *TORCHRUN, *map(str, train(drafted_cache, folder / "torchrun", **SETTINGS))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    two = forks.start([*train(drafted_cache, folder / "two", **SETTINGS), "--num-processes", 2])
    # Two at a time, as there may be no more cores.
    for name, settings in (("", SETTINGS), ("few-", FEW)):
        one = forks.start(train(drafted_cache, folder / f"{name}one", **settings))
        for each in (one, *forks.start_ranks(train(drafted_cache, folder / f"{name}fsdp2", **settings, **FSDP2))):
            assert each.wait().code == 0
    for each in forks.start_ranks(train(drafted_cache, folder / "few-two", **FEW)):
        assert each.wait().code == 0
    assert two.result()["step"] == 6
    out, err = torchrun.communicate(timeout=60)
    assert torchrun.returncode == 0, err
    assert out.count("\n") == 1  # one process tells
    return folder


def shares_of_two(cache: Path, settings: dict[str, Any]) -> list[list[int]]:
    """How many sequences each of two processes has in each step."""
    rows = split_rows(Cache.open(cache), TRAIN["holdout"])[0]
    order = DataOrder.of(rows, TrainConfig().max_len, settings["batch_tokens"], TrainConfig().seed)
    return [[len(order.share(step, process, 2)) for process in range(2)] for step in range(settings["max_steps"])]


@pytest.mark.parametrize("name", ["two", "fsdp2", "torchrun"])
def test_two_processes_train_as_one(name: str, runs: Path, drafted_cache: Path):
    shares = shares_of_two(drafted_cache, SETTINGS)
    assert any(0 < min(share) < max(share) for share in shares)  # they have passes that differ in number
    check_close_runs(runs / name, runs / "one", 6)
    assert checkpoint_steps(runs / name) == checkpoint_steps(runs / "one") == [3, 6]
    # They did not both compute everything: their sums are rounded in another order.
    assert metrics(runs / name) != metrics(runs / "one")


@pytest.mark.parametrize("name", ["few-two", "few-fsdp2"])
def test_a_process_may_have_nothing_to_do_in_a_step(name: str, runs: Path, drafted_cache: Path):
    assert {0 in share for share in shares_of_two(drafted_cache, FEW)} == {True, False}
    check_close_runs(runs / name, runs / "few-one", FEW["max_steps"])


@pytest.mark.parametrize(("made_by", "num_processes"), [("two", 1), ("fsdp2", 1), ("one", 2)])
def test_another_number_of_processes_continues(
    made_by: str, num_processes: int, runs: Path, drafted_cache: Path, forks: Forks, tmp_path: Path
):
    run = cut_short(runs / made_by, tmp_path / "run", 3)
    arguments = train(drafted_cache, run, **SETTINGS, **(FSDP2 if num_processes > 1 else {}))
    ranks = forks.start_ranks(arguments) if num_processes > 1 else [forks.start(arguments)]
    for rank in ranks:
        assert rank.wait().code == 0
    check_close_runs(run, runs / "one", 6)
    # The steps before are not computed again.
    assert metrics(run)[:3] == metrics(runs / made_by)[:3]


def test_a_checkpoint_holds_the_whole_drafter_whoever_made_it(runs: Path):
    one = weights(runs / "one")
    for name in ("two", "fsdp2", "torchrun"):
        assert {key: value.shape for key, value in weights(runs / name).items()} == {
            key: value.shape for key, value in one.items()
        }
        assert not any(torch.equal(value, torch.zeros_like(value)) for value in weights(runs / name).values())


# Processes that do not find each other

LAUNCHED = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "all"])
def test_one_of_several_needs_to_know_the_others(
    missing: str, drafted_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    absent = [name for name in LAUNCHED if missing in (name, "all") and name != "WORLD_SIZE"]
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name in LAUNCHED.keys() - absent:
        monkeypatch.setenv(name, LAUNCHED[name])
    outcome = run_vpd(*train(drafted_cache, tmp_path / "run", **SETTINGS))
    assert outcome.code == 2
    for word in ("WORLD_SIZE is 2", *absent, "--num-processes", "torchrun"):
        assert word in outcome.message
    assert not (tmp_path / "run").exists() or not [*(tmp_path / "run").iterdir()]


@pytest.mark.parametrize("variables", [LAUNCHED, {"OMPI_COMM_WORLD_SIZE": "2"}], ids=["torchrun", "mpirun"])
def test_one_of_several_is_not_alone(
    variables: dict[str, str], drafted_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """This process has trained alone before, and so does not join any others."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    outcome = run_vpd(*train(drafted_cache, tmp_path / "run", **SETTINGS))
    assert outcome.code == 2
    for word in ("one of 2 processes", "alone", "torchrun"):
        assert word in outcome.message
    assert not (tmp_path / "run").exists() or not [*(tmp_path / "run").iterdir()]


def test_a_process_of_its_own_fails_as_clearly(drafted_cache: Path, forks: Forks, tmp_path: Path):
    outcome = forks.start(train(drafted_cache, tmp_path / "run", **SETTINGS), {"WORLD_SIZE": "2"}).wait()
    assert outcome.code == 2
    assert "WORLD_SIZE is 2" in outcome.message


@pytest.mark.parametrize(("size", "expected"), [(None, False), ("1", False), ("2", True)])
def test_a_world_of_one_is_not_launched(size: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch):
    """Some clusters tell every process of the world that it is in, be it a world of one."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    assert is_launched() == expected
