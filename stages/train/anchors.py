"""Anchor samplers: at which tokens of a sequence the training blocks start.

A new sampler is a function here (or anywhere that is imported before the settings are read) under `@anchor_sampler`.
"""

# M anchors to choose from, N chosen, G block size
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from ...data.lazy import LazyModule
from ...data.registry import Registry
from .samplers import BOUNDARIES, NOTHING, Reads, Sampler, registering

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .config import AnchorConfig
    from .drafted import Drafted
else:
    torch = LazyModule("torch")


class AnchorCandidates(NamedTuple):
    """All M anchors of a sequence, in order; each has at least one label."""

    positions_M: Tensor
    """int64: positions in the sequence."""
    num_labels_M: Tensor
    """int64: labeled positions of the block that starts there, 1..G-1."""
    block_size: int
    drafted: Drafted | None
    """The first drafts, with what the sampler reads of them; None if no sampler in use reads first drafts."""


AnchorFunction = Callable[["AnchorConfig", AnchorCandidates, int, "torch.Generator"], "Tensor"]
ANCHOR_SAMPLERS: Registry[Sampler[AnchorFunction]] = Registry("anchor sampler")


def anchor_sampler(name: str, reads: Reads = NOTHING) -> Callable[[AnchorFunction], AnchorFunction]:
    """Registers an anchor sampler: a function from settings, candidates, the largest number of anchors and a random
    generator to distinct indices into the candidates.

    Args:
        reads: how much of the first drafts the function reads.
    """
    return registering(ANCHOR_SAMPLERS, name, reads)


def choose_anchors(
    config: AnchorConfig, candidates: AnchorCandidates, num_anchors: int, generator: torch.Generator
) -> Tensor:
    """Indices [N] into the sequence's anchors, ascending and distinct, at most `num_anchors`."""
    return ANCHOR_SAMPLERS[config.sampler].function(config, candidates, num_anchors, generator).sort().values


@anchor_sampler("uniform")
def uniform(config: AnchorConfig, candidates: AnchorCandidates, num_anchors: int, generator: torch.Generator) -> Tensor:
    """Every anchor has the same chance."""
    return torch.randperm(len(candidates.positions_M), generator=generator)[:num_anchors]


@anchor_sampler("failure", reads=BOUNDARIES)
def failure(config: AnchorConfig, candidates: AnchorCandidates, num_anchors: int, generator: torch.Generator) -> Tensor:
    """Anchors where the first draft fails early are likelier: weight (L + 1)^-failure_power, without replacement.

    L is G-1 where the draft is not known to fail. The keys log(u) / w of Efraimidis and Spirakis (2006) turn the
    weights w into such a draw.
    """
    assert candidates.drafted is not None
    fails_M = candidates.drafted.fails_within(candidates.num_labels_M)
    accept_len_M = torch.where(fails_M, candidates.drafted.accept_len_N, candidates.block_size - 1)
    weights_M = (accept_len_M + 1.0) ** -config.failure_power
    keys_M = torch.rand(len(weights_M), generator=generator, dtype=torch.float64).log() / weights_M
    return keys_M.topk(min(num_anchors, len(keys_M))).indices
