"""An extraction that several workers share, and the same extraction by one worker."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from vpd.data.cache.cache import Cache
from vpd.data.cache.work import DONE, WORK
from vpd.stages.extract.units import LEASE

from support.forks import SECONDS, Process
from support.tiny import EXTRACT, as_flags

NUM_RECORDS, UNIT = 60, 4
MACHINERY = {"unit_records": UNIT, "lease_seconds": 2.0, "max_in_flight": 2}
SETTINGS: dict[str, Any] = EXTRACT | {f"extract.machinery.{name}": value for name, value in MACHINERY.items()}


def arguments(target: Path, prompts: Path, out: Path, **changes: Any) -> list[object]:
    return ["extract", target, prompts, "--out", out, "--json", *as_flags(SETTINGS | changes)]


def contents(folder: Path) -> dict[str, tuple[list[int], torch.Tensor]]:
    cache = Cache.open(folder)
    found = {row.seq_id: cache.read(row) for row in cache.rows}
    return {seq_id: (each.token_ids_S.tolist(), each.hidden_TKH.clone()) for seq_id, each in found.items()}


def check_same(folder: Path, expected: Path) -> None:
    ours, theirs = contents(folder), contents(expected)
    assert ours.keys() == theirs.keys()
    for seq_id, (token_ids, hidden_TKH) in ours.items():
        assert token_ids == theirs[seq_id][0]
        assert torch.equal(hidden_TKH, theirs[seq_id][1])
    left = [path.name for path in (folder / WORK).iterdir() if not path.name.endswith(DONE)]
    assert [name for name in left if name.endswith(LEASE)] == []


def wait_until(condition: Callable[[], bool], processes: list[Process]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, [process.wait() for process in processes]
        time.sleep(0.005)
