"""Has PyTorch trace what it would compile, forwards and backwards, without making code for a processor."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.attention import flex_attention


def trace_compiled_modules(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The list of graphs, which grows by one for each that would be compiled."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    original = nn.Module.compile

    def compile_without_code(module: nn.Module, **arguments: Any) -> None:
        original(module, **arguments, backend=backend)

    monkeypatch.setattr(nn.Module, "compile", compile_without_code)
    # Flex attention refuses gradients on a CPU, for which it has no kernel; what is traced has them.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    torch.compiler.reset()
    return graphs
