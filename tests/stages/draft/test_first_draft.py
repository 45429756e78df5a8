"""First drafts of a whole cache against drafts made one anchor at a time."""

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import EXTRACT, vpd
from vpd.data.cache.arrays import NOT_DRAFTED
from vpd.data.cache.cache import Cache
from vpd.data.cache.drafts import DraftedSequence, FirstDrafts
from vpd.data.cache.part import committed_parts
from vpd.data.cache.reader import CachedSequence
from vpd.data.errors import DrafterError
from vpd.stages.draft import first_draft
from vpd.stages.draft.config import DraftConfig
from vpd.stages.draft.first_draft import FirstDrafting
from vpd.stages.drafter.checkpoint import load_drafter
from vpd.stages.drafter.model import Drafter
from vpd.stages.drafter.target_pieces import TargetPieces
from vpd.stages.train.checkpoints import find_drafter


def slow_anchors(mask: list[bool], num_context: int) -> list[int]:
    return [a for a in range(min(num_context, len(mask) - 1)) if mask[a] and mask[a + 1]]


def check_drafts(sequence: CachedSequence, drafts: DraftedSequence, drafter: Drafter, pieces: TargetPieces) -> int:
    """Compares each anchor's row with a draft whose context ends before the anchor; returns the number of anchors."""
    tokens, mask = sequence.token_ids_S.tolist(), sequence.loss_mask_S.tolist()
    features = sequence.hidden_TKH.float().flatten(1)
    anchors = slow_anchors(mask, len(features))
    G = drafter.shape.block_size
    for a in range(len(features)):
        if a not in anchors:
            assert drafts.accept_len_T[a] == NOT_DRAFTED
            continue
        block = torch.tensor([[tokens[a]] + [drafter.shape.mask_token_id] * (G - 1)])
        with torch.inference_mode():
            hidden = drafter(pieces.embed_VH[block], torch.tensor([a]), drafter.context(features[:a]))
            best = (hidden[0, 1:] @ pieces.head_VH.T).softmax(dim=-1).topk(5, dim=-1)
        assert torch.equal(drafts.tokens_TGA[a].long(), best.indices)
        # Stored as float16.
        torch.testing.assert_close(drafts.probs_TGA[a].float(), best.values, rtol=2e-3, atol=1e-4)
        accepted = 0
        while (
            accepted < G - 1
            and a + accepted + 1 < len(tokens)
            and all(mask[a : a + accepted + 2])
            and best.indices[accepted, 0] == tokens[a + accepted + 1]
        ):
            accepted += 1
        assert drafts.accept_len_T[a] == accepted
    return len(anchors)


def test_every_anchor_is_drafted_from_the_states_before_it(drafted_cache: Path, first_run: Path):
    cache = Cache.open(drafted_cache)
    drafts = FirstDrafts.open(cache)
    drafter, pieces = load_drafter(find_drafter(first_run)), TargetPieces.load(cache.target_folder)
    count = sum(check_drafts(cache.read(row), drafts.read(row), drafter, pieces) for row in cache.rows)
    assert count > 100


def test_a_stride_leaves_the_anchors_between_out(
    tiny_cache: Path, first_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(first_draft, "ANCHORS_PER_PASS", 2)
    folder = tmp_path / "cache"
    shutil.copytree(tiny_cache, folder)
    cache = Cache.open(folder)
    drafts = FirstDrafting(find_drafter(first_run), DraftConfig(stride=3)).run(cache)
    for row in cache.rows:
        anchors = slow_anchors(cache.read(row).loss_mask_S.tolist(), row.num_tokens)
        drafted = (drafts.read(row).accept_len_T != NOT_DRAFTED).nonzero().flatten().tolist()
        assert drafted == anchors[::3]
    with pytest.raises(DrafterError, match="stride 3"):
        FirstDrafting(find_drafter(first_run), DraftConfig(stride=1)).run(cache)


def test_bfloat16_drafts_are_those_of_float32_but_for_rounding(drafted_cache: Path, first_run: Path, tmp_path: Path):
    folder = tmp_path / "cache"
    shutil.copytree(drafted_cache, folder, ignore=shutil.ignore_patterns("drafts"))
    cache = Cache.open(folder)
    rounded = FirstDrafting(find_drafter(first_run), DraftConfig(dtype="bfloat16")).run(cache)
    precise = FirstDrafts.open(Cache.open(drafted_cache))
    differing = 0
    for row in cache.rows:
        ours, theirs = rounded.read(row), precise.read(row)
        assert torch.equal(ours.accept_len_T == NOT_DRAFTED, theirs.accept_len_T == NOT_DRAFTED)
        torch.testing.assert_close(ours.probs_TGA.float(), theirs.probs_TGA.float(), rtol=0.1, atol=0.02)
        differing += int((ours.probs_TGA != theirs.probs_TGA).sum())
    assert differing


def test_what_another_process_drafts_meanwhile_is_not_drafted_again(
    first_run: Path, tiny_llama: Path, tiny_prompts: Path, tmp_path: Path
):
    for limit in (4, 8, 12):  # each run adds a part
        vpd("extract", tiny_llama, tiny_prompts, "--out", tmp_path / "cache", **EXTRACT, limit=limit)
    cache = Cache.open(tmp_path / "cache")
    first, second = (FirstDrafting(find_drafter(first_run), DraftConfig(stride=4)) for _ in range(2))
    began = False

    def begin_another(num_anchors: int) -> None:
        nonlocal began
        if not began:
            began = True
            second.run(cache)

    drafts = first.run(cache, begin_another)
    assert len(cache.parts) == 3
    assert sorted(drafts.parts) == sorted(cache.parts)
    committed = committed_parts(cache.storage, drafts.root)
    assert len(committed) == 3 + 1  # both have written one part


@pytest.mark.parametrize("has_room", [True, False])
def test_drafting_beside_or_after_extraction_gives_the_same_drafts(
    has_room: bool,
    drafted_cache: Path,
    first_run: Path,
    tiny_llama: Path,
    tiny_prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    out, beside = tmp_path / "cache", []
    monkeypatch.setattr("vpd.pipeline.extraction.SECONDS_BETWEEN_DRAFTINGS", 0.01)
    monkeypatch.setattr("vpd.pipeline.commands.extract.can_draft_beside", lambda is_engine_elsewhere: has_room)
    run = FirstDrafting.run

    def noted(drafting: FirstDrafting, cache: Cache, *args: Any, **settings: Any) -> FirstDrafts:
        drafts = run(drafting, cache, *args, **settings)
        if threading.current_thread() is not threading.main_thread():
            beside.append(len(drafts.parts))
        return drafts

    monkeypatch.setattr(FirstDrafting, "run", noted)
    vpd("extract", tiny_llama, tiny_prompts, "--out", out, "--first-drafter", first_run, **EXTRACT)
    assert bool(beside) == has_room
    after, during = Cache.open(drafted_cache), Cache.open(out)
    rows = {row.seq_id: row for row in after.rows}
    for row in during.rows:
        theirs, ours = FirstDrafts.open(after).read(rows[row.seq_id]), FirstDrafts.open(during).read(row)
        assert torch.equal(ours.tokens_TGA, theirs.tokens_TGA)
        assert torch.equal(ours.accept_len_T, theirs.accept_len_T)


def test_no_drafter_is_loaded_where_nothing_is_left(
    drafted_cache: Path, first_run: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*arguments: object, **settings: object) -> None:
        raise AssertionError("the drafter was loaded")

    monkeypatch.setattr(first_draft, "load_drafter", refuse)
    drafting = FirstDrafting(find_drafter(first_run), DraftConfig(device="cpu"))
    assert not drafting.run(Cache.open(drafted_cache)).missing_parts()
