"""Replayed alpha against decoding with the real target."""

from pathlib import Path

import pytest
import torch
from support.live import LiveDecoder
from transformers import AutoModelForCausalLM
from vpd.data.cache.cache import Cache
from vpd.stages.drafter.checkpoint import load_drafter
from vpd.stages.drafter.target_pieces import TargetPieces
from vpd.stages.evaluate.branches import POLICIES
from vpd.stages.evaluate.config import EvalConfig
from vpd.stages.evaluate.replay import Replay
from vpd.stages.extract.target import load_target
from vpd.stages.train.checkpoints import find_drafter

WAYS = ("first", "first_tree", "first_as_second", "d2sd")


def check_replay_equals_decoding(
    target_folder: Path,
    cache_folder: Path,
    first: Path,
    vp: Path,
    *,
    policy: str,
    num_sequences: int,
    max_new_tokens: int,
) -> dict[str, float]:
    cache = Cache.open(cache_folder)
    # Only sequences with a single response can be decoded from their prompt.
    single = [row for row in cache.rows if row.num_supervised == row.num_tokens + 1 - row.prompt_len]
    rows = single[:num_sequences]
    config = EvalConfig(k=3, policies=[policy])
    report = Replay(cache, find_drafter(first), find_drafter(vp), config).run(rows)
    target = load_target(str(target_folder))
    decoder = LiveDecoder(
        target=AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32).eval(),
        pieces=TargetPieces.load(cache.target_folder),
        first=load_drafter(find_drafter(first)),
        second=load_drafter(find_drafter(vp)),
        layer_ids=cache.manifest.layer_ids,
        eos_token_ids=target.eos_token_ids,
        policy=policy,
        k=config.k,
    )
    # Ways without a second draft do not depend on the policy.
    decoded = WAYS if policy == "paper" else WAYS[2:]
    cycles = dict.fromkeys(decoded, 0)
    for row in rows:
        tokens = cache.read(row).token_ids_S.tolist()
        for way in decoded:
            response, count = decoder.decode(tokens[: row.prompt_len], max_new_tokens, way)
            assert response == tokens[row.prompt_len :], "decoding with drafts must give the target's greedy tokens"
            cycles[way] += count
    assert {way: report.num_cycles[way] for way in decoded} == cycles
    return report.alpha


@pytest.mark.parametrize("policy", [*POLICIES])
def test_tiny_target(tiny_target_run: dict[str, Path], policy: str):
    alpha = check_replay_equals_decoding(**tiny_target_run, policy=policy, num_sequences=7, max_new_tokens=24)
    # Some drafts were accepted, and the second draft gained tokens; else the comparison shows little.
    assert alpha["first"] > 1.1
    assert alpha["d2sd"] > alpha["first"]


@pytest.mark.engine
@pytest.mark.smollm2
@pytest.mark.parametrize("policy", ["paper", "runner-up"])
def test_smollm2(smollm2_run: dict[str, Path], policy: str):
    alpha = check_replay_equals_decoding(**smollm2_run, policy=policy, num_sequences=2, max_new_tokens=24)
    assert alpha["first"] > 1.1
