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
NODES = (8, 16, 32, 64, 128)
REUSED = "reused"
"""The arm that has the first drafter as second drafter."""
BOTH = {"second": "d2sd", "policy": "reranked"}
LINES: dict[str, dict[str, Any]] = {
    "chain": {"name": "chain"},
    "tree of the first drafter": {"name": "tree"},
    "branches (reranked)": {"name": "branches", **BOTH},
    "best chain": {"name": "best chain", **BOTH},
    "two-drafter tree, first drafter as second": {"name": "two-drafter tree", "arm": REUSED, **BOTH},
    "two-drafter tree": {"name": "two-drafter tree", **BOTH},
}
"""What the plot of alpha against verified nodes shows; the arm is the default one unless it is named."""
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

    def cycles(self, arm: str, **wanted: Any) -> np.ndarray:
        """Cycles [E] of a way of decoding, which is named by the fields of `Way` that are not at their defaults."""
        key = {"second": None, "policy": None, "k": 0, "nodes": None} | wanted
        found = [
            way["cycles"]
            for result in self.arms[arm]
            for way in result["ways"]
            if all(way[field] == value for field, value in key.items())
        ]
        return np.mean(found, axis=0)

    def branches(self, arm: str, policy: str) -> np.ndarray:
        """Cycles [E] with all nodes of the first draft and of k completed branches."""
        return self.cycles(arm, name="branches", second="d2sd", policy=policy, k=self.k)

    def two_drafter_tree(self, arm: str, nodes: int) -> np.ndarray:
        return self.cycles(arm, name="two-drafter tree", second="d2sd", policy="reranked", k=self.k, nodes=nodes)

    def tree(self, nodes: int) -> np.ndarray:
        """Cycles [E] with a tree of the first drafter alone, which is the same for all arms."""
        return self.cycles(next(iter(self.arms)), name="tree", nodes=nodes)

    @property
    def lifts(self) -> Lifts:
        arm = next(iter(self.arms))
        return Lifts(np.array(self.arms[arm][0]["tokens"]), self.cycles(arm, name="chain"))

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
            f"drafter alone has alpha {results.first_alpha:.3f}. The table holds lifts."
        )
        columns = list(rows[0])[2:]
        text += ["", f"| second drafter | seeds | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
        text += [
            f"| {row['arm']} | {row['num_seeds']} | {' | '.join(str(row[column]) for column in columns)} |"
            for row in rows
        ]
        text += ["", *(f"- {name}: {ratio}" for name, ratio in ratios.items()), ""]
        if default in results.arms:
            text += nodes_table(results, default)
            plot_nodes(results, default, out / f"nodes-{split}.png")
    plot_recovery(Results.load(out / "results", "held", k), [default, paper], out / "recovery.png")
    (out / "report.json").write_text(json.dumps(figures, indent=2) + "\n")
    (out / "report.md").write_text("\n".join(text))
    return "\n".join(text)


def lift_rows(results: Results) -> list[dict[str, Any]]:
    """Each arm's lift with the branches of each policy, and with two-drafter trees."""
    lifts = results.lifts
    return [
        {
            "arm": "a tree of the first drafter alone",
            "num_seeds": 1,
            **dict.fromkeys(POLICIES, ""),
            **{f"tree of {nodes}": lifts.lift(results.tree(nodes)) for nodes in (32, 64)},
        },
        *(
            {
                "arm": arm,
                "num_seeds": len(seeds),
                **{policy: lifts.lift(results.branches(arm, policy)) for policy in POLICIES},
                **{f"tree of {nodes}": lifts.lift(results.two_drafter_tree(arm, nodes)) for nodes in (32, 64)},
            }
            for arm, seeds in results.arms.items()
        ),
    ]


def headline_ratios(results: Results, paper: str, default: str) -> dict[str, Estimate]:
    """Ratios of the default recipe's lift to the lifts that it must exceed."""
    if not {paper, default} <= set(results.arms):
        return {}
    lifts = results.lifts
    ours_E, paper_E = results.branches(default, "reranked"), results.branches(paper, "paper")
    return {
        f"{default}, reranked / {paper}, paper": lifts.ratio(ours_E, paper_E),
        **{
            f"{default}, two-drafter tree / tree of the first drafter, {nodes} nodes": lifts.ratio(
                results.two_drafter_tree(default, nodes), results.tree(nodes)
            )
            for nodes in NODES
        },
    }


def alphas_by_nodes(results: Results, arm: str) -> dict[str, list[float]]:
    """Alpha at each of `NODES`, by line; without the lines of an arm that has no results yet."""
    num_tokens = results.lifts.num_tokens_E.sum()
    found = {}
    for name, line in LINES.items():
        wanted = {"arm": arm, "k": results.k if "second" in line else 0, **line}
        if wanted["arm"] in results.arms:
            found[name] = [float(num_tokens / results.cycles(**wanted, nodes=nodes).sum()) for nodes in NODES]
    return found


def nodes_table(results: Results, arm: str) -> list[str]:
    """A table of alpha by verified nodes."""
    lines = [f"Alpha by verified nodes, {arm}:", "", f"| way | {' | '.join(map(str, NODES))} |", "|---" * 6 + "|"]
    for name, alphas in alphas_by_nodes(results, arm).items():
        lines.append(f"| {name} | {' | '.join(f'{alpha:.3f}' for alpha in alphas)} |")
    return [*lines, ""]


def plot_nodes(results: Results, arm: str, path: Path) -> None:
    """Plots alpha against verified nodes, a line for each way of decoding."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, alphas in alphas_by_nodes(results, arm).items():
        axes.plot(NODES, alphas, marker=".", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(NODES, [str(nodes) for nodes in NODES])
    axes.set(xlabel="verified nodes", ylabel="alpha")
    axes.legend()
    figure.savefig(path, dpi=120)


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
