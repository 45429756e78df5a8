"""Before an extraction: whether the engine gives the states of the layers that it was asked for."""

# T tokens, K captured layers, L layers of the target, H hidden width
from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.cache.storage.base import Storage
from ...data.cache.work import PROBE, note_probe, read_probe
from ...data.errors import ExtractionError
from .adapter import can_apply
from .compare_states import compare_states
from .engine import Engine, EngineRequest, Sampling
from .target import Target
from .transformers_engine import TransformersEngine

TEXT = "Every capture of hidden states begins with this sentence, so that a wrong layer is found before it costs a day."
MAX_TOKENS = 16
LEAST_COSINE = 0.95
"""Between two engines' whitened states. Rounding in bfloat16 leaves 0.99 and more."""
SMALL_TARGET_BYTES = 4 << 30
"""Weights that are loaded once more, to compare with transformers."""


def probe(engine: Engine, target: Target, layer_ids: Sequence[int], storage: Storage) -> None:
    """Compares the engine's states of a short text with the cache's, or, for its first engine, with transformers'.

    Without either, as for a large target's first run, the states are noted for later runs and workers.

    Raises:
        ExtractionError: they are another layer's, or of other weights.
    """
    token_ids = target.tokenizer(TEXT, add_special_tokens=False)["input_ids"][:MAX_TOKENS]
    found_TKH = capture(engine, token_ids)
    noted = read_probe(storage)
    if noted is not None and noted["token_ids"] == token_ids:
        require_alike(found_TKH, from_text(noted["states"], found_TKH.shape), layer_ids, storage)
        return
    if engine.facts["name"] != "transformers" and can_compare(target):
        greedy = Sampling(temperature=0, top_p=1, top_k=0, seed=0)
        reference = TransformersEngine(target, range(target.num_layers), greedy, dtype=engine.facts["dtype"])
        require_layers(found_TKH, capture(reference, token_ids), layer_ids)
    note_probe(storage, {"engine": engine.facts, "token_ids": token_ids, "states": as_text(found_TKH)})


def can_compare(target: Target) -> bool:
    """Whether transformers computes the same from the same weights, at little cost."""
    num_bytes = sum(path.stat().st_size for path in target.weight_files())
    has_known_weights = getattr(target.config, "quantization_config", None) is None
    return num_bytes <= SMALL_TARGET_BYTES and has_known_weights and (target.adapter is None or can_apply())


def capture(engine: Engine, token_ids: list[int]) -> Tensor:
    """States [T, K, H] of a prompt, or those of all layers if the engine captures them."""
    engine.submit(EngineRequest(key="probe", prompt_ids=token_ids, max_new_tokens=1, capture=True))
    while not (completions := engine.poll()):
        pass
    hidden_TKH = completions[0].hidden_TKH
    if hidden_TKH is None:
        raise ExtractionError(f"the engine's first request went wrong: {completions[0].fault}. Nothing was written.")
    return hidden_TKH


def require_layers(found_TKH: Tensor, all_TLH: Tensor, layer_ids: Sequence[int]) -> None:
    """Each captured layer must be most like the one of its number, and very much so."""
    for k, layer_id in enumerate(layer_ids):
        found = found_TKH[:, k : k + 1].expand_as(all_TLH)
        # The first token's states are an outlier in most targets, and say little.
        cosine_L = compare_states(found[1:], all_TLH[1:]).cosine_TK.mean(dim=0)
        nearest = int(cosine_L.argmax())
        if nearest != layer_id or float(cosine_L[layer_id]) < LEAST_COSINE:
            raise ExtractionError(
                f"the engine's states for layer {layer_id} are not those that transformers computes: whitened cosine "
                f"{float(cosine_L[layer_id]):.3f}, and {float(cosine_L[nearest]):.3f} to layer {nearest}'s. Nothing "
                "was written. Check the dtype and the engine's version, or choose --engine transformers."
            )


def require_alike(found_TKH: Tensor, noted_TKH: Tensor, layer_ids: Sequence[int], storage: Storage) -> None:
    cosine_K = compare_states(found_TKH[1:], noted_TKH[1:]).cosine_TK.mean(dim=0)
    for layer_id, cosine in zip(layer_ids, cosine_K.tolist(), strict=True):
        if not cosine >= LEAST_COSINE:
            raise ExtractionError(
                f"this engine's states for layer {layer_id} are not like those that {storage.place} was begun with: "
                f"whitened cosine {cosine:.3f} for the text in {PROBE}. Nothing was added. Check the weights, the "
                "dtype and the engine on this machine."
            )


def as_text(states_TKH: Tensor) -> str:
    return base64.b64encode(states_TKH.bfloat16().contiguous().view(torch.int16).numpy().tobytes()).decode()


def from_text(text: str, shape: Sequence[int]) -> Tensor:
    """
    Raises:
        ExtractionError: they are of another shape.
    """
    values: Any = np.frombuffer(base64.b64decode(text), np.int16).copy()
    if values.size != np.prod(shape):
        raise ExtractionError(f"{PROBE} holds {values.size} values, expected states of shape {tuple(shape)}.")
    return torch.from_numpy(values).view(torch.bfloat16).view(*shape)
