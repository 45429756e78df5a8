"""Outputs of a model's layers, kept while the model runs."""

# B rows, W tokens, H hidden width
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .architecture import text_tower


class LayerOutputs:
    """Keeps what some layers of a model have given in the model's latest pass.

    The layers are hooked, since `output_hidden_states` of transformers gives the last layer's output after the final
    norm.
    """

    def __init__(self, model: Any, num_layers: int, layer_ids: Sequence[int]):
        """
        Args:
            model: a model of transformers.
            num_layers: number of the model's decoder layers.
            layer_ids: 0-based layers to keep, in this order.

        Raises:
            TargetError: the model does not hold one list of that many layers.
        """
        self._latest: dict[int, Tensor] = {}
        self._layer_ids = tuple(layer_ids)
        _, layers = text_tower(model, num_layers)
        for layer_id in self._layer_ids:
            layers[layer_id].register_forward_hook(self._hook(layer_id))

    def latest(self) -> list[Tensor]:
        """The output of each kept layer, [B, W, H]."""
        return [self._latest[layer_id] for layer_id in self._layer_ids]

    def _hook(self, layer_id: int) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._latest[layer_id] = output[0] if isinstance(output, tuple) else output

        return keep
