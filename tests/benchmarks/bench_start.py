"""Starting the command line, as a share of importing torch and transformers."""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

from report import Figure, interleave, median_ratio
from support.tiny import fill_cache, make_sequence, make_tokenizer
from vpd.data.cache.storage.local import LocalStorage
from vpd.data.cache.target_files import store_target_files

NAME = "start"
DATA = "a tiny cache"
ROUNDS = 7
IMPORTS = "import torch, transformers"
TARGETS = {"vpd --help": 0.15, "vpd inspect": 0.4}
VPD = [sys.executable, "-m", "vpd.pipeline.cli"]


def bench_start(folder: Path) -> list[Figure]:
    """Every round runs each command once; seconds and ratios are the medians of the rounds."""
    cache = make_cache(folder)
    commands = {
        IMPORTS: [sys.executable, "-c", IMPORTS],
        "vpd --help": [*VPD, "--help"],
        "vpd train --help": [*VPD, "train", "--help"],
        "vpd inspect": [*VPD, "inspect", str(cache)],
    }
    for command in commands.values():  # so that the files are in memory
        time_run(command)
    seconds = interleave({name: partial(time_run, command) for name, command in commands.items()}, ROUNDS)
    figures = [
        Figure(benchmark=NAME, name=name, data=DATA, value=median(found), unit="s", less_is_better=True)
        for name, found in seconds.items()
    ]
    figures += [
        Figure(
            benchmark=NAME,
            name=f"{name}, share of {IMPORTS!r}",
            data=DATA,
            value=median_ratio(seconds[name], seconds[IMPORTS]),
            target=target,
            less_is_better=True,
        )
        for name, target in TARGETS.items()
    ]
    return figures


def make_cache(folder: Path) -> Path:
    """A cache of a few sequences with a tokenizer."""
    make_tokenizer().save_pretrained(folder / "target")
    sequences = [make_sequence(f"sequence-{i}", 100, 2, 8) for i in range(8)]
    fill_cache(folder / "cache", sequences)
    store_target_files(LocalStorage(folder / "cache"), folder / "target")
    return folder / "cache"


def time_run(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started
