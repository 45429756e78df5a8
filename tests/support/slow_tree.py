"""Trees of drafts as the method describes them: grown path by path, each step from the drafter that knows most."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from itertools import count
from typing import NamedTuple

from support.slow_decode import (
    NUM_ASKED,
    Ranked,
    SlowDrafter,
    slow_branches,
    slow_posterior,
)

TREE_ALTERNATIVES = 8
Path = tuple[int, ...]
Row = list[tuple[float, int]]
"""Probabilities and tokens, best first."""


class Table(NamedTuple):
    """What follows at each position, for paths that begin with certain tokens."""

    beginning: Path
    rows: list[Row]


def united(candidates: Iterable[list[int]]) -> list[Path]:
    """The nodes of some candidates, in order."""
    found: dict[Path, None] = {}
    for candidate in candidates:
        for length in range(1, len(candidate) + 1):
            found.setdefault(tuple(candidate[:length]))
    return list(found)


class Launched(NamedTuple):
    """What a second drafter is given in one cycle."""

    asked: list[int]
    """Numbers of draft tokens after which it is asked for the next token."""
    shown: list[Path]
    """The visible tokens of each branch."""
    excluded: list[int | None]


def ask(second: SlowDrafter, anchor: int, token: int, shown: Path) -> list[Row]:
    """The second drafter's rows after the visible tokens; none past its block."""
    return second.ranked(anchor, (token, *shown)) if len(shown) + 1 < second.block_size else []


def slow_launch(ranked: Ranked, second: SlowDrafter, policy: str, k: int, anchor: int, token: int) -> Launched:
    draft = [best[0][1] for best in ranked]
    r = slow_posterior([best[0][0] for best in ranked])
    asked = sorted(range(len(draft)), key=lambda i: -r[i])[:NUM_ASKED] if policy == "reranked" else []
    answers = {i: ask(second, anchor, token, tuple(draft[:i]))[:1] for i in asked}
    chosen = slow_branches(policy, ranked, lambda i: answers[i][0] if answers[i] else [])[:k]
    shown = [(*draft[:i], *(() if alternative is None else (alternative,))) for i, alternative, _ in chosen]
    excluded = [branch.excluded for branch in chosen]
    if second.block_size > len(draft) + 1:
        shown.append(tuple(draft))
        excluded.append(None)
    return Launched(asked, shown, excluded)


def slow_tables(
    ranked: Ranked, second: SlowDrafter | None, policy: str, k: int, anchor: int, token: int
) -> list[Table]:
    """The first drafter's table, then those of asked lengths and of k branches; none of the latter two for k = 0."""
    draft = [best[0][1] for best in ranked]
    of_first = [best[:TREE_ALTERNATIVES] for best in ranked]
    found = [Table((), of_first)]
    if second is None or not k:
        return found
    launched = slow_launch(ranked, second, policy, k, anchor, token)
    for shown in (*(tuple(draft[:i]) for i in launched.asked), *launched.shown):
        rows = [*of_first, *[[]] * (max(len(draft), second.block_size - 1) - len(draft))]
        for place, answer in enumerate(ask(second, anchor, token, shown), len(shown)):
            rows[place] = answer[:TREE_ALTERNATIVES]
        found.append(Table(shown, rows))
    return found


def next_tokens(tables: list[Table], path: Path) -> Row:
    """What may follow a path, by the table with the longest beginning; the last one among equals."""
    fitting = [table for table in tables if path[: len(table.beginning)] == table.beginning]
    rows = max(reversed(fitting), key=lambda table: len(table.beginning)).rows
    return rows[len(path)] if len(path) < len(rows) else []


def slow_tree(tables: list[Table], num_nodes: int) -> list[Path]:
    """The paths of largest score, one after another; among equals the shorter one."""
    order = count()
    waiting: list[tuple[float, int, int, Path]] = []

    def open_node(path: Path, score: float) -> None:
        for prob, token in next_tokens(tables, path):
            if prob:
                heapq.heappush(waiting, (-score * prob, len(path), next(order), (*path, token)))

    open_node((), 1.0)
    found = []
    while waiting and len(found) < num_nodes:
        negative_score, _, _, path = heapq.heappop(waiting)
        found.append(path)
        open_node(path, -negative_score)
    return found


def slow_best_chain(tables: list[Table]) -> list[Path]:
    path: Path = ()
    found = []
    while row := next_tokens(tables, path):
        path = (*path, row[0][1])
        found.append(path)
    return found


class ThirdLevel(NamedTuple):
    """What the second drafter sees at the third level, and the candidates that it makes of this."""

    shown: list[Path]
    candidates: list[list[int]]


def slow_third_level(ranked: Ranked, second: SlowDrafter, policy: str, k: int, anchor: int, token: int) -> ThirdLevel:
    """Beginnings of completed branches that are likeliest to end right before a wrong token, completed anew."""
    tables = slow_tables(ranked, second, policy, k, anchor, token)
    launched = slow_launch(ranked, second, policy, k, anchor, token)
    scored = []
    for shown, excluded in list(zip(launched.shown, launched.excluded, strict=True))[:k]:
        chain = second.complete(anchor, (token, *shown), excluded)
        reached = 1.0
        for i, drafted in enumerate(chain):
            row = {each: prob for prob, each in next_tokens(tables, tuple(chain[:i]))}
            prob = row.get(drafted, 0.0)
            if i > len(shown):
                scored.append((reached * (1 - prob), tuple(chain[:i])))
            reached *= prob
    chosen = [path for _, path in sorted(scored, key=lambda pair: -pair[0])[:k]]
    return ThirdLevel(chosen, [second.complete(anchor, (token, *path)) for path in chosen])


def accepted(paths: list[Path], continuation: list[int]) -> int:
    """Tokens of the continuation that a verified path covers."""
    return max((len(path) for path in paths if list(path) == continuation[: len(path)]), default=0)
