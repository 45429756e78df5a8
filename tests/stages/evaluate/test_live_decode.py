"""Replayed alpha against decoding with the real target, which is tiny here."""

from pathlib import Path

import pytest
from support.live import check_replay_equals_decoding
from vpd.stages.evaluate.branches import POLICIES


@pytest.mark.parametrize("policy", [*POLICIES])
def test_tiny_target(tiny_target_run: dict[str, Path], policy: str):
    alpha = check_replay_equals_decoding(**tiny_target_run, policy=policy, num_sequences=7, max_new_tokens=24)
    # Some drafts were accepted, and the second draft gained tokens; else the comparison shows little.
    assert alpha["first"] > 1.1
    assert alpha["d2sd"] > alpha["first"]
