"""What an extraction will cost: tokens, bytes for each codec, hours; and whether the disk has the space."""

# K layers, H hidden width
from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...data.cache.array_spec import CRC_BYTES, INDEX_ENTRY_BYTES
from ...data.cache.arrays import state_specs
from ...data.cache.cache import Cache
from ...data.cache.codecs import CODECS
from ...data.cache.manifest import CacheManifest
from ...data.cache.storage.base import Storage
from ...data.errors import ExtractionError, StorageError
from .config import ExtractConfig
from .conversations import Conversation
from .engine import Engine
from .plan import ExtractPlan
from .run import extract
from .sink import ExtractReport
from .units import PreparedUnit, WorkUnit

INDEX_BYTES = 150
"""Bytes of a sequence in the index."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths of sequences that stand for a larger number of sequences."""

    num_tokens: Sequence[float]
    """Length of each sequence in tokens, expected or measured."""
    num_sequences: int
    """Number of sequences that these stand for."""

    @property
    def total(self) -> float:
        """Tokens of all sequences."""
        return float(np.mean(self.num_tokens)) * self.num_sequences if len(self.num_tokens) else 0.0


def expected_lengths(
    conversations: Sequence[Conversation], response_tokens: float | None, num_sequences: int
) -> Lengths:
    """
    Args:
        response_tokens: expected length of an answer; None = the longest allowed.
        num_sequences: number of sequences that the conversations stand for.
    """
    found = [conversation.expected_len(response_tokens) for conversation in conversations]
    return Lengths(found, num_sequences)


def cache_bytes(lengths: Lengths, manifest: CacheManifest, codec: str, share: float | None = None) -> int:
    """Bytes of a cache with sequences of these lengths: padded chunks, checksums, tokens and index.

    Args:
        share: bytes of the states after compression, as a share of the bytes before; None = the codec's usual share.
    """
    if not len(lengths.num_tokens):
        return 0
    num_chunks = np.asarray(lengths.num_tokens) / manifest.chunk_tokens
    mean_filled, mean_chunks = float(num_chunks.mean()), float(np.ceil(num_chunks).mean())
    mean_bytes: float = INDEX_BYTES
    for spec in state_specs(manifest.model_copy(update={"codec": codec})).values():
        if spec.compression is None:
            mean_bytes += mean_chunks * spec.chunk_bytes
        else:  # compressed padding takes almost no space
            mean_bytes += mean_filled * spec.chunk_bytes * (CODECS[codec].usual_share if share is None else share)
        mean_bytes += mean_chunks * (CRC_BYTES + INDEX_ENTRY_BYTES)
    return round(lengths.num_sequences * mean_bytes)


def check_space(storage: Storage, plan: ExtractPlan, manifest: CacheManifest, config: ExtractConfig) -> None:
    """
    Raises:
        StorageError: the disk may be too small for the sequences of the plan.
    """
    free = storage.free_bytes()
    if free is None or config.fill_disk:
        return
    lengths = expected_lengths(plan.conversations, config.response_tokens, plan.num_expected)
    needed = cache_bytes(lengths, manifest, config.codec)
    if needed > free:
        longest = config.mode == "generate" and config.response_tokens is None
        how = f", if every answer takes all {config.max_new_tokens} tokens" if longest else ""
        shorter = "give the mean length of an answer with --response-tokens, " if longest else ""
        raise StorageError(
            f"expected {needed / 2**30:.3f} GiB of free space at {storage.place} for {lengths.num_sequences} "
            f"sequences{how}, found {free / 2**30:.3f} GiB. Free some space, choose a smaller codec with --codec, "
            f"{shorter}or start nevertheless with --fill-disk."
        )


@dataclass(frozen=True, slots=True)
class Pilot:
    """Measurements of a small extraction."""

    num_sequences: int
    num_tokens: int
    seconds: float
    response_tokens: float
    """Mean length of an answer."""
    shares: dict[str, float]
    """Codec -> bytes of the states after compression, as a share of the bytes before."""

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds


def run_pilot(
    engine_factory: Callable[[], Engine], plan: ExtractPlan, manifest: CacheManifest, config: ExtractConfig, near: Path
) -> Pilot:
    """Extracts the plan's sequences into a temporary folder, and measures.

    Args:
        near: folder for the temporary folder; if it does not exist, the nearest folder above it is used.

    Raises:
        ExtractionError: no record gave a sequence.
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
        report = extract(start_engine, cache, plan, config)
        seconds = time.monotonic() - started[0]
        cache = Cache.open(folder, allow_empty=True)
        if not len(cache):
            raise ExtractionError(
                f"expected sequences of {len(plan.conversations)} records in a pilot, found none: "
                f"{dict(report.skipped)}. Pilot more records with --pilot, or check these records."
            )
        responses = [row.num_tokens + (row.final_token_id is not None) - row.prompt_len for row in cache.rows]
        return Pilot(
            num_sequences=len(cache),
            num_tokens=cache.num_tokens,
            seconds=seconds,
            response_tokens=float(np.mean(responses)),
            shares={codec: measure_share(cache, codec) for codec in CODECS},
        )


def measure_share(cache: Cache, codec: str, num_sequences: int = 16) -> float:
    """Bytes of the states of some sequences after a codec's compression, as a share of the bytes before."""
    spec = CODECS[codec].spec(len(cache.manifest.layer_ids), cache.manifest.hidden_size, cache.manifest.chunk_tokens)
    if spec.compression is None:
        return 1.0
    compressor = spec.compression.compressor()
    before = after = 0
    for row in cache.rows[:num_sequences]:
        hidden_TKH = cache.read(row).hidden_TKH
        stored = CODECS[codec].encode(hidden_TKH, CODECS[codec].channel_scale(hidden_TKH))
        for start in range(0, len(stored), spec.chunk_tokens):
            chunk = np.ascontiguousarray(stored[start : start + spec.chunk_tokens])
            before += chunk.nbytes
            after += len(compressor.encode(chunk))
    return after / before


def choose_evenly(plan: ExtractPlan, number: int) -> ExtractPlan:
    """A plan with `number` of the conversations, evenly chosen; with all of them if there are fewer."""
    number = min(number, len(plan.conversations))
    chosen = np.linspace(0, len(plan.conversations) - 1, number).round().astype(int)
    conversations = [plan.conversations[i] for i in chosen]
    seq_ids = [conversation.record.seq_id for conversation in conversations]
    sample = PreparedUnit("pilot", conversations, seq_ids)
    units = [WorkUnit("pilot", range(number), sample)]
    return replace(plan, units=units, report=ExtractReport(), known_units={}, sample=sample)
