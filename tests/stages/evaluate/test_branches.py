"""Branches of a decoding cycle against enumerated hypotheses."""

# N anchors, J = G - 1 drafted positions, A alternatives (the first is the draft), B branches per anchor
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.slow_decode import Branch, Ranked, slow_branches, slow_posterior
from torch import Tensor
from vpd.stages.draft.posterior import boundary_posterior
from vpd.stages.drafter.blocks import NO_TOKEN
from vpd.stages.evaluate.branches import POLICIES, Branches, CycleFacts, show_branches
from vpd.stages.evaluate.config import EvalConfig

OF_FIRST_DRAFT = ("paper", "exclude", "runner-up")
"""Policies that do not ask the second drafter."""

SHAPES = [
    pytest.param(6, 7, 5, id="block-of-8"),
    pytest.param(3, 1, 4, id="block-of-2"),
    pytest.param(4, 4, 2, id="one-alternative"),
]


def random_drafts(N: int, J: int, A: int) -> tuple[Tensor, Tensor]:
    """Tokens that are all different, and probabilities that fall from one alternative to the next."""
    generator = torch.Generator().manual_seed(N)
    tokens_NJA = torch.arange(N * J * A).view(N, J, A)
    probs_NJA = torch.rand(N, J, A + 2, generator=generator).pow(3)
    probs_NJA = (probs_NJA / probs_NJA.sum(dim=2, keepdim=True)).sort(dim=2, descending=True).values
    return tokens_NJA, probs_NJA[..., :A]


def as_ranked(tokens_JA: Tensor, probs_JA: Tensor) -> Ranked:
    return [
        list(zip(probs, tokens, strict=True))
        for probs, tokens in zip(probs_JA.tolist(), tokens_JA.tolist(), strict=True)
    ]


def as_list(branches: Branches, n: int) -> list[Branch]:
    """The branches of one anchor."""
    columns = [[None if value == NO_TOKEN else value for value in column[n].tolist()] for column in branches]
    return [Branch(*row) for row in zip(*columns, strict=True)]


def test_the_settings_take_every_policy_and_no_other():
    assert EvalConfig(policies=[*POLICIES]).policies == [*OF_FIRST_DRAFT, "reranked"]
    with pytest.raises(ValueError, match="'paper' or 'exclude'"):
        EvalConfig(policies=["paper", "another"])


@pytest.mark.parametrize(("N", "J", "A"), SHAPES)
def test_the_posterior_is_the_probability_that_the_draft_fails_there(N: int, J: int, A: int):
    confidence_NJ = random_drafts(N, J, A)[1][..., 0]
    posterior = boundary_posterior(confidence_NJ)
    for found, confidences in zip(posterior.tolist(), confidence_NJ.tolist(), strict=True):
        assert found == pytest.approx(slow_posterior(confidences), rel=1e-5)
        # The draft fails at one position, or at none.
        assert sum(found) + math.prod(confidences) == pytest.approx(1)


def test_certain_tokens_are_no_boundary():
    posterior = boundary_posterior(torch.tensor([[1.0, 1.0, 0.25, 0.5]]))
    assert posterior.tolist() == [[0.0, 0.0, 0.75, 0.125]]


@pytest.mark.parametrize("num_branches", [0, 1, 3, 50])
@pytest.mark.parametrize(("N", "J", "A"), SHAPES)
@pytest.mark.parametrize("policy", OF_FIRST_DRAFT)
def test_the_likeliest_hypotheses_are_launched(policy: str, N: int, J: int, A: int, num_branches: int):
    tokens_NJA, probs_NJA = random_drafts(N, J, A)
    branches = POLICIES[policy](CycleFacts(tokens_NJA, probs_NJA, num_branches))
    num_available = J * (A - 1) if policy == "runner-up" else J
    for n in range(N):
        expected = slow_branches(policy, as_ranked(tokens_NJA[n], probs_NJA[n]))[:num_branches]
        assert as_list(branches, n) == expected
        assert len(expected) == min(num_branches, num_available)


@settings(deadline=None, max_examples=50)
@given(st.data(), st.integers(1, 6), st.integers(2, 4))
@pytest.mark.parametrize("policy", OF_FIRST_DRAFT)
def test_k_branches_are_the_first_of_any_larger_number(policy: str, data: st.DataObject, J: int, A: int):
    # Multiples of 1/8: probabilities are often equal, as stored ones can be, and after a 0 all scores are 0.
    eighths = data.draw(st.lists(st.integers(0, 8), min_size=J * A, max_size=J * A))
    probs_JA = (torch.tensor(eighths) / 8).view(J, A)
    tokens_JA = torch.arange(J * A).view(J, A)
    expected = slow_branches(policy, as_ranked(tokens_JA, probs_JA))
    for k in range(len(expected) + 2):
        assert as_list(POLICIES[policy](CycleFacts(tokens_JA[None], probs_JA[None], k)), 0) == expected[:k]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        # The draft fails at 1 with 0.6, at 2 with 0.4 * 0.1.
        pytest.param("paper", [(0, NO_TOKEN, NO_TOKEN), (1, NO_TOKEN, NO_TOKEN)], id="paper"),
        pytest.param("exclude", [(0, NO_TOKEN, 11), (1, NO_TOKEN, 21)], id="exclude"),
        # Both alternatives at position 1 compete, before those at position 2.
        pytest.param(
            "runner-up",
            [(0, 12, NO_TOKEN), (0, 13, NO_TOKEN), (1, 22, NO_TOKEN), (1, 23, NO_TOKEN)],
            id="two-at-one-position",
        ),
    ],
)
def test_branches_written_out(policy: str, expected: list[tuple[int, int, int]]):
    tokens_NJA = torch.tensor([[[11, 12, 13], [21, 22, 23]]])
    probs_NJA = torch.tensor([[[0.4, 0.3, 0.2], [0.9, 0.06, 0.03]]])
    branches = POLICIES[policy](CycleFacts(tokens_NJA, probs_NJA, 9))
    assert [tuple(row) for row in torch.stack(tuple(branches), dim=2)[0].tolist()] == expected
    extra = int(policy == "runner-up")
    assert branches.visible_len_NB.tolist() == [[i + extra for i, _, _ in expected]]


@pytest.mark.parametrize("policy", OF_FIRST_DRAFT)
def test_a_branch_shows_the_draft_with_its_alternative(policy: str):
    tokens_NJA, probs_NJA = random_drafts(5, 4, 3)
    draft_NJ = tokens_NJA[..., 0].clone()
    branches = POLICIES[policy](CycleFacts(tokens_NJA, probs_NJA, 6))
    shown_NBJ = show_branches(draft_NJ, branches).tokens_NBJ
    assert torch.equal(draft_NJ, tokens_NJA[..., 0])
    for n, draft in enumerate(draft_NJ.tolist()):
        expected = []
        for i, alternative, _ in as_list(branches, n):
            expected.append([*draft[:i], draft[i] if alternative is None else alternative, *draft[i + 1 :]])
        assert shown_NBJ[n].tolist() == expected


@pytest.mark.parametrize("num_branches", [0, 1, 4, 20])
def test_reranked_pairs_are_the_likeliest_by_both_drafters(num_branches: int):
    tokens_NJA, probs_NJA = random_drafts(5, 7, 5)
    generator = torch.Generator().manual_seed(1)
    # The second drafter ranks the draft's token, some of the first drafter's alternatives and new ones, in any order.
    second_probs_NJA = torch.rand(5, 7, 6, generator=generator).sort(dim=2, descending=True).values / 3
    others_NJ2 = 1000 + torch.arange(5 * 7 * 2).view(5, 7, 2)
    known_NJA = torch.cat([tokens_NJA[..., :4], others_NJ2], dim=2)
    second_NJA = torch.stack([x[torch.randperm(6, generator=generator)] for x in known_NJA.flatten(0, 1)]).view(5, 7, 6)

    def next_tokens(branches: Branches) -> tuple[Tensor, Tensor]:
        assert bool((branches.alternative_NB == NO_TOKEN).all())
        at = branches.prefix_len_NB[..., None].expand(-1, -1, 6)
        return second_NJA.gather(1, at), second_probs_NJA.gather(1, at)

    found = POLICIES["reranked"](CycleFacts(tokens_NJA, probs_NJA, num_branches, next_tokens))
    for n in range(5):
        asked = as_ranked(second_NJA[n], second_probs_NJA[n])
        expected = slow_branches("reranked", as_ranked(tokens_NJA[n], probs_NJA[n]), asked.__getitem__)
        assert len(expected) == 20  # 4 lengths with 6 tokens each, without the draft's own
        assert as_list(found, n) == expected[:num_branches]
