"""Settings of first drafts."""

from typing import Literal

from ..config import Count, Section


class DraftConfig(Section):
    """`draft`: first drafts and their boundaries over an existing cache."""

    stride: Count = 1
    """Draft at every stride-th anchor of a sequence; >= 1."""
    device: str = "auto"
    """Torch device; auto = a GPU where there is one."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """What the first drafter computes in; auto = bfloat16 on a GPU, float32 on a CPU."""
