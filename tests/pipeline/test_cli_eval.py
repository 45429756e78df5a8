"""`vpd eval` as a user sees it: the headline, the tables, the live check."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from support.place import ONE_STEP, Place
from support.tiny import MULTI_TURN_ROW, TEXT_ROW, make_row, run_vpd, vpd
from vpd.data.cache.cache import Cache
from vpd.stages.evaluate.ways import Way
from vpd.stages.holdout import is_held_out
from vpd.stages.train.checkpoints import find_drafter
from vpd.stages.trained_on import PROVENANCE, was_trained_on


@pytest.fixture(scope="module")
def result(drafted_cache: Path, first_run: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("eval") / "eval.json"
    flags = {"holdout": 1, "policies": "paper,runner-up", "max_k": 5, "live_prompts": 5}
    arguments = ["eval", drafted_cache, "--first-drafter", first_run, "--drafter", first_run]
    found = vpd(*arguments, "--target", tiny_llama, "--out", out, **flags)
    assert json.loads(out.read_text()) == found
    return found


def by_way_name(result: dict) -> list[dict]:
    return [{**each, "name": each["way"]} for each in result["by_nodes"]]


def test_every_way_is_listed_by_branches_and_nodes(result: dict):
    ways = {tuple(each[field] for field in Way._fields): each["alpha"] for each in by_way_name(result)}
    limits = [None, 8, 16, 32, 64, 128]
    expected = {("chain", None, None, 0, nodes) for nodes in limits}
    expected |= {("tree", None, None, 0, nodes) for nodes in limits[1:]}
    expected |= {("resampled", None, None, k, None) for k in range(1, 6)}
    expected |= {("three levels", "d2sd", "paper", 4, nodes) for nodes in limits}
    for second in ("first_as_second", "d2sd"):
        for policy in ("paper", "runner-up"):
            expected |= {("branches", second, policy, k, None) for k in range(6)}
            expected |= {("best chain", second, policy, k, nodes) for k in (1, 2, 4) for nodes in limits}
            expected |= {("branches", second, policy, k, nodes) for k in (1, 2, 4) for nodes in limits[1:]}
            expected |= {("two-drafter tree", second, policy, k, nodes) for k in (1, 2, 4) for nodes in limits[1:]}
    assert set(ways) == expected
    assert result["alpha"] == {
        "first": ways["chain", None, None, 0, None],
        "first_tree": ways["tree", None, None, 0, 32],
        "first_as_second": ways["two-drafter tree", "first_as_second", "paper", 4, 32],
        "d2sd": ways["two-drafter tree", "d2sd", "paper", 4, 32],
    }
    assert result["alpha_mean_of_answers"].keys() == result["alpha"].keys()
    assert (result["way"], result["policy"], result["k"], result["nodes"]) == ("two-drafter tree", "paper", 4, 32)
    for setting, (low, high) in result["interval"].items():
        assert low <= result["alpha"][setting] <= high


def test_decoding_with_the_target_commits_the_cached_tokens_at_the_replayed_rate(result: dict, drafted_cache: Path):
    live = result["live"]
    assert (live["num_prompts"], live["num_identical"]) == (5, 5)
    assert live["alpha"] == live["replayed_alpha"] == live["num_tokens"] / live["num_cycles"]
    rows = [row for row in Cache.open(drafted_cache).rows if row.source_row not in (MULTI_TURN_ROW, TEXT_ROW)]
    assert live["num_tokens"] == sum(row.num_supervised - 1 for row in rows[:5])


def test_people_get_the_same_in_words(place: Place):
    outcome = run_vpd(*place.evaluate("--holdout", 1, "--target", place.llama, "--live-prompts", 2, "--gpu", "h100"))
    assert outcome.code == 0
    for words in (
        "alpha by verified nodes",
        "alpha by slice",
        "batch  64: ",
        "H100 SXM data sheet",
        "alpha first ",
        "alpha first_tree ",
        "reranked",
        "2 of 2 responses equal the cached ones",
    ):
        assert words in outcome.out


def test_a_cache_without_a_single_response_can_not_be_decoded(place: Place):
    flags = ["--set", "extract.layer_ids=null"]
    prompts = place.write({"turns": ["name a dog", "and another one"]})
    assert run_vpd(*place.extract(prompts, "talks"), *flags).code == 0
    arguments = ["eval", place.folder / "talks", "--first-drafter", place.first_run, "--holdout", 1]
    outcome = run_vpd(*arguments, "--target", place.llama)
    assert outcome.code == 1
    assert "one prompt and one response" in outcome.message


def trained(place: Place, name: str, **settings: object) -> Path:
    """A run over the cache of `place`, one step long."""
    out = place.folder / name
    vpd("train", place.cache, "--out", out, **{**ONE_STEP, **settings})
    return out


def test_sequences_that_a_drafter_was_trained_on_are_not_called_held_out(place: Place):
    """Both drafters' runs hold out a third. The second drafter starts from a run that held out nothing."""
    all_of_it = trained(place, "all", objective="dflash", holdout=0.0)
    vp = trained(place, "vp", prefix_sampler="geometric", init=all_of_it)
    rows = Cache.open(place.cache).rows
    kept = {row.seq_id for row in rows if is_held_out(row.seq_id, ONE_STEP["holdout"])}
    arguments = ["eval", place.cache, "--first-drafter", place.first_run, "--drafter", vp]
    found = vpd(*arguments, holdout=1)
    marks = {
        name: dict(zip(found["sequences"]["seq_ids"], each, strict=True))
        for name, each in found["sequences"]["trained_on"].items()
    }
    assert marks["first"] == {seq_id: "no" if seq_id in kept else "yes" for seq_id in marks["first"]}
    assert set(marks["second"].values()) == {"yes"}
    counts = Counter(marks["first"].values())
    assert found["trained_on"]["first"] == {"yes": counts["yes"], "no": counts["no"], "unknown": 0}
    assert counts.keys() == {"yes", "no"}
    text = run_vpd(*arguments, "--holdout", 1).out
    assert "held-out sequences" not in text
    assert f"NOT held out: the first drafter was trained on {counts['yes']} of the {len(rows)} sequences" in text
    # Those that both runs held out.
    vp = trained(place, "fair", prefix_sampler="geometric", init=place.first_run)
    arguments = ["eval", place.cache, "--first-drafter", place.first_run, "--drafter", vp]
    found = vpd(*arguments)
    assert set(found["sequences"]["seq_ids"]) <= kept
    no_others = {"yes": 0, "no": found["num_sequences"], "unknown": 0}
    assert found["trained_on"] == {"first": no_others, "second": no_others}
    assert f"in {found['num_sequences']} held-out sequences" in run_vpd(*arguments).out


def test_a_drafter_without_a_record_may_have_been_trained_on_anything(place: Place):
    published = shutil.copytree(find_drafter(place.first_run), place.folder / "published")
    outcome = run_vpd("eval", place.cache, "--first-drafter", published, "--holdout", 1)
    assert "unknown: whether the first drafter was trained on" in outcome.out
    assert "held-out sequences" not in outcome.out
    init = trained(place, "from-published", prefix_sampler="geometric", init=published)
    found = vpd("eval", place.cache, "--first-drafter", init, holdout=1)
    assert found["trained_on"]["first"]["no"] == 0


@pytest.mark.parametrize(
    ("holdout", "part", "records", "expected"),
    [
        (0.25, "a", [{"holdout": 0.25, "parts": ["a"]}], {"yes", "no"}),
        (0.25, "b", [{"holdout": 0.25, "parts": ["a"]}], {"unknown", "no"}),
        (0.25, "a", [{"holdout": 0.5, "parts": ["a"]}, {"unknown": "x"}], {"unknown", "yes"}),
        (0.0, "a", [{"holdout": 0.0, "parts": ["a"]}], {"yes"}),
        (0.0, "a", None, {"unknown"}),
    ],
)
def test_part_and_share_say_whether_a_sequence_was_trained_on(
    holdout: float, part: str, records: list[dict] | None, expected: set[str]
):
    answers = {i: was_trained_on(make_row(f"prompt-{i}", 3, part=part), records) for i in range(60)}
    assert set(answers.values()) == expected
    if "no" in expected:
        assert {i for i, answer in answers.items() if answer == "no"} == {
            i for i in range(60) if is_held_out(f"prompt-{i}", holdout)
        }


def test_swapped_drafters_are_refused_and_others_named(place: Place):
    vp = trained(place, "vp", prefix_sampler="geometric")
    swapped = run_vpd("eval", place.cache, "--first-drafter", vp, "--drafter", place.first_run)
    assert swapped.code == 1
    assert "the drafters are swapped" in swapped.message
    other = trained(place, "other", objective="dflash", seed=5)
    copied = shutil.copytree(find_drafter(place.first_run), place.folder / "copy")
    cases = {
        (place.first_run, vp): [],
        (vp, None): ["was trained as a VP-Drafter"],
        (place.first_run, other): ["was trained as a first drafter"],
        (place.first_run, copied): ["is both drafters"],
    }
    for (first, second), words in cases.items():
        more = [] if second is None else ["--drafter", second]
        warnings = vpd("eval", place.cache, "--first-drafter", first, *more, holdout=1)["warnings"]
        assert [word in warning for word, warning in zip(words, warnings, strict=True)] == [True] * len(words)
    assert "warning: " in run_vpd("eval", place.cache, "--first-drafter", vp, "--holdout", 1).out


def test_that_nothing_is_held_out_is_said_in_training_and_in_evaluation(place: Place):
    outcome = run_vpd(*place.train(place.cache, objective="dflash", holdout=0.0001))
    assert outcome.code == 0
    assert "--holdout 0.0001 holds out none of 12 sequences" in outcome.err
    outcome = run_vpd("eval", place.cache, "--first-drafter", place.folder / "run")
    assert outcome.code == 1
    assert "of its 12 sequences, none is held out" in outcome.message
    assert "--holdout" in outcome.message


def test_a_continued_run_keeps_its_record(place: Place):
    """Also if the drafter that it started from has gone; without a record, that drafter's training is unknown."""
    init = shutil.copytree(place.first_run, place.folder / "init")
    run = trained(place, "vp", prefix_sampler="geometric", init=init)
    path = run / PROVENANCE
    written = json.loads(path.read_text())
    own, of_init = written["trained_on"]
    assert own["parts"] == of_init["parts"] == [*Cache.open(place.cache).parts]
    assert (own["holdout"], own["cache"]) == (ONE_STEP["holdout"], str(place.cache))
    shutil.rmtree(init)
    trained(place, "vp", prefix_sampler="geometric", init=init)
    assert json.loads(path.read_text())["trained_on"] == [own, of_init]
    path.write_text(json.dumps({key: value for key, value in written.items() if key != "trained_on"}))
    trained(place, "vp", prefix_sampler="geometric", init=init)
    assert json.loads(path.read_text())["trained_on"] == [own, {"unknown": str(init)}]
