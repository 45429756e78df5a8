"""`vpd eval` as a user sees it: the headline, the tables, the live check."""

import json
from pathlib import Path

import pytest
from support.place import Place
from support.tiny import MULTI_TURN_ROW, TEXT_ROW, run_vpd, vpd
from vpd.data.cache.cache import Cache


@pytest.fixture(scope="module")
def result(drafted_cache: Path, first_run: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("eval") / "eval.json"
    flags = {"holdout": 1, "policies": "paper,runner-up", "max_k": 5, "live_prompts": 5}
    arguments = ["eval", drafted_cache, "--first-drafter", first_run, "--drafter", first_run]
    found = vpd(*arguments, "--target", tiny_llama, "--out", out, **flags)
    assert json.loads(out.read_text()) == found
    return found


def test_every_policy_and_number_of_branches_is_listed(result: dict):
    ways = {(way["way"], way["policy"], way["k"]): way["alpha"] for way in result["by_way"]}
    expected = {("first", None, 0)} | {("first_tree", None, k) for k in range(6)}
    for setting in ("first_as_second", "d2sd"):
        expected |= {(setting, policy, k) for policy in ("paper", "runner-up") for k in range(6)}
    assert set(ways) == expected
    assert result["alpha"] == {
        "first": ways["first", None, 0],
        "first_tree": ways["first_tree", None, 4],
        "first_as_second": ways["first_as_second", "paper", 4],
        "d2sd": ways["d2sd", "paper", 4],
    }
    assert (result["policy"], result["k"]) == ("paper", 4)
    for setting, (low, high) in result["interval"].items():
        assert low <= result["alpha"][setting] <= high


def test_decoding_with_the_target_commits_the_cached_tokens_at_the_replayed_rate(result: dict, drafted_cache: Path):
    live = result["live"]
    assert (live["num_prompts"], live["num_identical"]) == (5, 5)
    assert live["alpha"] == live["replayed_alpha"] == live["num_tokens"] / live["num_cycles"]
    rows = [row for row in Cache.open(drafted_cache).rows if row.source_row not in (MULTI_TURN_ROW, TEXT_ROW)]
    assert live["num_tokens"] == sum(row.num_supervised - 1 for row in rows[:5])


def test_people_get_the_same_in_words(place: Place):
    outcome = run_vpd(*place.evaluate("--holdout", 1, "--target", place.llama, "--live-prompts", 2))
    assert outcome.code == 0
    for words in ("alpha first ", "alpha first_tree ", "reranked", "2 of 2 responses equal the cached ones"):
        assert words in outcome.out


def test_a_cache_without_a_single_response_can_not_be_decoded(place: Place):
    flags = ["--set", "extract.layer_ids=null"]
    prompts = place.write({"turns": ["name a dog", "and another one"]})
    assert run_vpd(*place.extract(prompts, "talks"), *flags).code == 0
    arguments = ["eval", place.folder / "talks", "--first-drafter", place.first_run, "--holdout", 1]
    outcome = run_vpd(*arguments, "--target", place.llama)
    assert outcome.code == 1
    assert "one prompt and one response" in outcome.message
