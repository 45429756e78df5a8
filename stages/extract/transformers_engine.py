"""The reference engine: plain transformers, a batch of requests at a time."""

# B requests, W tokens of the longest, T tokens of one, K captured layers, H hidden width, V vocabulary
from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from ...data.errors import ConfigError, TargetError
from .adapter import Adapter, can_apply
from .architecture import auto_class, one_line, text_tower
from .engine import Completion, EngineRequest, Sampling, engine_facts
from .layer_outputs import LayerOutputs
from .target import Target


class TransformersEngine:
    """Generates with transformers, and captures the layers' outputs with forward hooks."""

    neutral_args = frozenset({"batch_size"})

    def __init__(
        self,
        target: Target,
        layer_ids: Sequence[int],
        sampling: Sampling,
        *,
        dtype: str,
        max_len: int | None = None,
        engine_args: dict[str, Any] | None = None,
    ):
        """
        Args:
            max_len: not used, as this engine takes sequences of any length.
            engine_args: arguments of `from_pretrained`, and `batch_size` (default 1), the number of requests that run
                together. Sampled answers depend on `batch_size`.

        Raises:
            ConfigError: the batch size is below 1, or the target has an adapter and peft is not installed.
            TargetError: the adapter does not fit the target, or the target's layers can't be found.
        """
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        engine_args = engine_args or {}
        model_args = dict(engine_args)
        self._batch_size = int(model_args.pop("batch_size", 1))
        if self._batch_size < 1:
            raise ConfigError(f"expected a batch_size of at least 1, got {self._batch_size}.")
        self._model = load_model(target, dtype, **model_args)
        cast(nn.Module, self._model).to(self._device).eval()
        self._sampling = sampling
        self._ends = [[token_id] for token_id in target.eos_token_ids]
        self._outputs = LayerOutputs(self._model, target.num_layers, layer_ids)
        self._waiting: deque[EngineRequest] = deque()
        self.facts = engine_facts("transformers", self.version(), self._model.dtype, engine_args)

    @staticmethod
    def version() -> str:
        return transformers.__version__

    @property
    def num_in_flight(self) -> int:
        return len(self._waiting)

    def submit(self, request: EngineRequest) -> None:
        self._waiting.append(request)

    @torch.inference_mode()
    def poll(self) -> list[Completion]:
        batch = [self._waiting.popleft() for _ in range(min(self._batch_size, len(self._waiting)))]
        if not batch:
            return []
        generator = torch.Generator(self._device).manual_seed(self._sampling.seed_of(batch[0].key))
        token_ids_BW, real_BW = pad_left([request.prompt_ids for request in batch], self._device)
        past: Any = None
        outputs: list[list[int]] = [[] for _ in batch]
        states: list[Tensor] = []
        argmax: list[Tensor] = []
        while not all(map(self._is_complete, batch, outputs)):
            positions_BW = (real_BW.cumsum(dim=1) - 1).clamp(min=0)[:, -token_ids_BW.shape[1] :]
            out = self._model(
                token_ids_BW, attention_mask=real_BW, position_ids=positions_BW, past_key_values=past, use_cache=True
            )
            past = kept_past(out, self._model)
            states.append(torch.stack(self._outputs.latest(), dim=2).bfloat16())
            argmax.append(out.logits.argmax(dim=-1))
            token_ids_BW = sample(out.logits[:, -1], self._sampling, generator)[:, None]
            real_BW = torch.cat([real_BW, torch.ones_like(real_BW[:, :1])], dim=1)
            for request, output_ids, token_id in zip(batch, outputs, token_ids_BW[:, 0].tolist(), strict=True):
                if not self._is_complete(request, output_ids):
                    output_ids.append(token_id)
        hidden_BWKH, argmax_BW = torch.cat(states, dim=1), torch.cat(argmax, dim=1)
        width = max(len(request.prompt_ids) for request in batch)
        return [
            self._complete(request, output_ids, hidden_WKH, argmax_W, width - len(request.prompt_ids))
            for request, output_ids, hidden_WKH, argmax_W in zip(batch, outputs, hidden_BWKH, argmax_BW, strict=True)
        ]

    def _is_complete(self, request: EngineRequest, output_ids: list[int]) -> bool:
        return len(output_ids) == request.max_new_tokens or output_ids[-1:] in self._ends

    def _complete(
        self, request: EngineRequest, output_ids: list[int], hidden_WKH: Tensor, argmax_W: Tensor, padding: int
    ) -> Completion:
        own = slice(padding, padding + len(request.prompt_ids) + len(output_ids) - 1)
        return Completion(
            key=request.key,
            prompt_ids=request.prompt_ids,
            output_ids=output_ids,
            finish_reason="stop" if output_ids[-1:] in self._ends else "length",
            hidden_TKH=hidden_WKH[own].cpu() if request.capture else None,
            argmax_T=argmax_W[own].cpu() if request.capture else None,
        )

    def close(self) -> None:
        self._waiting.clear()


def load_model(target: Target, dtype: Any, **model_args: Any) -> Any:
    """The target as transformers loads it, with its adapter.

    Args:
        model_args: arguments of `from_pretrained`.

    Raises:
        ConfigError: the target has an adapter, and peft is not installed.
        TargetError: transformers can't load the target, its weights lack a tensor, or the adapter does not fit.
    """
    args = {"trust_remote_code": target.trust_remote_code, **model_args}
    try:
        model, found = auto_class(target.model_config).from_pretrained(
            target.folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **args
        )
    except (Exception, SystemExit) as error:  # the class may be any code, and a quantized target needs further packages
        raise TargetError(f"transformers can't load the target {target.folder}: {one_line(error)}.") from error
    absent = {*found["missing_keys"], *(each[0] for each in found["mismatched_keys"])}
    # What lies beside the text tower, such as a vision tower, has no part in a text.
    used = (text_tower(model, target.num_layers)[0], target.architecture.head)
    missing = sorted(name for name in absent if name.startswith(used))
    if missing:
        raise TargetError(
            f"expected all weights of {type(model).__name__} in {target.folder}, found none of the right shape for "
            f"{', '.join(missing[:4])}{f' and {len(missing) - 4} more' if len(missing) > 4 else ''}. The weights are "
            "of another model or incomplete: download config.json and the weights again."
        )
    if target.adapter is not None:
        _load_adapter(model, target.adapter, target.folder)
    return model


def _load_adapter(model: Any, adapter: Adapter, target_folder: Path) -> None:
    if not can_apply():
        raise ConfigError(
            f"extract.adapter: transformers needs the package peft for {adapter.folder}, which is not installed. "
            "Install vpd[adapter], or choose --engine vllm."
        )
    try:
        model.load_adapter(str(adapter.folder))
    except (RuntimeError, ValueError, TypeError) as error:
        raise TargetError(
            f"the adapter {adapter.folder} can't be applied to {target_folder}: {error}. "
            "Check that it was trained on this target."
        ) from error


def kept_past(out: Any, model: Any) -> Any:
    """What a model keeps of the tokens so far, as its pass has returned it.

    Raises:
        TargetError: the model keeps no such thing.
    """
    past = getattr(out, "past_key_values", None)
    if past is None:
        raise TargetError(
            f"expected a target with a key-value cache, found {type(model).__name__}, which gives none. Choose another "
            "target."
        )
    return past


def pad_left(prompts: list[list[int]], device: str) -> tuple[Tensor, Tensor]:
    """Token ids, int64 [B, W], with the padding before each prompt; and, int64 [B, W], 0 for padding, 1 for tokens."""
    width = max(map(len, prompts))
    token_ids_BW = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts], device=device)
    padding_B = torch.tensor([width - len(ids) for ids in prompts], device=device)
    return token_ids_BW, (torch.arange(width, device=device) >= padding_B[:, None]).long()


def sample(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The next tokens, int64 [B]: the most likely tokens, or tokens drawn after temperature, top-k and top-p."""
    if sampling.greedy:
        return logits_BV.argmax(dim=-1)
    probs_BV, order_BV = (logits_BV.float() / sampling.temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    if sampling.top_k:
        probs_BV[:, sampling.top_k :] = 0
    # A token stays if the tokens before it have less mass than top_p.
    probs_BV[probs_BV.cumsum(dim=-1) - probs_BV >= sampling.top_p] = 0
    return order_BV.gather(1, torch.multinomial(probs_BV, 1, generator=generator))[:, 0]
