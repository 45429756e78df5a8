"""Every way of decoding at limited numbers of nodes, against trees that are grown path by path."""

# N anchors
from itertools import pairwise

import numpy as np
import pytest
from support.slow_decode import POLICIES, SlowDrafter
from support.slow_tree import accepted, slow_launch, slow_third_level
from support.tiny_world import SECONDS, Anchor, Recorder, World
from vpd.stages.evaluate.ways import NODES, Way

EVERY = 3
"""The slow trees are grown at every third anchor."""
MAX_K = 4


@pytest.fixture(scope="module", params=SECONDS.values(), ids=list(SECONDS))
def replayed(world: World, request: pytest.FixtureRequest) -> tuple[str, Recorder]:
    """A second drafter, and the replay of all ways beside it."""
    settings = {"k": 3, "max_k": MAX_K, "way": "two-drafter tree", "nodes": 11}
    return request.param, world.run(world.talks, request.param, wanted=lambda way: True, **settings)


def slow_costs(world: World, way: Way, second: SlowDrafter, anchor: Anchor) -> list[int]:
    """Passes and blocks of the second drafter, and rows of the head."""
    ranked, rows, num_passes = world.ranked(anchor), [], 0
    if way.second is not None and way.k:
        launched = slow_launch(ranked, second, way.policy or "", way.k, anchor.position, anchor.token)
        num_passes = 1 + bool(launched.asked) + (way.name == "three levels")
        seen = [*launched.asked, *map(len, launched.shown)]
        rows = [second.block_size - 1 - visible_len for visible_len in seen]
        if way.name == "three levels":
            third = slow_third_level(ranked, second, way.policy or "", way.k, anchor.position, anchor.token)
            rows += [second.block_size - 1 - len(shown) for shown in third.shown]
    rows = [number for number in rows if number > 0]
    return [num_passes, len(rows), len(ranked) + sum(rows)]


def test_accept_lengths_and_costs(world: World, replayed: tuple[str, Recorder]):
    second, report = replayed
    anchors = world.anchors()
    found = report.by_way()
    costs = dict(zip(report.ways, np.concatenate(report.costs).transpose(1, 0, 2).tolist(), strict=True))
    wrong = []
    for way in report.ways:
        name = "first" if way.second == "first_as_second" else second
        for n in range(0, len(anchors), EVERY):
            anchor = anchors[n]
            drafter = world.slow(anchor.seq_id, name)
            nodes = world.slow_nodes(way, drafter, anchor, world.ranked(anchor))
            expected = accepted(nodes, anchor.continuation), [len(nodes), *slow_costs(world, way, drafter, anchor)]
            if (found[way][n], costs[way][n]) != expected:
                wrong.append((way, n, found[way][n], costs[way][n], expected))
    assert wrong == []


def test_all_ways_are_compared_at_the_same_nodes(replayed: tuple[str, Recorder]):
    _, report = replayed
    budgets = sorted({*NODES, 11})
    for name in ("chain", "tree"):
        assert {way.nodes for way in report.ways if way.name == name} - {None} == {*budgets}
    for second in ("first_as_second", "d2sd"):
        for policy in POLICIES:
            for name in ("branches", "two-drafter tree", "best chain"):
                limited = [way for way in report.ways if way[:3] == (name, second, policy) and way.nodes is not None]
                assert {(way.k, way.nodes) for way in limited} == {
                    (k, nodes) for k in (1, 2, 3, 4) for nodes in budgets
                }


def test_more_nodes_never_accept_less(replayed: tuple[str, Recorder]):
    _, report = replayed
    found = report.by_way()
    for way in report.ways:
        more = sorted((other.nodes, other) for other in report.ways if other.nodes and other[:4] == way[:4])
        for (_, fewer_nodes), (_, more_nodes) in pairwise(more):
            assert all(few <= many for few, many in zip(found[fewer_nodes], found[more_nodes], strict=True))


def test_the_ways_differ(replayed: tuple[str, Recorder]):
    """Else the comparison with slow trees would show little."""
    _, report = replayed
    found = report.by_way()
    ways = [Way("chain", nodes=32), Way("tree", nodes=32), Way("best chain", "d2sd", "reranked", 4, 32)]
    ways += [Way("branches", "d2sd", policy, k, 32) for policy in ("paper", "reranked") for k in (1, 4)]
    ways += [Way("two-drafter tree", "d2sd", *drafted, 32) for drafted in (("paper", 1), ("paper", 4), ("reranked", 4))]
    assert len({tuple(found[way]) for way in ways}) == len(ways)
