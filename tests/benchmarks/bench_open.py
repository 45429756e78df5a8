"""Opening a cache of very many parts: seconds, file reads, and memory a sequence."""

from __future__ import annotations

import gc
import hashlib
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import pyarrow as pa
from bench_write import status_bytes
from report import Figure
from vpd.data.cache.array_spec import METADATA
from vpd.data.cache.cache import CHUNK_TOKENS, Cache
from vpd.data.cache.index import SequenceIndex, rows_to_table, write_snapshot
from vpd.data.cache.part import COMMITS, PARTS, commit_file, part_folder
from vpd.data.cache.records import dump_record
from vpd.data.cache.storage.local import LocalStorage
from workload import MIB, make_manifest

NAME = "open"
DATA = "index alone"
NUM_SEQUENCES, NUM_PARTS, FEW = 100_000, 12_500, 100
ROUNDS, OPENED = 5, 7
TARGET_SECONDS, TARGET_BYTES = 1.0, 200


class CountingStorage(LocalStorage):
    """Counts what is read."""

    def __init__(self, root: Path):
        super().__init__(root)
        self.num_reads = self.num_listings = 0

    def read(self, name: str) -> bytes:
        self.num_reads += 1
        return super().read(name)

    def list_folder(self, name: str) -> list[str]:
        self.num_listings += 1
        return super().list_folder(name)


def bench_open(folder: Path) -> list[Figure]:
    """Seconds are the best of the rounds."""
    fill(folder / "many", NUM_SEQUENCES, NUM_PARTS)
    fill(folder / "few", FEW, FEW)
    seconds = min(time_open(folder / "many") for _ in range(ROUNDS))
    storage = CountingStorage(folder / "many")
    cache = Cache.open(storage)
    assert (len(cache), len(cache.parts)) == (NUM_SEQUENCES, NUM_PARTS)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        first, *later = pool.submit(resident_growth, folder / "few", folder / "many").result()

    def figure(name: str, value: float, unit: str, target: float | None = None) -> Figure:
        digits = 0 if unit == "" else None
        return Figure(
            benchmark=NAME,
            name=name,
            data=DATA,
            value=value,
            unit=unit,
            digits=digits,
            target=target,
            less_is_better=True,
        )

    return [
        figure("Cache.open, 100,000 sequences in 12,500 parts", seconds, "s", TARGET_SECONDS),
        figure("file reads: manifest and snapshot", storage.num_reads, "", 2),
        figure("listings", storage.num_listings, ""),
        figure("bytes of the index a sequence", cache.rows.nbytes / NUM_SEQUENCES, "B", TARGET_BYTES),
        figure("resident memory a sequence, opened again", median(later) / NUM_SEQUENCES, "B", TARGET_BYTES),
        figure("resident memory of the first opening", first / MIB, "MiB"),
    ]


def time_open(folder: Path) -> float:
    started = time.perf_counter()
    Cache.open(folder)
    return time.perf_counter() - started


def fill(folder: Path, num_sequences: int, num_parts: int) -> None:
    """A cache without states: records, index and the parts' folders are real."""
    storage = LocalStorage(folder)
    make_manifest(5, 4096).write(storage)
    for name in (COMMITS, PARTS):
        (folder / name).mkdir()
    each = num_sequences // num_parts
    rows = []
    for i in range(num_parts):
        part = f"part-{hashlib.sha256(str(i).encode()).hexdigest()[:12]}"
        (folder / part_folder("", part)).mkdir()
        files = {f"{part_folder('', part)}/{METADATA}": {"bytes": 80, "crc32c": "00000000"}}
        record = {"part": part, "num_sequences": each, "num_rows": each * CHUNK_TOKENS, "files": files}
        (folder / commit_file("", part)).write_bytes(dump_record(record))
        rows += [make_row(part, i * each + k, k) for k in range(each)]
    write_snapshot(storage, SequenceIndex.concatenate([rows_to_table(rows)]), num_parts)


def make_row(part: str, number: int, place: int) -> dict[str, object]:
    digits = hashlib.sha256(str(number).encode()).hexdigest()
    return {
        "seq_id": digits[40:56],
        "source": f"prompts-{number % 3}.jsonl",
        "source_row": number,
        "part": part,
        "first_row": place * CHUNK_TOKENS,
        "num_tokens": CHUNK_TOKENS,
        "prompt_len": 10,
        "num_supervised": 50,
        "final_token_id": 2,
        "finish_reason": "stop",
        "hidden_offset": place << 20,
        "hidden_length": 1 << 20,
        "hidden_crc": int(digits[16:24], 16),
        "content_hash": digits[24:40],
    }


def resident_growth(few: Path, many: Path) -> list[int]:
    """Bytes by which a process grows with every time that it opens `many` and keeps it; `few` loads the code."""
    caches = [Cache.open(few)]
    sizes = [settled_bytes()]
    for _ in range(OPENED):
        caches.append(Cache.open(many))
        sizes.append(settled_bytes())
    return [after - before for before, after in pairwise(sizes)]


def settled_bytes() -> int:
    gc.collect()
    pa.default_memory_pool().release_unused()
    return status_bytes("VmRSS")
