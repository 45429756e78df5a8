"""Extractions that continue: present sequences are not written again, and an interruption loses no finished one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.extracting import by_row, no_engine, run, tokens
from support.prompts import read_prompts
from support.tiny import EXTRACT, PROMPTS, skipped_by_unit, snapshot, vpd, write_jsonl
from vpd.data.cache.cache import Cache
from vpd.data.cache.maintenance.quarantine import LISTS, read_quarantined
from vpd.data.errors import ExtractionError
from vpd.stages.extract.engine import ABORTED, Completion, Engine, EngineRequest


class WrappedEngine:
    """The real engine; a subclass changes its completions."""

    def __init__(self, engine: Engine):
        self.engine, self.facts, self.closed = engine, engine.facts, False
        self.num_completions = 0

    @property
    def num_in_flight(self) -> int:
        return self.engine.num_in_flight

    def submit(self, request: EngineRequest) -> None:
        self.engine.submit(request)

    def poll(self) -> list[Completion]:
        completions = self.engine.poll()
        self.num_completions += len(completions)
        return [self.change(completion) for completion in completions]

    def change(self, completion: Completion) -> Completion:
        return completion

    def close(self) -> None:
        self.closed = True
        self.engine.close()


class FailingEngine(WrappedEngine):
    def __init__(self, engine: Engine, error: BaseException, num_good: int):
        super().__init__(engine)
        self.error, self.num_good = error, num_good

    def change(self, completion: Completion) -> Completion:
        if self.num_completions > self.num_good:
            raise self.error
        return completion


class BrokenStates(WrappedEngine):
    """Non-finite states for the first `num_bad` sequences."""

    def __init__(self, engine: Engine, num_bad: int, value: float):
        super().__init__(engine)
        self.num_bad, self.value = num_bad, value

    def change(self, completion: Completion) -> Completion:
        if completion.hidden_TKH is None or self.num_completions > self.num_bad:
            return completion
        hidden_TKH = completion.hidden_TKH.clone()
        hidden_TKH[-1, 0, 3] = self.value
        return replace(completion, hidden_TKH=hidden_TKH)


class GivingUp(WrappedEngine):
    """An engine that gives up all but the first `num_good` requests half-way, as vLLM does when a signal ends it."""

    def __init__(self, engine: Engine, num_good: int):
        super().__init__(engine)
        self.num_good = num_good

    def change(self, completion: Completion) -> Completion:
        if self.num_completions <= self.num_good:
            return completion
        nothing: dict[str, Any] = {"output_ids": [], "hidden_TKH": None, "argmax_T": None}
        return replace(completion, finish_reason=ABORTED, fault="given up", **nothing)


def test_a_second_run_writes_nothing_and_starts_no_engine(undisturbed: Path, tiny_llama: Path, tiny_prompts: Path):
    before = snapshot(undisturbed)
    report = run(tiny_llama, tiny_prompts, undisturbed, wrap=no_engine, **SHORT)
    assert (report.num_present, report.num_written, report.num_tokens) == (len(PROMPTS), 0, 0)
    assert snapshot(undisturbed) == before


def test_the_command_repeated_writes_nothing(tiny_cache: Path, tiny_llama: Path, tiny_prompts: Path):
    before = snapshot(tiny_cache)
    result = vpd("extract", tiny_llama, tiny_prompts, "--out", tiny_cache, **EXTRACT)
    assert (result["num_present"], result["num_written"]) == (len(PROMPTS), 0)
    assert result["num_sequences"] == len(PROMPTS)
    assert snapshot(tiny_cache) == before


def test_the_order_of_the_records_does_not_matter_to_a_run_that_goes_on(tiny_llama: Path, tmp_path: Path):
    run(tiny_llama, write_jsonl(tmp_path / "one.jsonl", PROMPTS[:4]), tmp_path / "cache", max_new_tokens=4)
    other = write_jsonl(tmp_path / "other.jsonl", PROMPTS[3::-1])
    assert run(tiny_llama, other, tmp_path / "cache", wrap=no_engine, max_new_tokens=4).num_present == 4


def test_other_prompts_are_added_to_what_is_there(tiny_llama: Path, tmp_path: Path):
    # One record is in both files.
    files = [write_jsonl(tmp_path / f"{i}.jsonl", PROMPTS[2 * i : 2 * i + 3]) for i in range(2)]
    run(tiny_llama, files[0], tmp_path / "cache", max_new_tokens=4)
    before, fingerprint = tokens(tmp_path / "cache"), Cache.open(tmp_path / "cache").fingerprint
    report = run(tiny_llama, files[1], tmp_path / "cache", max_new_tokens=4)
    assert (report.num_present, report.num_written) == (1, 2)
    after = tokens(tmp_path / "cache")
    assert before.items() <= after.items()
    assert len(after) == 5
    assert Cache.open(tmp_path / "cache").fingerprint != fingerprint
    assert run(tiny_llama, files[0], tmp_path / "cache", wrap=no_engine, max_new_tokens=4).num_present == 3


SHORT: dict[str, Any] = {"max_new_tokens": 6, "machinery": {"max_in_flight": 1}}
SHORT_UNITS: dict[str, Any] = {"max_new_tokens": 6, "machinery": {"max_in_flight": 1, "unit_records": 3}}


@pytest.fixture(scope="module")
def undisturbed(tiny_llama: Path, tiny_prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "cache"
    run(tiny_llama, tiny_prompts, folder, **SHORT)
    return folder


@pytest.mark.parametrize(
    ("error", "num_good"), [(KeyboardInterrupt(), 5), (ExtractionError("lost"), 1), (RuntimeError("bug"), 0)], ids=repr
)
def test_an_interrupted_run_keeps_what_was_finished_and_then_ends_as_an_undisturbed_one(
    error: BaseException, num_good: int, undisturbed: Path, tiny_llama: Path, tiny_prompts: Path, tmp_path: Path
):
    engines: list[FailingEngine] = []

    def wrap(engine: Engine) -> Engine:
        engines.append(FailingEngine(engine, error, num_good))
        return engines[-1]

    with pytest.raises(type(error)):
        run(tiny_llama, tiny_prompts, tmp_path / "cache", wrap, **SHORT)
    assert engines[0].closed
    assert sorted(by_row(tmp_path / "cache")) == list(range(1, num_good + 1))
    report = run(tiny_llama, tiny_prompts, tmp_path / "cache", **SHORT)
    assert (report.num_present, report.num_written) == (num_good, len(PROMPTS) - num_good)
    assert tokens(tmp_path / "cache") == tokens(undisturbed)


def test_what_the_engine_gave_up_is_left_and_then_made(
    undisturbed: Path, tiny_llama: Path, tiny_prompts: Path, tmp_path: Path
):
    cache = tmp_path / "cache"
    report = run(tiny_llama, tiny_prompts, cache, lambda engine: GivingUp(engine, 5), **SHORT_UNITS)
    assert (report.num_written, report.num_left, report.skipped) == (5, len(PROMPTS) - 5, {})
    storage = Cache.open(cache).storage
    assert list(read_quarantined(storage)) == []
    assert [*skipped_by_unit(storage).values()] == [{}]  # two records of the second unit are left
    report = run(tiny_llama, tiny_prompts, cache, **SHORT_UNITS)
    assert (report.num_present, report.num_written, report.num_left) == (5, len(PROMPTS) - 5, 0)
    assert tokens(cache) == tokens(undisturbed)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_states_that_are_not_finite_go_to_quarantine_and_are_tried_again(
    value: float, tiny_llama: Path, four_prompts: Path, tmp_path: Path
):
    cache = tmp_path / "cache"
    report = run(tiny_llama, four_prompts, cache, lambda engine: BrokenStates(engine, 2, value), max_new_tokens=6)
    assert (report.num_written, report.skipped) == (2, {"states that are not finite": 2})
    assert sorted(by_row(cache)) == [3, 4]
    entries = sorted(read_quarantined(Cache.open(cache).storage), key=lambda entry: entry["row"])
    records = read_prompts([four_prompts]).records[:2]
    assert entries == [
        {"seq_id": r.seq_id, "source": r.source, "row": r.row, "reason": "states that are not finite"} for r in records
    ]
    assert run(tiny_llama, four_prompts, cache, max_new_tokens=6).num_written == 2
    assert sorted(by_row(cache)) == [1, 2, 3, 4]


def test_too_many_sequences_in_quarantine_stop_the_run(tiny_llama: Path, tiny_prompts: Path, tmp_path: Path):
    with pytest.raises(ExtractionError) as caught:
        run(tiny_llama, tiny_prompts, tmp_path / "cache", lambda engine: BrokenStates(engine, 100, float("nan")))
    for word in ("4 of 4 sequences", "not finite", LISTS, "dtype"):
        assert word in str(caught.value)
