"""The study's report: tables in Markdown, a figure, and all values as JSON."""

# E sequences
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lifts import Estimate, Lifts
from vpd.data.errors import VpdError

POLICIES = ("paper", "exclude", "runner-up", "reranked")
MEANINGS = {"held": "held-out prompts of the same sets", "unseen": "prompts of a set never trained on"}


@dataclass(frozen=True)
class Results:
    """The results of one split. Cycles are means over an arm's seeds."""

    split: str
    k: int
    arms: dict[str, list[dict[str, Any]]]
    """Each arm's results on this split, one per seed."""

    @classmethod
    def load(cls, folder: Path, split: str, k: int) -> Results:
        """
        Raises:
            VpdError: there is no result.
        """
        arms: dict[str, list[dict[str, Any]]] = {}
        for path in sorted(folder.glob("*.json")):
            result = json.loads(path.read_text())
            arms.setdefault(result["arm"], []).append(result[split])
        if not arms:
            raise VpdError(f"expected results of the study in {folder}, found none. Run `make study` first.")
        return cls(split, k, arms)

    def cycles(self, arm: str, name: str, policy: str | None, k: int) -> np.ndarray:
        """Cycles [E] of a way of decoding."""
        key = {"name": name, "policy": policy, "k": k}
        found = [
            way["cycles"]
            for result in self.arms[arm]
            for way in result["ways"]
            if all(way[field] == value for field, value in key.items())
        ]
        return np.mean(found, axis=0)

    @property
    def lifts(self) -> Lifts:
        arm = next(iter(self.arms))
        return Lifts(np.array(self.arms[arm][0]["tokens"]), self.cycles(arm, "first", None, 0))

    @property
    def tree_cycles_E(self) -> np.ndarray:
        return self.cycles(next(iter(self.arms)), "first_tree", None, self.k)

    @property
    def first_alpha(self) -> float:
        return float(self.lifts.num_tokens_E.sum() / self.lifts.first_cycles_E.sum())


def write_report(out: Path, k: int, paper: str, default: str) -> str:
    """Writes report.md, report.json and recovery.png beside the results; returns the report.

    Args:
        paper: the arm of the paper's recipe, which decodes with the policy `paper`.
        default: the arm of the default recipe, which decodes with `reranked`.
    """
    text: list[str] = []
    figures: dict[str, Any] = {}
    for split, meaning in MEANINGS.items():
        results = Results.load(out / "results", split, k)
        rows = lift_rows(results)
        ratios = headline_ratios(results, paper, default)
        figures[split] = {"first": results.first_alpha, "lifts": rows, "ratios": ratios}
        num_sequences, num_tokens = len(results.lifts.num_tokens_E), int(results.lifts.num_tokens_E.sum())
        text.append(
            f"{meaning[0].upper()}{meaning[1:]}: {num_tokens} tokens of {num_sequences} responses, K = {k}; the first "
            f"drafter alone has alpha {results.first_alpha:.3f}, first_tree lifts it by "
            f"{results.lifts.lift(results.tree_cycles_E)}."
        )
        text += ["", f"| second drafter | seeds | {' | '.join(POLICIES)} |", "|---|---|" + "---|" * len(POLICIES)]
        text += [
            f"| {row['arm']} | {row['num_seeds']} | {' | '.join(str(row[policy]) for policy in POLICIES)} |"
            for row in rows
        ]
        text += ["", *(f"- {name}: {ratio}" for name, ratio in ratios.items()), ""]
    plot_recovery(Results.load(out / "results", "held", k), [default, paper], out / "recovery.png")
    (out / "report.json").write_text(json.dumps(figures, indent=2) + "\n")
    (out / "report.md").write_text("\n".join(text))
    return "\n".join(text)


def lift_rows(results: Results) -> list[dict[str, Any]]:
    """Each arm's lift under each policy."""
    lifts = results.lifts
    return [
        {
            "arm": arm,
            "num_seeds": len(seeds),
            **{policy: lifts.lift(results.cycles(arm, "d2sd", policy, results.k)) for policy in POLICIES},
        }
        for arm, seeds in results.arms.items()
    ]


def headline_ratios(results: Results, paper: str, default: str) -> dict[str, Estimate]:
    """Ratios of the default recipe's lift to the lifts that it must exceed."""
    if not {paper, default} <= set(results.arms):
        return {}
    lifts = results.lifts
    ours_E = results.cycles(default, "d2sd", "reranked", results.k)
    return {
        f"{default}, reranked / {paper}, paper": lifts.ratio(ours_E, results.cycles(paper, "d2sd", "paper", results.k)),
        f"{default}, reranked / first_tree": lifts.ratio(ours_E, results.tree_cycles_E),
    }


def plot_recovery(results: Results, arms: list[str], path: Path) -> None:
    """Plots how often the second draft commits more tokens than the first, and how many, by boundary position."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots(1, 2)
    for arm in (arm for arm in arms if arm in results.arms):
        recovery = results.arms[arm][0]["recovery"]
        positions = [each["boundary"] for each in recovery]
        axes[0].plot(positions, [each["recovered"] for each in recovery], marker=".", label=arm)
        axes[1].plot(positions, [each["gained_tokens"] for each in recovery], marker=".", label=arm)
    axes[0].set(xlabel="boundary position", ylabel="share of anchors with a gain", ylim=(0, None))
    axes[1].set(xlabel="boundary position", ylabel="tokens gained, mean", ylim=(0, None))
    axes[0].legend()
    figure.savefig(path, dpi=120)
