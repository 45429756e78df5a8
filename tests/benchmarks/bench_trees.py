"""Trees of drafts: the time to grow trees for a thousand cycles against the time to draft for them."""

# N anchors, B branches per anchor, T context tokens, J drafted positions, A alternatives
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from bench_feed import make_shape
from report import Figure, interleave, median_ratio
from torch import Tensor
from vpd.data.cache.arrays import NUM_ALTERNATIVES
from vpd.stages.draft.conditionals import marginals, with_second
from vpd.stages.draft.passes import draft_all
from vpd.stages.draft.tree import Conditionals, grow
from vpd.stages.drafter.model import Drafter
from vpd.stages.drafter.target_pieces import TargetPieces
from workload import SMOLLM2

NAME = "trees"
CYCLES, CONTEXT, NODES, ROUNDS = 1000, 1024, 128, 3
VOCABULARY, LAYERS = 49152, 3
ASKED, BRANCHES = 4, 4


@torch.inference_mode()
def bench_trees(folder: Path) -> list[Figure]:
    """A first drafter of three layers in float32, block 16, over the anchors of one sequence."""
    shape = replace(make_shape(SMOLLM2, VOCABULARY), num_layers=LAYERS)
    generator = torch.Generator().manual_seed(0)
    drafter = Drafter(shape)
    drafter.init_weights(generator)
    table_VH = torch.randn(VOCABULARY, shape.hidden_size, generator=generator)
    pieces = TargetPieces(table_VH, table_VH)
    num_features = len(shape.target_layer_ids) * shape.hidden_size
    context = drafter.context(torch.randn(CONTEXT, num_features, generator=generator))
    anchors_N = torch.arange(CONTEXT - CYCLES, CONTEXT)
    anchor_ids_N = torch.randint(VOCABULARY, (CYCLES,), generator=generator)

    def draft() -> tuple[Tensor, Tensor]:
        return draft_all(drafter, pieces, context, torch.zeros_like(anchors_N), anchors_N, anchor_ids_N, 512)

    of_one = marginals(*draft())
    of_two = with_branches(of_one, generator)
    seconds = interleave(
        {
            "draft": timed(draft),
            "tree": timed(lambda: grow(of_one, NODES)),
            "two-drafter tree": timed(lambda: grow(of_two, NODES)),
        },
        ROUNDS,
    )
    return [
        Figure(
            benchmark=NAME,
            name=f"{name} of {NODES} nodes / first draft, time",
            data="SmolLM2-like",
            value=median_ratio(seconds[name], seconds["draft"]),
            target=1.0,
            less_is_better=True,
        )
        for name in ("tree", "two-drafter tree")
    ]


def with_branches(found: Conditionals, generator: torch.Generator) -> Conditionals:
    """The tables of asked lengths and of branches, with probabilities drawn at random."""
    shape_NBJ = (CYCLES, ASKED + BRANCHES, found.num_positions)
    tokens_NBJA = torch.randint(VOCABULARY, (*shape_NBJ, NUM_ALTERNATIVES), generator=generator)
    probs_NBJA = torch.randn(tokens_NBJA.shape, generator=generator).softmax(dim=3)
    shown_NBJ = found.tokens_NCJA[:, :1, :, 0].expand(shape_NBJ)
    visible_len_NB = torch.randint(found.num_positions, shape_NBJ[:2], generator=generator)
    return with_second(found, shown_NBJ, visible_len_NB, tokens_NBJA, probs_NBJA)


def timed(run: Callable[[], object]) -> Callable[[], float]:
    def measure() -> float:
        started = time.monotonic()
        run()
        return time.monotonic() - started

    return measure
