"""How PyTorch compiles what the drafter computes: once for all numbers of tokens and blocks."""

from __future__ import annotations

import torch
import torch.fx.experimental._config

RECOMPILE_LIMIT = 128


def set_up_compiler() -> None:
    """To be called before anything is compiled; holds for the process."""
    # All layers have one code in three forms (the first, those between, the last), for every shape in a sweep.
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    # Sizes that happen to be equal in the first pass are not in others.
    torch.fx.experimental._config.use_duck_shape = False
    # The norms' epsilon is a constant; PyTorch would find that out in a second attempt.
    torch._dynamo.config.specialize_float = True
