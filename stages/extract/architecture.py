"""The target's class: where its embedding, its layers, its final norm and its head are, and what it does around them.

Nothing is looked up by a name. The class is built without weights, on the meta device. A forward pass over a few
tokens, with small tensors in place of the embedding and the head and with layers that do nothing, then shows what is
called in which order, and what becomes of the values.
"""

# R rows of the small embedding and head, H hidden width
from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ...data.errors import TargetError

ROWS = 16
OTHER_ROWS = 4 * ROWS
"""Rows of other embeddings, such as those of positions, which may count from another number than 0."""
LARGEST = 1 << 24
"""Values of the largest tensor outside the layers that gets memory."""
TOLERANCE = 1e-4
"""Relative; some classes compute in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsMap:
    """What the target makes of its head's outputs x: `multiplier * x`, then `soft_cap * tanh(x / soft_cap)`."""

    multiplier: float = 1.0
    soft_cap: float | None = None
    """None = no cap."""

    def __call__(self, logits: Tensor) -> Tensor:
        scaled = logits * self.multiplier
        return scaled if self.soft_cap is None else self.soft_cap * torch.tanh(scaled / self.soft_cap)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Parts of the target's class, built without weights; names are those of the class's modules."""

    model: Any
    embed: str
    head: str
    is_tied: bool
    """Whether the class gives the head the embedding's weight."""
    norm: str | None
    """None: no single module stands between the last layer and the head."""
    logits_map: LogitsMap
    shapes: Mapping[str, tuple[int, ...]]
    """Name of a parameter -> its shape by the config; in `model`, embedding and head are smaller."""

    def module(self, name: str) -> Any:
        return self.model.get_submodule(name)

    def checkpoint_names(self, names: Sequence[str]) -> dict[str, str]:
        """Name in the class -> name in the weight files, renamed as transformers renames when it loads.

        Args:
            names: names of tensors in the weight files.
        """
        transforms = get_model_conversion_mapping(self.model)
        renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        converters = [each for each in transforms if isinstance(each, WeightConverter)]
        own = self.model.state_dict()
        prefix = self.model.base_model_prefix
        return {rename_source_key(name, renamings, converters, prefix, own)[0]: name for name in names}


def auto_class(config: PretrainedConfig) -> Any:
    """The auto class of transformers that loads a model of this config.

    Raises:
        TargetError: transformers has no class with a language model for it.
    """
    remote = getattr(config, "auto_map", None) or {}
    for auto, mapping in (
        (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
        (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    ):
        if type(config) in mapping or auto.__name__ in remote:
            return auto
    raise TargetError(
        f"expected a target that writes text, found a config of type {config.model_type}, for which transformers has "
        "no such class. Give a decoder-only language model."
    )


def build(config: PretrainedConfig, trust_remote_code: bool) -> Architecture:
    """Builds the target's class without weights, and finds its parts.

    Raises:
        TargetError: the class can't be built, or has no embedding, layers or head of the usual kind.
    """
    try:
        with torch.device("meta"):
            model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
        embed, head = model.get_input_embeddings(), model.get_output_embeddings()
        _, layers = text_tower(model, int(config.get_text_config().num_hidden_layers))
        names = {id(module): name for name, module in model.named_modules()}
        is_tied = head.weight is embed.weight
        shapes = {name: tuple(value.shape) for name, value in model.named_parameters(remove_duplicate=False)}
        norm, logits_map = _observe(model, embed, head, layers, names)
        return Architecture(
            model=model,
            embed=names[id(embed)],
            head=names[id(head)],
            is_tied=is_tied,
            norm=norm,
            logits_map=logits_map,
            shapes=shapes,
        )
    except TargetError:
        raise
    except (Exception, SystemExit) as error:  # the class may be any code
        raise TargetError(
            f"the class of transformers for a target of type {config.model_type} can't be used: "
            f"{one_line(error)}. Check config.json, or choose another target."
        ) from error


def text_tower(model: Any, num_layers: int) -> tuple[str, nn.ModuleList]:
    """The part of a model that holds its embedding and its decoder layers: the part's name, and the list of layers.

    Raises:
        TargetError: no part holds one list of that length.
    """
    embed = model.get_input_embeddings()
    place = next(name for name, module in model.named_modules() if module is embed)
    while place:
        place = place.rpartition(".")[0]
        inside = list(model.get_submodule(place).modules())
        lists = [each for each in inside if isinstance(each, nn.ModuleList) and len(each) == num_layers]
        outer = [each for each in lists if not any(each is not other and each in other.modules() for other in lists)]
        if len(outer) == 1:
            return place, outer[0]
        if outer:
            break
    raise TargetError(f"expected one list of {num_layers} decoder layers beside the embedding of {type(model)}.")


def embedding_multiplier(architecture: Architecture, dtype: torch.dtype) -> float:
    """What the target's embedding module multiplies the rows of its weight by, if the weight has this type.

    Raises:
        TargetError: the module does something else than multiply.
    """
    module = architecture.module(architecture.embed)
    width = module.weight.shape[1]
    rows_RH = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows_RH[0] = 1.0
    _fill(architecture.model, module, rows_RH)
    with torch.no_grad():
        found_RH = module(torch.arange(ROWS))
    multiplier = found_RH[0, 0]
    if not torch.equal(found_RH, rows_RH * multiplier):
        raise TargetError(
            f"expected a target whose embedding module gives its weight's rows or multiples of them, found "
            f"{type(module).__name__}, which does more. The drafters' inputs would be wrong; choose another target."
        )
    return float(multiplier)


def one_line(error: BaseException | str) -> str:
    """An error's text on one line, without its last full stop, cut where a library wrote a page."""
    if isinstance(error, SystemExit):
        return f"code that it needs ends the program (SystemExit {error.code})"
    text = " ".join(str(error).split()).rstrip(". ") or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _observe(model: Any, embed: Any, head: Any, layers: Any, names: Mapping[int, str]) -> tuple[str | None, LogitsMap]:
    """Name of the module between the last layer and the head, and what becomes of the head's outputs."""
    inner = {id(module) for layer in layers for module in layer.modules()}
    _make_small(model, embed, head, inner, names)
    called: list[tuple[nn.Module, Any]] = []

    def copied(output: Any) -> Any:  # a class may change its head's outputs in place
        return output.clone() if isinstance(output, Tensor) else output

    for module in model.modules():
        parts = list(module.modules())
        if module is head or module is layers[-1] or not (id(module) in inner or layers in parts or head in parts):
            module.register_forward_hook(lambda module, args, output: called.append((module, copied(output))))
    logits = _run(model, layers, called)
    order = [module for module, _ in called]
    between = order[order.index(layers[-1]) + 1 : order.index(head)]
    outer = [each for each in between if not any(each is not other and each in other.modules() for other in between)]
    raw = called[order.index(head)][1]
    return (names[id(outer[0])] if len(outer) == 1 else None), _fit_map(raw.double(), logits.double())


def _run(model: Any, layers: Any, called: list[Any]) -> Tensor:
    """Logits of a pass whose layers give back what they get; classes differ in what a layer returns."""
    masks = [torch.ones(1, ROWS, dtype=torch.int64), torch.zeros(1, 1, ROWS, ROWS)]
    returns = [lambda states: states, lambda states: (states,), lambda states: (states, None)]
    failures: list[BaseException] = []
    for returned, mask in product(returns, masks):
        called.clear()
        for layer in layers:
            layer.forward = lambda hidden_states, *args, returned=returned, **kwargs: returned(hidden_states)
        try:
            with torch.no_grad():
                return model(input_ids=torch.arange(ROWS)[None], attention_mask=mask, use_cache=False).logits
        except (Exception, SystemExit) as error:  # the class may be any code
            failures.append(error)
    raise failures[0]


def _make_small(model: Any, embed: Any, head: Any, inner: Container[int], names: Mapping[int, str]) -> None:
    """Gives values to the modules outside the layers, and few rows to their embeddings and to the head."""
    width = embed.weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if id(module) in inner or module is embed or module is head:
            continue
        if isinstance(module, nn.Embedding):
            _fill(model, module, torch.zeros(OTHER_ROWS, module.weight.shape[1]))
            continue
        for name, value in list(module.named_parameters(recurse=False)):
            if value.numel() <= LARGEST:
                is_vector = value.shape == (width,)
                filled = torch.rand(width, generator=generator) + 0.5 if is_vector else torch.zeros(value.shape)
                module.register_parameter(name, nn.Parameter(filled))
        for name, value in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.ones_like(value, device="cpu"), persistent=False)
        if "rotary" in names[id(module)].rpartition(".")[2]:
            module.forward = lambda *args, **kwargs: None
    _fill(model, embed, torch.randn(ROWS, width, generator=generator))
    # Rows from tiny to huge: the smallest outputs show a multiplier, the largest a cap.
    _fill(model, head, torch.randn(ROWS, width, generator=generator) * torch.logspace(-4, 4, ROWS)[:, None])


def _fill(model: Any, module: Any, rows: Tensor) -> None:
    """Gives a module these rows as its weight, and its buffers the values that the class gives them."""
    for name, buffer in list(module.named_buffers()):
        filled = (
            torch.full(buffer.shape, torch.nan)
            if buffer.is_floating_point()
            else torch.zeros_like(buffer, device="cpu")
        )
        module.register_buffer(name, filled, persistent=False)
    if getattr(module, "bias", None) is not None:
        module.bias = nn.Parameter(torch.zeros(len(rows)))
    module.padding_idx = None  # it may lie beyond the rows
    module.weight = nn.Parameter(rows.clone())
    owners = [each for each in model.modules() if isinstance(each, PreTrainedModel) and module in each.modules()]
    with torch.random.fork_rng(devices=[]):
        owners[-1]._init_weights(module)  # only the innermost class may know the module
    with torch.no_grad():
        module.weight.copy_(rows)


def _fit_map(raw: Tensor, final: Tensor) -> LogitsMap:
    """
    Raises:
        TargetError: no map of the known form gives these logits.
    """
    raw, final = raw.flatten(), final.flatten()
    smallest, largest = raw.abs().argmin(), raw.abs().argmax()
    multiplier = _rounded(final[smallest] / raw[smallest])
    is_capped = bool(final[largest].abs() < (1 - TOLERANCE) * (raw[largest] * multiplier).abs())
    found = LogitsMap(multiplier=multiplier, soft_cap=_rounded(final[largest].abs()) if is_capped else None)
    if not torch.allclose(found(raw), final, rtol=TOLERANCE, atol=1e-12):
        raise TargetError(
            "expected a target that multiplies or soft-caps its head's outputs, found one that changes them otherwise. "
            "Its probabilities would be wrong; choose another target."
        )
    return found


def _rounded(value: Tensor) -> float:
    """Few digits, as configs state them."""
    return float(f"{float(value):.6g}")
