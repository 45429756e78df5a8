"""Checkpoints with copies of the target's weights beside the drafter's."""

# H hidden width
from pathlib import Path

import pytest
import torch
from support.checkpoints import edit_weights, save_pieces
from support.tiny import SHAPE
from vpd.data.errors import DrafterError
from vpd.stages.drafter.checkpoint import load_drafter

H = SHAPE.hidden_size
COPIES = {"embed_tokens.weight": 0, "lm_head.weight": 1, "verifier_lm_head.weight": 1, "verifier_norm.weight": 2}
"""Names in a checkpoint, and which of embedding, head and norm each is a copy of."""


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("copied", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_copies_of_the_targets_weights_are_left_out(
    stored: torch.dtype, copied: torch.dtype, tied: bool, saved: Path, tmp_path: Path
):
    exact = [*save_pieces(tmp_path / "exact", tied=tied).values()]
    if tied:
        exact.insert(0, exact[0])
    expected = load_drafter(saved).state_dict()
    save_pieces(tmp_path / "target", stored, tied)
    if copied != torch.float32:  # else the piece is a rounding of the copy
        exact = [piece.to(stored) for piece in exact]
    edit_weights(
        saved, lambda weights: weights.update({name: exact[i].to(copied).clone() for name, i in COPIES.items()})
    )
    found = load_drafter(saved, target_folder=tmp_path / "target").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("name", COPIES)
def test_other_weights_than_the_targets_are_refused_by_name(name: str, saved: Path, tmp_path: Path):
    pieces = [*save_pieces(tmp_path / "target").values()]
    other = pieces[COPIES[name]].clone()
    other.view(-1)[3] += 0.01
    copies = {key: pieces[i].clone() for key, i in COPIES.items()} | {name: other}
    edit_weights(saved, lambda weights: weights.update(copies))
    with pytest.raises(DrafterError, match=rf"model\.safetensors: {name}: expected a copy of the target's weight"):
        load_drafter(saved, target_folder=tmp_path / "target")


def test_a_copy_of_another_vocabulary_is_refused(saved: Path, tmp_path: Path):
    pieces = save_pieces(tmp_path / "target")
    edit_weights(saved, lambda weights: weights.update({"lm_head.weight": pieces["lm_head.weight"][:19].clone()}))
    with pytest.raises(DrafterError, match=r"lm_head\.weight: expected a copy"):
        load_drafter(saved, target_folder=tmp_path / "target")
    with pytest.raises(DrafterError, match="Name the cache"):
        load_drafter(saved)
