"""Filling blocks: the head's likeliest tokens against a full softmax and a sort."""

# T context tokens, N blocks, G block size, A alternatives, H hidden width, V vocabulary
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from vpd.stages.drafter import target_pieces
from vpd.stages.drafter.drafting import fill_blocks
from vpd.stages.drafter.model import Drafter
from vpd.stages.drafter.shape import DrafterShape
from vpd.stages.drafter.target_pieces import TargetPieces

N, G, H, V = 3, 5, 8, 17
ANCHORS = torch.tensor([1, 4, 6])
SHAPE = DrafterShape(
    num_layers=2,
    hidden_size=H,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    intermediate_size=6,
    rms_norm_eps=1e-6,
    rope_theta=100.0,
    max_position_embeddings=64,
    vocab_size=V,
    block_size=G,
    mask_token_id=V - 1,
    target_layer_ids=(0, 2),
    num_target_layers=4,
)


@pytest.fixture
def drafter() -> Drafter:
    generator = torch.Generator().manual_seed(0)
    drafter = Drafter(SHAPE)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.uniform_(-0.7, 0.7, generator=generator)
    return drafter


@pytest.fixture
def pieces() -> TargetPieces:
    generator = torch.Generator().manual_seed(1)
    embed_VH, head_VH = torch.randn(2, V, H, generator=generator)
    return TargetPieces(embed_VH, head_VH)


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(7, 2 * H, generator=generator), torch.randint(V, (N, G), generator=generator)


def ranked_tokens(
    state_H: list[float], head_VH: list[list[float]], cap: float | None = None
) -> list[tuple[float, int]]:
    """Every token with its probability, likeliest first."""
    logits = [math.fsum(a * b for a, b in zip(state_H, row, strict=True)) for row in head_VH]
    logits = [logit if cap is None else cap * math.tanh(logit / cap) for logit in logits]
    total = math.fsum(math.exp(logit) for logit in logits)
    return sorted(((math.exp(logit) / total, token) for token, logit in enumerate(logits)), reverse=True)


WANTED = {
    "all": torch.ones(N, G, dtype=torch.bool),
    "all-but-anchors": (torch.arange(G) > 0).expand(N, G),
    "past-prefixes": torch.arange(G) > torch.tensor([[0], [3], [4]]),
    "none": torch.zeros(N, G, dtype=torch.bool),
}


@pytest.mark.parametrize("positions_per_chunk", [1024, 4])
@pytest.mark.parametrize("num_alternatives", [1, V])
@pytest.mark.parametrize("wanted", WANTED)
def test_wanted_positions_get_the_most_likely_tokens_and_others_nothing(
    drafter: Drafter,
    pieces: TargetPieces,
    wanted: str,
    num_alternatives: int,
    positions_per_chunk: int,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(target_pieces, "LOGITS_ON_CPU", positions_per_chunk * V)
    features_TD, block_ids_NG = inputs()
    with torch.no_grad():
        context = drafter.context(features_TD)
        states_NGH = drafter(pieces.embed_VH[block_ids_NG], ANCHORS, context).tolist()
    tokens_NGA, probs_NGA = fill_blocks(
        drafter, pieces, context, block_ids_NG, ANCHORS, WANTED[wanted], num_alternatives
    )
    assert tokens_NGA.shape == probs_NGA.shape == (N, G, num_alternatives)
    assert (tokens_NGA.dtype, probs_NGA.dtype) == (torch.int64, torch.float32)
    for n in range(N):
        for k in range(G):
            expected = [(0.0, 0)] * num_alternatives
            if WANTED[wanted][n, k]:
                expected = ranked_tokens(states_NGH[n][k], pieces.head_VH.tolist())[:num_alternatives]
            assert tokens_NGA[n, k].tolist() == [token for _, token in expected]
            # Logits below 10 in float32: relative errors of probabilities are a few 1e-6.
            assert probs_NGA[n, k].tolist() == pytest.approx([prob for prob, _ in expected], rel=2e-5, abs=0)


def test_drafts_carry_no_gradient_and_leave_the_inputs_alone(drafter: Drafter, pieces: TargetPieces):
    features_TD, block_ids_NG = inputs()
    before = block_ids_NG.clone()
    context = drafter.context(features_TD)
    _, probs_NGA = fill_blocks(drafter, pieces, context, block_ids_NG, ANCHORS, WANTED["all"], 2)
    assert not probs_NGA.requires_grad
    assert torch.equal(block_ids_NG, before)


def test_the_targets_soft_cap_changes_the_probabilities(drafter: Drafter, pieces: TargetPieces):
    features_TD, block_ids_NG = inputs()
    with torch.no_grad():
        context = drafter.context(features_TD)
        states_NGH = drafter(pieces.embed_VH[block_ids_NG], ANCHORS, context).tolist()
    capped = replace(pieces, logits_soft_cap=1.5)
    _, probs_NGA = fill_blocks(drafter, capped, context, block_ids_NG, ANCHORS, WANTED["all"], V)
    for n in range(N):
        for k in range(G):
            expected = ranked_tokens(states_NGH[n][k], pieces.head_VH.tolist(), cap=1.5)
            assert probs_NGA[n, k].tolist() == pytest.approx([prob for prob, _ in expected], rel=2e-5, abs=0)
