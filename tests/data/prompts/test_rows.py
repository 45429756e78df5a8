"""Where prompts come from: patterns, data sets, other names of columns; which records are taken."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.prompts import read_prompts
from support.tiny import write_jsonl
from vpd.data.errors import ConfigError, PromptError
from vpd.data.prompts.reading import Reading
from vpd.data.prompts.rows import HubPart

TEXTS = [f"text {i}" for i in range(40)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files of ten records each, and a file of twenty records in a folder below."""
    (tmp_path / "more").mkdir()
    for name, texts in (("a.jsonl", TEXTS[:10]), ("b.jsonl", TEXTS[10:20]), ("more/c.jsonl", TEXTS[20:])):
        write_jsonl(tmp_path / name, [{"text": text} for text in texts])
    return tmp_path


def texts(places: list[str], **settings: object) -> list[str | None]:
    return [record.text for record in read_prompts(places, **settings).records]  # pyright: ignore[reportArgumentType]


def test_a_pattern_stands_for_its_files_in_order(folder: Path):
    assert texts([f"{folder}/*.jsonl"]) == TEXTS[:20]
    assert sorted(texts([f"{folder}/**/*.jsonl"]), key=str) == sorted(TEXTS)
    sources = {record.source for record in read_prompts([f"{folder}/?.jsonl"]).records}
    assert sources == {f"{folder}/a.jsonl", f"{folder}/b.jsonl"}


def test_a_file_may_be_called_like_a_pattern(folder: Path):
    write_jsonl(folder / "[ab].jsonl", [{"text": "itself"}])
    assert texts([f"{folder}/[ab].jsonl"]) == ["itself"]


def test_a_pattern_that_fits_nothing_is_an_error(folder: Path):
    with pytest.raises(PromptError, match=re.escape(f"no file fits {folder}/*.json;")):
        read_prompts([f"{folder}/*.json"])


def test_a_seed_draws_the_same_rows_whatever_file_they_are_in(folder: Path, tmp_path: Path):
    places = [f"{folder}/[ab].jsonl", f"{folder}/more/c.jsonl"]
    whole = texts(places, shuffle_seed=3)
    assert sorted(whole, key=str) == sorted(TEXTS) != whole
    assert texts(places, shuffle_seed=3, limit=7) == whole[:7]
    assert texts(places, shuffle_seed=4) != whole
    other = write_jsonl(tmp_path / "one.jsonl", [{"text": text} for text in TEXTS])
    assert texts([str(other)], shuffle_seed=3, limit=7, unit_rows=2) == whole[:7]


def test_repeated_contents_are_left_out_and_counted(folder: Path):
    again = write_jsonl(folder / "again.jsonl", [{"text": TEXTS[3]}, {"text": "new"}, {"text": "new"}])
    found = read_prompts([f"{folder}/a.jsonl", again], keep_duplicates=False)
    assert [record.text for record in found.records] == [*TEXTS[:10], "new"]
    assert found.num_duplicates == 2


@pytest.mark.parametrize("form", ["parquet", "jsonl", "hub"])
def test_columns_may_have_other_names(form: str, tmp_path: Path):
    records = [
        {"question": "why?", "answer": "so", "text": "not this"},
        {"question": "how?", "answer": None, "text": ""},
    ]
    places = [str(tmp_path / "data.parquet")]
    if form == "jsonl":
        places = [str(write_jsonl(tmp_path / "data.jsonl", records))]
    else:
        pq.write_table(pa.Table.from_pylist(records), tmp_path / "data.parquet")
    if form == "hub":
        pytest.importorskip("datasets")
        places = [f"hf://{tmp_path}"]
    columns = {"prompt": "question", "response": "answer", "text": "none"}
    found = [
        [m.content for m in record.messages]
        for record in read_prompts(places, reading=Reading(columns=columns)).records
    ]
    assert found == [["why?", "so"], ["how?"]]


def test_a_data_set_has_splits(tmp_path: Path):
    pytest.importorskip("datasets")
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", [{"prompt": f"{split} {i}", "other": i} for i in range(3)])
    for split in ("train", "test"):
        found = read_prompts([f"hf://{tmp_path}"], hub=HubPart(split)).records
        assert [record.messages[0].content for record in found] == [f"{split} {i}" for i in range(3)]
        assert [record.row for record in found] == [1, 2, 3]
    with pytest.raises(PromptError, match="split nowhere"):
        read_prompts([f"hf://{tmp_path}"], hub=HubPart("nowhere"))


def test_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'vpd[hub]'")):
        read_prompts(["hf://org/name"])


def test_what_templates_know_of_a_message_is_kept(tmp_path: Path):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
    tools = [{"type": "function", "function": {"name": "add"}}]
    messages = [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "easy"},
        {"role": "tool", "content": "3", "tool_call_id": "x", "name": "add"},
    ]
    path = write_jsonl(
        tmp_path / "calls.jsonl",
        [
            {"messages": messages, "tools": tools},
            {"messages": messages, "tools": json.dumps(tools)},
            {"messages": messages},
            {"messages": [{"role": "user", "content": "add", "tool_calls": None}]},
        ],
    )
    first, same, without, plain = read_prompts([path]).records
    assert first.messages[1].content == ""
    call["function"] = {"name": "add", "arguments": {"a": 1}}  # a null stands for what a record lacks
    assert first.messages[1].extra == {"tool_calls": [call], "reasoning_content": "easy"}
    assert first.messages[2].extra == {"tool_call_id": "x", "name": "add"}
    assert first.tools == tuple(tools)
    assert first.content_hash == same.content_hash != without.content_hash
    assert plain.messages[0].extra == {}


@pytest.mark.parametrize("tools", ["no list", {"a": 1}, ["x"]])
def test_tools_that_are_no_list_of_functions_are_an_error(tools: object, tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "u", "tools": tools}])
    with pytest.raises(PromptError, match=r"tools(\[0\])? must be a (list of )?function"):
        read_prompts([path])
