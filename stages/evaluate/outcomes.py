"""What every way of decoding commits and costs at the anchors of a batch."""

# N anchors, C ways of decoding, X kinds of cost, J drafted positions, A alternatives
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...data.cache.arrays import NUM_ALTERNATIVES
from ..draft.conditionals import marginals
from ..draft.tree import Conditionals, best_chain, grow
from .nodes import TreeOutcomes, UnitedOutcomes, chain_within
from .resampled import resampled_drafts
from .second_drafts import Blocks, Redraft, SecondDrafts, show_second_drafts
from .ways import BEST_CHAIN, BRANCHES, CHAIN, RESAMPLED, THREE_LEVELS, TREE, TWO_DRAFTER_TREE, Way

COSTS = ("verified", "second_passes", "second_blocks", "head_rows")
"""What a cycle costs beside the first drafter's block: verified nodes; passes of the second drafter one after another;
blocks in these passes; positions of both drafters that need a row of the head."""


class Outcomes:
    """Accept lengths and costs by way, for N anchors."""

    def __init__(self, ways: Sequence[Way], recorded_NJ: Tensor):
        self._ways, self._recorded_NJ = ways, recorded_NJ
        self._found: dict[Way, tuple[Tensor, ...]] = {}

    def add_first(self, tokens_NJA: Tensor, probs_NJA: Tensor, anchors_N: Tensor) -> None:
        """The ways that the first drafter takes alone.

        Args:
            anchors_N: positions in their sequences.
        """
        none_N = torch.zeros_like(anchors_N)
        passes = none_N, none_N, torch.full_like(anchors_N, tokens_NJA.shape[1])
        draft_NJ = tokens_NJA[..., 0]
        for way in self._named(CHAIN):
            self._found[way] = *chain_within(draft_NJ, self._recorded_NJ, way.nodes), *passes
        if resampled := self._named(RESAMPLED):
            stored = tokens_NJA[..., :NUM_ALTERNATIVES], probs_NJA[..., :NUM_ALTERNATIVES]
            drawn_NBJ = resampled_drafts(*stored, anchors_N, max(way.k for way in resampled))
            united = UnitedOutcomes(torch.cat([draft_NJ[:, None], drawn_NBJ], dim=1), self._recorded_NJ)
            for way in resampled:
                self._found[way] = *united.within(1 + way.k, way.nodes), *passes
        self._add_trees(self._named(TREE), marginals(tokens_NJA, probs_NJA), passes)

    def add_second(self, second: str, policy: str, drafts: SecondDrafts) -> None:
        """The ways in which a second drafter takes part."""
        branches = self._named(BRANCHES, second, policy)
        united = UnitedOutcomes(drafts.candidates(), self._recorded_NJ) if branches else None
        for way in branches:
            assert united is not None
            found = united.within(drafts.num_candidates(way.k), way.nodes)
            self._found[way] = *found, *drafts.passes(way.k)
        by_both = (*self._named(TWO_DRAFTER_TREE, second, policy), *self._named(BEST_CHAIN, second, policy))
        for k in sorted({way.k for way in by_both}):
            conditionals, passes = drafts.conditionals(k), drafts.passes(k)
            self._add_trees(self._named(TWO_DRAFTER_TREE, second, policy, k), conditionals, passes)
            if chains := self._named(BEST_CHAIN, second, policy, k):
                chain_NJ = best_chain(conditionals)
                for way in chains:
                    self._found[way] = *chain_within(chain_NJ, self._recorded_NJ, way.nodes), *passes

    def add_third(self, second: str, policy: str, drafts: SecondDrafts, redraft: Redraft) -> None:
        """The ways with a third level of drafts; it costs one more pass of the second drafter."""
        ways = self._named(THREE_LEVELS, second, policy)
        for k in sorted({way.k for way in ways}):
            shown = show_second_drafts(drafts, k)
            third = Blocks(shown, *redraft(shown))
            third_NBJ, rows_NB = third.completed(), third.num_rows()
            second_NBJ = drafts.candidates()[:, : drafts.num_candidates(k)]
            united = UnitedOutcomes(torch.cat([second_NBJ, third_NBJ], dim=1), self._recorded_NJ)
            passes_N, blocks_N, rows_N = drafts.passes(k)
            passes = passes_N + 1, blocks_N + (rows_NB > 0).sum(dim=1), rows_N + rows_NB.sum(dim=1)
            for way in self._named(THREE_LEVELS, second, policy, k):
                self._found[way] = *united.within(second_NBJ.shape[1] + third_NBJ.shape[1], way.nodes), *passes

    def accept_lens(self) -> np.ndarray:
        """Accept lengths [N, C]."""
        return torch.stack([self._found[way][0] for way in self._ways], dim=1).cpu().numpy()

    def costs(self) -> np.ndarray:
        """Costs [N, C, X] of a cycle, see `COSTS`."""
        costs = [torch.stack(self._found[way][1:], dim=1) for way in self._ways]
        return torch.stack(costs, dim=1).cpu().numpy()

    def _add_trees(self, ways: Sequence[Way], conditionals: Conditionals, passes: tuple[Tensor, ...]) -> None:
        """One growth serves all numbers of nodes."""
        if ways:
            grown = TreeOutcomes(grow(conditionals, max(way.nodes or 0 for way in ways)), self._recorded_NJ)
            for way in ways:
                self._found[way] = *grown.within(way.nodes or 0), *passes

    def _named(self, *wanted: object) -> list[Way]:
        """The ways of a name, and perhaps of a second drafter, a policy and a number of branches."""
        return [way for way in self._ways if way[: len(wanted)] == wanted]
