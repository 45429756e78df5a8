"""Settings of PyTorch's compiler: the drafter's layers are compiled once for all numbers of tokens and blocks."""

from __future__ import annotations

import torch
import torch.fx.experimental._config

RECOMPILE_LIMIT = 128
"""Compiled forms that a function may have."""


def set_up_compiler() -> None:
    """Must be called before anything is compiled; holds for the whole process."""
    # All layers share one function with three forms (first, middle, last layer), for every shape in a sweep.
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    # Sizes that are equal in the first pass by chance must not be taken for equal later.
    torch.fx.experimental._config.use_duck_shape = False
    # The norms' epsilon is a constant. Without this, PyTorch compiles twice to learn that.
    torch._dynamo.config.specialize_float = True
