"""Parts on disk: valid Zarr, described by their commit record, and never misread when damaged."""

# T tokens, K layers, H hidden width
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import Damage
from vpd.data.cache.part import PartWriter, part_path
from vpd.data.cache.shard import ArraySpec, read_rows
from vpd.data.errors import CacheCorruptError

CHUNK_TOKENS = 4


def make_specs(num_layers: int, width: int, chunk_tokens: int = CHUNK_TOKENS) -> list[ArraySpec]:
    return [
        ArraySpec("hidden", (num_layers, width), "uint16", chunk_tokens),
        ArraySpec("token_ids", (), "int32", chunk_tokens),
        ArraySpec("loss_mask", (), "uint8", chunk_tokens),
        ArraySpec("probs", (width, num_layers), "float16", chunk_tokens),
    ]


def random_rows(specs: list[ArraySpec], num_rows: int, seed: int) -> dict[str, np.ndarray]:
    """Rows of random bits, so NaNs are among the floats."""
    rng = np.random.default_rng(seed)
    rows = {}
    for spec in specs:
        num_bytes = num_rows * spec.chunk_bytes // spec.chunk_tokens
        rows[spec.name] = np.frombuffer(rng.bytes(num_bytes), spec.dtype).reshape(num_rows, *spec.row_shape)
    return rows


def write_part(root: Path, specs: list[ArraySpec], lengths: list[int]) -> tuple[Path, list[int], list[Any]]:
    """A committed part; its folder, each sequence's first row, and what was written."""
    writer = PartWriter(root, specs)
    written = [random_rows(specs, length, seed) for seed, length in enumerate(lengths)]
    first_rows = [writer.append(rows) for rows in written]
    writer.commit({"made_by": "a test"})
    return writer.path, first_rows, written


@given(
    lengths=st.lists(st.integers(1, 11), min_size=1, max_size=5),
    num_layers=st.integers(1, 4),
    width=st.integers(1, 9),
    chunk_tokens=st.integers(1, 5),
)
@example(lengths=[64, 65, 1, 128], num_layers=5, width=16, chunk_tokens=64)
@settings(max_examples=15, deadline=None)
def test_zarr_reads_the_bits_that_were_written_and_that_our_reader_reads(lengths, num_layers, width, chunk_tokens):
    specs = make_specs(num_layers, width, chunk_tokens)
    with tempfile.TemporaryDirectory() as root:
        part, first_rows, written = write_part(Path(root), specs, lengths)
        group = zarr.open_group(part, mode="r")
        assert set(group.array_keys()) == {spec.name for spec in specs}
        for spec in specs:
            array = group[spec.name]
            assert isinstance(array, zarr.Array)
            content = np.asarray(array[:])
            assert (content.dtype, content.shape[1:]) == (np.dtype(spec.dtype), spec.row_shape)
            padded = []
            for first_row, rows in zip(first_rows, written, strict=True):
                assert first_row == sum(map(len, padded))
                ours = read_rows(part, spec, first_row, len(rows[spec.name]))
                assert ours.dtype == content.dtype
                assert ours.shape == rows[spec.name].shape
                assert ours.tobytes() == rows[spec.name].tobytes()
                room = -len(rows[spec.name]) % chunk_tokens
                padded.append(np.concatenate([rows[spec.name], np.zeros((room, *spec.row_shape), spec.dtype)]))
            assert content.tobytes() == np.concatenate(padded).tobytes()


def test_the_commit_record_gives_size_and_checksum_of_every_file(tmp_path: Path):
    assert google_crc32c.value(b"123456789") == 0xE3069283  # CRC-32C's check value
    writer = PartWriter(tmp_path, make_specs(2, 8))
    writer.append(random_rows(make_specs(2, 8), 9, 0))
    writer.commit({"made_by": "a test"}, {"index/x.bin": b"abc"})
    record = json.loads((tmp_path / "commits" / f"{writer.name}.json").read_text())
    files = record.pop("files")
    assert record == {"part": writer.name, "made_by": "a test", "num_rows": 12}
    found = [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "commits"]
    assert set(files) == {str(path.relative_to(tmp_path)) for path in found}
    for path in found:
        content = path.read_bytes()
        expected = {"bytes": len(content), "crc32c": f"{google_crc32c.value(content):08x}"}
        assert files[str(path.relative_to(tmp_path))] == expected


DAMAGE = [
    Damage("first-bits-flipped", 0.0),
    Damage("middle-bits-flipped", 0.3),
    Damage("cut-short", 0.2, cut=True),
    Damage("emptied", 0.0, cut=True),
    Damage("missing", None),
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.id)
def test_damage_is_an_error_that_names_the_file(damage: Damage, tmp_path: Path):
    specs = make_specs(2, 8)
    part, _, _ = write_part(tmp_path, specs, [18])
    for spec in specs:
        read_rows(part, spec, 0, 18)
        damage.apply(spec.shard_path(part))
        with pytest.raises(CacheCorruptError, match=re.escape(str(spec.shard_path(part)))):
            read_rows(part, spec, 0, 18)


def test_every_flipped_bit_of_a_sequence_is_found_and_no_other_sequence_minds(tmp_path: Path):
    (spec,) = specs = [ArraySpec("token_ids", (), "int32", CHUNK_TOKENS)]
    part, first_rows, written = write_part(tmp_path, specs, [6, 3, 5])
    path = spec.shard_path(part)
    content = path.read_bytes()
    offset, length = spec.byte_range(first_rows[1], 3)
    for bit in range(8 * offset, 8 * (offset + length)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(CacheCorruptError, match=f"rows {first_rows[1]} and on"):
            read_rows(part, spec, first_rows[1], 3)
        for i in (0, 2):
            assert np.array_equal(
                read_rows(part, spec, first_rows[i], len(written[i]["token_ids"])), written[i][spec.name]
            )


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"hidden": np.zeros((3, 2, 7), np.uint16)}, id="other-width"),
        pytest.param({"hidden": np.zeros((3, 2, 8), np.int16)}, id="other-dtype"),
        pytest.param({"token_ids": np.zeros(2, np.int32)}, id="other-length"),
        pytest.param({"more": np.zeros(3, np.int32)}, id="unknown-array"),
    ],
)
def test_rows_that_do_not_fit_the_arrays_are_refused(change: dict[str, Any], tmp_path: Path):
    writer = PartWriter(tmp_path, make_specs(2, 8))
    with pytest.raises(ValueError, match="expected rows"):
        writer.append(random_rows(make_specs(2, 8), 3, 0) | change)
    writer.abandon()
    assert list((tmp_path / "parts").iterdir()) == []


def test_an_unfinished_part_has_another_name(tmp_path: Path):
    specs = make_specs(1, 2)
    writer = PartWriter(tmp_path, specs)
    writer.append(random_rows(specs, 3, 0))
    assert not part_path(tmp_path, writer.name).exists()
    assert not (tmp_path / "commits").exists()
    writer.commit({})
    assert [path.name for path in (tmp_path / "parts").iterdir()] == [f"{writer.name}.zarr"]
