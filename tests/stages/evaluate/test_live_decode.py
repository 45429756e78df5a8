"""Replayed alpha against decoding with the real target, which is tiny here."""

import json
import shutil
from pathlib import Path

import pytest
from support.live import check_replay_equals_decoding
from support.tiny import vpd
from vpd.stages.drafter.checkpoint import CONFIG
from vpd.stages.evaluate.branches import POLICIES
from vpd.stages.train.checkpoints import find_drafter


@pytest.mark.parametrize(
    ("way", "policy"),
    [
        *(("branches", policy) for policy in POLICIES),
        ("two-drafter tree", "paper"),
        ("two-drafter tree", "reranked"),
        ("best chain", "reranked"),
    ],
)
def test_tiny_target(tiny_target_run: dict[str, Path], way: str, policy: str):
    alpha = check_replay_equals_decoding(tiny_target_run, way, policy=policy, num_sequences=7, max_new_tokens=24)
    # Some drafts were accepted, and the second draft gained tokens; else the comparison shows little.
    assert alpha["first"] > 1.1
    assert alpha["d2sd"] > alpha["first"]


@pytest.mark.parametrize("block_size", [3, 7])
def test_a_second_drafter_of_another_block_size(tiny_target_run: dict[str, Path], tmp_path: Path, block_size: int):
    """The weights do not depend on the block size, so the trained drafter works at another one."""
    vp = shutil.copytree(find_drafter(tiny_target_run["vp"]), tmp_path / "vp")
    config = json.loads((vp / CONFIG).read_text())
    (vp / CONFIG).write_text(json.dumps(config | {"block_size": block_size}))
    run = tiny_target_run | {"vp": vp}
    alpha = check_replay_equals_decoding(run, policy="reranked", num_sequences=5, max_new_tokens=24)
    assert alpha["d2sd"] > alpha["first"]
    flags = {"first_drafter": run["first"], "drafter": vp, "target": run["target_folder"]}
    for way in ("two-drafter tree", "branches", "best chain"):
        live = vpd("eval", run["cache_folder"], **flags, holdout=1, live_prompts=5, k=3, max_k=3, way=way)["live"]
        assert (live["num_prompts"], live["num_identical"]) == (5, 5)
        assert live["alpha"] == live["replayed_alpha"]
