"""Trees of drafts against trees that are grown path by path."""

# N anchors, C tables per anchor, J drafted positions, A alternatives, M nodes of a tree
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.slow_tree import Table, next_tokens, slow_best_chain, slow_tree
from vpd.stages.draft.conditionals import marginals
from vpd.stages.draft.tree import ABSENT, ROOT, Conditionals, Tree, best_chain, grow
from vpd.stages.drafter.blocks import NO_TOKEN

N, J, A, V = 3, 4, 3, 5


def random_conditionals(seed: int, num_tables: int, sharpness: float, ties: bool) -> Conditionals:
    """Tables whose beginnings follow likely paths, so that trees use them; some rows are silent."""
    generator = torch.Generator().manual_seed(seed)
    logits_NCJV = sharpness * torch.randn(N, num_tables, J, V, generator=generator)
    probs_NCJA, tokens_NCJA = logits_NCJV.softmax(dim=-1).topk(A, dim=-1)
    if ties:
        probs_NCJA = (probs_NCJA * 4).ceil() / 4
    probs_NCJA[torch.rand(N, num_tables, J, generator=generator) < 0.1] = 0
    visible_len_NC = torch.randint(J + 1, (N, num_tables), generator=generator)
    visible_len_NC[:, 0] = 0
    rank_NCJ = torch.randint(A, (N, num_tables, J), generator=generator).clamp(max=1)
    shown_NCJ = tokens_NCJA[:, :1].expand_as(tokens_NCJA).gather(3, rank_NCJ[..., None])[..., 0]
    return Conditionals(tokens_NCJA, probs_NCJA, shown_NCJ, visible_len_NC)


def tables_of(conditionals: Conditionals, n: int) -> list[Table]:
    found = []
    for c in range(conditionals.tokens_NCJA.shape[1]):
        beginning = conditionals.shown_NCJ[n, c, : conditionals.visible_len_NC[n, c]].tolist()
        rows = zip(conditionals.probs_NCJA[n, c].tolist(), conditionals.tokens_NCJA[n, c].tolist(), strict=True)
        found.append(Table(tuple(beginning), [list(zip(*row, strict=True)) for row in rows]))
    return found


def paths_of(tree: Tree, n: int) -> list[tuple[int, ...]]:
    """The path to each node, in order; parents come first."""
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens_NM[n].tolist(), tree.parents_NM[n].tolist(), strict=True):
        if parent != ABSENT:
            found.append((*(() if parent == ROOT else found[parent]), token))
    return found


def score(tables: list[Table], path: tuple[int, ...]) -> float:
    rows = [{token: prob for prob, token in next_tokens(tables, path[:depth])} for depth in range(len(path))]
    return math.prod(row[token] for row, token in zip(rows, path, strict=True))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 6), st.sampled_from([0.5, 2.0]), st.sampled_from([1, 2, 7, 40, 200]))
def test_a_tree_holds_the_paths_of_largest_score(seed: int, num_tables: int, sharpness: float, num_nodes: int):
    conditionals = random_conditionals(seed, num_tables, sharpness, ties=False)
    tree = grow(conditionals, num_nodes)
    chain_NJ = best_chain(conditionals)
    for n in range(N):
        tables = tables_of(conditionals, n)
        found = paths_of(tree, n)
        assert found == slow_tree(tables, num_nodes)
        assert [len(path) for path in found] == tree.depths_NM[n, : len(found)].tolist()
        scores = tree.log_scores_NM[n, : len(found)].exp().tolist()
        assert scores == pytest.approx([score(tables, path) for path in found], rel=1e-4)
        absent = slice(len(found), None)
        assert set(tree.tokens_NM[n, absent].tolist()) <= {NO_TOKEN}
        greedy = [token for token in chain_NJ[n].tolist() if token != NO_TOKEN]
        assert [path[-1] for path in slow_best_chain_of(tables)] == greedy


def slow_best_chain_of(tables: list[Table]) -> list[tuple[int, ...]]:
    """Without tokens of probability 0, which stand for the end of a drafter's block."""
    silent_ends = [Table(each.beginning, [row if row[0][0] else [] for row in each.rows]) for each in tables]
    return slow_best_chain(silent_ends)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 6), st.sampled_from([3, 10, 30]))
def test_among_equal_scores_trees_are_still_trees_and_beginnings_of_larger_ones(
    seed: int, num_tables: int, num_nodes: int
):
    conditionals = random_conditionals(seed, num_tables, 2.0, ties=True)
    small, large = grow(conditionals, num_nodes), grow(conditionals, 2 * num_nodes)
    for n in range(N):
        tables = tables_of(conditionals, n)
        found = paths_of(small, n)
        assert found == paths_of(large, n)[: len(found)]
        assert len(set(found)) == len(found)
        assert all(path[:-1] in {(), *found[:i]} for i, path in enumerate(found))
        expected = [score(tables, path) for path in slow_tree(tables, num_nodes)]
        assert [score(tables, path) for path in found] == pytest.approx(expected)


def test_one_drafter_alone_has_one_table():
    tokens_NJA = torch.arange(N * J * A).view(N, J, A)
    probs_NJA = torch.tensor([0.6, 0.3, 0.1]).expand(N, J, A)
    paths = paths_of(grow(marginals(tokens_NJA, probs_NJA), 4), 0)
    # 0.6, 0.36, 0.3, then 0.216.
    assert paths == [(0,), (0, 3), (1,), (0, 3, 6)]
