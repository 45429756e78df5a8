"""Prompt files: every form, every error with its place, and ids that depend on content alone."""

import gzip
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.prompts import read_prompts
from vpd.data.errors import PromptError
from vpd.data.prompts.messages import Message
from vpd.data.prompts.reading import Reading
from vpd.data.prompts.records import PromptRecord

HELLO = {"text": "hello"}
UNPAIRED = json.loads('"\\ud83d"')


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def contents(path: Path) -> list[tuple[tuple[tuple[str, str], ...], str | None]]:
    return [(tuple((m.role, m.content) for m in r.messages), r.text) for r in read_prompts([path]).records]


FORMS = [
    pytest.param(
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
        (("system", "s"), ("user", "u")),
        None,
        id="messages",
    ),
    pytest.param(
        {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
        (("user", "u"), ("assistant", "a")),
        None,
        id="conversations-from-value",
    ),
    pytest.param(
        {"conversations": [{"role": "user", "content": "u"}, {"role": "bot", "content": "a"}]},
        (("user", "u"), ("assistant", "a")),
        None,
        id="conversations-role-content",
    ),
    pytest.param(
        {"conversations": [{"from": name, "value": "x"} for name in ("model", "observation", "function")]},
        (("assistant", "x"), ("tool", "x"), ("tool", "x")),
        None,
        id="conversations-other-names",
    ),
    pytest.param({"turns": ["one", "two"]}, (("user", "one"), ("user", "two")), None, id="turns"),
    pytest.param({"prompt": "u"}, (("user", "u"),), None, id="prompt"),
    pytest.param({"prompt": "u", "response": None}, (("user", "u"),), None, id="prompt-null-response"),
    pytest.param({"prompt": "u", "response": "a"}, (("user", "u"), ("assistant", "a")), None, id="prompt-response"),
    pytest.param(
        {"prompt": [{"role": "user", "content": "u"}], "response": "a"},
        (("user", "u"), ("assistant", "a")),
        None,
        id="prompt-list",
    ),
    pytest.param({"text": "plain"}, (), "plain", id="text"),
    pytest.param({"messages": None, "text": "plain", "id": 3}, (), "plain", id="null-is-absent"),
    pytest.param({"text": "u", "turns": ["u"], "prompt": "u"}, (("user", "u"),), None, id="first-form-wins"),
]


@pytest.mark.parametrize(("record", "messages", "text"), FORMS)
def test_each_form_reads_alike_from_json_gzip_and_parquet(tmp_path, record, messages, text):
    plain = write_jsonl(tmp_path / "a.jsonl", record)
    zipped = tmp_path / "a.jsonl.gz"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    table = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([record]), table)
    for path in (plain, zipped, table):
        assert contents(path) == [(messages, text)], path.name


def test_the_bytes_decide_not_the_name(tmp_path):
    zipped = tmp_path / "zipped.json"
    zipped.write_bytes(gzip.compress(json.dumps(HELLO).encode()))
    table = tmp_path / "table.data"
    pq.write_table(pa.Table.from_pylist([HELLO]), table)
    for name in ("plain.jsonl.gz", "plain.parquet", "plain.zst"):
        assert contents(write_jsonl(tmp_path / name, HELLO)) == [((), "hello")]
    assert contents(zipped) == contents(table) == [((), "hello")]


def test_parquet_ignores_null_columns_and_columns_of_no_form(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [
        {"messages": [{"role": "user", "content": "u", "name": None}], "text": None, "score": 1},
        {"messages": None, "text": "plain", "score": 2},
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert contents(path) == [((("user", "u"),), None), ((), "plain")]
    assert [r.row for r in read_prompts([path]).records] == [1, 2]


def test_rows_are_line_numbers_and_blank_lines_do_not_count_as_records(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"text": "a\u2028b"}\r\n\n  \t\n{"text": "c"}'.encode())
    records = read_prompts([str(path)]).records
    assert [(r.source, r.row, r.text) for r in records] == [(str(path), 1, "a\u2028b"), (str(path), 4, "c")]


BAD = [
    pytest.param("{broken", ["not JSON", "one JSON object per line"], id="not-json"),
    pytest.param("[" * 100_000, ["not JSON"], id="nested-too-deep"),
    pytest.param("[1]", ["one JSON object", "list"], id="not-an-object"),
    pytest.param({"score": "q", "id": 1}, ["score", "id", "messages", "turns", "text"], id="no-form"),
    pytest.param({"messages": []}, ["messages", "empty"], id="empty-messages"),
    pytest.param({"turns": []}, ["turns", "empty"], id="empty-turns"),
    pytest.param({"messages": "hi"}, ["messages must be a list", "str 'hi'"], id="messages-not-a-list"),
    pytest.param({"messages": ["hi"]}, ["messages[0] must be an object"], id="message-not-an-object"),
    pytest.param(
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": 3}]},
        ["messages[1].content must be a string", "int"],
        id="content-not-a-string",
    ),
    pytest.param({"messages": [{"role": "user"}]}, ["messages[0].content", "nothing"], id="content-missing"),
    pytest.param(
        {"messages": [{"role": "wizard", "content": "u"}]},
        ["messages[0].role", "wizard", "assistant"],
        id="role-unknown",
    ),
    pytest.param({"messages": [{"content": "u"}]}, ["messages[0].role", "None"], id="role-missing"),
    pytest.param({"conversations": [{"from": "alice", "value": "u"}]}, ["conversations[0].from", "alice"], id="from"),
    pytest.param({"turns": ["a", None]}, ["turns[1] must be a string"], id="turn-not-a-string"),
    pytest.param({"prompt": 1}, ["prompt must be a string or a list of messages"], id="prompt-type"),
    pytest.param({"prompt": "u", "response": ["a"]}, ["response must be a string"], id="response-type"),
    pytest.param({"text": {"a": 1}}, ["text must be a string", "dict"], id="text-type"),
    pytest.param({"text": UNPAIRED}, ["text", "surrogate"], id="half-surrogate"),
    pytest.param(
        {"messages": [{"role": "assistant", "content": "a", "reasoning_content": UNPAIRED}]},
        ["messages[0].reasoning_content", "surrogate"],
        id="half-surrogate-in-reasoning",
    ),
    pytest.param(
        {"prompt": [{"role": "assistant", "tool_calls": [{"function": {"arguments": {"city": ["", UNPAIRED]}}}]}]},
        ["prompt[0].tool_calls[0].function.arguments.city[1]", "surrogate"],
        id="half-surrogate-in-tool-calls",
    ),
    pytest.param(
        {"prompt": "u", "tools": [{"name": "add"}, {"name": "sub", UNPAIRED: 1}]},
        ["a key of tools[1]", "surrogate"],
        id="half-surrogate-in-a-key-of-tools",
    ),
    pytest.param(
        {"prompt": "u", "tools": json.dumps([{"name": UNPAIRED}])},
        ["tools[0].name", "surrogate"],
        id="half-surrogate-in-tools-as-text",
    ),
    pytest.param({"prompt": "u", "tools": "[" * 100_000}, ["tools must be a list"], id="tools-nested-too-deep"),
]


@pytest.mark.parametrize(("bad", "words"), BAD)
def test_a_bad_record_names_its_file_and_line_and_can_be_skipped(tmp_path, bad, words):
    path = tmp_path / "bad.jsonl"
    line = bad if isinstance(bad, str) else json.dumps(bad)
    path.write_text(f'{json.dumps(HELLO)}\n\n{line}\n{{"text": "bye"}}\n')
    with pytest.raises(PromptError) as caught:
        read_prompts([path])
    assert str(caught.value).startswith(f"{path}:3: ")
    for word in words:
        assert word in str(caught.value)
    kept = read_prompts([path], skip_bad=True)
    assert [r.text for r in kept.records] == ["hello", "bye"]
    assert kept.num_skipped == 1


def test_a_line_that_is_not_utf8_is_a_bad_record(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(PromptError, match=r"latin\.jsonl:1: not JSON"):
        read_prompts([path])


def test_a_bad_parquet_row_names_its_row(tmp_path):
    path = tmp_path / "bad.parquet"
    pq.write_table(pa.table({"turns": [["u"], []]}), path)
    with pytest.raises(PromptError, match=r"bad\.parquet:2: turns must not be an empty list"):
        read_prompts([path])


def parquet_bytes(**columns: list[object]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


TABLE = parquet_bytes(text=["hello " * 50])
BAD_FILES = [
    pytest.param("a.jsonl", b"", "no prompts in", id="empty"),
    pytest.param("a.jsonl", b"\n \n", "no prompts in", id="blank"),
    pytest.param("a.jsonl.gz", gzip.compress(b""), "no prompts in", id="empty-gzip"),
    pytest.param("a.parquet", parquet_bytes(text=[]), "no prompts in", id="parquet-without-rows"),
    pytest.param("a.jsonl", b"version https://git-lfs", "pointer of Git LFS", id="pointer"),
    pytest.param("a.csv", b"prompt,response\nx,y\n", "begins with .*prompt,response", id="csv"),
    pytest.param("a.tar", b"a.jsonl" + bytes(500) + b'{"text": "hello"}\n' * 3, "begins with .*a.jsonl", id="tar"),
    pytest.param("a.jsonl", '{"text": "hello"}\n'.encode("utf-16-le"), "UTF-16", id="utf-16-without-mark"),
    pytest.param("a.jsonl", b"{}\n[]\n", "no prompts in .*2 bad records", id="nothing-remains"),
    pytest.param("a.jsonl.gz", gzip.compress(b'{"text": "hello"}')[:-9], "can't be read", id="cut-gzip"),
    pytest.param("a.parquet", TABLE[:-20], "can't be read", id="cut-parquet"),
    pytest.param("a.parquet", TABLE[:4] + bytes(40) + TABLE[44:], "can't be read", id="damaged-parquet"),
    pytest.param("a.parquet", parquet_bytes(score=["q"]), r"columns \['score'\]", id="parquet-no-form"),
]


@pytest.mark.parametrize(("name", "data", "message"), BAD_FILES)
def test_a_file_that_gives_no_record_raises_even_when_bad_records_are_skipped(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(PromptError, match=message) as caught:
        read_prompts([path], skip_bad=True)
    assert str(path) in str(caught.value)


def test_an_empty_file_beside_a_good_one_raises(tmp_path):
    good, empty = write_jsonl(tmp_path / "good.jsonl", HELLO), write_jsonl(tmp_path / "empty.jsonl")
    with pytest.raises(PromptError, match=r"no prompts in .*empty\.jsonl"):
        read_prompts([good, empty])


@pytest.mark.parametrize("name", ["missing.jsonl", "."], ids=["missing", "folder"])
def test_a_missing_file_raises_before_anything_is_read(tmp_path, name):
    good = write_jsonl(tmp_path / "good.jsonl", HELLO)
    with pytest.raises(PromptError, match=re.escape(str(tmp_path / name))):
        read_prompts([good, tmp_path / name], skip_bad=True, limit=1)


def test_no_file_at_all_raises():
    with pytest.raises(PromptError, match="no prompts in an empty list"):
        read_prompts([])


def test_repetitions_get_ids_of_their_own(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", HELLO, {"text": "bye"}, HELLO, HELLO)
    first, other, second, third = read_prompts([path]).records
    assert first.seq_id == first.content_hash == third.content_hash
    assert (second.seq_id, third.seq_id) == (f"{first.seq_id}-1", f"{first.seq_id}-2")
    assert other.content_hash != first.content_hash


def test_the_content_hash_is_that_of_canonical_json():
    record = PromptRecord("id", "file", 1, (Message("user", "h\u00e9"),), None)
    expected = hashlib.sha256(b'[[["user","h\\u00e9"]],null]').hexdigest()[:16]
    assert record.content_hash == expected


def test_the_same_content_has_one_hash_in_every_form(tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl",
        {"messages": [{"role": "user", "content": "u"}]},
        {"conversations": [{"from": "human", "value": "u"}]},
        {"turns": ["u"]},
        {"prompt": "u"},
        {"text": "u"},
    )
    hashes = [r.content_hash for r in read_prompts([path]).records]
    assert len(set(hashes[:4])) == 1
    assert hashes[4] != hashes[0]


def test_the_fingerprint_is_that_of_the_rows_and_their_choice(tmp_path):
    texts = [f"text {i}" for i in range(9)]

    def fingerprint(name: str, chosen: list[str], **settings: Any) -> str:
        path = write_jsonl(tmp_path / name, *({"text": text} for text in chosen))
        return read_prompts([path], unit_rows=4, **settings).fingerprint

    first = fingerprint("a.jsonl", texts)
    assert fingerprint("b.jsonl", texts) == first
    others = [
        fingerprint("c.jsonl", [*texts, texts[0]]),
        fingerprint("d.jsonl", [*texts[:5], "text X", *texts[6:]]),
        fingerprint("e.jsonl", texts[::-1]),
        *(fingerprint("a.jsonl", texts, limit=limit) for limit in (3, 4, 8)),
        *(fingerprint("a.jsonl", texts, shuffle_seed=seed) for seed in (0, 1)),
        fingerprint("a.jsonl", texts, reading=Reading(columns={"prompt": "question"})),
        fingerprint("a.jsonl", texts, keep_duplicates=False),
    ]
    assert len({first, *others}) == len(others) + 1


@pytest.mark.parametrize("limit", [1, 2, 3, 9])
def test_the_limit_counts_the_rows_of_all_files(tmp_path, limit):
    one = write_jsonl(tmp_path / "one.jsonl", {"text": "a"}, {"bad": 1}, {"text": "b"})
    two = write_jsonl(tmp_path / "two.jsonl", {"text": "c"}, {"text": "d"})
    kept = read_prompts([one, two], skip_bad=True, limit=limit)
    assert [r.text for r in kept.records] == [text for text in ["a", None, "b", "c", "d"][:limit] if text]
    assert kept.num_skipped == (limit > 1)


def test_a_limit_below_one_is_refused(tmp_path):
    with pytest.raises(PromptError, match="limit must be at least 1, got 0"):
        read_prompts([write_jsonl(tmp_path / "a.jsonl", HELLO)], limit=0)
