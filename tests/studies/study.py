"""The study: how much prefix samplers, anchors, objectives and branch policies gain on a real model."""

# E sequences, C ways of decoding
from __future__ import annotations

import contextlib
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from study_report import REUSED, write_report
from vpd.data.cache.cache import Cache
from vpd.data.cache.drafts import FirstDrafts
from vpd.data.errors import PromptError
from vpd.pipeline.commands.draft import run_draft
from vpd.pipeline.commands.extract import run_extract
from vpd.pipeline.commands.train import run_train
from vpd.pipeline.config import VpdConfig, load_config
from vpd.pipeline.demo import make_target
from vpd.stages.drafter.checkpoint import drafter_fingerprint
from vpd.stages.evaluate.plan import plan_replay
from vpd.stages.evaluate.report import ReplayReport
from vpd.stages.holdout import is_held_out
from vpd.stages.train.checkpoints import find_drafter
from vpd.stages.train.samples import draft_readers

HELD_OUT, FIRST_SHARE = 0.1, 0.5
"""Share of the prompts that is held out; share of the rest that the first drafter learns from."""
VARIANTS = (
    "",
    "\n\nThink step by step.",
    "\n\nKeep the answer short.",
    "\n\nExplain your answer to a beginner.",
    "\n\nGive the result first, then the reasons.",
)
"""Texts appended to the training prompts, which give more responses."""
PAPER_ARM, DEFAULT_ARM = "geometric-0.9", "posterior, warm"
FIRST_STEPS = 4
"""Steps of the first drafter, in multiples of a VP-Drafter's steps."""


@dataclass(frozen=True, slots=True)
class Arm:
    """A VP-Drafter, by the settings in which it differs from the others."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    """Dotted settings on top of the study's."""
    num_seeds: int = 1
    warm: bool = False
    """Whether it starts from the first drafter."""


def prefix(sampler: str, **settings: Any) -> dict[str, Any]:
    return {"train.prefix.sampler": sampler, **{f"train.prefix.{name}": value for name, value in settings.items()}}


PAST = prefix("past-boundary")
ARMS = (
    Arm("geometric-0.9", prefix("geometric"), num_seeds=3),
    Arm("past-boundary", PAST, num_seeds=3),
    Arm("posterior, warm", prefix("posterior"), num_seeds=3, warm=True),
    Arm("past-boundary, warm", PAST, num_seeds=3, warm=True),
    Arm("geometric-0.9, warm", prefix("geometric"), num_seeds=3, warm=True),
    Arm("visible-geometric", prefix("visible-geometric")),
    Arm("boundary", prefix("boundary")),
    Arm("posterior", prefix("posterior")),
    Arm("topk", prefix("topk")),
    Arm("geometric-0.6", prefix("geometric", beta=0.6)),
    Arm("geometric-0.8", prefix("geometric", beta=0.8)),
    Arm("geometric-1.0", prefix("geometric", beta=1.0)),
    Arm("mixture 0.7 past, 0.3 geometric", prefix("mixture", mixture={"past-boundary": 0.7, "geometric": 0.3})),
    Arm(
        "mixture 0.4 past, 0.4 boundary, 0.2 geometric",
        prefix("mixture", mixture={"past-boundary": 0.4, "boundary": 0.4, "geometric": 0.2}),
    ),
    Arm(
        "mixture 0.7 posterior, 0.3 geometric, warm",
        prefix("mixture", mixture={"posterior": 0.7, "geometric": 0.3}),
        warm=True,
    ),
    Arm(
        "mixture 0.5 posterior, 0.5 past, warm",
        prefix("mixture", mixture={"posterior": 0.5, "past-boundary": 0.5}),
        warm=True,
    ),
    Arm("past-boundary, failure", PAST | {"train.anchor.sampler": "failure"}),
    Arm("past-boundary, batch", PAST | {"train.normalize": "batch"}),
    Arm("past-boundary, tau 3", PAST | {"train.tau": 3.0}),
    Arm("boundary, warm", prefix("boundary"), warm=True),
    Arm("past-boundary, warm, lr 3e-4", PAST | {"train.lr": 3e-4}, warm=True),
)


@dataclass(frozen=True, slots=True)
class Study:
    """The study's folder, and the settings that all runs share."""

    out: Path
    recipe: Path
    overrides: dict[str, Any]

    @property
    def first(self) -> Path:
        return self.out / "first"

    def cache(self, split: str) -> str:
        return str(self.out / "caches" / split)

    def config(self, **settings: Any) -> VpdConfig:
        return load_config(self.recipe, self.overrides | settings)


def run_study(
    study: Study, prompts: Sequence[Path], unseen: Sequence[Path], num_variants: int, num_workers: int
) -> None:
    """Runs every step that is not done yet, and writes each arm's result as soon as it is there.

    Args:
        prompts: prompt files to train on. `plan_splits` splits their prompts.
        unseen: prompt files of another kind, never trained on.
    """
    splits = plan_splits(prompts, unseen, num_variants)
    study.out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True, highlight=False)
    make_target(study.out / "target")
    for split, records in splits.items():
        (study.out / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        console.rule(f"extract {split}")
        run_extract(
            str(study.out / "target"),
            (str(study.out / f"{split}.jsonl"),),
            study.cache(split),
            None,
            study.config(),
            True,
        )
    with worker_pool(num_workers) as pool:
        # Arms that need no first drafter train while the first drafter trains.
        for arm in ARMS:
            if not (arm.warm or draft_readers(study.config(**arm.settings).train)):
                for seed in range(arm.num_seeds):
                    pool.submit(train_arm, study, arm, seed)
        console.rule("first drafter")
        run_train(study.cache("first"), study.first, first_config(study), True)
        for split in ("train", "held", "unseen"):
            console.rule(f"draft {split}")
            run_draft(study.cache(split), study.first, study.config(), True)
        run_arms(study, pool, console)
    print(write_report(study.out, study.config().eval.k, PAPER_ARM, DEFAULT_ARM))


@contextlib.contextmanager
def worker_pool(num_workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes, which are killed if the caller fails or is stopped. A later study resumes their runs."""
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()
            raise


def first_config(study: Study) -> VpdConfig:
    """The first drafter's settings: the study's, with more steps."""
    steps = study.config().train.max_steps
    assert steps is not None
    return study.config(**{"train.objective": "dflash", "train.max_steps": FIRST_STEPS * steps})


def run_arms(study: Study, pool: ProcessPoolExecutor, console: Console) -> None:
    """Trains and evaluates all arms, several at a time; if an arm fails, the others go on."""
    futures: dict[Future[dict[str, Any]], str] = {pool.submit(run_arm, study, None, 0): REUSED}
    for arm in ARMS:
        for seed in range(arm.num_seeds):
            futures[pool.submit(run_arm, study, arm, seed)] = f"{arm.name}, seed {seed}"
    for future in as_completed(futures):
        error = future.exception()
        shown = future.result()["alpha"] if error is None else f"failed: {error!r}"
        console.print(f"{futures[future]}: {shown}")


def run_arm(study: Study, arm: Arm | None, seed: int) -> dict[str, Any]:
    """Trains a VP-Drafter (None: takes the first drafter), replays it on both held-out splits, writes the result."""
    name = REUSED if arm is None else arm.name
    path = study.out / "results" / f"{file_name(name)}.{seed}.json"
    if path.is_file():
        return json.loads(path.read_text())
    drafter = study.first if arm is None else train_arm(study, arm, seed)
    result: dict[str, Any] = {"arm": name, "seed": seed, "alpha": {}}
    for split in ("held", "unseen"):
        report = replay(study, split, drafter)
        result["alpha"][split] = report.alpha
        result[split] = summary(report)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result))
    return result


def train_arm(study: Study, arm: Arm, seed: int) -> Path:
    """Trains a VP-Drafter to its last step, unless that is done; returns the run's folder."""
    run = study.out / "arms" / f"{file_name(arm.name)}.{seed}"
    settings = {**arm.settings, "train.seed": seed, "train.first_drafter": str(study.first)}
    if arm.warm:
        settings["train.init"] = str(study.first)
    run.mkdir(parents=True, exist_ok=True)
    with silenced(run / "log.txt"):
        run_train(study.cache("train"), run, study.config(**settings), True)
    return run


def file_name(name: str) -> str:
    return name.replace(", ", "_").replace(" ", "-")


def replay(study: Study, split: str, drafter: Path) -> ReplayReport:
    cache = Cache.open(study.cache(split))
    config = study.config()
    drafts = FirstDrafts.open(cache, drafter_fingerprint(find_drafter(study.first), cache.target_folder))
    return plan_replay(cache, cache.rows, drafts, config.eval, config.read).run(find_drafter(drafter))


def summary(report: ReplayReport) -> dict[str, Any]:
    """A report with each way's cycles by sequence, which paired comparisons need."""
    cycles_EC = np.stack(report.cycles_EC)
    ways = [
        {**way._asdict(), "alpha": alpha, "cycles": cycles_EC[:, c].tolist()}
        for c, (way, alpha) in enumerate(zip(report.ways, report.alphas().tolist(), strict=True))
    ]
    found = report.to_json()
    kept = {name: found[name] for name in ("recovery", "calibration", "hits", "num_tokens", "num_sequences", "skipped")}
    return {"ways": ways, "tokens": report.num_tokens_E, **kept}


@contextlib.contextmanager
def silenced(log: Path) -> Iterator[None]:
    """Sends what a run prints to its log."""
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield


def plan_splits(prompts: Sequence[Path], unseen: Sequence[Path], num_variants: int) -> dict[str, list[dict[str, Any]]]:
    """The prompts of the splits `first`, `train`, `held` and `unseen`, chosen by a hash of their text.

    The first drafter has training prompts of its own. On prompts that it has learnt by heart, its drafts would fail
    at other places than in use. The variants are made for the training prompts only.

    Raises:
        PromptError: a file can't be read, or a record has another form than {"turns": [...]}.
    """
    records = list(read_turns(prompts))
    texts = [json.dumps(record) for record in records]
    held = [is_held_out(text, HELD_OUT) for text in texts]
    of_first = [is_held_out(f"first {text}", FIRST_SHARE) for text in texts]

    def variants(for_first: bool) -> list[dict[str, Any]]:
        return [
            {"turns": [*record["turns"][:-1], record["turns"][-1] + variant]}
            for variant in VARIANTS[:num_variants]
            for record, is_held, is_first in zip(records, held, of_first, strict=True)
            if not is_held and is_first == for_first
        ]

    return {
        "first": variants(True),
        "train": variants(False),
        "held": [record for record, is_held in zip(records, held, strict=True) if is_held],
        "unseen": list(read_turns(unseen)),
    }


def read_turns(paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    for path in paths:
        try:
            lines = path.read_text().splitlines()
        except OSError as error:
            raise PromptError(f"expected a prompt file at {path}: {error.strerror}. Check the path.") from None
        for number, line in enumerate(lines):
            try:
                yield {"turns": json.loads(line)["turns"]}
            except (ValueError, KeyError, TypeError):
                raise PromptError(f'{path}, row {number}: expected {{"turns": [...]}}, found {line[:60]!r}.') from None
