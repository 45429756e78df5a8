"""Parts on disk: valid Zarr, described by the commit record, and never misread after damage."""

# T tokens, K layers, H hidden width
import errno
import re
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from crc32c import crc32c
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.tiny import Damage
from vpd.data.cache.array_spec import ArraySpec
from vpd.data.cache.codecs import COMPRESSION
from vpd.data.cache.part import OpenPart, PartWriter, open_part, part_folder
from vpd.data.cache.reader import Slot, read_chunks
from vpd.data.cache.records import checksum, parse_record
from vpd.data.cache.shard import decode_whole, parse_footer
from vpd.data.cache.storage.local import LocalStorage
from vpd.data.errors import CacheCorruptError, StorageError
from xxhash import xxh3_64_hexdigest

CHUNK_TOKENS = 4
Rows = dict[str, np.ndarray]


def make_specs(num_layers: int, width: int, chunk_tokens: int = CHUNK_TOKENS) -> list[ArraySpec]:
    return [
        ArraySpec("hidden", (num_layers, width), "uint16", chunk_tokens),
        ArraySpec("packed", (num_layers, width), "uint16", chunk_tokens, COMPRESSION),
        ArraySpec("token_ids", (), "int32", chunk_tokens),
        ArraySpec("loss_mask", (), "uint8", chunk_tokens),
        ArraySpec("probs", (width, num_layers), "float16", chunk_tokens),
    ]


def random_rows(specs: list[ArraySpec], num_rows: int, seed: int) -> Rows:
    """Rows of random bits, with NaNs among the floats; odd seeds give rows that compress well."""
    rng = np.random.default_rng(seed)
    rows = {}
    for spec in specs:
        num_bytes = num_rows * spec.chunk_bytes // spec.chunk_tokens
        content = rng.bytes(num_bytes) if seed % 2 else bytes([seed]) * num_bytes
        rows[spec.name] = np.frombuffer(content, spec.dtype).reshape(num_rows, *spec.row_shape)
    return rows


def write_part(root: Path, specs: list[ArraySpec], lengths: list[int]) -> tuple[str, list[int], list[Rows]]:
    """Writes and commits a part; returns its name, each sequence's first row, and the rows written."""
    writer = PartWriter(LocalStorage(root), "", specs)
    written = [random_rows(specs, length, seed) for seed, length in enumerate(lengths, start=1)]
    first_rows = [writer.append(rows).first_row for rows in written]
    writer.commit({"made_by": "a test"})
    return writer.name, first_rows, written


def open_for(
    root: Path, name: str, ranged: Collection[ArraySpec], resident: Collection[ArraySpec] = (), verify: bool = True
) -> OpenPart:
    return open_part(LocalStorage(root), "", name, ranged, resident, verify)


def read_rows(part: OpenPart, spec: ArraySpec, first_row: int, num_rows: int) -> np.ndarray:
    """A sequence's rows by byte range, verified."""
    slot = Slot()
    chunks = part.chunks_of(spec, first_row, num_rows)
    read_chunks(part, spec, first_row, chunks, slot)
    content = slot.rows.view[: len(chunks) * spec.chunk_bytes]
    return np.frombuffer(content, spec.dtype).reshape(-1, *spec.row_shape)[:num_rows]


def padded(written: list[Rows], spec: ArraySpec) -> np.ndarray:
    """The content of the whole array: every sequence, padded with zeros to whole chunks."""
    found = []
    for rows in written:
        room = -len(rows[spec.name]) % spec.chunk_tokens
        found += [rows[spec.name], np.zeros((room, *spec.row_shape), spec.dtype)]
    return np.concatenate(found)


@given(
    lengths=st.lists(st.integers(1, 11), min_size=1, max_size=5),
    num_layers=st.integers(1, 4),
    width=st.integers(1, 9),
    chunk_tokens=st.integers(1, 5),
)
@example(lengths=[64, 65, 1, 128], num_layers=5, width=16, chunk_tokens=64)
@settings(max_examples=15, deadline=None)
def test_zarr_reads_the_bits_that_were_written_and_that_our_readers_read(lengths, num_layers, width, chunk_tokens):
    specs = make_specs(num_layers, width, chunk_tokens)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        name, first_rows, written = write_part(root, specs, lengths)
        part = open_for(root, name, specs, [spec for spec in specs if spec.compression is None])
        group = zarr.open_group(root / part_folder("", name), mode="r")
        assert set(group.array_keys()) == {spec.name for spec in specs}
        for spec in specs:
            array, expected = group[spec.name], padded(written, spec)
            assert isinstance(array, zarr.Array)
            content = np.asarray(array[:])
            assert (content.dtype, content.shape) == (np.dtype(spec.dtype), (part.num_rows, *spec.row_shape))
            assert content.tobytes() == expected.tobytes()
            if spec.name in part.resident:
                whole = part.resident[spec.name]
                assert (whole.dtype, whole.shape, whole.tobytes()) == (content.dtype, content.shape, content.tobytes())
            position = 0
            for first_row, rows in zip(first_rows, written, strict=True):
                assert first_row == position
                ours = read_rows(part, spec, first_row, len(rows[spec.name]))
                assert (ours.dtype, ours.shape) == (content.dtype, rows[spec.name].shape)
                assert ours.tobytes() == rows[spec.name].tobytes()
                position += spec.num_chunks(len(rows[spec.name])) * chunk_tokens


def test_where_rows_went_is_their_byte_range_and_their_checksum(tmp_path: Path):
    specs = make_specs(2, 8)
    writer = PartWriter(LocalStorage(tmp_path), "", specs)
    places = [writer.append(random_rows(specs, length, length)) for length in (9, 3)]
    writer.commit({})
    for spec in specs:
        content = (tmp_path / part_folder("", writer.name) / spec.shard_name).read_bytes()
        assert places[0].offsets[spec.name] == 0
        assert places[1].offsets[spec.name] == places[0].lengths[spec.name]
        end = places[1].offsets[spec.name] + places[1].lengths[spec.name]
        assert len(content) == end + 16 * (3 + 1) + 4  # the index: two numbers a chunk, and its checksum
        index = np.frombuffer(content[end:-4], "<u8").reshape(-1, 2).tolist()
        crcs = [content[offset + length - 4 : offset + length] for offset, length in index]
        for place, stored in zip(places, (crcs[:3], crcs[3:]), strict=True):
            assert place.crcs[spec.name] == crc32c(b"".join(stored))
        for (offset, length), crc in zip(index, crcs, strict=True):
            assert crc == crc32c(content[offset : offset + length - 4]).to_bytes(4, "little")


def test_the_commit_record_gives_size_and_checksum_of_every_file(tmp_path: Path):
    specs = make_specs(2, 8)
    constant = ArraySpec("constant", (3,), "float32", 2)
    writer = PartWriter(LocalStorage(tmp_path), "", specs, constants={constant: np.ones((2, 3), np.float32)})
    writer.append(random_rows(specs, 9, 1))
    writer.commit({"made_by": "a test"}, {"index/x.bin": b"abc"})
    path = tmp_path / "commits" / f"{writer.name}.json"
    record = parse_record(path.read_bytes(), str(path), "a commit record")
    files = record.pop("files")
    assert record == {"part": writer.name, "made_by": "a test", "num_rows": 12}
    found = [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "commits"]
    assert set(files) == {str(path.relative_to(tmp_path)) for path in found}
    for path in found:
        content = path.read_bytes()
        assert files[str(path.relative_to(tmp_path))] == {"bytes": len(content), "xxh3": xxh3_64_hexdigest(content)}
    part = open_for(tmp_path, writer.name, [], [constant])
    assert (part.num_rows, part.resident["constant"].tolist()) == (12, [[1.0] * 3] * 2)


# Damage

DAMAGE = [
    Damage("first-bits-flipped", 0.0),
    Damage("middle-bits-flipped", 0.3),
    Damage("index-flipped", 0.9),
    Damage("cut-short", 0.2, cut=True),
    Damage("emptied", 0.0, cut=True),
    Damage("missing", None),
]


@pytest.mark.parametrize("how", ["ranged", "resident", "unverified"])
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.id)
def test_damage_is_an_error_that_names_the_file(damage: Damage, how: str, tmp_path: Path):
    """If the files of a part are not verified at opening, its chunks are still verified when read."""
    specs = make_specs(2, 8)
    name, _, _ = write_part(tmp_path, specs, [18])

    def read(spec: ArraySpec) -> None:
        ranged, resident = ([], [spec]) if how == "resident" else ([spec], [])
        part = open_for(tmp_path, name, ranged, resident, verify=how != "unverified")
        for spec in ranged:
            read_rows(part, spec, 0, 18)

    for spec in specs:
        if how == "resident" and spec.compression is not None:
            continue
        read(spec)
        path = tmp_path / part_folder("", name) / spec.shard_name
        content = path.read_bytes()
        damage.apply(path)
        with pytest.raises(CacheCorruptError, match=re.escape(str(path))):
            read(spec)
        path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.id)
def test_damaged_metadata_is_an_error_when_a_part_is_opened_to_be_verified(damage: Damage, tmp_path: Path):
    specs = make_specs(2, 8)
    name, _, _ = write_part(tmp_path, specs, [5])
    for file in ["zarr.json", *(spec.metadata_name for spec in specs)]:
        path = tmp_path / part_folder("", name) / file
        content = path.read_bytes()
        damage.apply(path)
        with pytest.raises(CacheCorruptError, match=re.escape(str(path))):
            open_for(tmp_path, name, specs)
        path.write_bytes(content)
        open_for(tmp_path, name, specs)


@pytest.mark.parametrize("compression", [None, COMPRESSION], ids=["plain", "packed"])
def test_every_flipped_bit_of_a_sequence_is_found_and_no_other_sequence_minds(compression: Any, tmp_path: Path):
    (spec,) = specs = [ArraySpec("states", (2,), "uint16", CHUNK_TOKENS, compression)]
    name, first_rows, written = write_part(tmp_path, specs, [6, 3, 5])
    path = tmp_path / part_folder("", name) / spec.shard_name
    content = path.read_bytes()
    part = open_for(tmp_path, name, specs)
    offset, length = part.chunks_of(spec, first_rows[1], 3).sum(axis=0).tolist()
    for bit in range(8 * offset, 8 * (offset + length)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        part = open_for(tmp_path, name, specs)
        with pytest.raises(CacheCorruptError, match=f"rows {first_rows[1]} and on"):
            read_rows(part, spec, first_rows[1], 3)
        for i in (0, 2):
            rows = written[i]["states"]
            assert np.array_equal(read_rows(part, spec, first_rows[i], len(rows)), rows)


def test_every_flipped_bit_of_the_chunk_index_is_found_as_the_part_is_opened(tmp_path: Path):
    specs = make_specs(1, 2)
    name, _, _ = write_part(tmp_path, specs, [6, 3])
    for spec in (specs[0], specs[1]):
        path = tmp_path / part_folder("", name) / spec.shard_name
        content = path.read_bytes()
        for bit in range(8 * (len(content) - spec.footer_bytes(12)), 8 * len(content)):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(CacheCorruptError, match=re.escape(f"{path}: the checksum of its chunk index")):
                open_for(tmp_path, name, [spec], verify=False)
        path.write_bytes(content)


def test_every_flipped_bit_of_an_array_that_is_read_whole_is_found(tmp_path: Path):
    spec = ArraySpec("token_ids", (), "int32", CHUNK_TOKENS)
    name, _, _ = write_part(tmp_path, [spec], [6, 3])
    content = (tmp_path / part_folder("", name) / spec.shard_name).read_bytes()
    assert decode_whole(content, spec, "x").shape == (12,)
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CacheCorruptError, match="x: "):
            decode_whole(bytes(damaged), spec, "x")
    for end in range(len(content)):
        with pytest.raises(CacheCorruptError, match="x: "):
            decode_whole(content[:end], spec, "x")


@pytest.mark.parametrize("num_bytes", [0, 3, 4, 5, 19, 21])
def test_what_is_no_chunk_index_is_refused(num_bytes: int):
    with pytest.raises(CacheCorruptError, match="x: the checksum of its chunk index"):
        parse_footer(b"\1" * num_bytes, "x")


@pytest.mark.parametrize("chunks", [[(0, 20), (21, 20)], [(20, 20), (0, 20)], [(0, 20), (20, 4)], [(0, 2**64 - 1)] * 2])
def test_chunks_that_do_not_lie_one_after_the_other_are_refused(chunks: list[tuple[int, int]]):
    index = np.array(chunks, "<u8").tobytes()
    with pytest.raises(CacheCorruptError, match="x: its chunks do not lie one after the other"):
        parse_footer(index + checksum(index).to_bytes(4, "little"), "x")


@pytest.mark.parametrize(("first_row", "num_rows"), [(0, 13), (12, 1), (8, 5), (400, 1)])
def test_rows_that_a_part_does_not_have_are_an_error(first_row: int, num_rows: int, tmp_path: Path):
    specs = make_specs(1, 2)
    name, _, _ = write_part(tmp_path, specs, [6, 3])
    part = open_for(tmp_path, name, specs)
    for spec in specs:
        with pytest.raises(CacheCorruptError, match=rf"expected rows {first_row} .*{spec.name}, found 12 rows"):
            part.chunks_of(spec, first_row, num_rows)


# Writing


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
    writer = PartWriter(LocalStorage(tmp_path), "", make_specs(2, 8))
    with pytest.raises(ValueError, match="expected rows"):
        writer.append(random_rows(make_specs(2, 8), 3, 1) | change)
    writer.abandon()
    assert list((tmp_path / "parts").iterdir()) == []


def test_an_unfinished_part_has_another_name(tmp_path: Path):
    specs = make_specs(1, 2)
    writer = PartWriter(LocalStorage(tmp_path), "", specs)
    writer.append(random_rows(specs, 3, 1))
    assert not (tmp_path / part_folder("", writer.name)).exists()
    assert not (tmp_path / "commits").exists()
    writer.commit({})
    assert [path.name for path in (tmp_path / "parts").iterdir()] == [f"{writer.name}.zarr"]


def test_a_part_of_a_name_that_is_there_is_refused_and_leaves_the_first_alone(tmp_path: Path):
    specs = make_specs(1, 2)
    first, second = (PartWriter(LocalStorage(tmp_path), "drafts/x/", specs, "part-a") for _ in range(2))
    first.append(random_rows(specs, 3, 1))
    second.append(random_rows(specs, 5, 2))
    first.commit({})
    with pytest.raises(FileExistsError, match="part-a"):
        second.commit({})
    assert [path.name for path in (tmp_path / "drafts/x/parts").iterdir()] == ["part-a.zarr"]
    assert open_part(LocalStorage(tmp_path), "drafts/x/", "part-a", specs, [], verify=True).num_rows == 4


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_reported_and_leaves_nothing(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    specs = make_specs(1, 2)
    writer = PartWriter(LocalStorage(tmp_path), "", specs)
    writer.append(random_rows(specs, 3, 1))

    def full(storage: LocalStorage, name: str, content: bytes) -> None:
        raise OSError(number, "no room")

    monkeypatch.setattr(LocalStorage, "create", full)
    with pytest.raises(StorageError, match=rf"{re.escape(str(tmp_path))} can't be written to: no room\..*Make room"):
        writer.commit({})
    assert list((tmp_path / "parts").iterdir()) == []
