"""Drafting and completing branches of packed sequences, against one block at a time."""

# R branches, N anchors, J drafted positions
import pytest
import torch
from support.slow_decode import NUM_ALTERNATIVES
from support.tiny_world import SECONDS, Anchor, V, World
from torch import Tensor
from vpd.stages.draft.passes import OpenBranches, complete_branches, draft_pass
from vpd.stages.drafter.blocks import NO_TOKEN
from vpd.stages.drafter.model import Context, Drafter

TOGETHER = ("two-answers", "short-answers", "answer-given-in-full")
"""Sequences that are packed, in this order."""


def packed(world: World, drafter: Drafter, seq_ids: tuple[str, ...]) -> Context:
    features = [world.sequence(seq_id).hidden_TKH.flatten(1).float() for seq_id in seq_ids]
    return drafter.context(torch.cat(features), [len(each) for each in features])


def count(anchors: list[Anchor], seq_ids: tuple[str, ...]) -> list[int]:
    return [sum(anchor.seq_id == seq_id for anchor in anchors) for seq_id in seq_ids]


def column(values: list[int]) -> Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize("seq_ids", [pytest.param(TOGETHER, id="packed"), pytest.param(TOGETHER[:1], id="alone")])
def test_first_drafts(world: World, seq_ids: tuple[str, ...]):
    replay = world.replay()
    assert replay.first is not None
    anchors = world.anchors(seq_ids)
    tokens, probs = draft_pass(
        replay.first,
        replay.pieces,
        packed(world, replay.first, seq_ids),
        count(anchors, seq_ids) if len(seq_ids) > 1 else None,
        column([anchor.position for anchor in anchors]),
        column([anchor.token for anchor in anchors]),
        NUM_ALTERNATIVES,
    )
    best = [[position[:NUM_ALTERNATIVES] for position in world.ranked(anchor)] for anchor in anchors]
    assert tokens.tolist() == [[[token for _, token in position] for position in ranked] for ranked in best]
    # Float32 sums in another order.
    expected = torch.tensor([[[prob for prob, _ in position] for position in ranked] for ranked in best])
    torch.testing.assert_close(probs, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shown_len", [2, 4, 9])
@pytest.mark.parametrize("second", [pytest.param(second, id=name) for name, second in SECONDS.items()])
def test_completed_branches(world: World, second: str, shown_len: int):
    """All visible lengths; the excluded token is none, the best one, or another one."""
    drafter = world.replay(second).second
    assert drafter is not None
    generator = torch.Generator().manual_seed(shown_len)
    J = drafter.shape.block_size - 1
    cases, expected = [], []
    for anchor in world.anchors(TOGETHER)[::3]:
        slow = world.slow(anchor.seq_id, second)
        shown = torch.randint(V, (shown_len,), generator=generator).tolist()
        for visible_len in range(shown_len + 1):
            visible = (anchor.token, *shown[:visible_len])
            free = slow.complete(anchor.position, visible)
            best = free[visible_len] if visible_len < J else 0
            for excluded in (None, best, (best + 1) % V):
                cases.append((anchor, shown, visible_len, NO_TOKEN if excluded is None else excluded))
                expected.append(slow.complete(anchor.position, visible, excluded))
                if visible_len < J:
                    assert (expected[-1][visible_len] != best) == (excluded == best)
    anchors, shown, visible_lens, excluded = map(list, zip(*cases, strict=True))
    found = complete_branches(
        drafter,
        world.replay().pieces,
        packed(world, drafter, TOGETHER),
        count(anchors, TOGETHER),
        OpenBranches(
            column([anchor.position for anchor in anchors]),
            column([anchor.token for anchor in anchors]),
            torch.tensor(shown),
            column(visible_lens),
            column(excluded),
        ),
    )
    assert [[token for token in candidate if token != NO_TOKEN] for candidate in found.tolist()] == expected
