"""The reference engine: plain transformers, one request at a time."""

# T tokens, K captured layers, H hidden width
from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ...data.errors import TargetError
from .engine import Completion, EngineRequest, Sampling, engine_facts
from .target import Target


class TransformersEngine:
    """Generates with transformers and captures layer outputs with forward hooks."""

    def __init__(
        self,
        target: Target,
        layer_ids: Sequence[int],
        sampling: Sampling,
        *,
        dtype: str = "auto",
        engine_args: dict[str, Any] | None = None,
    ):
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = AutoModelForCausalLM.from_pretrained(target.folder, dtype=dtype, **(engine_args or {}))
        cast(nn.Module, self._model).to(self._device).eval()
        self._sampling = sampling
        self._eos_token_ids = target.eos_token_ids
        self._captured: dict[int, Tensor] = {}
        layers = decoder_layers(self._model, target.num_layers)
        for layer_id in layer_ids:
            layers[layer_id].register_forward_hook(self._hook(layer_id))
        self._layer_ids = tuple(layer_ids)
        self._waiting: deque[EngineRequest] = deque()
        self.facts = engine_facts("transformers", transformers.__version__, self._model.dtype, engine_args)

    @property
    def num_in_flight(self) -> int:
        return len(self._waiting)

    def submit(self, request: EngineRequest) -> None:
        self._waiting.append(request)

    @torch.inference_mode()
    def poll(self) -> list[Completion]:
        if not self._waiting:
            return []
        request = self._waiting.popleft()
        generator = torch.Generator(self._device).manual_seed(self._sampling.seed)
        token_ids = torch.tensor([request.prompt_ids], device=self._device)
        past: Any = None
        output_ids: list[int] = []
        states: list[Tensor] = []
        argmax: list[Tensor] = []
        while len(output_ids) < request.max_new_tokens:
            out = self._model(token_ids, past_key_values=past, use_cache=True)
            past = out.past_key_values
            if request.capture:
                states.append(torch.stack([self._captured[i][0] for i in self._layer_ids], dim=1).bfloat16().cpu())
                argmax.append(out.logits[0].argmax(dim=-1).cpu())
            token_ids = sample(out.logits[0, -1], self._sampling, generator).view(1, 1)
            output_ids.append(int(token_ids))
            if output_ids[-1] in self._eos_token_ids:
                break
        return [
            Completion(
                key=request.key,
                prompt_ids=request.prompt_ids,
                output_ids=output_ids,
                finish_reason="stop" if output_ids[-1] in self._eos_token_ids else "length",
                hidden_TKH=torch.cat(states) if states else None,
                argmax_T=torch.cat(argmax) if argmax else None,
            )
        ]

    def close(self) -> None:
        self._waiting.clear()

    def _hook(self, layer_id: int) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._captured[layer_id] = output[0] if isinstance(output, tuple) else output

        return keep


def decoder_layers(model: nn.Module, num_layers: int) -> nn.ModuleList:
    """The list of the target's decoder layers.

    Raises:
        TargetError: the architecture has no single list of that many layers.
    """
    lists = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.rsplit(".", 1)[-1] == "layers" and len(module) == num_layers
    ]
    if len(lists) != 1:
        raise TargetError(f"expected one list of {num_layers} decoder layers, found {len(lists)} in {type(model)}.")
    return lists[0]


def sample(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The next token: the most likely one, or one drawn after temperature, top-k and top-p."""
    if sampling.greedy:
        return logits_V.argmax()
    probs_V, order_V = (logits_V.float() / sampling.temperature).softmax(dim=-1).sort(descending=True)
    if sampling.top_k:
        probs_V[sampling.top_k :] = 0
    # A token stays while the mass before it is below top_p.
    probs_V[probs_V.cumsum(0) - probs_V >= sampling.top_p] = 0
    return order_V[torch.multinomial(probs_V, 1, generator=generator)[0]]
