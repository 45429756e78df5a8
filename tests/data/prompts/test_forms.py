"""Forms of a record: a new form is one function, whose keys are read from every kind of place."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.extracting import tokens
from support.tiny import EXTRACT, run_vpd, vpd, write_jsonl
from vpd.data.errors import ConfigError, PromptError
from vpd.data.prompts.forms import RECORD_FORMS, Content, parse_record, record_form
from vpd.data.prompts.messages import Message, require_string

RECORDS = [{"riddle": f"what is {i}?", "hint": "a fox", "score": i} for i in range(3)]


@pytest.fixture
def riddle_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """A form that the package does not know, for the time of a test."""
    monkeypatch.setattr(RECORD_FORMS, "_entries", {**RECORD_FORMS})

    @record_form("riddle", "hint")
    def parse_riddle(record: Mapping[str, Any]) -> Content:
        hint = require_string(record.get("hint", "no hint"), "hint")
        return Content((Message("system", hint), Message("user", require_string(record["riddle"], "riddle"))))


def write_places(folder: Path, records: list[dict[str, Any]]) -> dict[str, str]:
    """The same records as lines, as a table, and as a data set."""
    (folder / "hub").mkdir()
    lines = write_jsonl(folder / "records.jsonl", records)
    for table in (folder / "records.parquet", folder / "hub" / "records.parquet"):
        pq.write_table(pa.Table.from_pylist(records), table)
    return {"lines": str(lines), "table": str(folder / "records.parquet"), "hub": f"hf://{folder / 'hub'}"}


@pytest.mark.usefixtures("riddle_form")
@pytest.mark.parametrize("place", ["lines", "table", "hub"])
def test_a_registered_form_is_extracted_from_every_place(place: str, tiny_llama: Path, tmp_path: Path):
    known = [
        {"messages": [{"role": "system", "content": "a fox"}, {"role": "user", "content": record["riddle"]}]}
        for record in RECORDS
    ]
    short = EXTRACT | {"max_new_tokens": 3}
    for name, source in (("found", write_places(tmp_path, RECORDS)[place]), ("expected", tmp_path / "known.jsonl")):
        write_jsonl(tmp_path / "known.jsonl", known)
        vpd("extract", tiny_llama, source, "--out", tmp_path / name, **short)
    assert tokens(tmp_path / "found") == tokens(tmp_path / "expected")
    assert len(tokens(tmp_path / "found")) == len(RECORDS)


@pytest.mark.usefixtures("riddle_form")
@pytest.mark.parametrize("place", ["lines", "table"])
def test_the_keys_of_a_registered_form_can_be_renamed(place: str, tiny_llama: Path, tmp_path: Path):
    renamed = [{"ask": record["riddle"], "help": record["hint"], "riddle": 7} for record in RECORDS]
    source = write_places(tmp_path, renamed)[place]
    found = vpd(
        *("extract", tiny_llama, source, "--out", tmp_path / "found", "--set"),
        "extract.columns={riddle: ask, hint: help}",
        **EXTRACT | {"max_new_tokens": 3},
    )
    assert found["num_written"] == len(RECORDS)


@pytest.mark.usefixtures("riddle_form")
def test_messages_name_the_registered_form(tmp_path: Path, tiny_llama: Path):
    with pytest.raises(PromptError, match=r"expected one of messages, .*, turns, .*, text, riddle"):
        parse_record({"ridle": "why?"})
    prompts = write_jsonl(tmp_path / "bad.jsonl", [{"riddle": 3}])
    outcome = run_vpd("extract", tiny_llama, prompts, "--out", tmp_path / "cache", **EXTRACT)
    assert outcome.message == f"{prompts}:1: riddle must be a string, found int '3'"


def test_a_main_key_belongs_to_one_form():
    with pytest.raises(ConfigError, match="expected a new name for a record form, found prompt"):
        record_form("prompt")(lambda record: Content(text="x"))


def test_each_form_is_described_and_reads_its_main_key():
    for key, form in RECORD_FORMS.items():
        assert form.keys[0] == key
        assert form.parse.__doc__ is not None
        assert f'{{"{key}": ' in form.parse.__doc__


def test_the_forms_are_known_without_heavy_packages():
    code = "import json, sys, vpd.data.prompts.forms; print(json.dumps([*sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "pyarrow", "numpy", "transformers", "zarr", "datasets"} & {*json.loads(done.stdout)}
