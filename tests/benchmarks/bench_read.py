"""Reading in random order from a warm page cache: our reader and others, against `preadv` of the same byte ranges."""

from __future__ import annotations

import mmap
import os
import random
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from statistics import median

import zarr
from report import Figure, interleave, median_ratio
from vpd.data.cache.cache import Cache
from vpd.data.cache.codecs import HIDDEN
from vpd.data.cache.index import SequenceRow
from vpd.data.cache.part import part_folder
from vpd.data.cache.reader import Request, allocate, read_ahead
from workload import MIB, Workload, write_cache

NAME = "read"
ROUNDS = 6
EPOCHS = 8
"""Times that every sequence is read in one run, but for the libraries, which read it once."""
ZARRS_PIPELINE = "zarrs.ZarrsCodecPipeline"


def bench_read(folder: Path, workload: Workload) -> list[Figure]:
    """Medians over the rounds. What two threads of `preadv` reach says whether there were two cores to be had."""
    cache = write_cache(folder / "cache", workload, 256 * MIB)
    rows = list(cache.rows)
    random.Random(0).shuffle(rows)
    order = [row for epoch in range(EPOCHS) for row in random.Random(epoch).sample(rows, len(rows))]
    place = folder / "cache"
    once = sum(row.num_tokens for row in rows) * workload.token_bytes
    runs: dict[str, tuple[Callable[[], float], int]] = {
        "preadv": (lambda: run_preadv(place, order, 1), EPOCHS),
        "preadv, 2 buffers in turn": (lambda: run_preadv(place, order, 1, 2), EPOCHS),
        "preadv, 2 threads, 2 buffers": (lambda: run_preadv(place, order, 2), EPOCHS),
        "1 thread, not verified": (lambda: run_ours(place, order, 1, False), EPOCHS),
        "1 thread, verified": (lambda: run_ours(place, order, 1, True), EPOCHS),
        "2 threads, not verified": (lambda: run_ours(place, order, 2, False), EPOCHS),
        "2 threads, verified": (lambda: run_ours(place, order, 2, True), EPOCHS),
        "2 threads, verified, with Cache.open": (lambda: run_ours(place, order, 2, True, True), EPOCHS),
        "zarr-python": (lambda: run_zarr(place, rows), 1),
    }
    if find_spec("zarrs"):
        runs["zarrs"] = (lambda: run_zarrs(place, rows), 1)
    if find_spec("tensorstore"):
        runs["tensorstore"] = (lambda: run_tensorstore(place, rows), 1)
    seconds = interleave({name: run for name, (run, _) in runs.items()}, ROUNDS)
    speeds = {name: [times * once / taken / 1e9 for taken in seconds[name]] for name, (_, times) in runs.items()}

    def figure(name: str, value: float, unit: str = "x", target: float | None = None) -> Figure:
        wanted = None if target is None else workload.target(target)
        return Figure(benchmark=NAME, name=name, data=workload.name, value=value, unit=unit, target=wanted)

    found = [figure("preadv into one buffer", median(speeds["preadv"]), "GB/s")]
    targets = {"1 thread, not verified": 0.8, "1 thread, verified": 0.45, "2 threads, verified": 0.8}
    for name in list(runs)[1:]:
        found.append(figure(f"{name} / preadv", median_ratio(speeds[name], speeds["preadv"]), target=targets.get(name)))
    for name in ("1 thread, verified", "2 threads, verified"):
        target = 4.0 if name.startswith("2") else None
        found.append(figure(f"{name} / zarr-python", median_ratio(speeds[name], speeds["zarr-python"]), target=target))
    return found


def shard_path(place: Path, cache: Cache, part: str) -> Path:
    return place / part_folder("", part) / cache.specs[HIDDEN].shard_name


def run_preadv(place: Path, rows: list[SequenceRow], num_threads: int, num_buffers: int = 1) -> float:
    """One byte range a sequence into one buffer a thread, of the same kind as the reader's.

    With two buffers in turn a sequence is still there while the next is read, as a consumer needs it.
    """
    cache = Cache.open(place)
    files = {part: os.open(shard_path(place, cache, part), os.O_RDONLY) for part in cache.parts}
    size = -(-max(row.hidden_length for row in rows) // mmap.PAGESIZE) * mmap.PAGESIZE

    def read(mine: list[SequenceRow]) -> None:
        buffers = [memoryview(allocate(size)) for _ in range(num_buffers)]
        for buffer, row in zip(cycle(buffers), mine, strict=False):
            found = os.preadv(files[row.part], [buffer[: row.hidden_length]], row.hidden_offset)
            assert found == row.hidden_length, (found, row)

    with ThreadPoolExecutor(num_threads) as pool:
        started = time.perf_counter()
        list(pool.map(read, [rows[i::num_threads] for i in range(num_threads)]))
        seconds = time.perf_counter() - started
    for file in files.values():
        os.close(file)
    return seconds


def run_ours(place: Path, rows: list[SequenceRow], num_threads: int, verify: bool, time_open: bool = False) -> float:
    """A freshly opened cache, so that what is checked at the first touch of a part is part of it."""
    before_open = time.perf_counter()
    cache = Cache.open(place)
    started = before_open if time_open else time.perf_counter()
    requests = (Request(row, verify) for row in rows)
    with closing(read_ahead(cache.states, requests, num_threads, num_threads + 1)) as sequences:
        found = sum(len(sequence.stored_TKW) for sequence in sequences)
    seconds = time.perf_counter() - started
    assert found == sum(row.num_tokens for row in rows)
    return seconds


def run_zarr(place: Path, rows: Iterable[SequenceRow]) -> float:
    """A part's array is opened once, and before the clock starts."""
    arrays = {}
    for part in Cache.open(place).parts:
        arrays[part] = zarr.open_group(place / part_folder("", part), mode="r")[HIDDEN]
    started = time.perf_counter()
    for row in rows:
        found = arrays[row.part][row.first_row : row.first_row + row.num_tokens]
        assert len(found) == row.num_tokens
    return time.perf_counter() - started


def run_zarrs(place: Path, rows: Iterable[SequenceRow]) -> float:
    with zarr.config.set({"codec_pipeline.path": ZARRS_PIPELINE}):
        return run_zarr(place, rows)


def run_tensorstore(place: Path, rows: Iterable[SequenceRow]) -> float:
    import tensorstore

    arrays = {}
    for part in Cache.open(place).parts:
        store = {"driver": "file", "path": str(place / part_folder("", part) / HIDDEN)}
        arrays[part] = tensorstore.open({"driver": "zarr3", "kvstore": store}, read=True).result()
    started = time.perf_counter()
    for row in rows:
        found = arrays[row.part][row.first_row : row.first_row + row.num_tokens].read().result()
        assert len(found) == row.num_tokens
    return time.perf_counter() - started
