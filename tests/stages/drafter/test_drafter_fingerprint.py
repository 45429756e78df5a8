"""What a drafter's fingerprint covers."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.checkpoints import change_config, make_drafter, save, save_pieces
from vpd.stages.drafter.checkpoint import drafter_fingerprint


def test_fingerprints_stay_those_of_earlier_caches(tmp_path: Path):
    """First drafts of existing caches are found by it: a hash of this text and of the file of weights."""
    described = (
        "DrafterShape(num_layers=2, hidden_size=8, num_attention_heads=4, num_key_value_heads=2, head_dim=6, "
        "intermediate_size=10, rms_norm_eps=1e-05, rope_theta=500.0, max_position_embeddings=64, vocab_size=20, "
        "block_size=5, mask_token_id=19, target_layer_ids=(1, 3, 5), num_target_layers=8)"
    )
    saved = save(tmp_path / "drafter", make_drafter())
    content = (saved / "model.safetensors").read_bytes()
    assert drafter_fingerprint(saved) == hashlib.sha256(described.encode() + content).hexdigest()[:16]


def test_the_fingerprint_covers_what_the_target_does_to_its_embedding(saved: Path, tmp_path: Path):
    save_pieces(tmp_path / "target")
    found = [drafter_fingerprint(saved), drafter_fingerprint(saved, tmp_path / "target")]
    for facts in ({"embedding_multiplier": 2.0}, {"embedding_multiplier": 3.0}, {"logits_soft_cap": 30.0}):
        (tmp_path / "target/pieces.json").write_text(json.dumps(facts))
        found.append(drafter_fingerprint(saved, tmp_path / "target"))
    assert found[0] == found[1]
    assert len({*found}) == 4


def test_the_fingerprint_is_that_of_the_content(saved: Path, tmp_path: Path):
    fingerprint = drafter_fingerprint(saved)
    assert len(fingerprint) == 16
    assert int(fingerprint, 16) >= 0
    assert drafter_fingerprint(save(tmp_path / "elsewhere", make_drafter())) == fingerprint


@pytest.mark.parametrize("place", [-1, -1001], ids=["last-weight", "inner-weight"])
def test_one_weight_changes_the_fingerprint(saved: Path, place: int):
    before = drafter_fingerprint(saved)
    # Cloned, since `load_file` may return views of the file.
    weights = {name: value.clone() for name, value in load_file(saved / "model.safetensors").items()}
    content = bytearray((saved / "model.safetensors").read_bytes())
    content[place] ^= 1
    (saved / "model.safetensors").write_bytes(content)
    changed = load_file(saved / "model.safetensors")
    assert sum(int((changed[name] != value).sum()) for name, value in weights.items()) == 1
    assert drafter_fingerprint(saved) != before


def test_the_fingerprint_covers_large_files_to_their_end(saved: Path):
    content = bytearray(3 << 20)
    fingerprints = set()
    for place in (0, 1 << 20, -1):
        content[place] += 1
        (saved / "model.safetensors").write_bytes(content)
        fingerprints.add(drafter_fingerprint(saved))
    assert len(fingerprints) == 3


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda config: config["dflash_config"].update(mask_token_id=18), id="mask-token"),
        pytest.param(lambda config: config["dflash_config"].update(target_layer_ids=[1, 3, 6]), id="context-layers"),
        pytest.param(lambda config: config.update(block_size=4), id="block-size"),
        pytest.param(
            lambda config: config.update(rope_theta=600.0, rope_parameters={"rope_theta": 600.0}), id="rope-theta"
        ),
        pytest.param(lambda config: config.update(rms_norm_eps=1e-6), id="norm-eps"),
        pytest.param(lambda config: config.update(num_attention_heads=2, num_key_value_heads=1), id="heads"),
    ],
)
def test_a_setting_that_decides_drafts_changes_the_fingerprint(saved: Path, change: Callable[..., object]):
    before = drafter_fingerprint(saved)
    change_config(saved, change)
    assert drafter_fingerprint(saved) != before
