"""Outcomes are written and committed before their unit counts as finished, or reported with a reason."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import make_manifest, make_sequence, skipped_by_unit
from test_units import make_units, prepared
from vpd.data.cache.cache import Cache
from vpd.data.cache.maintenance.quarantine import read_quarantined
from vpd.data.cache.writer import StateWriter
from vpd.data.errors import ExtractionError, StorageError
from vpd.data.prompts.records import PromptRecord
from vpd.stages.extract.conversations import FinishedSequence
from vpd.stages.extract.sink import ExtractReport, Outcome, Sink, find_fault
from vpd.stages.extract.units import WorkBoard

NEVER, SOON = 60.0, 5.0
IDS = [f"id-{i}" for i in range(6)]
UNITS = make_units(IDS, 2, IDS)
ENDLESS, TINY = 1 << 30, 1
"""Bytes of a part that never gets full, and of a part that holds one sequence."""


def make_record(seq_id: str) -> PromptRecord:
    return PromptRecord(seq_id=seq_id, source="a.jsonl", row=1, messages=(), text=seq_id)


def finished(seq_id: str, **changes: Any) -> FinishedSequence:
    made = make_sequence(seq_id, 10, 2, 8)
    for name in ("seq_id", "source", "source_row"):
        del made[name]
    counts: dict[str, Any] = {"num_checked": 5, "num_argmax_differing": 1}
    return replace(FinishedSequence(record=make_record(seq_id), **made, **counts), **changes)


@dataclass
class Scene:
    """A sink on a real cache, with all that a test checks."""

    cache: Cache
    sink: Sink
    writer: StateWriter
    report: ExtractReport

    def put(self, *numbers: int, **changes: Any) -> None:
        for number in numbers:
            sequence = finished(IDS[number], **changes)
            self.sink.put(Outcome(UNITS[number // 2].unit_id, sequence.record, sequence))

    def put_reason(self, number: int, reason: str, is_fault: bool) -> None:
        record = make_record(IDS[number])
        self.sink.put(Outcome(UNITS[number // 2].unit_id, record, reason=reason, is_fault=is_fault))

    def settle(self) -> None:
        """Waits until the thread has processed all outcomes."""
        over = threading.Event()
        self.sink._queue.put(over.set)
        assert over.wait(SOON)

    @property
    def committed(self) -> list[str]:
        return sorted(Cache.open(self.cache.storage, allow_empty=True).rows.strings("seq_id"))

    @property
    def done(self) -> list[int]:
        finished = skipped_by_unit(self.cache.storage)
        return [number for number, unit in enumerate(UNITS) if unit.unit_id in finished]


Make = Callable[..., Scene]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    cache = Cache.create_or_open(tmp_path / "cache", make_manifest())
    with closing(WorkBoard(cache.storage, UNITS, {}, NEVER)) as board:

        def make(part_bytes: int = ENDLESS, max_quarantined: float = 0.0) -> Scene:
            report, writer = ExtractReport(), StateWriter(cache, part_bytes, {})
            sink = Sink(writer, board, report, max_quarantined, lambda num_tokens: None)
            for unit in iter(board.claim, None):
                sink.expect(prepared(unit))
            return Scene(cache, sink, writer, report)

        yield make


def test_a_unit_is_finished_once_all_of_it_is_committed(make: Make):
    scene = make()
    scene.put(0, 1, 2)
    scene.settle()
    assert (scene.committed, scene.done) == ([], [])
    scene.sink.commit()
    scene.settle()
    assert (scene.committed, scene.done) == (IDS[:3], [0])
    scene.put(3)
    scene.sink.close()
    assert (scene.committed, scene.done) == (IDS[:4], [0, 1])
    assert (scene.report.num_written, scene.report.num_tokens) == (4, 40)
    assert (scene.report.num_checked, scene.report.num_argmax_differing) == (20, 4)
    assert scene.report.written_ids == IDS[:4]


def test_a_full_part_finishes_the_units_in_it(make: Make):
    scene = make(TINY)
    scene.put(0, 2, 1)
    scene.settle()
    assert (scene.committed, scene.done) == (IDS[:3], [0])
    scene.sink.close()


def test_reasons_of_the_record_are_noted_with_the_unit_and_faults_of_the_engine_are_not(make: Make):
    scene = make()
    scene.put_reason(0, "too long", is_fault=False)
    scene.put_reason(1, "lost", is_fault=True)
    scene.put(2, prompt_len=10)
    scene.put(3)
    scene.sink.close()
    assert skipped_by_unit(scene.cache.storage) == {
        UNITS[0].unit_id: {"id-0": "too long"},
        UNITS[1].unit_id: {"id-2": "empty response"},
    }
    assert scene.report.skipped == {"too long": 1, "lost": 1, "empty response": 1}
    assert read_quarantined(scene.cache.storage) == [
        {"seq_id": "id-1", "source": "a.jsonl", "row": 1, "reason": "lost"}
    ]


def test_more_faults_than_a_share_end_the_run_and_keep_what_is_written(make: Make):
    scene = make(max_quarantined=0.5)
    scene.put(0)
    for number in (1, 2, 3, 4):
        scene.put_reason(number, "lost", is_fault=True)
    with pytest.raises(ExtractionError, match="4 of 5 sequences"):
        scene.sink.close()
    assert scene.committed == ["id-0"]


@pytest.mark.parametrize("fails", ["append", "commit"])
def test_what_ends_the_thread_reaches_who_puts(fails: str, make: Make, monkeypatch: pytest.MonkeyPatch):
    scene = make()
    scene.put(0, 1)
    scene.settle()
    part = scene.writer._part
    assert part is not None

    def full(*arguments: Any) -> None:
        part.abandon()
        raise StorageError("the disk is full")

    monkeypatch.setattr(part, fails, full)
    scene.put(2)
    scene.sink.commit()
    for _ in range(500):
        if scene.sink._error is None:
            time.sleep(0.01)
    for again in (scene.sink.check, lambda: scene.put(3)):
        with pytest.raises(StorageError, match="the disk is full"):
            again()
    with pytest.raises(StorageError, match="the disk is full"):
        scene.sink.close()
    # The part is gone, and the first unit's sequences with it.
    assert (scene.committed, scene.done) == ([], [])


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, ("", False)),
        ({"prompt_len": 10}, ("empty response", False)),
        ({"hidden_TKH": torch.zeros(9, 2, 8)}, ("states of another length", True)),
        ({"target_argmax": [1] * 11}, ("states of another length", True)),
        ({"hidden_TKH": torch.full((10, 2, 8), torch.nan)}, ("states that are not finite", True)),
        ({"loss_mask": [0] * 10}, ("nothing but thinking", False)),
    ],
)
def test_find_fault(changes: dict[str, Any], found: tuple[str, bool]):
    assert find_fault(finished("id-0", **changes)) == found


@pytest.mark.parametrize(
    ("num_checked", "num_differing", "trusted"),
    [(100, 100, False), (100, 51, False), (100, 50, True), (20, 11, False), (19, 19, True), (0, 0, True)],
)
def test_states_that_do_not_lead_to_the_choices_are_an_error(num_checked: int, num_differing: int, trusted: bool):
    report = ExtractReport(num_checked=num_checked, num_argmax_differing=num_differing)
    if trusted:
        report.require_confirmed()
    else:
        with pytest.raises(ExtractionError, match=f"of {num_checked} greedy.*confirm {num_checked - num_differing}:"):
            report.require_confirmed()
