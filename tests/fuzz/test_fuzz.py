"""A few seeds of every subject; `run.py` goes on for as long as one likes."""

from pathlib import Path

import pytest
from fuzz.run import make_start, run_case
from fuzz.subjects import SUBJECTS, Start

CASES = {"records": 40, "template": 25, "target": 25, "drafter": 15, "cache": 20, "settings": 20}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    return make_start(tmp_path_factory.mktemp("start"))


@pytest.mark.parametrize("name", SUBJECTS)
def test_damage_ends_in_an_error_or_in_a_right_result(name: str, start: Start, tmp_path: Path):
    outcomes = {seed: run_case(name, seed, start, tmp_path / "case")[0] for seed in range(CASES[name])}
    assert {seed: outcome for seed, outcome in outcomes.items() if outcome not in ("right", "refused")} == {}
    assert "refused" in outcomes.values()  # damage that nothing meets would show nothing
