"""A sweep's runs are the runs that `vpd train` makes one by one, however many share a pass over the cache."""

import json
import signal
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.compare import MASK, check_equal_runs, checkpoint_steps, metrics, steps_logged
from support.forks import Forks
from support.place import check_message
from support.tiny import DRAFTER, TRAIN, Outcome, run_vpd, snapshot, vpd
from vpd.data.cache.reader import CachedSequence, read_ahead
from vpd.pipeline import training
from vpd.pipeline.sweep import combinations, run_name
from vpd.pipeline.training import RunLog
from vpd.stages.train import feed
from vpd.stages.train.trainer import StepResult, Trainer

Settings = dict[str, Any]
SETTINGS: Settings = {
    **{f"drafter.{name}": value for name, value in DRAFTER.items()},
    **MASK,
    **{f"train.{name}": value for name, value in TRAIN.items()},
    "train.max_steps": 5,
    "train.save_every": 2,
    "train.batch_tokens": 100,
}
VARY = ["train.prefix.sampler=[geometric,boundary]", "train.num_anchors=[32,6]"]
NAMES = [f"sampler={sampler},num_anchors={number}" for sampler in ("geometric", "boundary") for number in (32, 6)]


def assignments(settings: Settings) -> list[object]:
    return [text for name, value in settings.items() for text in ("--set", f"{name}={value}")]


def sweep(cache: Path, out: Path, *more: object, vary: list[str] = VARY, **changes: Any) -> list[object]:
    """Arguments of a sweep over tiny drafters."""
    varied = [text for each in vary for text in ("--vary", each)]
    return ["sweep", cache, "--out", out, *varied, *assignments(SETTINGS | changes), *more]


def run_sweep(*arguments: Any, **changes: Any) -> list[Settings]:
    return vpd(*sweep(*arguments, **changes))["runs"]


@pytest.fixture(scope="module")
def separate(drafted_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every combination of `VARY`, trained by itself."""
    folder = tmp_path_factory.mktemp("separate")
    for settings in combinations(VARY):
        vpd("train", drafted_cache, "--out", folder / run_name(settings), *assignments(SETTINGS | settings))
    return folder


def check_runs(folder: Path, separate: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(NAMES)
    for name in NAMES:
        assert steps_logged(folder / name) == [1, 2, 3, 4, 5]
        check_equal_runs(folder / name, separate / name)


@pytest.fixture(scope="module")
def together(drafted_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Settings]]:
    """The sweep whose runs all share a pass, and its results."""
    folder = tmp_path_factory.mktemp("together") / "sweep"
    return folder, run_sweep(drafted_cache, folder, "--together", 4)


def test_runs_that_share_a_pass_are_those_that_do_not(together: tuple[Path, list[Settings]], separate: Path):
    check_runs(together[0], separate)


def test_runs_evaluated_while_they_train_are_those_of_vpd_train(drafted_cache: Path, tmp_path: Path):
    changes = {"train.eval_limit": 2, "train.max_steps": 2}
    results = run_sweep(drafted_cache, tmp_path / "sweep", vary=["train.lr=[0.003,0.002]"], **changes)
    settings = SETTINGS | changes
    for result in results:
        lr = result["run"].removeprefix("lr=")
        vpd("train", drafted_cache, "--out", tmp_path / lr, *assignments(settings | {"train.lr": lr}))
        lines = metrics(tmp_path / lr)
        assert [line["step"] for line in lines if "alpha" in line] == [2]
        assert result["loss"] == [line["loss"] for line in lines if "loss" in line][-1]
        check_equal_runs(tmp_path / "sweep" / result["run"], tmp_path / lr)


def test_a_run_that_fails_does_not_stop_the_others(drafted_cache: Path, tmp_path: Path, forks: Forks):
    """Not in its pass, not in passes to come, not in other processes."""
    hot = {"train.clip": 1e30, "train.warmup": 0.0}
    together, workers = (
        forks.start(
            sweep(drafted_cache, tmp_path / name, *more, "--json", vary=["train.lr=[0.003,1e30,0.002]"], **hot)
        ).wait()
        for name, more in {"together": ["--together", 3], "workers": ["--together", 1, "--num-workers", 2]}.items()
    )
    assert "vpd: error: lr=1e30: step 2: the loss or its gradient is not finite" in together.err
    for outcome in (together, workers):
        assert outcome.code == 1
        assert {run["run"] for run in json.loads(outcome.out)["runs"]} == {"lr=0.003", "lr=0.002"}
    for name in ("together", "workers"):
        assert [checkpoint_steps(tmp_path / name / run)[-1] for run in ("lr=0.003", "lr=0.002")] == [5, 5]
        assert checkpoint_steps(tmp_path / name / "lr=1e30") == []
    check_equal_runs(tmp_path / "together" / "lr=0.002", tmp_path / "workers" / "lr=0.002")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"train.holdout": 0.0}, "expected held-out greedy responses", id="nothing-held-out"),
        pytest.param({"train.prefix.sampler": "geometric"}, "expected the first drafts", id="no-first-drafts"),
    ],
)
def test_what_evaluation_needs_is_checked_before_training(
    changes: Settings, message: str, tiny_cache: Path, drafted_cache: Path, tmp_path: Path
):
    cache = drafted_cache if "train.holdout" in changes else tiny_cache
    outcome = run_vpd(*sweep(cache, tmp_path / "sweep", vary=["train.tau=[2,4]"], **changes))
    assert outcome.code == 1
    assert message in outcome.err
    assert not (tmp_path / "sweep").exists()


def test_runs_may_compute_in_other_types(drafted_cache: Path, tmp_path: Path):
    results = run_sweep(drafted_cache, tmp_path / "sweep", vary=["train.precision=[float32,bfloat16]"])
    losses = {result["run"]: result["loss"] for result in results}
    assert losses["precision=float32"] != losses["precision=bfloat16"]
    assert losses["precision=float32"] == pytest.approx(losses["precision=bfloat16"], rel=0.05)


@pytest.mark.parametrize("number", [1, 3])
def test_the_number_of_runs_together_changes_nothing(number: int, drafted_cache: Path, separate: Path, tmp_path: Path):
    run_sweep(drafted_cache, tmp_path / "sweep", "--together", number)
    check_runs(tmp_path / "sweep", separate)


def test_workers_share_the_runs(
    drafted_cache: Path, separate: Path, together: tuple[Path, list[Settings]], forks: Forks, tmp_path: Path
):
    arguments = sweep(drafted_cache, tmp_path / "sweep", "--num-workers", 2, "--json")
    results = forks.start(arguments).result()["runs"]
    check_runs(tmp_path / "sweep", separate)
    found, expected = (
        Counter((each["run"], json.dumps(each["alpha"])) for each in runs) for runs in (results, together[1])
    )
    assert found == expected


def test_a_worker_does_its_share_alone(drafted_cache: Path, tmp_path: Path):
    """As on another machine, with the same folder."""
    for worker in range(3):
        outcome = run_vpd(*sweep(drafted_cache, tmp_path, "--num-workers", 3, "--worker-index", worker))
        assert (outcome.code, outcome.out) == (0, "")
        done = sorted(path.name for path in tmp_path.iterdir())
        assert done == sorted({*NAMES[0::3], *(NAMES[1::3] if worker else []), *(NAMES[2::3] if worker > 1 else [])})


def test_results_list_all_runs_the_best_first(
    together: tuple[Path, list[Settings]], drafted_cache: Path, first_run: Path
):
    folder, results = together
    assert sorted(each["run"] for each in results) == sorted(NAMES)
    alphas = [each["alpha"]["d2sd"] for each in results]
    assert alphas == sorted(alphas, reverse=True)
    for each in results:
        assert each["loss"] == json.loads((folder / each["run"] / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
        expected = vpd("eval", drafted_cache, "--first-drafter", first_run, "--drafter", folder / each["run"])
        assert each["alpha"].items() <= expected["alpha"].items()
        assert Path(each["checkpoint"]) == folder / each["run"] / "checkpoints" / "step-0000005"


def test_without_json_a_table_tells_of_each_run(together: tuple[Path, list[Settings]], drafted_cache: Path):
    outcome = run_vpd(*sweep(drafted_cache, together[0]))
    assert outcome.code == 0
    assert "alpha d2sd" in outcome.out.replace("\n", " ")
    best = together[1][0]
    assert f"{best['alpha']['d2sd']:.3f}" in outcome.out


def test_first_drafters_are_ranked_by_their_own_alpha(drafted_cache: Path, tmp_path: Path):
    changes = {"train.objective": "dflash"}
    results = run_sweep(drafted_cache, tmp_path / "sweep", vary=["train.lr=[1e-2,1e-5]"], **changes)
    assert {each["run"] for each in results} == {"lr=1e-2", "lr=1e-5"}
    alphas = [each["alpha"]["first"] for each in results]
    assert alphas == sorted(alphas, reverse=True)
    for each in results:
        found = vpd("eval", drafted_cache, "--first-drafter", tmp_path / "sweep" / each["run"])["alpha"]
        assert each["alpha"] == {name: found[name] for name in ("first", "first_tree")}


# What is trained together


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Names of the runs trained together, group after group."""
    found: list[list[str]] = []

    def noted(trainers: list[Trainer], *more: Any) -> bool:
        found.append([trainer.run.name for trainer in trainers])
        return original(trainers, *more)

    original = training.run_together
    monkeypatch.setattr(training, "run_together", noted)
    return found


def test_runs_that_read_other_sequences_are_not_trained_together(
    drafted_cache: Path, tmp_path: Path, groups: list[list[str]]
):
    run_sweep(drafted_cache, tmp_path / "sweep", vary=["train.seed=[0,1]", "train.lr=[3e-3,1e-3]"])
    assert groups == [["seed=0,lr=3e-3", "seed=0,lr=1e-3"], ["seed=1,lr=3e-3", "seed=1,lr=1e-3"]]
    for name in groups[0] + groups[1]:
        assert steps_logged(tmp_path / "sweep" / name) == [1, 2, 3, 4, 5]


def test_runs_of_other_lengths_are_not_trained_together(drafted_cache: Path, tmp_path: Path, groups: list[list[str]]):
    run_sweep(drafted_cache, tmp_path / "sweep", vary=["train.max_steps=[2,3]"])
    assert groups == [["max_steps=2"], ["max_steps=3"]]
    assert [steps_logged(tmp_path / "sweep" / name[0])[-1] for name in groups] == [2, 3]


def test_at_most_so_many_runs_are_trained_together(drafted_cache: Path, tmp_path: Path, groups: list[list[str]]):
    run_sweep(drafted_cache, tmp_path / "sweep", "--together", 3)
    assert groups == [NAMES[:3], NAMES[3:]]


def test_runs_together_read_each_sequence_once(drafted_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    counts: Counter[str] = Counter()

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            counts[name] += 1
            return original(*arguments)

        return counted

    def reading(*arguments: Any, **settings: Any) -> Generator[CachedSequence]:
        for sequence in read_ahead(*arguments, **settings):
            counts["reads"] += 1
            yield sequence

    def count(*vary: str) -> Counter[str]:
        counts.clear()
        out = tmp_path / str(len(vary)) / vary[-1].rpartition("=")[2]
        assert run_vpd(*sweep(drafted_cache, out, "--together", 9, vary=[*vary])).code == 0
        return counts.copy()

    monkeypatch.setattr(feed, "read_ahead", reading)
    monkeypatch.setattr(feed, "draw_blocks", counting("draws", feed.draw_blocks))
    monkeypatch.setattr("vpd.pipeline.commands.sweep.evaluate_run", lambda cache, run: None)
    monkeypatch.setattr("vpd.pipeline.commands.sweep.show_sweep", lambda runs, as_json: None)
    one, three = count("train.tau=[7]"), count("train.tau=[7,4,2]")
    assert one["draws"] > 0
    assert three["reads"] == one["reads"]
    assert three["draws"] == 3 * one["draws"]


# Interruptions


@pytest.mark.parametrize("where", ["finish_step", "save"])
@pytest.mark.parametrize("number", [1, 4])
def test_an_interrupted_sweep_is_continued_by_the_same_command(
    where: str, number: int, drafted_cache: Path, separate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Runs that have come to different steps, because they were at work on the same one, come together again."""
    arguments = sweep(drafted_cache, tmp_path / "sweep", "--together", number)
    original = getattr(Trainer, where)

    def interrupted(trainer: Trainer) -> StepResult | dict[str, float] | None:
        if trainer.run.name == NAMES[2] and trainer.step == (4 if where == "save" else 3):
            raise KeyboardInterrupt
        return original(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, where, interrupted)
        outcome = run_vpd(*arguments)
    assert (outcome.code, "the same command continues" in outcome.err) == (130, True)
    assert checkpoint_steps(tmp_path / "sweep" / NAMES[2]) == [2]
    # Before it in the group, a run had saved the step in which it was interrupted.
    reached = {(4, "finish_step"): 2, (4, "save"): 4}.get((number, where), 5)
    assert checkpoint_steps(tmp_path / "sweep" / NAMES[0])[-1] == reached
    assert run_vpd(*arguments).code == 0
    check_runs(tmp_path / "sweep", separate)


def test_a_finished_sweep_is_left_as_it_is(
    together: tuple[Path, list[Settings]], drafted_cache: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, results = together
    before = snapshot(folder)
    monkeypatch.delattr(Trainer, "finish_step")  # none is called
    assert run_sweep(drafted_cache, folder) == results
    after = snapshot(folder)
    assert after.keys() == before.keys()
    assert {Path(path).name for path, content in after.items() if before[path] != content} <= {"provenance.json"}


def test_a_signal_that_a_run_has_no_use_for_ends_the_sweep(
    drafted_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In the last step of one run, before the next begins."""
    arguments = sweep(drafted_cache, tmp_path, "--together", 1, "--json", vary=["train.lr=[0.003,0.002]"])
    with monkeypatch.context() as patch:
        signal_at(patch, 5)
        outcome = run_vpd(*arguments)
    assert (outcome.code, outcome.out) == (143, "")
    assert "the same command continues" in outcome.err
    assert checkpoint_steps(tmp_path / "lr=0.003")[-1] == 5
    assert not (tmp_path / "lr=0.002" / "metrics.jsonl").exists()
    assert len(run_vpd(*arguments).result["runs"]) == 2


def test_a_stopped_sweep_tells_what_has_failed(drafted_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ended = note_ends(monkeypatch)
    signal_at(monkeypatch, 4)
    hot = {"train.clip": 1e30, "train.warmup": 0.0}
    outcome = run_vpd(*sweep(drafted_cache, tmp_path, vary=["train.lr=[1e30,0.002]"], **hot))
    assert outcome.code == 143
    assert "stopped after step 4 of 5" in outcome.err
    assert "vpd: error: lr=1e30: step 2: the loss or its gradient is not finite" in outcome.err
    assert ended == ["lr=1e30", "lr=0.002"]


def test_trackers_of_runs_that_all_fail_are_ended(drafted_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ended = note_ends(monkeypatch)
    hot = {"train.clip": 1e30, "train.warmup": 0.0}
    assert run_vpd(*sweep(drafted_cache, tmp_path, vary=["train.lr=[1e30,1e29]"], **hot)).code == 1
    assert ended == ["lr=1e30", "lr=1e29"]


def note_ends(patch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs whose trackers are ended."""
    ended: list[str] = []
    original = RunLog.end

    def noted(log: RunLog) -> None:
        ended.append(log.trainer.run.name)
        original(log)

    patch.setattr(RunLog, "end", noted)
    return ended


def signal_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """A termination in that step of any run."""
    original = Trainer.finish_step

    def signalled(trainer: Trainer) -> StepResult | None:
        if trainer.step + 1 == step:
            signal.raise_signal(signal.SIGTERM)
        return original(trainer)

    patch.setattr(Trainer, "finish_step", signalled)


# What can't be varied


def test_a_launcher_of_several_processes_is_refused(
    drafted_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_refused(
        run_vpd(*sweep(drafted_cache, tmp_path / "sweep")), ["vpd sweep", "--num-workers"], tmp_path / "sweep"
    )


class Wrong(NamedTuple):
    id: str
    vary: list[str]
    words: list[str]


WRONG = [
    Wrong("unknown-key", ["train.learning=[1]"], ["--vary", "a setting of drafter or train", "train.learning"]),
    Wrong("a-whole-section", ["train=[1]"], ["--vary", "a setting of drafter or train", "'train'"]),
    Wrong("key-of-another-section", ["extract.codec=[raw]"], ["drafter or train", "extract.codec"]),
    Wrong("no-list", ["train.lr=3e-4"], ["--vary train.lr", "a list of values, such as train.lr=[1,2]", "3e-4"]),
    Wrong("no-value", ["train.lr"], ["--vary train.lr", "a list of values", "None"]),
    Wrong("empty-list", ["train.lr=[]"], ["--vary train.lr", "a list of values", "[]"]),
    Wrong("no-yaml", ["train.lr=[1"], ["--vary train.lr", "a list of values", "[1"]),
    Wrong("bad-value", ["train.tau=[7,0]"], ["train.tau", "greater than 0"]),
    Wrong("value-twice", ["train.tau=[7,4,7]"], ["--vary", "tau=7", "twice"]),
    Wrong("key-twice", ["train.tau=[7]", "train.lr=[1]", "train.tau=[4]"], ["--vary", "train.tau", "twice"]),
]


def check_refused(outcome: Outcome, words: list[str], out: Path) -> None:
    check_message(outcome, 2, words)
    assert not out.exists()


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.id)
def test_what_can_not_be_varied_is_named(wrong: Wrong, drafted_cache: Path, tmp_path: Path):
    out = tmp_path / "sweep"
    check_refused(run_vpd(*sweep(drafted_cache, out, vary=wrong.vary)), wrong.words, out)
