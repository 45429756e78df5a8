"""Prefix samplers: drawn frequencies against the probabilities written out."""

# N blocks, G block size
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vpd.data.cache.drafts import NOT_DRAFTED
from vpd.stages.config import PrefixConfig
from vpd.stages.train.prefix import NEED_FIRST_DRAFTS, SAMPLERS, sample_prefixes

NUM_DRAWS = 20_000


def draw(
    config: PrefixConfig,
    num_labels: int | list[int],
    accept_len: int | list[int] | None,
    block_size: int,
    seed: int = 0,
) -> Tensor:
    """Prefix lengths of blocks with these numbers of labels; a number stands for `NUM_DRAWS` equal blocks."""
    labels = [num_labels] * NUM_DRAWS if isinstance(num_labels, int) else num_labels
    lengths = [accept_len] * NUM_DRAWS if isinstance(accept_len, int) else accept_len
    accept_len_N = None if lengths is None else torch.tensor(lengths, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    return sample_prefixes(config, torch.tensor(labels), accept_len_N, block_size, generator)


def eq6(beta: float, block_size: int, num_labels: int, shortest: int = 0) -> list[float]:
    """Eq. 6, Pr(l = j) proportional to beta^j for j = 0..G-2, over the lengths that leave a label to predict."""
    weights = [beta**j if shortest <= j < num_labels else 0.0 for j in range(block_size - 1)]
    return [weight / sum(weights) for weight in weights]


def assert_drawn_from(lengths_N: Tensor, expected: list[float]) -> None:
    """Each count lies within 4.5 standard deviations of a binomial; seeds are fixed, so this never flickers."""
    counts = Counter(lengths_N.tolist())
    assert set(counts) <= set(range(len(expected)))
    for length, probability in enumerate(expected):
        mean, deviation = NUM_DRAWS * probability, (NUM_DRAWS * probability * (1 - probability)) ** 0.5
        assert abs(counts[length] - mean) <= 4.5 * deviation + 1e-6, (length, counts[length], mean)


@pytest.mark.parametrize(
    ("beta", "block_size", "num_labels"),
    [
        pytest.param(0.9, 16, 15, id="paper"),
        pytest.param(0.5, 8, 7, id="short"),
        pytest.param(1.0, 6, 5, id="uniform"),
        pytest.param(0.9, 16, 6, id="turn-ends-inside"),
        pytest.param(0.9, 16, 1, id="one-label"),
        pytest.param(0.7, 2, 1, id="block-of-two"),
    ],
)
def test_geometric_is_eq_6_within_the_labels(beta: float, block_size: int, num_labels: int):
    lengths_N = draw(PrefixConfig(sampler="geometric", beta=beta), num_labels, None, block_size)
    assert_drawn_from(lengths_N, eq6(beta, block_size, num_labels))


@pytest.mark.parametrize("num_labels", [15, 4, 2])
def test_visible_geometric_is_eq_6_without_the_empty_prefix(num_labels: int):
    lengths_N = draw(PrefixConfig(sampler="visible-geometric", beta=0.8), num_labels, None, 16)
    assert not bool((lengths_N == 0).any())
    assert_drawn_from(lengths_N, eq6(0.8, 16, num_labels, shortest=1))


def test_visible_geometric_leaves_a_single_label_to_predict():
    assert draw(PrefixConfig(sampler="visible-geometric"), [1, 1, 1], None, 16).tolist() == [0, 0, 0]


@pytest.mark.parametrize("seed", range(3))
def test_boundary_is_the_accept_length_of_every_rejected_draft(seed: int):
    num_labels = [15, 15, 15, 15, 7, 7, 2, 1]
    accept_len = [0, 1, 9, 14, 0, 6, 1, 0]
    config = PrefixConfig(sampler="boundary", prior_share=0.0)
    assert draw(config, num_labels, accept_len, 16, seed).tolist() == accept_len


@pytest.mark.parametrize(
    ("num_labels", "accept_len"),
    [
        pytest.param(15, 15, id="fully-accepted"),
        pytest.param(15, NOT_DRAFTED, id="not-drafted"),
        pytest.param(6, 6, id="accepted-to-the-end-of-the-turn"),
        pytest.param(4, 9, id="rejected-beyond-what-is-read"),
    ],
)
def test_boundary_falls_back_to_eq_6_without_a_known_rejection(num_labels: int, accept_len: int):
    lengths_N = draw(PrefixConfig(sampler="boundary", beta=0.8, prior_share=0.0), num_labels, accept_len, 16)
    assert_drawn_from(lengths_N, eq6(0.8, 16, num_labels))


@pytest.mark.parametrize("prior_share", [0.0, 0.3, 0.75, 1.0])
@pytest.mark.parametrize(("num_labels", "accept_len"), [(15, 7), (15, 0), (5, 4)])
def test_boundary_gives_the_prior_its_share(prior_share: float, num_labels: int, accept_len: int):
    config = PrefixConfig(sampler="boundary", beta=0.9, prior_share=prior_share)
    expected = [prior_share * probability for probability in eq6(0.9, 16, num_labels)]
    expected[accept_len] += 1 - prior_share
    assert_drawn_from(draw(config, num_labels, accept_len, 16), expected)


SAMPLER = st.sampled_from(["geometric", "visible-geometric", "boundary"])


@settings(deadline=None, max_examples=80)
@given(
    st.data(),
    SAMPLER,
    st.integers(2, 12),
    st.floats(0.05, 1.0),
    st.floats(0.0, 1.0),
    st.integers(0, 1000),
)
def test_a_label_is_left_and_the_seed_decides(
    data: st.DataObject, sampler: str, block_size: int, beta: float, prior_share: float, seed: int
):
    num_labels = data.draw(st.lists(st.integers(1, block_size - 1), min_size=1, max_size=20))
    lengths = st.one_of(st.integers(0, block_size - 1), st.just(NOT_DRAFTED))
    accept_len = data.draw(st.lists(lengths, min_size=len(num_labels), max_size=len(num_labels)))
    config = PrefixConfig.model_validate({"sampler": sampler, "beta": beta, "prior_share": prior_share})
    drawn = draw(config, num_labels, accept_len, block_size, seed)
    assert drawn.dtype == torch.int64
    assert all(0 <= length < labels for length, labels in zip(drawn.tolist(), num_labels, strict=True))
    assert torch.equal(draw(config, num_labels, accept_len, block_size, seed), drawn)


@pytest.mark.parametrize("sampler", ["geometric", "visible-geometric", "boundary"])
def test_another_seed_draws_something_else(sampler: str):
    config = PrefixConfig.model_validate({"sampler": sampler})
    assert not torch.equal(draw(config, 15, 15, 16, seed=0), draw(config, 15, 15, 16, seed=1))


@pytest.mark.parametrize("sampler", ["geometric", "visible-geometric"])
def test_priors_do_not_look_at_first_drafts(sampler: str):
    config = PrefixConfig.model_validate({"sampler": sampler})
    assert torch.equal(draw(config, 15, 3, 16), draw(config, 15, None, 16))


def test_every_sampler_of_the_settings_exists():
    assert set(SAMPLERS) == {"geometric", "visible-geometric", "boundary"}
    assert {"boundary"} == NEED_FIRST_DRAFTS
