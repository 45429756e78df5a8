"""Files of records: every format in every compression gives the same rows, and damage is told with its place."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import write_jsonl
from vpd.data.errors import PromptError
from vpd.data.prompts import readers
from vpd.data.prompts.forms import parse_record
from vpd.data.prompts.rows import HubPart, find_places, rows_of_places

RECORDS: list[dict[str, Any]] = [
    {"prompt": f'a "quoted" \\ [{i}], {{', "response": "é" * i, "id": i} for i in range(40)
]


def with_arrow(codec: str) -> Callable[[bytes], bytes]:
    def compress(data: bytes) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, codec) as out:
            out.write(data)
        return sink.getvalue().to_pybytes()

    return compress


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda data: data,
    "gzip": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zstd": with_arrow("zstd"),
    "lz4": with_arrow("lz4"),
    "pzstd": lambda data: b"\x50\x2a\x4d\x18\x04\x00\x00\x00size" + with_arrow("zstd")(data),
    "many-zstd": lambda data: with_arrow("zstd")(data[:9]) + with_arrow("zstd")(data[9:]),
    "many-gzip": lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:]) + bytes(9),
}
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
TEXTS = {
    "lines": LINES,
    "list": json.dumps(RECORDS).encode(),
    "list-indented-with-mark": b"\xef\xbb\xbf\n "
    + json.dumps(RECORDS, indent=2, ensure_ascii=False).encode()
    + b"\n\n",
}


def rows(path: Path, wanted: Callable[[str], bool] = lambda name: True, split: str = "train") -> list[tuple[int, Any]]:
    return [(row, load()) for _, row, load in rows_of_places(find_places([path]), wanted, HubPart(split))]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that every value is cut by one."""
    monkeypatch.setattr(readers, "BLOCK_BYTES", 7)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_json_reads_alike_in_every_compression_whatever_its_name(text: str, compressor: str, tmp_path: Path):
    path = tmp_path / "records.txt"
    path.write_bytes(COMPRESSORS[compressor](TEXTS[text]))
    assert rows(path) == [*enumerate(RECORDS, start=1)]


@pytest.mark.parametrize("compressor", [name for name in COMPRESSORS if name != "plain"])
def test_two_files_after_each_other_and_a_cut_one(compressor: str, tmp_path: Path):
    path = tmp_path / "records.jsonl"
    compressed = COMPRESSORS[compressor](LINES)
    path.write_bytes(compressed * 2)
    assert [record for _, record in rows(path)] == RECORDS * 2
    path.write_bytes(compressed[: len(compressed) // 2])
    with pytest.raises(PromptError, match=r"records\.jsonl can't be read"):
        rows(path)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=40)
@given(
    items=st.lists(values, max_size=5), block=st.integers(1, 9), indent=st.sampled_from([None, 1]), raw=st.booleans()
)
def test_a_list_is_split_where_a_parser_splits_it(tmp_path_factory, items, block, indent, raw):
    path: Path = tmp_path_factory.mktemp("lists") / "list.json"
    path.write_bytes(json.dumps(items, indent=indent, ensure_ascii=raw).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "BLOCK_BYTES", block)
        assert [load() for _, load in readers.file_rows(path, lambda name: True)] == items


TABLES: dict[str, Callable[[pa.Table, Path], None]] = {
    "parquet": lambda table, path: pq.write_table(table, path),
    "arrow-stream": lambda table, path: write_ipc(pa.ipc.new_stream, table, path),
    "arrow-file": lambda table, path: write_ipc(pa.ipc.new_file, table, path),
}


def write_ipc(new: Callable[..., Any], table: pa.Table, path: Path) -> None:
    with new(str(path), table.schema) as out:
        out.write_table(table, max_chunksize=7)


@pytest.mark.parametrize("kind", TABLES)
def test_tables_read_wanted_columns_and_name_the_others(kind: str, tmp_path: Path):
    path = tmp_path / "table"
    TABLES[kind](pa.Table.from_pylist(RECORDS), path)
    assert rows(path, lambda name: name == "prompt") == [
        (row, {"prompt": record["prompt"], "response": None, "id": None}) for row, record in enumerate(RECORDS, start=1)
    ]
    with pytest.raises(PromptError, match="no known form among the columns"):
        rows(path, lambda name: False)


def test_a_saved_data_set_reads_like_its_records(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(RECORDS)
    data.save_to_disk(tmp_path / "one", num_shards=3)
    assert rows(tmp_path / "one") == [*enumerate(RECORDS, start=1)]
    datasets.DatasetDict({"train": data, "test": data.select(range(2))}).save_to_disk(tmp_path / "many")
    assert rows(tmp_path / "many", split="test") == [*enumerate(RECORDS[:2], start=1)]
    with pytest.raises(PromptError, match=r"has the splits \['train', 'test'\], and no dev; choose one with"):
        rows(tmp_path / "many", split="dev")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(PromptError, match=r"state\.json can't be read"):
        rows(tmp_path / "one")


BAD = [
    pytest.param(b'[{"text": "a"}, {"text": "b"', "ends after 1 rows, before the list ends", id="cut-list"),
    pytest.param(b'[{"text": "a"}, {"text": "b', "ends after 1 rows, before a text ends", id="cut-text"),
    pytest.param(b'[{"text": "a"}]\n[{"text": "b"}]', "more text after its list", id="two-lists"),
    pytest.param(b"PK\x03\x04....", "is a zip archive", id="zip"),
    pytest.param('{"text": "a"}'.encode("utf-16"), "is text in UTF-16", id="utf-16"),
    pytest.param(gzip.compress(gzip.compress(LINES)), "unpack it first", id="gzip-in-gzip"),
    pytest.param(gzip.compress(b"PAR1...."), "unpack it first", id="parquet-in-gzip"),
    pytest.param(b"ARROW1\x00\x00....", "can't be read", id="cut-arrow-file"),
    pytest.param(b"\xff\xff\xff\xff\x10\x00", "can't be read", id="cut-arrow-stream"),
    pytest.param(b"[]", "there is no record", id="empty-list"),
]


@pytest.mark.parametrize(("data", "message"), BAD)
def test_a_file_that_can_not_be_read_is_named_with_the_reason(data: bytes, message: str, tmp_path: Path):
    path = tmp_path / "bad.json"
    path.write_bytes(data)
    with pytest.raises(PromptError, match=message) as caught:
        rows(path)
    assert str(path) in str(caught.value)


BAD_LINES = {
    "two-values": ('{"text": "a", "text": "b"}', "the key 'text' has two values"),
    "two-values-below": (
        '{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
        "'content' has two values",
    ),
    "huge-number": ('{"text": "a", "n": ' + "9" * 5000 + "}", "not JSON"),
    "deep": ('{"messages": ' + "[" * 5000 + "]" * 5000 + "}", "not JSON"),
    "less-deep": ('{"messages": ' + "[" * 400 + "]" * 400 + "}", "nested deeper than 100"),
    "infinite": ('{"messages": [{"role": "user", "content": "a", "name": Infinity}]}', "is infinite"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_what_python_can_not_hold_is_a_bad_record(name: str, tmp_path: Path):
    line, message = BAD_LINES[name]
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{line}\n")
    ((_, _, load),) = rows_of_places([str(path)], lambda name: True, HubPart())
    with pytest.raises(PromptError, match=message):
        parse_record(load())


def test_a_key_may_stand_twice_with_one_value(tmp_path: Path):
    path = tmp_path / "twice.jsonl"
    path.write_text('{"text": "a", "text": "a"}\n')
    assert rows(path) == [(1, {"text": "a"})]


def test_a_table_gives_maps_dates_and_decimals_as_json_knows_them(tmp_path: Path):
    arguments = pa.struct(
        [("day", pa.timestamp("s")), ("price", pa.decimal128(6, 2)), ("city", pa.string()), ("n", pa.float64())]
    )
    call = pa.struct([("function", pa.struct([("name", pa.string()), ("arguments", arguments)]))])
    turn = pa.map_(pa.string(), pa.string())
    made = {"day": datetime(2024, 5, 1), "price": Decimal("9.50"), "city": None, "n": float("nan")}
    calls = [{"function": {"name": "book", "arguments": made}}]
    table = pa.table(
        {
            "messages": pa.array([[[("role", "user"), ("content", "book it")]]], pa.list_(turn)),
            "chosen": pa.array(
                [[{"role": "assistant", "content": None, "tool_calls": calls}]],
                pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(call))])),
            ),
        }
    )
    pq.write_table(table, tmp_path / "table.parquet")
    ((_, record),) = rows(tmp_path / "table.parquet")
    first, second = parse_record(record).messages
    assert (first.role, first.content) == ("user", "book it")
    expected = {"name": "book", "arguments": {"day": "2024-05-01T00:00:00", "price": 9.5}}
    assert second.extra == {"tool_calls": [{"function": expected}]}


def test_a_list_needs_the_memory_of_its_values_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1 << 10)
    path = tmp_path / "long.json"
    path.write_text(json.dumps([{"text": "x" * 100}] * 1000))
    stream = path.open("rb")
    with stream:
        items = readers._list_items(b"", stream, path)
        next(items)
        assert stream.tell() <= 3 << 10


@pytest.mark.parametrize("place", ["lines", "list"])
def test_a_bad_row_is_skipped_alone(place: str, tmp_path: Path):
    path = write_jsonl(tmp_path / "some.jsonl", RECORDS[:3])
    broken = path.read_text().replace('"id": 1', '"id": nope')
    path.write_text(broken if place == "lines" else f"[{broken.strip().replace(chr(10), ',')}]")
    loads = [load for _, _, load in rows_of_places([str(path)], lambda name: True, HubPart())]
    assert [loads[0](), loads[2]()] == [RECORDS[0], RECORDS[2]]
    with pytest.raises(PromptError, match="not JSON"):
        loads[1]()
