"""Settings of evaluation by replay."""

from typing import Annotated, Literal

from pydantic import Field

from ..config import Branches, Count, Nodes, OneOf, Section, Share
from .branches import POLICIES


class EvalConfig(Section):
    """`eval`: acceptance length by replay of held-out sequences."""

    k: Branches = 4
    """Branches beside the first draft in each cycle; in 0..64."""
    nodes: Nodes = 32
    """Draft tokens that the target verifies in each cycle, in the trees of the headline; in 1..128."""
    way: Literal["two-drafter tree", "branches", "best chain"] = "two-drafter tree"
    """How alpha with a second drafter is measured: one tree from both drafters, the completed branches, or one path."""
    policies: Annotated[list[Annotated[str, OneOf(POLICIES)]], Field(min_length=1)] = Field(default=["reranked"])
    """Branch policies, which choose the branches; the first gives alpha, the others are listed beside it."""
    max_k: Branches = 4
    """Alpha is also listed for every number of branches up to this (or up to k); in 0..64."""
    gpu: Literal["a100", "h100", "h200", "l40s"] | None = None
    """GPU whose data sheet gives tokens per second at several batch sizes; none = no such figures."""
    speed_target: Literal["qwen3-4b", "qwen3-8b", "qwen3-32b", "llama-3.1-8b"] | None = None
    """Target whose sizes count for these figures; none = the cache's."""
    speed_context: Count = 1024
    """Tokens of each request in the KV cache, for these figures; >= 1."""
    live_prompts: Count = 4
    """Held-out prompts that are decoded with the real target, if one is given; >= 1."""
    holdout: Share | None = None
    """Share of sequences held out; in [0, 1], none = as in the drafters' runs, else 0.05. 1 = all."""
    limit: Count | None = None
    """Number of held-out sequences; >= 1, none = all."""
    device: str = "auto"
    """Torch device; auto = a GPU where there is one."""
