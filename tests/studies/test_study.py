"""The study: how prompts are split, and the report of results made by hand."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from run import main
from study import ARMS, DEFAULT_ARM, PAPER_ARM, VARIANTS, plan_splits, worker_pool
from study_report import NODES, POLICIES, REUSED, write_report
from support.tiny import write_jsonl
from vpd.data.errors import VpdError
from vpd.pipeline.config import load_config
from vpd.stages.evaluate.ways import Way

QUESTIONS = [{"turns": [f"how much is {i} and {i}?"]} for i in range(200)]


def test_no_form_of_a_held_out_prompt_is_trained_on(tmp_path: Path):
    prompts, unseen = write_jsonl(tmp_path / "a.jsonl", QUESTIONS), write_jsonl(tmp_path / "b.jsonl", QUESTIONS[:3])
    splits = plan_splits([prompts], [unseen], 3)
    held, *trained = ([record["turns"][0] for record in splits[name]] for name in ("held", "first", "train"))
    bases = [{text.split("\n")[0] for text in texts} for texts in (held, *trained)]
    # Every question is in one split only; training splits have all its variants.
    assert sum(map(len, bases)) == len(set.union(*bases)) == 200
    for texts, base in zip(trained, bases[1:], strict=True):
        assert len(set(texts)) == len(texts) == 3 * len(base)
        assert sum(text.endswith(VARIANTS[1]) for text in texts) == len(base)
    # Shares of 10 % and 45 % of 200 by hash, within 4.5 standard deviations.
    assert 2 <= len(held) <= 39
    assert all(58 <= len(base) <= 122 for base in bases[1:])
    assert splits["unseen"] == QUESTIONS[:3]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(None, ["a.jsonl", "No such file"], id="missing"),
        pytest.param('{"prompt": "x"}', ["a.jsonl", "row 0", "turns"], id="another-form"),
        pytest.param('{"turns": ["x"', ["a.jsonl", "row 0", "turns"], id="not-json"),
    ],
)
def test_prompts_that_cannot_be_used_are_named_before_anything_is_made(
    tmp_path: Path, content: str | None, words: list[str]
):
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_text(content)
    outcome = CliRunner().invoke(main, [str(path), "--unseen", str(path), "--out", str(tmp_path / "out")])
    assert outcome.exit_code == 1
    assert all(word in outcome.stderr for word in words)
    assert not (tmp_path / "out").exists()


def test_what_waits_for_a_worker_is_not_begun_once_the_study_is_stopped(tmp_path: Path):
    def run() -> None:
        with worker_pool(1) as pool:
            pool.submit(time.sleep, 100)
            for name in "abc":
                pool.submit((tmp_path / name).touch)
            sys.exit(143)

    with pytest.raises(SystemExit):
        run()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", ["study", "study-gpu"])
@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_every_arm_is_a_setting_of_its_own(recipe: str, arm: Any):
    path = Path(__file__).with_name(f"{recipe}.yaml")
    config = load_config(path, arm.settings)
    assert config.train.objective == "vp"
    same = [other for other in ARMS if load_config(path, other.settings) == config and other.warm == arm.warm]
    assert same == [arm]


def make_result(arm: str, seed: int, cycles: dict[str, list[int]]) -> dict[str, Any]:
    """`cycles` by policy, of two sequences of 40 and 60 tokens.

    The first drafter needs 50 cycles, its trees 40, two-drafter trees 30.
    """
    both = {"second": "d2sd", "policy": "reranked", "k": 4}
    limited = [
        {**Way(name, nodes=nodes, **fields)._asdict(), "cycles": needed}
        for name, fields, needed in (
            ("chain", {}, [20, 30]),
            ("tree", {}, [16, 24]),
            ("branches", both, [16, 24]),
            ("best chain", both, [18, 22]),
            ("two-drafter tree", both, [12, 18]),
        )
        for nodes in NODES
    ]
    ways = [
        {**Way("chain")._asdict(), "cycles": [20, 30]},
        *({**Way("branches", "d2sd", policy, 4)._asdict(), "cycles": cycles[policy]} for policy in POLICIES),
        *limited,
    ]
    split = {"ways": ways, "tokens": [40, 60], "recovery": [{"boundary": 1, "recovered": 0.5, "gained_tokens": 1.0}]}
    return {"arm": arm, "seed": seed, "held": split, "unseen": split}


def test_the_report_holds_lifts_and_ratios(tmp_path: Path):
    results = [
        # alpha 2 for the first drafter, 2.5 for its trees.
        make_result(PAPER_ARM, 0, {"paper": [16, 24], "exclude": [16, 24], "runner-up": [10, 15], "reranked": [9, 14]}),
        # Means over two seeds: 25, 24, 25 and 20 cycles for 100 tokens.
        make_result(
            DEFAULT_ARM, 0, {"paper": [10, 16], "exclude": [10, 14], "runner-up": [9, 15], "reranked": [8, 11]}
        ),
        make_result(
            DEFAULT_ARM, 1, {"paper": [10, 14], "exclude": [10, 14], "runner-up": [9, 17], "reranked": [8, 13]}
        ),
    ]
    results.append(make_result(REUSED, 0, {policy: [16, 24] for policy in POLICIES}))
    (tmp_path / "results").mkdir()
    for i, result in enumerate(results):
        (tmp_path / f"results/{i}.json").write_text(json.dumps(result))
    text = write_report(tmp_path, 4, PAPER_ARM, DEFAULT_ARM)
    assert (tmp_path / "report.md").read_text() == text
    assert (tmp_path / "recovery.png").read_bytes()[:4] == b"\x89PNG"
    found = json.loads((tmp_path / "report.json").read_text())["held"]
    assert found["first"] == 2.0
    by_arm = {row["arm"]: row for row in found["lifts"]}
    assert (by_arm[PAPER_ARM]["num_seeds"], by_arm[DEFAULT_ARM]["num_seeds"]) == (1, 2)
    assert by_arm[PAPER_ARM]["paper"][0] == pytest.approx(0.5)
    assert by_arm[DEFAULT_ARM]["paper"][0] == pytest.approx(2.0)
    assert by_arm[DEFAULT_ARM]["exclude"][0] == pytest.approx(100 / 24 - 2)
    assert by_arm[DEFAULT_ARM]["runner-up"][0] == pytest.approx(2.0)
    assert by_arm[DEFAULT_ARM]["reranked"][0] == pytest.approx(3.0)
    # Trees of the first drafter lift by 1 / 2, two-drafter trees by 4 / 3.
    assert [ratio[0] for ratio in found["ratios"].values()] == pytest.approx([6.0, *[8 / 3] * len(NODES)])
    assert f"| {DEFAULT_ARM} | 2 | 2.000 [" in text
    assert "| two-drafter tree | 3.333 | 3.333 | 3.333 | 3.333 | 3.333 |" in text
    assert (tmp_path / "nodes-held.png").read_bytes()[:4] == b"\x89PNG"


def test_a_report_of_nothing_says_so(tmp_path: Path):
    with pytest.raises(VpdError, match="make study"):
        write_report(tmp_path, 4, PAPER_ARM, DEFAULT_ARM)
