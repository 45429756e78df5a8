"""Writers in processes of their own, which tests kill, starve of disk, or run side by side."""

import multiprocessing
import os
import random
import resource
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from vpd.data.cache.cache import Cache
from vpd.data.cache.writer import StateWriter

from support.tiny import append, make_manifest, make_sequence

NUM_LAYERS, WIDTH = 2, 8
LENGTHS = [5, 64, 70, 130, 1, 200, 63, 65]
PART_BYTES = 12_000

# Children are forks of a server process, which has done the slow imports once and has no threads.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "vpd.data.cache.writer",
        "vpd.pipeline.cli",
        "transformers.models.llama.modeling_llama",
        "transformers.models.qwen3.modeling_qwen3",
    ]
)


def sequences(prefix: str, number: int) -> list[dict[str, Any]]:
    return [make_sequence(f"{prefix}{i}", LENGTHS[i % len(LENGTHS)], NUM_LAYERS, WIDTH) for i in range(number)]


def write(folder: Path, prefix: str, number: int) -> None:
    """Writes the sequences that the cache lacks, as an extraction does."""
    cache = Cache.create_or_open(folder, make_manifest())
    present = set(cache.rows.strings("seq_id"))
    writer = StateWriter(cache, PART_BYTES, {})
    for sequence in sequences(prefix, number):
        if sequence["seq_id"] not in present:
            append(writer, **sequence)
    writer.finish()


def write_with_limit(folder: Path, prefix: str, number: int, max_file_bytes: int, outcome: Any) -> None:
    """Writes while no file may grow beyond a limit; sends the error that ends it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, resource.RLIM_INFINITY))
    try:
        write(folder, prefix, number)
        outcome.send(None)
    except Exception as error:
        outcome.send((type(error).__name__, str(error)))


def start(target: Callable[..., None], *arguments: Any) -> Any:
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process


def kill_at_random(process: Any, chance: random.Random, longest_s: float) -> bool:
    """Kills a process after a random time; returns whether it was still at work."""
    process.join(chance.uniform(0, longest_s))
    with suppress(ProcessLookupError):  # it has just ended
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode == -signal.SIGKILL
