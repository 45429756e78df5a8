"""A run that is stopped or killed is continued by the same command, and ends as if nothing had happened."""

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.compare import check_equal_runs, checkpoint_steps, steps_logged, train
from support.forks import Forks, wait_for_lines
from support.tiny import Outcome, run_vpd
from vpd.pipeline.signals import StopSignals
from vpd.stages.train.trainer import StepResult, Trainer

STEPS = 80
"""More than a run makes before a signal reaches it."""
SETTINGS: dict[str, Any] = {"max_steps": STEPS, "save_every": 25, "batch_tokens": 100}
STOPPED = rf"vpd: stopped after step (\d+) of {STEPS}, which is saved; the same command continues\."


@pytest.fixture(scope="module")
def undisturbed(drafted_cache: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs by one process and by two."""
    folder = tmp_path_factory.mktemp("undisturbed")
    one = forks.start(train(drafted_cache, folder / "one", **SETTINGS))
    for process in (*forks.start_ranks(train(drafted_cache, folder / "two", **SETTINGS)), one):
        assert process.wait().code == 0
    return folder


def check_stopped(outcome: Outcome, run: Path) -> None:
    """The run has shown where it stopped, and saved that step."""
    found = re.search(STOPPED, outcome.err)
    assert found, outcome.err
    assert outcome.err.count("stopped after") == 1
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    step = int(found[1])
    assert 2 <= step < STEPS
    assert steps_logged(run) == [*range(1, step + 1)]
    assert checkpoint_steps(run)[-1] == step


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_a_run_after_a_step(
    number: signal.Signals, code: int, drafted_cache: Path, forks: Forks, undisturbed: Path, tmp_path: Path
):
    arguments = train(drafted_cache, tmp_path / "run", **SETTINGS)
    process = forks.start(arguments)
    wait_for_lines(tmp_path / "run" / "metrics.jsonl", 2, process)
    process.send(number)
    outcome = process.wait()
    assert outcome.code == code, outcome.err
    check_stopped(outcome, tmp_path / "run")
    assert forks.start(arguments).result()["step"] == STEPS
    check_equal_runs(tmp_path / "run", undisturbed / "one")


def check_continues_in_two(arguments: list[object], run: Path, forks: Forks, undisturbed: Path) -> None:
    for process in forks.start_ranks(arguments):
        assert process.wait().code == 0
    check_equal_runs(run, undisturbed / "two")


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130)],
    ids=["SIGTERM", "SIGINT"],
)
def test_a_signal_to_the_launcher_ends_all_processes_after_the_same_step(
    number: signal.Signals, code: int, drafted_cache: Path, forks: Forks, undisturbed: Path, tmp_path: Path
):
    arguments = train(drafted_cache, tmp_path / "run", **SETTINGS)
    launcher = forks.start([*arguments, "--num-processes", 2])
    wait_for_lines(tmp_path / "run" / "metrics.jsonl", 2, launcher)
    launcher.send(number)
    outcome = launcher.wait()
    assert outcome.code == code, outcome.err
    check_stopped(outcome, tmp_path / "run")
    check_continues_in_two(arguments, tmp_path / "run", forks, undisturbed)


def test_a_signal_to_one_process_ends_all_after_the_same_step(
    drafted_cache: Path, forks: Forks, undisturbed: Path, tmp_path: Path
):
    """A machine may be taken away while others of the same run stay."""
    arguments = train(drafted_cache, tmp_path / "run", **SETTINGS)
    processes = forks.start_ranks(arguments)
    wait_for_lines(tmp_path / "run" / "metrics.jsonl", 2, processes[0])
    processes[1].send(signal.SIGINT)
    outcomes = [process.wait() for process in processes]
    assert [outcome.code for outcome in outcomes] == [143, 130]
    check_stopped(outcomes[0], tmp_path / "run")
    assert "Traceback" not in outcomes[1].err
    check_continues_in_two(arguments, tmp_path / "run", forks, undisturbed)


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    drafted_cache: Path, forks: Forks, undisturbed: Path, tmp_path: Path
):
    arguments = train(drafted_cache, tmp_path / "run", **SETTINGS)
    process = forks.start(arguments)
    wait_for_lines(tmp_path / "run" / "metrics.jsonl", 30, process)
    process.send(signal.SIGKILL)
    assert process.wait().code == -signal.SIGKILL
    saved = checkpoint_steps(tmp_path / "run")[-1]
    assert 25 <= saved < STEPS
    assert forks.start(arguments).result()["step"] == STEPS
    check_equal_runs(tmp_path / "run", undisturbed / "one")


# Within a process


def test_a_signal_in_the_last_step_changes_nothing(
    drafted_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    original = Trainer.finish_step

    def signalled(trainer: Trainer) -> StepResult | None:
        if trainer.step + 1 == trainer.num_steps:
            signal.raise_signal(signal.SIGTERM)
        return original(trainer)

    monkeypatch.setattr(Trainer, "finish_step", signalled)
    outcome = run_vpd(*train(drafted_cache, tmp_path / "run", max_steps=3))
    assert outcome.code == 0
    assert outcome.result["step"] == 3
    assert "stopped after" not in outcome.err


def test_a_second_interrupt_is_at_once():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopSignals("soon") as signals:
        assert signals.received is None
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        signal.raise_signal(signal.SIGTERM)  # schedulers repeat it
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_terminal_interrupts_the_processes_in_its_foreground():
    """There the launcher passes nothing on: a second interrupt would stop them at once."""
    code = "import sys; from vpd.pipeline.launch import is_in_foreground; sys.exit(10 + is_in_foreground())"
    command = [sys.executable, "-c", code]
    in_terminal = f"import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn({command})))"
    for arguments, expected in ((command, 10), ([sys.executable, "-c", in_terminal], 11)):
        found = subprocess.run(arguments, stdin=subprocess.DEVNULL, start_new_session=True, check=False)
        assert found.returncode == expected
