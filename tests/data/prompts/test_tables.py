"""Rows by their numbers: whatever rows somebody asks for, they are those that reading the whole file gives."""

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.prompts import read_prompts
from support.tiny import write_jsonl
from vpd.data.errors import PromptError
from vpd.data.prompts.records import BadRow, PromptRecord, PromptSource, shuffled
from vpd.data.prompts.rows import HubPart
from vpd.data.prompts.tables import BLOCK_BYTES, BatchTable, LineTable, StreamTable, open_table

ENDS = ["\n", "\r\n", "\n\n", "\n \n", "\n\r\n"]


def lines_of(table: LineTable | StreamTable, indices: list[int]) -> list[tuple[int, object]]:
    return [(number, load()) for _, number, load in table.read(indices)]


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(st.text(max_size=4), min_size=1, max_size=12),
    ends=st.lists(st.sampled_from(ENDS), min_size=12, max_size=12),
    is_open=st.booleans(),
    unit_rows=st.integers(1, 5),
)
def test_lines_are_those_of_plain_reading(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], ends: list[str], is_open: bool, unit_rows: int
):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    content = "".join(json.dumps({"text": text}) + end for text, end in zip(texts, ends, strict=False))
    path.write_bytes((content.rstrip() if is_open else content).encode())
    expected = [(i, json.loads(line)) for i, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    table = LineTable(str(path), unit_rows)
    assert lines_of(table, [*range(len(table))]) == expected
    assert lines_of(StreamTable(str(path), lambda name: True, HubPart()), [*range(len(expected))]) == expected
    assert len(table) <= len(expected) + content.count("\n \n")


def test_lines_longer_than_a_block_are_whole(tmp_path: Path):
    texts = ["x" * length for length in (BLOCK_BYTES - 12, BLOCK_BYTES, 3, 3 * BLOCK_BYTES, 0)]
    table = LineTable(str(write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])), 2)
    assert lines_of(table, [1, 3, 4]) == [(i + 1, {"text": texts[i]}) for i in (1, 3, 4)]


@pytest.mark.parametrize("changed", range(10))
def test_a_checksum_shows_that_a_row_of_its_unit_changed(changed: int, tmp_path: Path):
    """The changed row is as long as before."""
    before = [{"text": f"text {i}"} for i in range(10)]
    after = [{"text": "text X"} if i == changed else record for i, record in enumerate(before)]
    tables = [LineTable(str(write_jsonl(tmp_path / f"{i}.jsonl", rows)), 4) for i, rows in enumerate([before, after])]
    differing = [i for i in range(3) if tables[0].checksum(i) != tables[1].checksum(i)]
    assert differing == [changed // 4]


def make_places(folder: Path) -> list[str]:
    """Lines, compressed lines and a table, ten records each."""
    records = [{"text": f"text {i}"} for i in range(30)]
    write_jsonl(folder / "a.jsonl", records[:10])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(write_jsonl(folder / "b", records[10:20]).read_bytes()))
    pq.write_table(pa.Table.from_pylist(records[20:]), folder / "c.parquet")
    return [str(folder / name) for name in ("a.jsonl", "b.jsonl.gz", "c.parquet")]


@pytest.mark.parametrize("group_rows", [7, 1500, 5000])
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_rows_of_a_table_are_those_of_plain_reading(kind: str, group_rows: int, tmp_path: Path):
    table = pa.table({"text": [f"text {i}" for i in range(3000)], "other": range(3000)})
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=group_rows)
    else:
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table, max_chunksize=group_rows)
    opened = open_table(str(path), lambda name: name == "text", HubPart(), 256)
    assert isinstance(opened, BatchTable)
    assert len(opened) == 3000
    for indices in ([0, 1, 2999], [1500], [6, 7, 8], [2998], [*range(1400, 1600)], [], [0]):
        expected = [(i, i + 1, {"text": f"text {i}", "other": None}) for i in indices]
        assert [(index, number, load()) for index, number, load in opened.read(indices)] == expected


KINDS_OF_TEXT = {
    "plain": pa.array(["a", "b", "a", None]),
    "large": pa.array(["a", "b", "a", None], pa.large_string()),
    "view": pa.array(["a", "b", "a", None], pa.string_view()),
    "dictionary": pa.array(["a", "b", "a", None]).dictionary_encode(),
    "run-ends": pa.RunEndEncodedArray.from_arrays(pa.array([1, 2, 3, 4], pa.int32()), pa.array(["a", "b", "a", None])),
    "bytes": pa.array([b"a", b"b", b"a", None]),
    "json": pa.ExtensionArray.from_storage(pa.json_(), pa.array(["a", "b", "a", None])),
}
"""Arrow's types for the texts a, b, a and nothing."""


@pytest.mark.parametrize("kind", KINDS_OF_TEXT)
@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [2], [0, 2, 3]], ids=str)
def test_a_text_of_every_type_of_arrow_is_read(kind: str, rows: list[int], tmp_path: Path):
    table = pa.table({"prompt": ["p"] * 4, "response": KINDS_OF_TEXT[kind]})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as file:
        file.write_table(table)
    found = [each for each in PromptSource([tmp_path / "a.arrow"]).read(rows) if isinstance(each, PromptRecord)]
    expected = [["p", "a"], ["p", "b"], ["p", "a"], ["p"]]
    assert [[message.content for message in each.messages] for each in found] == [expected[row] for row in rows]


def test_bytes_that_are_no_text_are_a_bad_row(tmp_path: Path):
    pq.write_table(pa.table({"text": [b"\xff\xfe", b"b"]}), tmp_path / "a.parquet")
    bad, good = PromptSource([tmp_path / "a.parquet"]).read()
    assert isinstance(bad, BadRow)
    assert "text holds bytes that are no text in UTF-8" in bad.reason
    assert isinstance(good, PromptRecord)


@pytest.mark.parametrize("rows", [[3], [29, 0, 15, 14, 2], [*range(30)][::-1], [], [11, 12, 25]], ids=str)
def test_rows_come_in_the_order_in_which_they_are_asked_for(rows: list[int], tmp_path: Path):
    source = PromptSource(make_places(tmp_path))
    for _ in range(2):
        found = [each.text for each in source.read(rows) if isinstance(each, PromptRecord)]
        assert found == [f"text {row}" for row in rows]


@pytest.mark.parametrize("choice", [{}, {"limit": 17}, {"shuffle_seed": 5}, {"shuffle_seed": 5, "limit": 17}], ids=str)
@pytest.mark.parametrize("unit_rows", [1, 4, 10, 100])
def test_slices_hold_every_row_once_and_have_keys_of_their_own(unit_rows: int, choice: dict[str, Any], tmp_path: Path):
    places = make_places(tmp_path)
    source = PromptSource([*places, places[0]], unit_rows=unit_rows, **choice)
    slices = source.slices()
    rows = [row for each in slices for row in each.rows]
    assert len(rows) == len(set(rows)) == len(source) == choice.get("limit", 40)
    assert max(len(each.rows) for each in slices) <= unit_rows
    assert len({each.key for each in slices}) == len(slices)
    again = PromptSource([*places, places[0]], unit_rows=unit_rows, **choice)
    assert [each.key for each in again.slices()] == [each.key for each in slices]
    assert again.fingerprint == source.fingerprint


def test_a_seeds_order_reads_compressed_files_and_tables_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    places = make_places(tmp_path)
    source = PromptSource(places, unit_rows=2, shuffle_seed=5, limit=25)
    passes: list[str] = []
    for kind in (StreamTable, BatchTable):
        whole = kind.read
        monkeypatch.setattr(
            kind, "read", lambda table, rows, whole=whole: passes.append(table.place) or whole(table, rows)
        )
    found = [each.text for each in source.read() if isinstance(each, PromptRecord)]
    assert found == [f"text {row}" for row in shuffled(30, 5)[:25]]
    assert sorted(passes) == places[1:]


def test_a_bad_row_of_a_compressed_file_is_named_in_a_seeds_order(tmp_path: Path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\nno json\n{"text": "b"}\n'))
    found = {each.row: type(each) for each in PromptSource([path], shuffle_seed=1).read()}
    assert found == {1: PromptRecord, 2: BadRow, 3: PromptRecord}


def test_rows_that_are_added_leave_the_keys_of_full_slices(tmp_path: Path):
    records = [{"text": f"text {i}"} for i in range(10)]
    before, after = (
        PromptSource([write_jsonl(tmp_path / "a.jsonl", rows)], unit_rows=3).slices() for rows in (records[:7], records)
    )
    assert [each.key for each in before[:2]] == [each.key for each in after[:2]]
    assert before[2].key != after[2].key


@pytest.mark.parametrize("number", [1, 2, 1000])
def test_a_seed_gives_an_order(number: int):
    orders = [shuffled(number, seed).tolist() for seed in range(4)]
    assert all(sorted(order) == [*range(number)] for order in orders)
    assert shuffled(number, 2).tolist() == orders[2]
    if number == 1000:
        assert len({*map(tuple, orders)}) == 4
        places = np.argsort(orders, axis=1)
        assert abs(np.corrcoef(places[0], np.arange(number))[0, 1]) < 0.1


def test_the_kept_repetitions_are_those_of_a_slow_count(tmp_path: Path):
    texts = ["a", "b", "a", "a", "c", "b", "a"]
    place = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    found = [record.seq_id.partition("-")[2] for record in read_prompts([place, place]).records]
    doubled = texts * 2
    expected = [doubled[:i].count(text) for i, text in enumerate(doubled)]
    assert found == [str(count) if count else "" for count in expected]


def test_bad_rows_are_named_and_cost_no_other(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\nno json\n{"other": 1}\n{"text": "b"}\n')
    found = [*PromptSource([path]).read()]
    assert [(each.row, isinstance(each, BadRow)) for each in found] == [(1, False), (2, True), (3, True), (4, False)]


def test_a_file_that_went_away_is_an_error(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    source = PromptSource([path])
    path.unlink()
    with pytest.raises(PromptError, match=r"a\.jsonl can't be read"):
        list(source.read())


def test_opening_keeps_few_bytes_a_row(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "some text"}\n' * 50_000)
    tracemalloc.start()
    table = open_table(str(path), lambda name: True, HubPart(), 256)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(table) == 50_000
    assert peak < 5 * BLOCK_BYTES + 50 * len(table), (
        "a block has up to 50,000 ends of lines, which are held several times"
    )
