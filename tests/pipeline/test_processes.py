"""Training in several processes is training in one, however they are started and wherever it is continued."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.compare import check_close_runs, checkpoint_steps, cut_short, metrics, steps_logged, train, weights
from support.forks import ENVIRONMENT, SECONDS, Forks
from support.tiny import TRAIN, run_vpd
from vpd.data.cache.cache import Cache
from vpd.data.errors import ConfigError
from vpd.pipeline.launch import is_launched
from vpd.stages.drafter.checkpoint import load_shape
from vpd.stages.drafter.model import Drafter
from vpd.stages.holdout import split_rows
from vpd.stages.train.checkpoints import checkpoint_path, find_drafter, load_state
from vpd.stages.train.config import TrainConfig
from vpd.stages.train.order import DataOrder, counter_generator
from vpd.stages.train.parallel import check_joined

SETTINGS: dict[str, Any] = {"max_steps": 6, "save_every": 3, "batch_tokens": 150, "tokens_per_pass": 1}
"""Each sequence takes a pass of its own."""
FEW: dict[str, Any] = {"max_steps": 8, "save_every": 8, "batch_tokens": 70, "ema": 0.5}
"""Steps of one or two sequences."""
MUON: dict[str, Any] = {**FEW, "optimizer": "muon", "save_every": 1, "keep": 8}
FSDP2 = {"sharding": "fsdp2"}
LAUNCHERS = {
    "torchrun": "torch.distributed.run --standalone --nproc-per-node 2",
    # Of its ways to start several processes, the one that needs no MPI. Without GPUs they compute on the CPU.
    "accelerate": "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 "
    "--mixed_precision no --dynamo_backend no",
}

AT_EXIT = """
import atexit, os, pathlib

def note_threads():
    tasks = pathlib.Path("/proc/self/task").iterdir()
    names = [(task / "comm").read_text().strip() for task in tasks]
    pathlib.Path(os.environ["NOTES"], os.environ["RANK"]).write_text(" ".join(names))

if "RANK" in os.environ:
    atexit.register(note_threads)  # before all others, so it is called last
"""
"""Notes the threads of a process at its very end, as a file that is named after its rank."""


@pytest.fixture(scope="module")
def runs(drafted_cache: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of six steps and of few sequences a step, by one process and two."""
    folder = tmp_path_factory.mktemp("runs")
    launched = [launch(name, train(drafted_cache, folder / name, **SETTINGS)) for name in LAUNCHERS]
    (folder / "sitecustomize.py").write_text(AT_EXIT)
    two = forks.start(
        [*train(drafted_cache, folder / "two", **SETTINGS), "--num-processes", 2],
        {"PYTHONPATH": str(folder), "NOTES": str(folder)},
    )
    # Two at a time, as there may be no more cores.
    for name, settings in (("", SETTINGS), ("few-", FEW), ("muon-", MUON)):
        one = forks.start(train(drafted_cache, folder / f"{name}one", **settings))
        for each in (one, *forks.start_ranks(train(drafted_cache, folder / f"{name}fsdp2", **settings, **FSDP2))):
            assert each.wait().code == 0
    for each in forks.start_ranks(train(drafted_cache, folder / "few-two", **FEW)):
        assert each.wait().code == 0
    assert two.result()["step"] == 6
    for process in launched:
        out, err = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, err
        assert out.count("\n") == 1  # one process reports
    return folder


def launch(launcher: str, arguments: list[object]) -> subprocess.Popen[str]:
    """`vpd` in two processes that somebody else's launcher starts."""
    return subprocess.Popen(
        [sys.executable, "-m", *LAUNCHERS[launcher].split(), "-m", "vpd.pipeline.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def shares_of_two(cache: Path, settings: dict[str, Any]) -> list[list[int]]:
    """How many sequences each of two processes has in each step."""
    rows = split_rows(Cache.open(cache), TRAIN["holdout"])[0]
    order = DataOrder.of(rows, TrainConfig().max_len, settings["batch_tokens"], TrainConfig().seed)
    return [[len(order.share(step, process, 2)) for process in range(2)] for step in range(settings["max_steps"])]


@pytest.mark.parametrize("name", ["two", "fsdp2", *LAUNCHERS])
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
    for name in ("two", "fsdp2", *LAUNCHERS):
        assert {key: value.shape for key, value in weights(runs / name).items()} == {
            key: value.shape for key, value in one.items()
        }
        assert not any(torch.equal(value, torch.zeros_like(value)) for value in weights(runs / name).values())


# Muon, which makes the singular values of a whole matrix equal, in bfloat16: what rounding leaves is amplified


def check_near_runs(one: Path, other: Path, steps: int) -> None:
    assert steps_logged(one) == steps_logged(other) == [*range(1, steps + 1)]
    assert [line["num_labels"] for line in metrics(one)] == [line["num_labels"] for line in metrics(other)]
    losses = [[line["loss"] for line in metrics(run)] for run in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_muon_orthogonalises_whole_matrices_that_are_sharded(runs: Path):
    """A shard's singular values made equal by themselves are a step that differs by 0.6 of its size."""
    fsdp2, one = (load_state(checkpoint_path(runs / name, 1))["weights"] for name in ("muon-fsdp2", "muon-one"))
    start = Drafter(load_shape(find_drafter(runs / "muon-one")))
    start.init_weights(counter_generator(TrainConfig().seed, "weights"))
    for name, value in start.state_dict().items():
        distance, length = (torch.linalg.vector_norm(each - one[name]) for each in (fsdp2[name], value))
        assert distance < 0.2 * length, name
        assert length > 0, name


def test_muon_trains_sharded_where_a_process_may_have_nothing_to_do(runs: Path):
    check_near_runs(runs / "muon-fsdp2", runs / "muon-one", MUON["max_steps"])


def test_one_process_continues_sharded_muon(runs: Path, drafted_cache: Path, forks: Forks, tmp_path: Path):
    run = cut_short(runs / "muon-fsdp2", tmp_path / "run", 4)
    assert forks.start(train(drafted_cache, run, **MUON)).wait().code == 0
    check_near_runs(run, runs / "muon-one", MUON["max_steps"])
    # The momentum went along: the next step's is the one that the shards had. The steps themselves say less, since a
    # matrix of few singular values is orthogonalised along its rounding errors too.
    continued, sharded = (load_state(checkpoint_path(of, 5))["optimizer"]["state"] for of in (run, runs / "muon-fsdp2"))
    momenta = [name for name, state in sharded.items() if "momentum_buffer" in state]
    assert len(momenta) == 8
    for name in momenta:
        found, expected = (state[name]["momentum_buffer"] for state in (continued, sharded))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


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


def test_mpi_may_start_launchers(monkeypatch: pytest.MonkeyPatch):
    """One torchrun on each of two machines, of four processes each."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "8")
    check_joined(8)
    for num_processes in (1, 2, 4):
        with pytest.raises(ConfigError, match="WORLD_SIZE makes this one of 8 processes"):
            check_joined(num_processes)


def test_a_process_of_its_own_fails_as_clearly(drafted_cache: Path, forks: Forks, tmp_path: Path):
    outcome = forks.start(train(drafted_cache, tmp_path / "run", **SETTINGS), {"WORLD_SIZE": "2"}).wait()
    assert outcome.code == 2
    assert "WORLD_SIZE is 2" in outcome.message


@pytest.mark.parametrize(("size", "expected"), [(None, False), ("1", False), ("2", True)])
def test_a_world_of_one_is_not_launched(size: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch):
    """Some clusters set WORLD_SIZE in every process, even where there is only one process."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    assert is_launched() == expected


def test_no_thread_of_the_process_group_lives_when_the_interpreter_ends(runs: Path):
    """One that needs the interpreter then would abort the process."""
    found = [(runs / rank).read_text() for rank in ("0", "1")]
    assert [text for text in found if "gloo" in text] == []
