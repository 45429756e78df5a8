"""The arrays of a part: one table for those of the states, one for those of first drafts.

Writing, reading, checking and copying follow these tables. A new array takes an entry here, values from the code that
makes the sequences (`FinishedSequence`) or the drafts (`draft_sequences`), and a new `SCHEMA_VERSION`, because older
caches lack the array.
"""

# T tokens, K layers, H hidden width, G block size, A alternatives kept per block position
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .array_spec import ArraySpec
from .codecs import CHANNEL_SCALE, CODECS, HIDDEN
from .manifest import CacheManifest

NUM_ALTERNATIVES = 5
NO_CHOICE = -1
"""In `target_argmax`: the token after this one is not supervised, so no engine was asked."""
NOT_DRAFTED = 255
"""In `accept_len`: nobody drafted with this token as the anchor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenArray:
    """An array with one row for each token."""

    dtype: str
    about: str
    """What a row holds, in one line; the page on the format shows it."""
    row_shape: tuple[str, ...] = ()
    """The shape of a row, as names of sizes: `K` layers, `H` hidden width, `G-1` positions after an anchor, `A`
    alternatives."""
    fill: int = 0
    """The value of a token that has none."""
    by_range: bool = False
    """Whether readers read a sequence's rows by byte range; otherwise they keep the whole array in memory."""

    def spec(self, name: str, chunk_tokens: int, sizes: Mapping[str, int]) -> ArraySpec:
        return ArraySpec(name, tuple(sizes[size] for size in self.row_shape), self.dtype, chunk_tokens)


TOKEN_IDS, TARGET_ARGMAX, LOSS_MASK = "token_ids", "target_argmax", "loss_mask"
TOKEN_ARRAYS = {
    TOKEN_IDS: TokenArray(dtype="int32", about="the token"),
    TARGET_ARGMAX: TokenArray(
        dtype="int32",
        fill=NO_CHOICE,
        about="the target's greedy choice for the next token; -1 where the next token is not supervised",
    ),
    LOSS_MASK: TokenArray(dtype="uint8", about="1 = an assistant wrote the token"),
}
"""The arrays of a part of states, besides the states."""

ACCEPT_LEN, TOKENS, PROBS = "accept_len", "tokens", "probs"
DRAFT_ARRAYS = {
    ACCEPT_LEN: TokenArray(
        dtype="uint8", fill=NOT_DRAFTED, about="leading draft tokens equal to the recorded ones; 255 = not drafted"
    ),
    TOKENS: TokenArray(
        dtype="int32",
        row_shape=("G-1", "A"),
        by_range=True,
        about="the most likely tokens of block positions 1 to G-1, best first; the first is the draft",
    ),
    PROBS: TokenArray(dtype="float16", row_shape=("G-1", "A"), by_range=True, about="the probabilities of `tokens`"),
}
"""The arrays of a part of first drafts. A token's row is the draft with this token as the anchor."""


def names_by_range(table: Mapping[str, TokenArray]) -> set[str]:
    """The arrays of a table that readers read by byte range."""
    return {name for name, array in table.items() if array.by_range}


def state_specs(manifest: CacheManifest) -> dict[str, ArraySpec]:
    """The per-token arrays of a part of states, by name; the states come first."""
    num_layers, hidden_size, chunk_tokens = len(manifest.layer_ids), manifest.hidden_size, manifest.chunk_tokens
    sizes = {"K": num_layers, "H": hidden_size, "A": NUM_ALTERNATIVES}
    hidden = CODECS[manifest.codec].spec(num_layers, hidden_size, chunk_tokens)
    return {HIDDEN: hidden} | {name: array.spec(name, chunk_tokens, sizes) for name, array in TOKEN_ARRAYS.items()}


def constant_specs(manifest: CacheManifest) -> dict[str, ArraySpec]:
    """The arrays of a part that are not per token, by name: float32 [K, H] for a codec that scales every channel."""
    if not CODECS[manifest.codec].needs_channel_scale:
        return {}
    return {CHANNEL_SCALE: ArraySpec(CHANNEL_SCALE, (manifest.hidden_size,), "float32", len(manifest.layer_ids))}


def draft_specs(block_size: int, chunk_tokens: int) -> dict[str, ArraySpec]:
    """The arrays of a part of first drafts, by name."""
    sizes = {"G-1": block_size - 1, "A": NUM_ALTERNATIVES}
    return {name: array.spec(name, chunk_tokens, sizes) for name, array in DRAFT_ARRAYS.items()}


def empty_drafts(num_tokens: int, specs: Mapping[str, ArraySpec]) -> dict[str, np.ndarray]:
    """Rows [num_tokens, ...] of a sequence without any draft."""
    return {
        name: np.full((num_tokens, *spec.row_shape), DRAFT_ARRAYS[name].fill, spec.dtype)
        for name, spec in specs.items()
    }
