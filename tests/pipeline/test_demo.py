"""The demo's report: what it says of results made by hand, and its prompts and recipe."""

import json
import signal
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from vpd.pipeline.config import load_config
from vpd.pipeline.demo import (
    DEMO_PROMPTS,
    PROMPTS,
    RECIPE,
    VP_LR,
    compare_with_tree,
    d2sd_over,
    plot_result,
    print_summary,
    run_demo,
)
from vpd.pipeline.signals import Stopped
from vpd.stages.extract.sink import ExtractReport

CYCLES = {"first": [40, 60], "first_tree": [20, 30], "first_as_second": [18, 30], "d2sd": [16, 24]}
NUM_TOKENS = [40, 60]


def make_result(tree_interval: tuple[float, float], gain: tuple[float, float, float]) -> dict[str, Any]:
    """A result as `vpd eval` and the demo make it, over two answers."""
    alpha = {name: sum(NUM_TOKENS) / sum(cycles) for name, cycles in CYCLES.items()}
    return {
        "alpha": alpha,
        "interval": {name: (value - 0.1, value + 0.1) for name, value in alpha.items()} | {"first_tree": tree_interval},
        "policy": "reranked",
        "k": 4,
        "nodes": 32,
        "num_tokens": sum(NUM_TOKENS),
        "num_sequences": len(NUM_TOKENS),
        "recovery": [
            {"boundary": 1, "num_anchors": 30, "recovered": 0.25, "gained_tokens": 0.5},
            {"boundary": 2, "num_anchors": 10, "recovered": 0.5, "gained_tokens": 1.5},
        ],
        "sequences": {"num_tokens": NUM_TOKENS, "num_cycles": CYCLES},
        "demo": {
            "num_sequences": 12,
            "num_tokens": 1234,
            "num_bytes": 3 * 2**20,
            "seconds": {"extract": 41.6, "eval": 7.2},
            "d2sd_over": {"first_tree": dict(zip(("value", "low", "high"), gain, strict=True))},
        },
    }


def summary_of(result: dict[str, Any]) -> str:
    text = StringIO()
    print_summary(result, Console(file=text, highlight=False, width=100))
    return text.getvalue()


def test_the_gain_is_the_difference_of_the_alphas():
    result = make_result((1.9, 2.1), (0, 0, 0))
    # Each answer has alpha 2.5 with d2sd and 2 with the tree, so every resample has the same difference.
    assert d2sd_over(result, "first_tree") == pytest.approx((0.5, 0.5, 0.5))
    found = d2sd_over(result, "first_as_second")
    assert found.value == pytest.approx(100 / 40 - 100 / 48)
    # The resamples have the first answer twice, the second twice, or both.
    differences = [2.5 - 40 / 18, 2.5 - 60 / 30]
    assert (found.low, found.high) == pytest.approx((min(differences), max(differences)))


@pytest.mark.parametrize(
    ("tree_interval", "gain", "words"),
    [
        pytest.param(
            (1.9, 2.1),
            (0.5, 0.3, 0.7),
            ["+0.500", "+0.300 to +0.700", "is more than", "0.400", "do not overlap"],
            id="clear",
        ),
        pytest.param((1.9, 2.45), (0.5, 0.3, 0.7), ["is more than", "table overlap"], id="paired-only"),
        pytest.param((1.9, 2.1), (0.1, -0.1, 0.3), ["is not more than", "do not overlap"], id="within-chance"),
    ],
)
def test_the_report_does_not_claim_more_than_the_intervals_show(
    tree_interval: tuple[float, float], gain: tuple[float, float, float], words: list[str]
):
    text = compare_with_tree(make_result(tree_interval, gain))
    assert all(word in text for word in words)


def test_the_summary_shows_every_way_and_what_it_was_measured_on():
    text = summary_of(make_result((1.9, 2.1), (0.5, 0.3, 0.7)))
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert "1.000" in rows["first"]
    assert "2.000 │ 1.900 to 2.100" in rows["first_tree"]
    assert "2.500 │ 2.400 to 2.600" in rows["d2sd"]
    assert all(word in rows["1"] for word in ("30", "75.0%", "25.0%", "0.50"))
    assert all(word in rows["2"] for word in ("10", "25.0%", "50.0%", "1.50"))
    plain = " ".join(text.split())
    assert "100 tokens of 2 held-out answers" in plain
    assert "12 answers, 1234 tokens, 3.0 MiB" in plain
    assert "extract 42, eval 7" in plain


def test_the_plot_is_an_image(tmp_path: Path):
    plot_result(make_result((1.9, 2.1), (0.5, 0.3, 0.7)), tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG"


def test_the_demo_has_prompts_and_a_recipe_of_its_own():
    prompts, others = ([json.loads(line) for line in path.read_text().splitlines()] for path in (DEMO_PROMPTS, PROMPTS))
    texts = [record["prompt"] for record in prompts]
    assert len(set(texts)) == len(texts) >= 200
    assert not set(texts) & {message["content"] for record in others for message in record.get("messages", [])}
    recipe = load_config(RECIPE, {})
    assert recipe.train.lr > VP_LR
    # Enough answers are held out for an interval that is narrow.
    assert recipe.train.holdout * len(texts) >= 30
    assert np.isclose(recipe.extract.temperature, 0)


def test_a_signal_while_the_demo_extracts_ends_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vpd.pipeline.demo.make_target", lambda folder: None)
    report = ExtractReport(stopped_by=signal.SIGTERM)
    monkeypatch.setattr("vpd.pipeline.demo.run_extract", lambda *args: report)
    with pytest.raises(Stopped, match="SIGTERM"):
        run_demo(tmp_path)
    assert [*tmp_path.iterdir()] == []
