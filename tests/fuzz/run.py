"""Damages what vpd reads, at random, and checks what comes of it: `python tests/fuzz/run.py --minutes 60`.

A case is named by its subject and its seed, and is the same wherever it runs: `--only target --seed 17 --cases 1`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from random import Random

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TQDM_DISABLE": "1"}
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from fuzz.subjects import SUBJECTS, Case, Fault, Start
from support.tiny import DRAFTER, EXTRACT, PROMPTS, TRAIN, make_tokenizer, save_target, vpd, write_jsonl


def make_start(folder: Path) -> Start:
    """A tiny target, a first drafter, and a cache with first drafts."""
    target = save_target("qwen3", folder / "target", make_tokenizer())
    prompts = write_jsonl(folder / "prompts.jsonl", PROMPTS[:4])
    vpd("extract", target, prompts, "--out", folder / "cache", **EXTRACT)
    vpd("train", folder / "cache", "--out", folder / "run", objective="dflash", max_steps=1, **DRAFTER, **TRAIN)
    (drafter,) = (folder / "run" / "checkpoints").iterdir()
    shutil.copytree(drafter, folder / "drafter", ignore=shutil.ignore_patterns("state*"))
    vpd("draft", folder / "cache", "--first-drafter", folder / "drafter")
    return Start(target, folder / "cache", folder / "drafter")


def run_case(name: str, seed: int, start: Start, folder: Path) -> tuple[str, Case]:
    """One case in an empty folder, which is removed; the outcome is the subject's, or the fault's text."""
    folder.mkdir()
    case = Case(Random(f"{name} {seed}"), folder, start)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return SUBJECTS[name](case), case
    except Fault as fault:
        return str(fault) or "fault", case
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument(
        "--cases", type=int, help="number of cases of each subject; as many as the time allows if absent"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case")
    parser.add_argument("--only", action="append", choices=SUBJECTS)
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz.jsonl"), help="where faults are written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    counts: dict[str, Counter[str]] = {name: Counter() for name in args.only or SUBJECTS}
    end, seed = time.monotonic() + 60 * args.minutes, args.seed
    with tempfile.TemporaryDirectory() as scratch, args.out.open("a") as faults:
        start = make_start(Path(scratch))
        while not stopped and time.monotonic() < end and (args.cases is None or seed < args.seed + args.cases):
            for name, counted in counts.items():
                outcome, case = run_case(name, seed, start, Path(scratch, "case"))
                is_fault = outcome not in ("right", "refused")
                counted["fault" if is_fault else outcome] += 1
                if is_fault:
                    print(json.dumps([name, seed, outcome, case.notes]), file=faults, flush=True)
                    print(f"{name} {seed}: {outcome[:300]}", flush=True)
            seed += 1
    for name, counted in counts.items():
        print(f"{name:10} {dict(counted)}")
    return int(any(counted["fault"] for counted in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
