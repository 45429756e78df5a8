"""A small cache for tests of buckets, and functions that write and check it."""

# T tokens, K layers, H hidden width
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from vpd.data.cache.arrays import empty_drafts
from vpd.data.cache.cache import CHUNK_TOKENS, Cache
from vpd.data.cache.drafts import FirstDrafts
from vpd.data.cache.reader import Request, read_ahead
from vpd.data.cache.storage.base import Storage
from vpd.data.cache.storage.places import open_storage
from vpd.data.cache.writer import StateWriter

from support.tiny import append, make_manifest, make_sequence, same_bits

K, H = 2, 8
CHUNK_BYTES = CHUNK_TOKENS * K * H * 2 + 4
LENGTHS = [40, 70, 64, 1, 130]
SEQUENCES = [make_sequence(f"s{i}", length, K, H) for i, length in enumerate(LENGTHS)]
PART_BYTES = 3 * CHUNK_BYTES
PARTS_MADE = 2
"""The sequences have 1, 2, 1, 1 and 3 chunks: s0 and s1 fill the first part, the others fill the second."""
FACTS: dict[str, Any] = {"block_size": 4, "stride": 1}
FINGERPRINT = "abcd0001"


def write_drafts(cache: Cache, seed: int) -> None:
    """Random first drafts of every part."""
    rng = np.random.default_rng(seed)
    drafts = FirstDrafts.create_or_open(cache, FINGERPRINT, FACTS)
    for part in drafts.missing_parts():
        writer = drafts.writer(part)
        for row in cache.rows_of_part(part):
            writer.append(random_drafts(rng, row.num_tokens, drafts))
        writer.commit({})


def random_drafts(rng: np.random.Generator, num_tokens: int, drafts: FirstDrafts) -> dict[str, np.ndarray]:
    arrays = empty_drafts(num_tokens, drafts.specs)
    arrays["accept_len"][:] = rng.integers(drafts.block_size, size=num_tokens)
    arrays["tokens"][:] = rng.integers(50, size=arrays["tokens"].shape)
    return arrays


def write_cache(
    place: str | Path, sequences: list[dict[str, Any]], part_bytes: int = PART_BYTES, **changes: Any
) -> None:
    writer = StateWriter(Cache.create_or_open(place, make_manifest(**changes)), part_bytes, {})
    for sequence in sequences:
        append(writer, **sequence)
    writer.finish()


def check_sequences(cache: Cache, sequences: list[dict[str, Any]]) -> None:
    """Checks that a cache without loss holds these sequences and no others."""
    rows = sorted(cache.rows, key=lambda row: row.seq_id)
    assert [row.seq_id for row in rows] == sorted(sequence["seq_id"] for sequence in sequences)
    expected = {sequence["seq_id"]: sequence for sequence in sequences}
    with closing(read_ahead(cache.states, map(Request, rows))) as found:
        for read in found:
            written = expected[read.row.seq_id]
            assert same_bits(read.hidden_TKH, written["hidden_TKH"])
            assert read.token_ids_S.tolist() == [*written["token_ids"], written["final_token_id"]]
            assert read.target_argmax_T.tolist() == written["target_argmax"]


def objects(place: str) -> dict[str, bytes]:
    storage = open_storage(place)
    return {name: storage.read(name) for name in storage.walk("")}


def read_ranges(storage: Storage, name: str, offset: int, *lengths: int) -> tuple[int, list[bytes]]:
    buffers = [bytearray(length) for length in lengths]
    found = storage.open(name).read_into([memoryview(buffer) for buffer in buffers], offset)
    return found, [bytes(buffer) for buffer in buffers]
