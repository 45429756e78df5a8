"""Drafts of one sequence from Python: the stored first drafts, and the second drafts of a slow decode."""

# N anchors, J drafted positions
from pathlib import Path

import pytest
import torch
from support.tiny_world import SECONDS, World
from vpd.data.cache.cache import Cache
from vpd.data.cache.drafts import FirstDrafts
from vpd.stages.draft import one_sequence
from vpd.stages.draft.one_sequence import draft_blocks, redraft_blocks
from vpd.stages.drafter.blocks import NO_TOKEN, anchors_of
from vpd.stages.drafter.checkpoint import load_drafter
from vpd.stages.drafter.target_pieces import TargetPieces
from vpd.stages.train.checkpoints import find_drafter


@pytest.mark.parametrize("blocks_per_pass", [256, 3])
def test_first_drafts_are_those_that_the_stage_stores(
    blocks_per_pass: int, drafted_cache: Path, first_run: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(one_sequence, "BLOCKS_PER_PASS", blocks_per_pass)
    cache = Cache.open(drafted_cache)
    drafts, pieces = FirstDrafts.open(cache), TargetPieces.load(cache.target_folder)
    drafter = load_drafter(find_drafter(first_run))
    for row in cache.rows:
        sequence, stored = cache.read(row), drafts.read(row)
        anchors_N = anchors_of(sequence.loss_mask_S, row.num_tokens)
        tokens_NJA, probs_NJA = draft_blocks(drafter, pieces, sequence, anchors_N)
        assert torch.equal(tokens_NJA, stored.tokens_TGA[anchors_N].long())
        # Stored as float16.
        torch.testing.assert_close(probs_NJA, stored.probs_TGA[anchors_N].float(), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("second", [pytest.param(second, id=name) for name, second in SECONDS.items()])
def test_second_drafts_are_those_of_the_slow_decode(second: str, world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(one_sequence, "BLOCKS_PER_PASS", 4)
    replay = world.replay(second)
    assert replay.first is not None
    assert replay.second is not None
    sequence = world.sequence("two-answers")
    anchors = world.anchors(["two-answers"])
    positions = [anchor.position for anchor in anchors]
    tokens_NJA, _ = draft_blocks(replay.first, replay.pieces, sequence, positions)
    J = tokens_NJA.shape[1]
    visible_lens = [n % (J + 1) for n in range(len(anchors))]
    found = redraft_blocks(
        replay.second, replay.pieces, sequence, positions, tokens_NJA[..., 0], torch.tensor(visible_lens)
    )
    slow = world.slow("two-answers", second)
    for anchor, draft, visible_len, candidate in zip(
        anchors, tokens_NJA[..., 0].tolist(), visible_lens, found.tolist(), strict=True
    ):
        expected = slow.complete(anchor.position, (anchor.token, *draft[:visible_len]))
        assert [token for token in candidate if token != NO_TOKEN] == expected


def test_no_anchors_give_no_drafts(world: World):
    replay = world.replay("larger")
    assert replay.first is not None
    assert replay.second is not None
    sequence = world.sequence("two-answers")
    tokens_NJA, probs_NJA = draft_blocks(replay.first, replay.pieces, sequence, [])
    assert tokens_NJA.shape == probs_NJA.shape == (0, replay.first.shape.block_size - 1, 5)
    found = redraft_blocks(replay.second, replay.pieces, sequence, [], tokens_NJA[..., 0], torch.zeros(0).long())
    assert found.shape == (0, replay.second.shape.block_size - 1)


@pytest.mark.parametrize("anchor", [-1, 1000])
def test_an_anchor_without_a_state_is_refused(anchor: int, world: World):
    replay = world.replay()
    assert replay.first is not None
    with pytest.raises(ValueError, match=r"expected anchors in 0\.\."):
        draft_blocks(replay.first, replay.pieces, world.sequence("two-answers"), [anchor])
