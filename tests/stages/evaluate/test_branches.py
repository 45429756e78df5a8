"""Candidates of a decoding cycle against enumerated hypotheses."""

# N anchors, G block size, A alternatives kept per position (the first is the draft), B branches
import math

import pytest
import torch
from torch import Tensor
from vpd.stages.evaluate.branches import boundary_posterior, paper_prefixes, swapped_candidates

# Scores of random float32 probabilities: no two are equal, so the order of the best is certain.
SHAPES = [
    pytest.param(6, 7, 5, id="block-of-8"),
    pytest.param(3, 1, 4, id="block-of-2"),
    pytest.param(4, 4, 2, id="one-alternative"),
]


def random_drafts(N: int, num_positions: int, A: int) -> tuple[Tensor, Tensor]:
    """Tokens that tell their place, and probabilities that fall from one alternative to the next."""
    generator = torch.Generator().manual_seed(N)
    tokens_NGA = torch.arange(N * num_positions * A).view(N, num_positions, A)
    probs_NGA = torch.rand(N, num_positions, A + 2, generator=generator).pow(3)
    probs_NGA = (probs_NGA / probs_NGA.sum(dim=2, keepdim=True)).sort(dim=2, descending=True).values
    return tokens_NGA, probs_NGA[..., :A]


def slow_posterior(confidences: list[float]) -> list[float]:
    """r(i): the first i draft tokens are right and the next one is wrong."""
    return [math.prod(confidences[:i]) * (1 - confidences[i]) for i in range(len(confidences))]


@pytest.mark.parametrize(("N", "num_positions", "A"), SHAPES)
def test_the_posterior_is_the_chance_that_the_draft_fails_right_there(N: int, num_positions: int, A: int):
    confidence_NG = random_drafts(N, num_positions, A)[1][..., 0]
    posterior = boundary_posterior(confidence_NG)
    for found, confidences in zip(posterior.tolist(), confidence_NG.tolist(), strict=True):
        assert found == pytest.approx(slow_posterior(confidences), rel=1e-5)
        # Some boundary, or none.
        assert sum(found) + math.prod(confidences) == pytest.approx(1)


def test_a_certain_draft_has_no_boundary_before_the_doubt():
    posterior = boundary_posterior(torch.tensor([[1.0, 1.0, 0.25, 0.5]]))
    assert posterior.tolist() == [[0.0, 0.0, 0.75, 0.125]]


@pytest.mark.parametrize("num_branches", [0, 1, 3, 50])
@pytest.mark.parametrize(("N", "num_positions", "A"), SHAPES)
def test_the_papers_prefixes_are_the_likeliest_boundaries(N: int, num_positions: int, A: int, num_branches: int):
    confidence_NG = random_drafts(N, num_positions, A)[1][..., 0]
    prefixes_NB = paper_prefixes(confidence_NG, num_branches)
    assert prefixes_NB.shape == (N, min(num_branches, num_positions))
    for found, confidences in zip(prefixes_NB.tolist(), confidence_NG.tolist(), strict=True):
        posterior = slow_posterior(confidences)
        ranked = sorted(range(num_positions), key=lambda i: posterior[i], reverse=True)
        assert found == ranked[:num_branches]


@pytest.mark.parametrize("num_branches", [0, 1, 4, 100])
@pytest.mark.parametrize(("N", "num_positions", "A"), SHAPES)
def test_swapped_candidates_are_the_likeliest_single_swaps(N: int, num_positions: int, A: int, num_branches: int):
    tokens_NGA, probs_NGA = random_drafts(N, num_positions, A)
    before = tokens_NGA.clone()
    candidates_NBG = swapped_candidates(tokens_NGA, probs_NGA, num_branches)
    assert torch.equal(tokens_NGA, before)
    assert candidates_NBG.shape == (N, min(num_branches, num_positions * (A - 1)), num_positions)
    for n in range(N):
        tokens, probs = tokens_NGA[n].tolist(), probs_NGA[n].tolist()
        draft = [row[0] for row in tokens]
        scored = []
        for i in range(num_positions):
            for j in range(1, A):
                score = math.prod(row[0] for row in probs[:i]) * probs[i][j]
                scored.append((score, [*draft[:i], tokens[i][j], *draft[i + 1 :]]))
        ranked = [candidate for _, candidate in sorted(scored, reverse=True)]
        assert candidates_NBG[n].tolist() == ranked[:num_branches]


def test_several_alternatives_may_compete_at_one_position():
    tokens_NGA = torch.tensor([[[1, 2, 3], [4, 5, 6]]])
    probs_NGA = torch.tensor([[[0.4, 0.3, 0.2], [0.9, 0.06, 0.03]]])
    assert swapped_candidates(tokens_NGA, probs_NGA, 2).tolist() == [[[2, 4], [3, 4]]]
