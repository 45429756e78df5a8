"""Progress where there is no terminal: lines in a log."""

import pytest
from vpd.pipeline import progress
from vpd.pipeline.progress import ProgressReport


class Clock:
    """A clock that tests set."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_rate_and_time_left_count_from_the_beginning_of_work(clock: Clock):
    """What starts up before that would make the first figures wrong by minutes."""
    report = ProgressReport("extract", 101, "tokens")
    assert report.line() == "extract: 0/101  0:00:00"
    clock.now += 60
    assert report.line() == "extract: 0/101  0:01:00"
    report.begin()
    clock.now += 10
    for _ in range(20):
        report.advance(100, "3 in the engine")
    assert report.line() == "extract: 20/101  200 tokens/s  3 in the engine  0:01:10, 0:00:40 left"
    clock.now += 40
    for _ in range(81):
        report.advance(100)
    assert report.line() == "extract: 101/101  202 tokens/s  0:01:50"


def test_a_note_says_what_the_first_unit_waits_for(clock: Clock):
    report = ProgressReport("train", 3, "labels", "compiling")
    assert report.line() == "train: 0/3  compiling  0:00:00"
    clock.now += 10
    report.advance(50)
    assert report.line() == "train: 1/3  5 labels/s  0:00:10, 0:00:20 left"


def test_lines_are_printed_to_standard_error(capsys: pytest.CaptureFixture[str]):
    with ProgressReport("draft", 1) as report:
        report.advance()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("draft: 1/1  0:00:0")


def test_quiet_prints_nothing(capsys: pytest.CaptureFixture[str]):
    with ProgressReport("draft", 1, quiet=True) as report:
        report.advance()
    assert capsys.readouterr() == ("", "")
