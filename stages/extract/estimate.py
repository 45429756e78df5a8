"""What an extraction will take, before it runs: tokens, bytes for each codec, hours; and whether the disk holds it."""

# K layers, H hidden width
from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from ...data.cache.codecs import HIDDEN, Codec, CodecName, measure_channels
from ...data.cache.manifest import CacheManifest
from ...data.cache.shard import CRC_BYTES, INDEX_ENTRY_BYTES, ArraySpec
from ...data.cache.storage import LocalStorage, Storage
from ...data.cache.store import TOKEN_ARRAYS, Cache
from ...data.errors import StorageError
from ..config import ExtractConfig
from .conversations import Conversation
from .engine import Engine, EngineRequest
from .run import ExtractPlan, ExtractReport, extract

USUAL_SHARES: dict[str, float] = {"raw": 1.0, "lossless": 0.72, "round4": 0.53, "round3": 0.47, "fp8": 1.0, "int4": 1.0}
"""Bytes after compression, as a share of those before; what real models' states compress to."""
INDEX_BYTES = 150
"""Bytes of a sequence in the index."""
CODECS: tuple[CodecName, ...] = get_args(CodecName)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths in tokens, expected or measured, of sequences that stand for all."""

    num_tokens: Sequence[float]
    num_sequences: int
    """How many sequences they stand for."""

    @property
    def total(self) -> float:
        return float(np.mean(self.num_tokens)) * self.num_sequences if len(self.num_tokens) else 0.0


def expected_lengths(
    conversations: Sequence[tuple[Conversation, EngineRequest]], response_tokens: float | None, num_sequences: int
) -> Lengths:
    """Expected lengths of the sequences of these conversations, which stand for `num_sequences`."""
    found = [conversation.expected_len(first, response_tokens) for conversation, first in conversations]
    return Lengths(found, num_sequences)


def cache_bytes(lengths: Lengths, manifest: CacheManifest, codec: CodecName, share: float | None = None) -> int:
    """Bytes of a cache with sequences of these lengths: chunks padded and checksummed, tokens and index included.

    Args:
        share: bytes after compression as a share of those before; None = the usual.
    """
    chunk_tokens = manifest.chunk_tokens
    hidden = Codec(codec).spec(len(manifest.layer_ids), manifest.hidden_size, chunk_tokens)
    arrays = [hidden, *(ArraySpec(name, (), dtype, chunk_tokens) for name, dtype in TOKEN_ARRAYS.items())]
    shares = {HIDDEN: USUAL_SHARES[codec] if share is None else share}
    overhead = CRC_BYTES + INDEX_ENTRY_BYTES
    chunk_bytes = sum(spec.chunk_bytes * shares.get(spec.name, 1.0) + overhead for spec in arrays)
    num_chunks = np.ceil(np.asarray(lengths.num_tokens) / chunk_tokens)
    mean_chunks = float(num_chunks.mean()) if len(num_chunks) else 0.0
    return round(lengths.num_sequences * (mean_chunks * chunk_bytes + INDEX_BYTES))


def free_bytes(storage: Storage) -> int | None:
    """Free space where a cache lives or will live; None for a bucket."""
    if not isinstance(storage, LocalStorage):
        return None
    folder = storage.root.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_space(storage: Storage, plan: ExtractPlan, manifest: CacheManifest, config: ExtractConfig) -> None:
    """
    Raises:
        StorageError: the disk may not hold what the plan will write.
    """
    free = free_bytes(storage)
    if free is None or config.fill_disk:
        return
    lengths = expected_lengths(plan.conversations, config.response_tokens, len(plan.conversations))
    needed = cache_bytes(lengths, manifest, config.codec)
    if needed > free:
        longest = config.mode == "generate" and config.response_tokens is None
        how = f"if every answer takes all {config.max_new_tokens} tokens" if longest else "as expected"
        raise StorageError(
            f"expected {needed / 2**30:.2f} GiB of free space at {storage.place} for {len(plan.conversations)} "
            f"sequences ({how}), found {free / 2**30:.2f} GiB. Make room, choose a smaller codec with --codec, "
            "give the mean length of an answer with --response-tokens, or start all the same with --fill-disk."
        )


@dataclass(frozen=True, slots=True)
class Pilot:
    """What a small extraction showed."""

    num_sequences: int
    num_tokens: int
    seconds: float
    response_tokens: float
    """Mean length of an answer."""
    shares: dict[str, float]
    """Bytes of each codec's states after compression, as a share of those before."""

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds


def run_pilot(
    engine_factory: Callable[[], Engine], plan: ExtractPlan, manifest: CacheManifest, config: ExtractConfig, near: Path
) -> Pilot:
    """Extracts the plan's sequences into a folder that is removed afterwards.

    Args:
        near: folder beside which the temporary one is made.
    """
    started: list[float] = []

    def start_engine() -> Engine:
        engine = engine_factory()
        started.append(time.monotonic())
        return engine

    while not near.exists():
        near = near.parent
    with tempfile.TemporaryDirectory(dir=near, prefix=".pilot-") as folder:
        cache = Cache.create_or_open(folder, manifest.model_copy(update={"codec": "raw"}))
        extract(start_engine, cache, plan, config)
        seconds = time.monotonic() - started[0]
        cache = Cache.open(folder)
        rows = list(cache.rows)
        responses = [row.num_tokens + (row.final_token_id is not None) - row.prompt_len for row in rows]
        return Pilot(
            num_sequences=len(rows),
            num_tokens=cache.num_tokens,
            seconds=seconds,
            response_tokens=float(np.mean(responses)),
            shares={codec: measure_share(cache, codec) for codec in CODECS},
        )


def measure_share(cache: Cache, codec: CodecName, num_sequences: int = 16) -> float:
    """Bytes of the states of some sequences after a codec's compression, as a share of those before."""
    spec = Codec(codec).spec(len(cache.manifest.layer_ids), cache.manifest.hidden_size, cache.manifest.chunk_tokens)
    if spec.compression is None:
        return 1.0
    compressor = spec.compression.compressor()
    before = after = 0
    for row in cache.rows[:num_sequences]:
        hidden_TKH = cache.read(row).hidden_TKH
        stored = Codec(codec).encode(hidden_TKH, measure_channels(hidden_TKH))
        for start in range(0, len(stored), spec.chunk_tokens):
            chunk = np.ascontiguousarray(stored[start : start + spec.chunk_tokens])
            before += chunk.nbytes
            after += len(compressor.encode(chunk))
    return after / before


def choose_evenly(plan: ExtractPlan, number: int | None) -> ExtractPlan:
    """A plan with that many of the conversations, evenly chosen."""
    if number is None or number >= len(plan.conversations):
        return plan
    chosen = np.linspace(0, len(plan.conversations) - 1, number).round().astype(int)
    return ExtractPlan([plan.conversations[i] for i in chosen], ExtractReport(), plan.prompt_set)
