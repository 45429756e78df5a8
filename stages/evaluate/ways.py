"""Ways of decoding that a replay compares."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .config import EvalConfig

CHAIN, RESAMPLED, TREE = "chain", "resampled", "tree"
BRANCHES, THREE_LEVELS = "branches", "three levels"
TWO_DRAFTER_TREE, BEST_CHAIN = "two-drafter tree", "best chain"
FIRST_AS_SECOND, D2SD = "first_as_second", "d2sd"
NODES = (8, 16, 32, 64, 128)
"""Numbers of verified nodes at which all ways are compared."""
SEVERAL_K = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of branches at which ways are compared by nodes, up to the largest one that is asked for."""


class Way(NamedTuple):
    """A way of decoding."""

    name: str
    """Which drafts a cycle verifies.

    `chain`: the first draft. `resampled`: the first draft, and others that are drawn from its probabilities. `tree`:
    a tree of the first drafter's probabilities. `branches`: the first draft, and branches that the second drafter
    completes. `three levels`: the paper's branches, and as many branches of the completed ones. `two-drafter tree`: a
    tree of both drafters' probabilities. `best chain`: the one path that takes the likeliest token by both drafters.
    """
    second: str | None = None
    """Who drafts second: `first_as_second` (the first drafter again), `d2sd` (the second drafter), or nobody."""
    policy: str | None = None
    """Branch policy; None for ways without a second draft."""
    k: int = 0
    """Branches beside the first draft."""
    nodes: int | None = None
    """Largest number of verified nodes, draft tokens after the anchor; None: as many as the way has."""


def reported_ways(config: EvalConfig, seconds: list[str]) -> dict[str, Way]:
    """The ways that the headline shows, by name; the last is the best one.

    Args:
        seconds: who may draft second.
    """
    nodes = config.nodes if config.way == TWO_DRAFTER_TREE else None
    found = {"first": Way(CHAIN), "first_tree": Way(TREE, nodes=config.nodes)}
    return found | {name: Way(config.way, name, config.policies[0], config.k, nodes) for name in seconds}


def all_ways(config: EvalConfig, seconds: list[str]) -> Iterator[Way]:
    """Every way, each at every number of nodes and of branches that the settings ask for."""
    budgets = sorted({*NODES, config.nodes})
    largest = max(config.k, config.max_k)
    several_k = sorted({config.k, *(k for k in SEVERAL_K if k <= config.max_k)})
    yield Way(CHAIN)
    yield from (Way(name, nodes=nodes) for name in (CHAIN, TREE) for nodes in budgets)
    yield from (Way(RESAMPLED, k=k) for k in range(1, largest + 1))
    for second in seconds:
        for policy in config.policies:
            yield from (Way(BRANCHES, second, policy, k) for k in range(largest + 1))
            yield from (Way(BEST_CHAIN, second, policy, k) for k in several_k)
            for name in (BRANCHES, TWO_DRAFTER_TREE, BEST_CHAIN):
                yield from (Way(name, second, policy, k, nodes) for k in several_k for nodes in budgets)
            if config.k and (second, policy) == (D2SD, "paper"):
                yield from (Way(THREE_LEVELS, second, policy, config.k, nodes) for nodes in (None, *budgets))
