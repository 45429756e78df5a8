"""Loads an exported folder as its readers do, and compares what they compute with the original drafter."""

# T context tokens, G block size, K context layers, H hidden width
from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging

from ...data.errors import DrafterError
from ..drafter.checkpoint import load_drafter, load_shape
from ..drafter.shape import DrafterShape

TOLERANCE = 1e-4
"""Largest difference of float32 values that is taken for rounding, as a share of the largest value."""


class Inputs(NamedTuple):
    """Random inputs of a drafter: a context, and the block that begins right after it."""

    features_TD: Tensor
    """float32, D = K x H"""
    block_GH: Tensor

    @classmethod
    def draw(cls, shape: DrafterShape) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        width, num_tokens = shape.hidden_size, 2 * shape.block_size
        features_TD = torch.randn(num_tokens, len(shape.target_layer_ids) * width, generator=generator)
        return cls(features_TD, torch.randn(shape.block_size, width, generator=generator))


class Agreement(NamedTuple):
    """How well a program's values agree with those of the original drafter."""

    program: str
    """Name and version."""
    largest_difference: float
    """As a share of the largest value."""


@torch.inference_mode()
def states_of_vpd(folder: Path, inputs: Inputs) -> Tensor:
    """Hidden states [G, H] of the block."""
    drafter = load_drafter(folder)
    anchors_N = torch.tensor([len(inputs.features_TD)])
    return drafter(inputs.block_GH[None], anchors_N, drafter.context(inputs.features_TD))[0]


@torch.inference_mode()
def states_of_transformers(folder: Path, inputs: Inputs) -> Tensor:
    """Hidden states [G, H] of the block, by the code that a folder in the form `dflash` holds."""
    from .modeling_dflash import DFlashDraftModel

    model = DFlashDraftModel.from_pretrained(folder, dtype=torch.float32).eval()
    return model(inputs.block_GH[None], inputs.features_TD[None])[0]


@torch.inference_mode()
def states_of_speculators(folder: Path, inputs: Inputs) -> Tensor:
    """Hidden states [G, H] of the block."""
    from speculators import SpeculatorModel, SpeculatorModelConfig

    config = SpeculatorModelConfig.from_pretrained(folder)
    config.speculators_config.verifier.name_or_path = None  # The target's weights take no part, and may be far away.
    config.transformer_layer_config._attn_implementation = "eager"
    model: Any = SpeculatorModel.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    context, states = model.hidden_norm(model.fc(inputs.features_TD[None])), inputs.block_GH[None]
    position_ids = torch.arange(context.shape[1] + states.shape[1])[None]
    rope = model.rotary_emb(states, position_ids)
    for layer in model.layers:
        states = layer(
            hidden_states=states,
            target_hidden=context,
            attention_mask=None,
            position_ids=position_ids,
            position_embeddings=rope,
        )
    return model.norm(states)[0]


READERS: dict[str, dict[str, Callable[[Path, Inputs], Tensor]]] = {
    "dflash": {"vpd": states_of_vpd, "transformers": states_of_transformers},
    "speculators": {"vpd": states_of_vpd, "speculators": states_of_speculators},
}
"""Form -> package -> function that gives the hidden states [G, H]."""


class ExportCheck:
    """The comparison of an exported folder with the drafter that was exported."""

    def __init__(self, original: Path):
        """
        Raises:
            DrafterError: the drafter can't be loaded.
        """
        self.shape = load_shape(original)
        self._inputs = Inputs.draw(self.shape)
        self._expected_GH = states_of_vpd(original, self._inputs)

    def run(self, folder: Path, form: str) -> list[Agreement]:
        """Compares what each installed reader of the form computes.

        Raises:
            DrafterError: a reader can't load the folder, or computes something else.
        """
        installed = [name for name in READERS[form] if importlib.util.find_spec(name) is not None]
        return [self._compare(folder, package, READERS[form][package]) for package in installed]

    def _compare(self, folder: Path, package: str, states_of: Callable[[Path, Inputs], Tensor]) -> Agreement:
        program = f"{package} {metadata.version(package)}"
        try:
            with quietly():
                states_GH = states_of(folder, self._inputs)
        except Exception as error:  # of any kind that another library raises
            raise DrafterError(
                f"expected {program} to load what was exported, found an error, so nothing was written: "
                f"{' '.join(str(error).split())[:400]} Please report this with both versions."
            ) from error
        difference = float((states_GH - self._expected_GH).abs().max() / self._expected_GH.abs().max())
        if not difference <= TOLERANCE:
            raise DrafterError(
                f"expected {program} to compute the hidden states of the drafter from what was exported, found a "
                f"difference of {difference:.2g} of the largest value, where rounding explains {TOLERANCE:.0e}. "
                "Nothing was written. Please report this with both versions."
            )
        return Agreement(program, difference)


@contextmanager
def quietly() -> Iterator[None]:
    """Other libraries show no progress bars and no warnings in the block."""
    were_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if were_shown:
            logging.enable_progress_bar()
