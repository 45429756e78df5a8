"""Settings of evaluation by replay."""

from typing import Annotated, Literal

from pydantic import Field

from ..config import BlockSize, Branches, Count, Section, Share

PolicyName = Literal["paper", "exclude", "runner-up", "reranked"]


class EvalConfig(Section):
    """`eval`: acceptance length by replay of held-out sequences."""

    k: Branches = 4
    """Branches beside the first draft in each cycle; in 0..64."""
    policies: Annotated[list[PolicyName], Field(min_length=1)] = Field(default=["reranked"])
    """Branch policies; the first gives alpha, the others are listed beside it.

    paper: the k likeliest prefix lengths; exclude: the same, the first draft's next token ruled out; runner-up: the
    k likeliest pairs of prefix length and alternative token, which the second drafter then sees; reranked: the same,
    the alternatives from both drafters, which takes one more pass of the second.
    """
    max_k: Branches = 8
    """Alpha is also listed for every number of branches up to this (or up to k); in 0..64."""
    live_prompts: Count = 4
    """Held-out prompts that are decoded with the real target, where one is given; >= 1."""
    second_block_size: BlockSize | None = None
    """Block positions of the second draft; in 2..255, none = those of its drafter."""
    holdout: Share | None = None
    """Share of sequences held out; in [0, 1], none = as in the drafters' runs, else 0.05. 1 = all."""
    limit: Count | None = None
    """Number of held-out sequences; >= 1, none = all."""
    device: str = "auto"
    """Torch device; auto = a GPU where there is one."""
