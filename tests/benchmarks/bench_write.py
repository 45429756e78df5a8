"""Writing: `StateWriter` against the same bytes written into one file, both through to the disk."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import disk_usage, rmtree
from tempfile import TemporaryDirectory

import torch
from report import Figure, interleave, median_ratio
from vpd.data.cache.cache import Cache
from vpd.data.cache.writer import StateWriter
from workload import GIB, MIB, Workload, append, make_manifest

NAME = "write"
ROUNDS = 5
RAW_BLOCK = 4 * MIB
SHARED_MEMORY = Path("/dev/shm")
SEQUENCES_IN_MEMORY = 4


def bench_write(folder: Path, workload: Workload) -> list[Figure]:
    """The median over the rounds: what one write leaves for the disk to do slows the next one down."""
    sequences = list(workload.sequences())
    num_bytes = sum(sequence["hidden_TKH"].nbytes for sequence in sequences)
    largest = max(sequence["hidden_TKH"].nbytes for sequence in sequences)
    peak_bytes = 0

    def write_raw(where: Path) -> float:
        path = where / "raw"
        started = time.perf_counter()
        with open(path, "wb", buffering=0) as file:
            for sequence in sequences:
                content = memoryview(sequence["hidden_TKH"].view(torch.uint8).numpy()).cast("B")
                for start in range(0, len(content), RAW_BLOCK):
                    file.write(content[start : start + RAW_BLOCK])
            os.fsync(file.fileno())
        seconds = time.perf_counter() - started
        path.unlink()
        return seconds

    def write_cache(where: Path) -> float:
        nonlocal peak_bytes
        cache = Cache.create_or_open(where / "written", make_manifest(workload.num_layers, workload.hidden_size))
        peak = measure_peak()
        started = time.perf_counter()
        writer = StateWriter(cache, 2 * GIB, {})
        for sequence in sequences:
            append(writer, **sequence)
        writer.finish()
        seconds = time.perf_counter() - started
        peak_bytes = max(peak_bytes, peak())
        rmtree(where / "written")
        return seconds

    runs = {"raw": lambda: write_raw(folder), "ours": lambda: write_cache(folder)}
    with memory_folder(2 * num_bytes) as memory:
        if memory is not None:
            runs |= {"raw in memory": lambda: write_raw(memory), "ours in memory": lambda: write_cache(memory)}
        seconds = interleave(runs, ROUNDS)

    def figure(name: str, value: float, unit: str = "x", target: float | None = None, less: bool = False) -> Figure:
        return Figure(
            benchmark=NAME,
            name=name,
            data=workload.name,
            value=value,
            unit=unit,
            target=target if target is None else workload.target(target),
            less_is_better=less,
        )

    found = [
        figure("raw write with fsync, best", num_bytes / min(seconds["raw"]) / 1e9, "GB/s"),
        figure("StateWriter: crc32c, fsync, commit, best", num_bytes / min(seconds["ours"]) / 1e9, "GB/s"),
        figure("StateWriter / raw write, median", median_ratio(seconds["raw"], seconds["ours"]), target=0.8),
        figure(
            f"memory of the writer, at most {SEQUENCES_IN_MEMORY} sequences",
            peak_bytes / MIB,
            "MiB",
            SEQUENCES_IN_MEMORY * largest / MIB,
            True,
        ),
    ]
    if "raw in memory" in seconds:
        ratio = median_ratio(seconds["raw in memory"], seconds["ours in memory"])
        found.append(figure("the same ratio without a disk, in /dev/shm", ratio))
    return found


@contextmanager
def memory_folder(num_bytes: int) -> Iterator[Path | None]:
    """A folder in memory, where a write costs the processor's work alone; None if there is no room for one."""
    if not SHARED_MEMORY.is_dir() or disk_usage(SHARED_MEMORY).free < num_bytes:
        yield None
        return
    with TemporaryDirectory(dir=SHARED_MEMORY) as folder:
        yield Path(folder)


def measure_peak() -> Callable[[], int]:
    """Starts to measure; what it returns says by how many bytes the resident memory has grown at its peak."""
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    return lambda: status_bytes("VmHWM") - before


def status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
