"""The index: to open a cache of many parts takes one file, and an open cache is a stable view."""

# K layers, H hidden width
import io
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.tiny import Damage, append, make_index, make_manifest, make_row, make_sequence, same_bits, snapshot
from vpd.data.cache.cache import Cache
from vpd.data.cache.index import SequenceIndex, SequenceRow, parse_rows, read_snapshot, write_snapshot
from vpd.data.cache.storage.local import LocalFile, LocalStorage
from vpd.data.cache.writer import StateWriter
from vpd.data.errors import CacheCorruptError

K, H = 2, 8
NAMES = "abcdefghij"


class RecordingStorage(LocalStorage):
    """A folder that records the calls."""

    def __init__(self, root: Path):
        super().__init__(root)
        self.reads: list[str] = []
        self.listings: list[str] = []

    def read(self, name: str) -> bytes:
        self.reads.append(name)
        return super().read(name)

    def open(self, name: str) -> LocalFile:
        self.reads.append(name)
        return super().open(name)

    def list_folder(self, name: str) -> list[str]:
        self.listings.append(name)
        return super().list_folder(name)


def add_parts(folder: Path, names: str, *, finish: bool) -> list[str]:
    """Writes each sequence into its own part; with `finish`, the snapshot covers all parts."""
    writer = StateWriter(Cache.create_or_open(folder, make_manifest()), 1, {})
    before = {name: (folder / "index" / name).read_bytes() for name in snapshots(folder)}
    parts = [append(writer, **make_sequence(name, 5 + ord(name) % 7, K, H)) for name in names]
    if finish:
        writer.finish()
    else:
        remove_snapshots(folder)
        for name, content in before.items():
            (folder / "index" / name).write_bytes(content)
    return [part for part in parts if part is not None]


def snapshots(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "index").glob("all-*"))


def remove_snapshots(folder: Path) -> None:
    for name in snapshots(folder):
        (folder / "index" / name).unlink()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "cache"
    assert len(add_parts(folder, NAMES, finish=True)) == len(NAMES)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A cache of ten parts of one sequence each, all in one snapshot."""
    return shutil.copytree(original, tmp_path / "cache")


def ids(cache: Cache) -> list[str]:
    return sorted(row.seq_id for row in cache.rows)


# Opening


def test_opening_reads_the_manifest_and_the_snapshot_alone(folder: Path):
    storage = RecordingStorage(folder)
    cache = Cache.open(storage)
    (name,) = snapshots(folder)
    assert storage.reads == ["dataset.json", f"index/{name}"]
    assert sorted(storage.listings) == ["commits", "index", "parts"]
    assert (ids(cache), len(cache.parts)) == (list(NAMES), len(NAMES))


def test_reading_a_sequence_reads_its_own_part_alone(folder: Path):
    storage = RecordingStorage(folder)
    cache = Cache.open(storage)
    row = cache.rows[3]
    storage.reads.clear()
    cache.read(row)
    assert all(row.part in name for name in storage.reads)
    num_first = len(storage.reads)
    assert num_first == len(set(storage.reads))
    cache.read(row)
    cache.read_tokens(row)
    assert len(storage.reads) == num_first  # opened once


def test_parts_committed_after_the_snapshot_are_found(folder: Path):
    later = add_parts(folder, "xy", finish=False)
    storage = RecordingStorage(folder)
    cache = Cache.open(storage)
    assert ids(cache) == [*NAMES, "x", "y"]
    (name,) = snapshots(folder)
    expected = ["dataset.json", f"index/{name}"]
    expected += [file for part in later for file in (f"commits/{part}.json", f"index/{part}.parquet")]
    assert sorted(storage.reads) == sorted(expected)


@pytest.mark.parametrize("finish", [False, True])
def test_an_open_cache_is_a_view_of_what_was_committed_then(finish: bool, folder: Path):
    before = Cache.open(folder)
    rows, fingerprint, parts = list(before.rows), before.fingerprint, list(before.parts)
    assert Cache.open(folder).fingerprint == fingerprint
    add_parts(folder, "xyz", finish=finish)
    assert (list(before.rows), before.fingerprint, before.parts) == (rows, fingerprint, parts)
    for row in before.rows:  # none of its files is gone
        assert same_bits(before.read(row).hidden_TKH, make_sequence(row.seq_id, row.num_tokens, K, H)["hidden_TKH"])
    after = Cache.open(folder)
    assert len(after) == len(before) + 3
    assert after.fingerprint != fingerprint


def test_the_order_of_the_rows_does_not_depend_on_the_snapshots(folder: Path):
    """A resumed run must find sequence i at the same place, with any snapshot."""
    add_parts(folder, "uvwxyz", finish=False)
    with_a_part = Cache.open(folder)
    remove_snapshots(folder)
    without = Cache.open(folder)
    without.write_snapshot()
    renewed = Cache.open(folder)
    for cache in (without, renewed):
        assert cache.fingerprint == with_a_part.fingerprint
        assert list(cache.rows) == list(with_a_part.rows)


def test_a_sequence_that_two_writers_made_is_read_once(tmp_path: Path):
    manifest = make_manifest()
    writers = [StateWriter(Cache.create_or_open(tmp_path, manifest), 1 << 20, {}) for _ in range(2)]
    for writer, names in zip(writers, ("abc", "cbd"), strict=True):
        for name in names:
            append(writer, **make_sequence(name, 30, K, H))
    parts = sorted(str(writer.commit()) for writer in writers)
    cache = Cache.open(tmp_path)
    assert sorted(cache.rows.strings("seq_id")) == ["a", "b", "c", "d"]
    assert {row.part for row in cache.rows if row.seq_id in "bc"} == {parts[0]}
    assert cache.num_tokens == 4 * 30
    # A part keeps all its rows, as first drafts have one for each.
    assert sorted(row.seq_id for part in parts for row in cache.rows_of_part(part)) == list("abbccd")
    for part in parts:
        assert [row.first_row for row in cache.rows_of_part(part)] == [0, 64, 128]


# Snapshots


def test_the_snapshot_follows_the_parts_and_lacks_few_of_them(tmp_path: Path):
    writer = StateWriter(Cache.create_or_open(tmp_path, make_manifest()), 1, {})
    num_renewed = 0
    for count in range(1, 41):
        before = snapshots(tmp_path)
        append(writer, **make_sequence(f"s{count}", 3, K, H))
        (name,) = snapshots(tmp_path)
        num_renewed += [name] != before
        assert 0 <= count - int(name.split("-")[1]) <= count / 8
        assert len(Cache.open(tmp_path)) == count
    assert num_renewed < 25
    writer.finish()
    (name,) = snapshots(tmp_path)
    assert int(name.split("-")[1]) == 40
    before = snapshot(tmp_path)
    writer.finish()
    assert snapshot(tmp_path) == before


def test_a_snapshot_renewed_while_a_cache_is_opened_is_no_loss(folder: Path):
    storage = RecordingStorage(folder)
    list_folder = storage.list_folder

    def list_then_renew(name: str) -> list[str]:
        found = list_folder(name)
        if storage.listings == ["index"]:
            add_parts(folder, "z", finish=True)
        return found

    storage.list_folder = list_then_renew
    assert ids(Cache.open(storage)) == [*NAMES, "z"]


@pytest.mark.parametrize(
    "damage",
    [
        *(Damage(f"bits-flipped-at-{share}", share) for share in (0.0, 0.04, 0.22, 0.4, 0.55, 0.7, 0.9999)),
        Damage("cut-short", 0.5, cut=True),
        Damage("emptied", 0.0, cut=True),
    ],
    ids=lambda damage: damage.id,
)
@pytest.mark.parametrize("kind", ["snapshot", "part"])
def test_a_damaged_index_is_an_error_that_names_it(damage: Damage, kind: str, folder: Path):
    (part,) = add_parts(folder, "x", finish=False)
    name = snapshots(folder)[0] if kind == "snapshot" else f"{part}.parquet"
    damage.apply(folder / "index" / name)
    with pytest.raises(CacheCorruptError) as caught:
        Cache.open(folder)
    assert str(folder / "index" / name) in str(caught.value)


def test_a_missing_index_of_a_part_is_an_error_unless_the_snapshot_has_its_rows(folder: Path):
    (part,) = add_parts(folder, "x", finish=False)
    path = folder / "index" / f"{part}.parquet"
    path.rename(folder / "aside")
    with pytest.raises(CacheCorruptError, match=rf"index/{part}\.parquet of a committed part .*found None"):
        Cache.open(folder)
    (folder / "aside").rename(path)
    Cache.open(folder).write_snapshot()
    path.unlink()
    assert ids(Cache.open(folder)) == [*NAMES, "x"]


def test_what_is_no_index_is_refused(tmp_path: Path):
    other = io.BytesIO()
    whole = pq.read_table(io.BytesIO(make_index([make_row("a", 3)]).to_parquet()))
    pq.write_table(whole.drop_columns(["seq_id"]), other)
    for content in (b"", b"PAR1", other.getvalue()):
        with pytest.raises(CacheCorruptError, match="here is not an index of sequences"):
            parse_rows(content, "here")


# Rows

ROWS = st.builds(
    make_row,
    seq_id=st.text(max_size=4),
    num_tokens=st.integers(1, 2**40),
    part=st.sampled_from(["part-b", "part-a", "part-c"]),
    first_row=st.integers(0, 10),
    final_token_id=st.none() | st.integers(0, 9),
    finish_reason=st.sampled_from(["stop", "length", "given"]),
    hidden_crc=st.integers(0, 2**32 - 1),
)


@given(st.lists(ROWS, max_size=12))
@example([make_row(seq_id, 1) for seq_id in ("", "\0", "a", "a")])
@settings(deadline=None)
def test_an_index_is_a_sequence_of_its_rows(rows: list[SequenceRow]):
    index = make_index(rows)
    assert list(index) == rows
    assert [index[i] for i in range(-len(rows), len(rows))] == rows * 2
    assert list(index[1:7:2]) == rows[1:7:2]
    assert list(index[::-1]) == rows[::-1]
    assert list(index.take(range(0, len(rows), 3))) == rows[::3]
    assert index.column("num_tokens").tolist() == [row.num_tokens for row in rows]
    assert index.strings("seq_id") == [row.seq_id for row in rows]
    for outside in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError):
            index[outside]
    assert sorted(index.parts) == sorted({row.part for row in rows})
    for part in ("part-a", "part-b", "elsewhere"):
        assert list(index.of_part(part)) == sorted((r for r in rows if r.part == part), key=lambda row: row.first_row)
    assert list(index.in_order_of_parts()) == sorted(rows, key=lambda row: row.part)
    unique = {row.seq_id: row for row in reversed(rows)}
    assert list(index.without_repetitions()) == [row for row in rows if unique[row.seq_id] is row]


@given(st.lists(ROWS, max_size=8), st.lists(ROWS, max_size=8))
@settings(deadline=None)
def test_an_index_comes_back_from_its_file_and_others_can_follow(rows: list[SequenceRow], more: list[SequenceRow]):
    tables = [parse_rows(make_index(some).to_parquet(), "here") for some in (rows, more)]
    assert list(SequenceIndex.concatenate(tables)) == rows + more
    assert [table.to_pylist() for table in tables] == [[asdict(row) for row in some] for some in (rows, more)]


def test_twenty_thousand_rows_take_less_than_200_bytes_each(tmp_path: Path):
    rng = np.random.default_rng(0)
    parts = [f"part-{i:012x}" for i in range(40)]
    rows = [
        make_row(
            f"{i:016x}",
            int(rng.integers(50, 4000)),
            part=parts[i // 500],
            source=f"prompts-{i // 5000}.jsonl",
            final_token_id=int(rng.integers(150_000)),
            hidden_offset=int(rng.integers(2**40)),
            hidden_crc=int(rng.integers(2**32)),
            content_hash=f"{rng.integers(2**62):016x}",
        )
        for i in range(20_000)
    ]
    index = make_index(rows)
    assert index.nbytes < 200 * len(rows)
    assert index[12_345] == rows[12_345]
    assert index[19_999:][0] == rows[-1]
    write_snapshot(LocalStorage(tmp_path), index, len(parts))
    table = read_snapshot(LocalStorage(tmp_path))
    assert table is not None
    read = SequenceIndex.concatenate([table])
    assert read.nbytes < 200 * len(rows)
    assert list(read) == rows


@pytest.mark.parametrize("change", [lambda row: replace(row, seq_id="b"), lambda row: replace(row, hidden_crc=1)])
def test_the_name_of_a_snapshot_is_that_of_its_content(change: Callable[[SequenceRow], SequenceRow], tmp_path: Path):
    storage = LocalStorage(tmp_path)
    for row in (make_row("a", 3), change(make_row("a", 3))):
        write_snapshot(storage, make_index([row]), 7)
    first, second = tmp_path / "first", tmp_path / "second"
    for place, row in ((first, make_row("a", 3)), (second, change(make_row("a", 3)))):
        write_snapshot(LocalStorage(place), make_index([row]), 7)
    names = {snapshots(place)[0] for place in (first, second)}
    assert len(names) == 2
    assert set(snapshots(tmp_path)) <= names
    assert max(names) in snapshots(tmp_path)  # readers take the last
