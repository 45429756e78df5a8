"""A bucket whose every answer takes 30 ms: our reader against zarr-python over the same client."""

from __future__ import annotations

import os
import time
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import zarr
from obstore.store import from_url
from report import Figure, interleave
from support.servers import RangeServer
from vpd.data.cache.cache import Cache
from vpd.data.cache.codecs import HIDDEN
from vpd.data.cache.index import SequenceRow
from vpd.data.cache.part import part_folder
from vpd.data.cache.reader import Request, read_ahead
from workload import GIB, Workload, write_cache
from zarr.storage import ObjectStore

NAME = "remote"
LATENCY_S = 0.03
NUM_SEQUENCES, NUM_BY_ZARR = 24, 8
NUM_THREADS, NUM_BUFFERS = 8, 12
ROUNDS = 3
TARGET = 3.0


def bench_remote(folder: Path, workload: Workload) -> list[Figure]:
    """The best of the rounds. The server runs in this process, and so takes the same share of both."""
    write_cache(folder, workload, GIB, NUM_SEQUENCES)
    with RangeServer(folder, LATENCY_S) as server, patch.dict(os.environ, server.environment):
        rows = list(Cache.open(server.place).rows)
        few = rows[:NUM_BY_ZARR]
        requests: dict[str, int] = {}

        def run_ours() -> float:
            cache = Cache.open(server.place)
            server.take_requests()
            started = time.perf_counter()
            with closing(read_ahead(cache.states, map(Request, rows), NUM_THREADS, NUM_BUFFERS)) as sequences:
                found = sum(len(sequence.stored_TKW) for sequence in sequences)
            seconds = time.perf_counter() - started
            requests["ours"] = len(server.take_requests())
            assert found == sum(row.num_tokens for row in rows)
            return seconds

        def run_zarr() -> float:
            arrays = open_arrays(server.place, few)
            server.take_requests()
            started = time.perf_counter()
            for row in few:
                assert len(arrays[row.part][row.first_row : row.first_row + row.num_tokens]) == row.num_tokens
            seconds = time.perf_counter() - started
            requests["zarr"] = len(server.take_requests())
            return seconds

        seconds = interleave({"ours": run_ours, "zarr": run_zarr}, ROUNDS)

    def speed(name: str, read: list[SequenceRow]) -> float:
        return sum(row.num_tokens for row in read) * workload.token_bytes / min(seconds[name]) / 1e6

    def figure(name: str, value: float, unit: str = "", target: float | None = None) -> Figure:
        return Figure(benchmark=NAME, name=name, data=workload.name, value=value, unit=unit, target=target)

    ours, by_zarr = speed("ours", rows), speed("zarr", few)
    return [
        figure(f"{NUM_THREADS} threads, verified", ours, "MB/s"),
        figure("zarr-python", by_zarr, "MB/s"),
        figure(f"{NUM_THREADS} threads, verified / zarr-python", ours / by_zarr, "x", TARGET),
        figure("requests a sequence, opening a part included", requests["ours"] / len(rows)),
        figure("requests a sequence, zarr-python", requests["zarr"] / len(few)),
    ]


def open_arrays(place: str, rows: list[SequenceRow]) -> dict[str, Any]:
    """The states' array of every part, opened before the clock starts."""
    store = ObjectStore(from_url(place), read_only=True)
    parts = {row.part for row in rows}
    return {part: zarr.open_group(store, path=part_folder("", part), mode="r")[HIDDEN] for part in parts}
