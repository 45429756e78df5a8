"""Samplers and policies that are registered outside the project: settings take them, and whole runs use them."""

# N blocks or anchors, J drafted positions, A alternatives, B branches
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.tiny import DRAFTER, TRAIN, run_vpd, vpd
from torch import Tensor
from vpd.data.cache.arrays import NUM_ALTERNATIVES
from vpd.data.errors import ConfigError
from vpd.data.registry import Registry
from vpd.stages.drafter.blocks import NO_TOKEN
from vpd.stages.evaluate.branches import POLICIES, Branches, CycleFacts, policy
from vpd.stages.train.anchors import ANCHOR_SAMPLERS, AnchorCandidates, anchor_sampler
from vpd.stages.train.config import AnchorConfig, PrefixConfig
from vpd.stages.train.prefix import PREFIX_SAMPLERS, BlockFacts, prefix_sampler
from vpd.stages.train.samplers import ALTERNATIVES, CONFIDENCES

REGISTRIES: list[Registry[Any]] = [PREFIX_SAMPLERS, ANCHOR_SAMPLERS, POLICIES]
SHORT = {**DRAFTER, **TRAIN, "max_steps": 2, "batch_tokens": 100, "num_anchors": 5}
J = DRAFTER["block_size"] - 1


@pytest.fixture(autouse=True)
def _registries_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes what a test registers."""
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "_entries", dict(registry))


def test_a_prefix_sampler_reads_all_alternatives(drafted_cache: Path, tmp_path: Path):
    seen: list[BlockFacts] = []

    @prefix_sampler("least-margin", reads=ALTERNATIVES)
    def least_margin(config: PrefixConfig, facts: BlockFacts) -> Tensor:
        """The prefix ends where the draft's probability is nearest to the runner-up's."""
        seen.append(facts)
        assert facts.drafted is not None
        assert facts.drafted.probs_NJA is not None
        best_NJ, second_NJ = facts.drafted.probs_NJA[..., :2].unbind(dim=2)
        return torch.nn.functional.one_hot((best_NJ - second_NJ).argmin(dim=1), J).float()

    vpd("train", drafted_cache, "--out", tmp_path / "run", "--set", "train.prefix.sampler=least-margin", **SHORT)
    assert len(seen) >= 2
    for facts in seen:
        assert facts.drafted is not None
        assert facts.drafted.tokens_NJA is not None
        assert facts.drafted.tokens_NJA.shape == (len(facts.num_labels_N), J, NUM_ALTERNATIVES)
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["train"]["prefix"]["sampler"] == "least-margin"
    assert PREFIX_SAMPLERS.describe()["least-margin"].startswith("The prefix ends where")


def test_a_mixture_takes_a_prefix_sampler(drafted_cache: Path, tmp_path: Path):
    num_calls = 0

    @prefix_sampler("none-visible")
    def none_visible(config: PrefixConfig, facts: BlockFacts) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        return (torch.arange(J) == 0).expand(len(facts.num_labels_N), J).float()

    mixture = ["--set", "train.prefix.sampler=mixture", "--set", "train.prefix.mixture={none-visible: 1, topk: 1}"]
    vpd("train", drafted_cache, "--out", tmp_path / "run", *mixture, **SHORT)
    assert num_calls >= 2


def test_an_anchor_sampler_reads_confidences(drafted_cache: Path, tmp_path: Path):
    numbers: list[tuple[int, int]] = []

    @anchor_sampler("unsure", reads=CONFIDENCES)
    def unsure(
        config: AnchorConfig, candidates: AnchorCandidates, num_anchors: int, generator: torch.Generator
    ) -> Tensor:
        """Anchors where the first drafted token has the lowest confidence."""
        assert candidates.drafted is not None
        assert candidates.drafted.confidence_NJ is not None
        assert candidates.drafted.tokens_NJA is None
        chosen = candidates.drafted.confidence_NJ[:, 0].argsort()[:num_anchors]
        numbers.append((len(candidates.positions_M), len(chosen)))
        return chosen

    # The first drafter's objective draws no prefixes, so nothing but the anchors needs the first drafts.
    vpd(
        "train",
        drafted_cache,
        "--out",
        tmp_path / "run",
        "--set",
        "train.anchor.sampler=unsure",
        objective="dflash",
        **SHORT,
    )
    assert all(chosen == min(num_candidates, 5) for num_candidates, chosen in numbers)
    assert len(numbers) >= 2


def test_a_policy_asks_the_second_drafter_if_it_wants_to(drafted_cache: Path, first_run: Path):
    @policy("second-opinion")
    def second_opinion(facts: CycleFacts) -> Branches:
        """The second drafter's best tokens right after the anchor."""
        assert facts.next_tokens is not None
        nothing_N1 = torch.zeros_like(facts.tokens_NJA[:, 0, :1])
        asked = Branches(nothing_N1, nothing_N1 + NO_TOKEN, nothing_N1 + NO_TOKEN)
        tokens_NB = facts.next_tokens(asked)[0][:, 0, : facts.num_branches]
        none_NB = torch.full_like(tokens_NB, NO_TOKEN)
        return Branches(torch.zeros_like(tokens_NB), tokens_NB, none_NB)

    arguments = ["eval", drafted_cache, "--first-drafter", first_run, "--drafter", first_run]
    found = vpd(*arguments, "--set", "eval.policies=[second-opinion, paper]", holdout=1)
    assert found["policy"] == "second-opinion"
    unlimited = [way for way in found["by_nodes"] if way["nodes"] is None and way["second"] in (None, "d2sd")]
    ways = {(way["way"], way["policy"], way["k"]): way["alpha"] for way in unlimited}
    # With the first drafter as the second one, its best token after the anchor is the first draft's own.
    assert ways["branches", "second-opinion", 1] == ways["chain", None, 0] < ways["branches", "second-opinion", 4]


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.kind)
def test_a_name_is_given_once_and_every_entry_says_what_it_does(registry: Registry[Any]):
    with pytest.raises(ConfigError, match="is taken"):
        registry.add(next(iter(registry)), None)
    assert all(registry.describe().values())


def test_what_nobody_has_registered_is_an_error(drafted_cache: Path, tmp_path: Path):
    outcome = run_vpd("train", drafted_cache, "--out", tmp_path / "run", "--set", "train.prefix.sampler=least-margin")
    assert outcome.code == 2
    assert "train.prefix.sampler: expected 'geometric' or" in outcome.message
