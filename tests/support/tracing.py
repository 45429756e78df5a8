"""Lets PyTorch trace what it would compile, forward and backward, without generating code."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.attention import flex_attention


def trace_compiled_modules(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that gets every graph that would be compiled from now on."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    original = nn.Module.compile

    def compile_without_code(module: nn.Module, **arguments: Any) -> None:
        original(module, **arguments, backend=backend)

    monkeypatch.setattr(nn.Module, "compile", compile_without_code)
    # Flex attention refuses gradients on a CPU, since it has no kernel there; tracing needs no kernel.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    torch.compiler.reset()
    return graphs
