"""Extractions with records that can't be used: what is left out, and what runs once they are corrected; and one that a
signal to all of its processes stops."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.forks import Forks
from support.place import ANSWERED, Place, check_message
from support.tiny import END, PROMPTS, run_vpd, skipped_by_unit, vpd, write_jsonl
from support.workers import arguments, wait_until
from transformers import PreTrainedTokenizerFast
from vpd.data.cache.cache import Cache
from vpd.data.cache.drafts import list_drafts
from vpd.data.cache.maintenance.quarantine import read_quarantined
from vpd.data.cache.storage.places import open_storage
from vpd.pipeline.extraction import work_on
from vpd.stages.extract.sink import ExtractReport


def test_skip_bad_counts_what_it_leaves_out(place: Place):
    records = [PROMPTS[0], "{broken", {"riddle": "why?"}, {"prompt": "fox " * 100}, PROMPTS[1]]
    prompts = place.write(*records)
    result = vpd(*place.extract(prompts), skip_bad=True)
    assert result["skipped"] == {"unreadable record": 2, "too long": 1}
    assert (result["num_written"], result["num_sequences"]) == (2, 2)
    again = vpd(*place.extract(prompts), skip_bad=True)
    assert (again["num_written"], again["num_present"]) == (0, 2)
    assert again["skipped"] == result["skipped"]


def test_the_rules_of_reading_are_counted_by_name(place: Place):
    turns = [{"role": "assistant", "content": "hi"}, *({"role": "user", "content": f"why {i}?"} for i in range(2))]
    prompts = place.write({"messages": turns}, {"messages": turns[1:]}, {"messages": turns[:2]})
    expected = {"begins with the assistant": 2, "repeats a role": 2}
    assert vpd(*place.extract(prompts))["rules"] == expected
    assert vpd(*place.extract(prompts))["rules"] == expected
    assert run_vpd(*place.extract(prompts)).out.count(f"Rules applied to records: {expected}.") == 1


def test_skip_bad_counts_records_without_an_answer(place: Place):
    prompts = write_jsonl(place.folder / "given.jsonl", [ANSWERED, {"prompt": "why?"}])
    result = vpd(*place.extract(prompts, mode="given"), skip_bad=True)
    assert (result["num_written"], result["skipped"]) == (1, {"no assistant token": 1})


def test_the_result_for_people_says_what_was_skipped(place: Place):
    outcome = run_vpd(*place.extract(place.write(PROMPTS[0], "{broken")), skip_bad=True)
    assert outcome.code == 0
    assert "1 sequences" in outcome.out
    assert "{'unreadable record': 1}" in outcome.out


MIXED = [ANSWERED, {"text": "a fox"}]
CORRECTED = [
    pytest.param(lambda place: place.extract(place.write(*MIXED), mode="given", max_len=128), 2, id="raise-max-len"),
    pytest.param(
        lambda place: place.extract(place.write(*MIXED), mode="given", max_len=8, skip_bad=True), 1, id="skip-bad"
    ),
    pytest.param(lambda place: place.extract(place.write(MIXED[1]), mode="given", max_len=8), 1, id="change-the-file"),
]


@pytest.mark.parametrize(("corrected", "num_written"), CORRECTED)
def test_after_a_refused_extraction_the_corrected_command_runs(
    corrected: Callable[[Place], list[object]], num_written: int, place: Place
):
    refused = run_vpd(*place.extract(place.write(*MIXED), mode="given", max_len=8))
    check_message(refused, 1, ["some.jsonl, row 1:", "Raise extract.max_len", "--skip-bad"])
    assert vpd(*corrected(place))["num_written"] == num_written


def test_a_signal_as_the_last_sequence_is_written_leaves_the_first_drafts(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    def work_then_signal(*args: Any) -> ExtractReport:
        report = work_on(*args)
        os.kill(os.getpid(), signal.SIGTERM)
        return report

    command = [*place.extract(place.write(*PROMPTS[:2])), "--first-drafter", place.first_run, "--json"]
    with monkeypatch.context() as patch:
        patch.setattr("vpd.pipeline.commands.extract.work_on", work_then_signal)
        stopped = run_vpd(*command)
    assert (stopped.code, stopped.result["num_written"], stopped.result["num_left"]) == (0, 2, 0)
    assert "first drafts are left, the same command continues" in stopped.err
    assert list_drafts(open_storage(place.folder / "new")) == []
    assert run_vpd(*command).code == 0
    assert len(list_drafts(open_storage(place.folder / "new"))) == 1


@pytest.mark.engine
def test_a_signal_to_all_processes_lets_the_engine_finish_what_it_began(
    tiny_llama: Path, tiny_tokenizer: PreTrainedTokenizerFast, forks: Forks, tmp_path: Path
):
    """As Ctrl+C in a terminal, `timeout` and SLURM send it."""
    num_records, out, end = 40, tmp_path / "cache", tiny_tokenizer.get_vocab()[END]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"why {i}?"} for i in range(num_records)])
    longer = {"max_len": 400, "max_new_tokens": 200, "extract.machinery.max_in_flight": 8}
    engine_args = "{enforce_eager: true, kv_cache_memory_bytes: 268435456, max_num_seqs: 4}"
    process = forks.start(
        [*arguments(tiny_llama, prompts, out, engine="vllm", **longer), "--set", f"extract.engine_args={engine_args}"]
    )
    wait_until(lambda: any((out / "parts").glob("*")), [process])
    os.killpg(process.pid, signal.SIGTERM)
    result = process.result()
    assert 0 < result["num_left"] < num_records
    assert result["num_written"] == num_records - result["num_left"]
    assert result["skipped"] == {}
    cache = Cache.open(out)
    assert list(read_quarantined(cache.storage)) == []
    assert not any(skipped_by_unit(cache.storage).values())
    for row in cache.rows:
        answer = cache.read(row).token_ids_S[row.prompt_len :].tolist()
        assert answer.index(end) == len(answer) - 1 if row.finish_reason == "stop" else len(answer) == 200
