"""The cache: readers get what was written, and damage is an error."""

# T tokens, K layers, H hidden width
import hashlib
import shutil
import struct
import tempfile
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import Damage, chunk_bytes, fill_cache, make_manifest, make_sequence, same_bits, snapshot
from torch import Tensor
from vpd.data.cache.arrays import state_specs
from vpd.data.cache.cache import Cache
from vpd.data.cache.codecs import CODECS, HIDDEN, measure_channels
from vpd.data.cache.index import hash_content
from vpd.data.cache.reader import CachedSequence, Request, read_ahead
from vpd.data.errors import CacheCorruptError
from xxhash import xxh3_64_hexdigest

K, H = 2, 8
CHUNK_BYTES = chunk_bytes(K, H)
SEQUENCES = [make_sequence(name, length, K, H) for name, length in [("a", 40), ("b", 70), ("c", 64)]]
"""The sequences have one chunk, two chunks, and one chunk."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "cache"
    assert len(fill_cache(folder, SEQUENCES, 3 * CHUNK_BYTES)) == 2
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A cache of two parts: a and b, then c."""
    return shutil.copytree(original, tmp_path / "cache")


def by_id(cache: Cache) -> dict[str, Any]:
    return {row.seq_id: cache.read(row) for row in cache.rows}


def part_of(folder: Path, seq_id: str) -> str:
    return next(row.part for row in Cache.open(folder).rows if row.seq_id == seq_id)


# What is read


def random_states(num_tokens: int, num_layers: int, width: int, any_bits: bool, seed: int) -> Tensor:
    """States of any bits, NaNs among them; or finite states with one massive channel."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_tokens, num_layers, width)
    if any_bits:
        return torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16).view(torch.bfloat16)
    states = torch.randn(shape, generator=generator)
    states[..., seed % width] *= 300
    return states.bfloat16()


def expected_states(sequences: dict[str, dict[str, Any]], cache: Cache) -> dict[str, Tensor]:
    """The states of every sequence, encoded and decoded here; a part's first sequence gives the channels' scales."""
    written = {seq_id: sequence["hidden_TKH"] for seq_id, sequence in sequences.items()}
    if cache.codec.is_exact:
        return written
    first = {row.part: written[row.seq_id] for row in cache.rows if row.first_row == 0}
    scales = {part: measure_channels(states) for part, states in first.items()}
    stored = {
        row.seq_id: torch.from_numpy(cache.codec.encode(written[row.seq_id], scales[row.part])) for row in cache.rows
    }
    return {
        row.seq_id: cache.codec.decode(stored[row.seq_id], cache.manifest.hidden_size, scales[row.part])
        for row in cache.rows
    }


def check_tokens(read: CachedSequence, written: dict[str, Any]) -> None:
    final = written["final_token_id"]
    assert read.token_ids_S.tolist() == written["token_ids"] + ([] if final is None else [final])
    assert read.loss_mask_S.tolist() == [*map(bool, written["loss_mask"])] + ([] if final is None else [True])
    assert read.target_argmax_T.tolist() == written["target_argmax"]
    assert (read.token_ids_S.dtype, read.loss_mask_S.dtype) == (torch.int64, torch.bool)
    assert read.target_argmax_T.dtype == torch.int64


@given(
    sizes=st.lists(st.tuples(st.integers(1, 150), st.booleans()), min_size=1, max_size=5),
    num_layers=st.integers(1, 4),
    width=st.integers(1, 40),
    part_chunks=st.integers(1, 6),
    codec=st.sampled_from([*CODECS]),
)
@settings(max_examples=20, deadline=None)
def test_what_was_written_is_what_is_read(sizes, num_layers, width, part_chunks, codec):
    written: dict[str, dict[str, Any]] = {}
    for i, (length, generated) in enumerate(sizes):
        states = random_states(length, num_layers, width, codec in ("raw", "lossless"), i)
        final = 3 if generated else None
        written[f"s{i}"] = make_sequence(f"s{i}", length, num_layers, width, hidden_TKH=states, final_token_id=final)
    manifest = {"layer_ids": tuple(range(num_layers)), "hidden_size": width, "codec": codec}
    part_bytes = part_chunks * chunk_bytes(num_layers, width)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "cache"
        fill_cache(folder, list(written.values()), part_bytes, **manifest)
        cache = Cache.open(folder)
        assert sorted(row.seq_id for row in cache.rows) == sorted(written)
        expected = expected_states(written, cache)
        with closing(read_ahead(cache.states, map(Request, cache.rows))) as ahead:
            for row, read in zip(cache.rows, ahead, strict=True):
                assert read.row == row
                alone = cache.read(row)
                part = zarr.open_group(folder / "parts" / f"{row.part}.zarr", mode="r")
                states = part[HIDDEN]
                assert isinstance(states, zarr.Array)
                rows = np.asarray(states[row.first_row : row.first_row + row.num_tokens])
                for sequence in (read, alone):
                    check_tokens(sequence, written[row.seq_id])
                    assert same_bits(sequence.hidden_TKH, expected[row.seq_id])
                    assert sequence.stored_TKW.numpy().tobytes() == rows.tobytes()
                    assert (sequence.stored_TKW.shape, sequence.codec) == (rows.shape, cache.codec)


def test_tokens_are_read_without_the_states(folder: Path):
    cache = Cache.open(folder)
    for row in cache.rows:
        whole, tokens = cache.read(row), cache.read_tokens(row)
        assert tokens.row == row
        for name in ("token_ids_S", "loss_mask_S", "target_argmax_T"):
            assert same_bits(getattr(tokens, name), getattr(whole, name))


def test_index_rows_say_what_was_written(folder: Path):
    expected = [
        {"num_tokens": 40, "first_row": 0, "hidden_offset": 0, "hidden_length": CHUNK_BYTES, "num_supervised": 21},
        {"num_tokens": 70, "first_row": 64, "hidden_offset": CHUNK_BYTES, "hidden_length": 2 * CHUNK_BYTES}
        | {"num_supervised": 36},
        {"num_tokens": 64, "first_row": 0, "hidden_offset": 0, "hidden_length": CHUNK_BYTES, "num_supervised": 33},
    ]
    kept = ["seq_id", "source", "source_row", "prompt_len", "final_token_id", "finish_reason"]
    rows = {row.seq_id: row for row in Cache.open(folder).rows}
    for sequence, more in zip(SEQUENCES, expected, strict=True):
        row = rows[sequence["seq_id"]]
        ids, mask = sequence["token_ids"], sequence["loss_mask"]
        more |= {"hidden_crc": row.hidden_crc, "content_hash": hash_content(ids, mask, sequence["final_token_id"])}
        assert asdict(row) == {name: sequence[name] for name in kept} | more | {"part": row.part}
        assert asdict(row) in pq.read_table(folder / "index" / f"{row.part}.parquet").to_pylist()


def test_content_hashes_differ_by_tokens_mask_and_end():
    sequences = [([1, 2], [0, 1], 3), ([1, 2, 3], [0, 1, 1], None), ([1, 2], [1, 1], 3), ([1, 2], [0, 1], None)]
    sequences += [([2, 1], [0, 1], 3), ([1], [0], 3), ([1, 2], [0, 1], 4)]
    hashes = {hash_content(*sequence) for sequence in sequences}
    assert len(hashes) == len(sequences)
    assert all(len(found) == 16 for found in hashes)
    content = struct.pack("<3q", 1, 2, 3) + bytes([0, 1])
    assert hash_content([1, 2], [0, 1], 3) == hashlib.sha256(content).hexdigest()[:16]


def test_the_byte_range_of_the_index_holds_the_states(folder: Path):
    rows = {row.seq_id: row for row in Cache.open(folder).rows}
    for sequence in SEQUENCES:
        row = rows[sequence["seq_id"]]
        with open(folder / "parts" / f"{row.part}.zarr/hidden/c/0/0/0", "rb") as file:
            file.seek(row.hidden_offset)
            content = file.read(row.hidden_length)
        chunks = [content[i : i + CHUNK_BYTES] for i in range(0, len(content), CHUNK_BYTES)]
        states = torch.frombuffer(bytearray(b"".join(chunk[:-4] for chunk in chunks)), dtype=torch.bfloat16)
        assert same_bits(states.view(-1, K, H)[: row.num_tokens], sequence["hidden_TKH"])
        assert not states.view(-1, K, H)[row.num_tokens :].any()
        assert row.hidden_crc == crc32c(b"".join(chunk[-4:] for chunk in chunks))


def test_commit_records_describe_every_file_and_count_sequences(folder: Path):
    cache = Cache.open(folder)
    listed: set[str] = set()
    assert list(cache.commits()) == cache.parts
    for name, record in cache.commits().items():
        rows = list(cache.rows_of_part(name))
        assert (record["num_sequences"], record["num_tokens"]) == (len(rows), sum(row.num_tokens for row in rows))
        for path, facts in record["files"].items():
            content = (folder / path).read_bytes()
            assert facts == {"bytes": len(content), "xxh3": xxh3_64_hexdigest(content)}
        listed |= record["files"].keys()
    (snapshot_file,) = (folder / "index").glob("all-*")
    assert listed | {f"index/{snapshot_file.name}"} == {
        path for path in snapshot(folder) if path.startswith(("parts/", "index/"))
    }
    assert cache.num_bytes == sum((folder / path).stat().st_size for path in listed)
    assert (len(cache), cache.num_tokens) == (3, 40 + 70 + 64)


def test_a_tiny_cache_made_by_the_command_is_zarr_too(tiny_cache: Path):
    cache = Cache.open(tiny_cache)
    for name in cache.parts:
        group = zarr.open_group(tiny_cache / "parts" / f"{name}.zarr", mode="r")
        arrays = {key: np.asarray(array[:]) for key, array in group.arrays()}
        assert arrays.keys() == cache.specs.keys()
        for row in cache.rows_of_part(name):
            read, rows = cache.read(row), slice(row.first_row, row.first_row + row.num_tokens)
            assert arrays["hidden"][rows].tobytes() == read.hidden_TKH.view(torch.uint16).numpy().tobytes()
            assert arrays["token_ids"][rows].tolist() == read.token_ids_S[: row.num_tokens].tolist()
            assert arrays["loss_mask"][rows].tolist() == read.loss_mask_S[: row.num_tokens].int().tolist()
            assert arrays["target_argmax"][rows].tolist() == read.target_argmax_T.tolist()


# Damage

DAMAGE = [
    Damage("first-bits-flipped", 0.0),
    Damage("middle-bits-flipped", 0.4),
    Damage("cut-short", 0.2, cut=True),
    Damage("emptied", 0.0, cut=True),
    Damage("missing", None),
]


@pytest.mark.parametrize("name", list(state_specs(make_manifest())))
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.id)
def test_damaged_states_are_an_error_that_names_the_file(damage: Damage, name: str, folder: Path):
    cache = Cache.open(folder)
    (row,) = (row for row in cache.rows if row.seq_id == "c")
    path = folder / "parts" / f"{row.part}.zarr" / cache.specs[name].shard_name
    damage.apply(path)
    with pytest.raises(CacheCorruptError) as caught:
        cache.read(row)
    assert str(path) in str(caught.value)
    for other in cache.rows_of_part(part_of(folder, "a")):
        cache.read(other)


def test_states_of_another_sequence_are_an_error_though_every_checksum_holds(folder: Path):
    """A shard of the same sizes from another part is not taken for the sequence's states."""
    cache = Cache.open(folder)
    fill_cache(folder, [make_sequence("d", 64, K, H)])
    (row,) = (row for row in cache.rows if row.seq_id == "c")
    other = part_of(folder, "d")
    shutil.copy(*(folder / "parts" / f"{part}.zarr/hidden/c/0/0/0" for part in (other, row.part)))
    with pytest.raises(CacheCorruptError, match="the states of c are not those of the index"):
        cache.read(row)


@pytest.mark.parametrize("kind", ["the commit record", "the folder"])
def test_a_missing_part_is_an_error_that_names_it_as_the_cache_is_opened(kind: str, folder: Path):
    part = part_of(folder, "c")
    opened = Cache.open(folder)
    if kind == "the folder":
        shutil.rmtree(folder / "parts" / f"{part}.zarr")
    else:
        (folder / "commits" / f"{part}.json").unlink()
    with pytest.raises(CacheCorruptError, match=f"{kind} of 1 committed part is gone: {part}"):
        Cache.open(folder)
    with pytest.raises(CacheCorruptError, match=part):
        opened.read(next(iter(opened.rows_of_part(part))))


COMMIT_DAMAGE = [*DAMAGE[:-1], Damage("last-bits-flipped", 0.999)]


@pytest.mark.parametrize("damage", COMMIT_DAMAGE, ids=lambda damage: damage.id)
def test_a_damaged_commit_record_is_an_error_that_names_it_once_its_part_is_read(damage: Damage, folder: Path):
    part = part_of(folder, "c")
    path = folder / "commits" / f"{part}.json"
    damage.apply(path)
    cache = Cache.open(folder)
    for read in (cache.read, cache.read_tokens):
        with pytest.raises(CacheCorruptError) as caught:
            read(cache.rows_of_part(part)[0])
        assert str(path) in str(caught.value)
    with pytest.raises(CacheCorruptError, match="commit record"):
        cache.commits()
    for other in cache.rows_of_part(part_of(folder, "a")):
        cache.read(other)


def test_the_commit_record_of_another_part_is_refused(folder: Path):
    one, other = (folder / "commits" / f"{part_of(folder, seq_id)}.json" for seq_id in "ac")
    shutil.copy(other, one)
    with pytest.raises(CacheCorruptError, match="is not the commit record of the part"):
        by_id(Cache.open(folder))
