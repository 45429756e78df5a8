"""Figures, the machine that they were measured on, and the table and the file that show them."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

PACKAGES = ["torch", "numpy", "zarr", "numcodecs", "crc32c", "xxhash", "obstore", "pyarrow", "tensorstore", "zarrs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number. With a target it must be at least that, or at most where less is better."""

    benchmark: str
    name: str
    data: str
    """What it was measured on."""
    value: float
    unit: str = "x"
    digits: int | None = None
    """Decimal places to show; none = by its size."""
    target: float | None = None
    less_is_better: bool = False

    @property
    def holds(self) -> bool | None:
        if self.target is None:
            return None
        return self.value <= self.target if self.less_is_better else self.value >= self.target


def interleave(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run in every round: A, B, C, A, B, C, ..., so that a busy machine slows all of them down."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(run())
    return seconds


def median_ratio(one: list[float], other: list[float]) -> float:
    """Median over the rounds of how many times as much `one` is."""
    return median(a / b for a, b in zip(one, other, strict=True))


def describe_machine(folder: Path) -> dict[str, Any]:
    """The processor, the kernel, and what holds the files."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [mount for mount in mounts if folder.resolve().is_relative_to(mount[1])]
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": ", ".join(sorted(models)) or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "kernel": platform.release(),
        "file_system": max(holding, key=lambda mount: len(mount[1]))[2] if holding else "unknown",
        "huge_pages": pages.read_text().strip() if pages.is_file() else "unknown",
        "load": round(os.getloadavg()[0], 2),
    }


def find_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_json(path: Path, machine: dict[str, Any], seconds: dict[str, float], figures: list[Figure]) -> None:
    entries = [{**asdict(figure), "holds": figure.holds} for figure in figures]
    report = {"machine": machine, "versions": find_versions(), "seconds": seconds, "figures": entries}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def print_table(machine: dict[str, Any], seconds: dict[str, float], figures: list[Figure]) -> None:
    """One row a figure, one column for each kind of data."""
    kinds = list(dict.fromkeys(figure.data for figure in figures))
    table = Table("benchmark", "figure", *kinds, "target", title="vpd bench", title_justify="left")
    rows = dict.fromkeys((figure.benchmark, figure.name) for figure in figures)
    before = ""
    for benchmark, name in rows:
        found = {figure.data: figure for figure in figures if (figure.benchmark, figure.name) == (benchmark, name)}
        if benchmark != before:
            table.add_section()
        cells = [show(found[kind]) if kind in found else "" for kind in kinds]
        table.add_row(benchmark if benchmark != before else "", name, *cells, show_target(list(found.values())))
        before = benchmark
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    console.print(table)
    for facts in (machine, find_versions(), {f"{name} took": f"{value:.0f} s" for name, value in seconds.items()}):
        console.print(", ".join(f"{name} {value}" for name, value in facts.items()), markup=False)


def show(figure: Figure) -> str:
    size = abs(figure.value)
    digits = figure.digits if figure.digits is not None else 2 if size < 10 else 1 if size < 100 else 0
    return f"{figure.value:,.{digits}f} {figure.unit}"


def show_target(figures: list[Figure]) -> str:
    aimed = [figure for figure in figures if figure.target is not None]
    if not aimed:
        return ""
    sign = "<=" if aimed[0].less_is_better else ">="
    verdict = "holds" if all(figure.holds for figure in aimed) else "[bold red]missed[/bold red]"
    return f"{sign} {aimed[0].target:g} {verdict}"
