"""Extractions with records that can't be used: what is left out, and what runs once they are corrected."""

from collections.abc import Callable

import pytest
from place import ANSWERED, Place, check_message
from tiny import (
    PROMPTS,
    run_vpd,
    vpd,
    write_jsonl,
)


def test_skip_bad_counts_what_it_leaves_out(place: Place):
    records = [PROMPTS[0], "{broken", {"question": "why?"}, {"prompt": "fox " * 100}, PROMPTS[1]]
    prompts = place.write(*records)
    result = vpd(*place.extract(prompts), skip_bad=True)
    assert result["skipped"] == {"unreadable record": 2, "too long": 1}
    assert (result["num_written"], result["num_sequences"]) == (2, 2)
    again = vpd(*place.extract(prompts), skip_bad=True)
    assert (again["num_written"], again["num_present"]) == (0, 2)
    assert again["skipped"] == result["skipped"]


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
