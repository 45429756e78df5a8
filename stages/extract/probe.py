"""The probe: checks, before an extraction, that the engine gives the states of the right layers."""

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
MIN_COSINE = 0.95
"""Least whitened cosine between two engines' states. Rounding in bfloat16 leaves more than 0.99."""
MAX_TARGET_BYTES = 4 << 30
"""Largest weights that are loaded a second time, to compare the engine with transformers."""


def probe(engine: Engine, target: Target, layer_ids: Sequence[int], storage: Storage) -> None:
    """Compares the engine's states of a short text with the states that the cache's first engine gave.

    The first engine is compared with transformers, if the target is small. Its states are then stored with the cache,
    for later runs and other workers.

    Raises:
        ExtractionError: the states are those of another layer or of other weights.
    """
    token_ids: list[int] = target.tokenizer(TEXT, add_special_tokens=False)["input_ids"][:MAX_TOKENS]
    # A tokenizer may have tokens that the target has no embedding for.
    token_ids = [token_id for token_id in token_ids if token_id < target.vocab_size] or [0]
    found_TKH = capture(engine, token_ids)
    stored = read_probe(storage)
    if stored is not None and stored["token_ids"] == token_ids:
        require_alike(found_TKH, from_text(stored["states"], found_TKH.shape), layer_ids, storage)
        return
    if engine.facts["name"] != "transformers" and can_compare(target):
        greedy = Sampling(temperature=0, top_p=1, top_k=0, seed=0)
        reference = TransformersEngine(target, range(target.num_layers), greedy, dtype=engine.facts["dtype"])
        require_layers(found_TKH, capture(reference, token_ids), layer_ids)
    note_probe(storage, {"engine": engine.facts, "token_ids": token_ids, "states": as_text(found_TKH)})


def can_compare(target: Target) -> bool:
    """Whether transformers can compute the states from the same weights, and at little cost."""
    num_bytes = sum(path.stat().st_size for path in target.weight_files())
    has_known_weights = getattr(target.config, "quantization_config", None) is None
    return num_bytes <= MAX_TARGET_BYTES and has_known_weights and (target.adapter is None or can_apply())


def capture(engine: Engine, token_ids: list[int]) -> Tensor:
    """States [T, K, H] of a prompt, of the K layers that the engine captures.

    Raises:
        ExtractionError: the engine gave no states.
    """
    engine.submit(EngineRequest(key="probe", prompt_ids=token_ids, max_new_tokens=1, capture=True))
    while not (completions := engine.poll()):
        pass
    hidden_TKH = completions[0].hidden_TKH
    if hidden_TKH is None:
        raise ExtractionError(f"the engine's first request failed: {completions[0].fault}. Nothing was written.")
    return hidden_TKH


def require_layers(found_TKH: Tensor, all_TLH: Tensor, layer_ids: Sequence[int]) -> None:
    """
    Raises:
        ExtractionError: a captured layer is more like another layer than like the layer asked for, or like none.
    """
    for k, layer_id in enumerate(layer_ids):
        found = found_TKH[:, k : k + 1].expand_as(all_TLH)
        # The first token is left out: in most targets its states are outliers.
        cosine_L = compare_states(found[1:], all_TLH[1:]).cosine_TK.mean(dim=0)
        nearest = int(cosine_L.argmax())
        if nearest != layer_id or float(cosine_L[layer_id]) < MIN_COSINE:
            raise ExtractionError(
                f"the engine's states for layer {layer_id} are not those that transformers computes: whitened cosine "
                f"{float(cosine_L[layer_id]):.3f}, and {float(cosine_L[nearest]):.3f} to layer {nearest}'s. Nothing "
                "was written. Check the dtype and the engine's version, or choose --engine transformers."
            )


def require_alike(found_TKH: Tensor, stored_TKH: Tensor, layer_ids: Sequence[int], storage: Storage) -> None:
    """
    Raises:
        ExtractionError: a layer's states differ from those that were stored.
    """
    cosine_K = compare_states(found_TKH[1:], stored_TKH[1:]).cosine_TK.mean(dim=0)
    for layer_id, cosine in zip(layer_ids, cosine_K.tolist(), strict=True):
        if not cosine >= MIN_COSINE:
            raise ExtractionError(
                f"this engine's states for layer {layer_id} are not like those of the first engine of {storage.place}: "
                f"whitened cosine {cosine:.3f} for the text in {PROBE}. Nothing was added. Check the weights, the "
                "dtype and the engine on this machine."
            )


def as_text(states_TKH: Tensor) -> str:
    """Base64 of the states in bfloat16."""
    return base64.b64encode(states_TKH.bfloat16().contiguous().view(torch.int16).numpy().tobytes()).decode()


def from_text(text: str, shape: Sequence[int]) -> Tensor:
    """The states, bfloat16, from what `as_text` returned.

    Raises:
        ExtractionError: the text does not hold states of this shape.
    """
    values: Any = np.frombuffer(base64.b64decode(text), np.int16).copy()
    if values.size != np.prod(shape):
        raise ExtractionError(f"{PROBE}: expected states of shape {tuple(shape)}, found {values.size} values.")
    return torch.from_numpy(values).view(torch.bfloat16).view(*shape)
