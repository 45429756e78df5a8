"""All benchmarks: one table, `bench.json`, and exit code 1 if a target is missed.

    python tests/benchmarks/run.py [--out FILE] [--only NAME] ...

They take about fourteen minutes and 4 GiB of the disk below OUT, which is given back. Ratios compare what was measured
in the same run, in turn; still, a machine that does nothing else gives the truest ones.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import click

sys.path.insert(1, str(Path(__file__).parents[1]))  # for `servers`

from bench_codecs import bench_codecs
from bench_extract import bench_extract
from bench_feed import bench_feed
from bench_open import bench_open
from bench_plan import bench_plan
from bench_read import bench_read
from bench_remote import bench_remote
from bench_start import bench_start
from bench_train import bench_train
from bench_trees import bench_trees
from bench_write import bench_write
from report import Figure, describe_machine, print_table, write_json
from workload import QWEN3, SMOLLM2

BENCHMARKS: dict[str, list[Callable[[Path], list[Figure]]]] = {
    "write": [partial(bench_write, workload=workload) for workload in (QWEN3, SMOLLM2)],
    "read": [partial(bench_read, workload=workload) for workload in (QWEN3, SMOLLM2)],
    "start": [bench_start],
    "open": [bench_open],
    "plan": [bench_plan],
    "codecs": [bench_codecs],
    "feed": [partial(bench_feed, workload=SMOLLM2)],
    "train": [bench_train],
    "trees": [bench_trees],
    "extract": [bench_extract],
    "remote": [partial(bench_remote, workload=workload) for workload in (QWEN3, SMOLLM2)],
}


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/bench.json"), show_default=True)
@click.option("--only", type=click.Choice(list(BENCHMARKS)), multiple=True, help="Benchmarks to run; none = all.")
def main(out: Path, only: tuple[str, ...]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(out.parent)
    figures: list[Figure] = []
    seconds: dict[str, float] = {}
    for name in only or BENCHMARKS:
        started = time.monotonic()
        for bench in BENCHMARKS[name]:
            with TemporaryDirectory(dir=out.parent, prefix="bench-") as folder:
                figures += bench(Path(folder))
        seconds[name] = round(time.monotonic() - started, 1)
    write_json(out, machine, seconds, figures)
    print_table(machine, seconds, figures)
    sys.exit(any(figure.holds is False for figure in figures))


if __name__ == "__main__":
    main()
