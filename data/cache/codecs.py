"""Codecs of the hidden states: how bfloat16 [T, K, H] is stored, and how it comes back.

| codec | stored per token and layer | loss |
|---|---|---|
| raw | H x bfloat16 | none |
| lossless | the same, compressed by Blosc (Zstandard, byte shuffle) | none |
| round4, round3 | the same after rounding to 4 or 3 bits of mantissa | half a unit in the last place kept |
| fp8 | H x float8 e4m3, then one float32 scale | 3 bits of mantissa, over a range of 2**17 below the largest channel |
| int4 | H x 4 bits, then float16 scales of 32 channels each, after division by a scale per channel | 1/14 of a span |

Hidden states have a few channels hundreds of times larger than the rest. Each codec keeps the others: the mantissa
codecs and fp8 because they are floating point, int4 because every channel is divided by its own scale first.
"""

# T tokens, K layers, H hidden width, W stored elements per token and layer, R groups of GROUP channels
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .shard import ArraySpec, BloscSettings

CodecName = Literal["raw", "lossless", "round4", "round3", "fp8", "int4"]
HIDDEN, CHANNEL_SCALE = "hidden", "channel_scale"
COMPRESSION = BloscSettings(typesize=2, cname="zstd", clevel=1, shuffle="shuffle", blocksize=1 << 20)
BFLOAT16_MANTISSA_BITS = 7
E4M3_MAX = 448.0
SCALE_BYTES = 4
GROUP = 32
INT4_MAX = 7
TINY = 1e-12
LEAST_SCALE = 0.1
BLOCK_ELEMENTS = 1 << 18
"""Values that are coded at a time on a CPU."""


@dataclass(frozen=True, slots=True)
class Codec:
    """One way to store hidden states. `channel_scale_KH` is float32 [K, H], read by int4 alone."""

    name: CodecName

    @property
    def needs_channel_scale(self) -> bool:
        return self.name == "int4"

    @property
    def is_exact(self) -> bool:
        return self.name in ("raw", "lossless")

    def spec(self, num_layers: int, hidden_size: int, chunk_tokens: int) -> ArraySpec:
        """The Zarr array that holds the states of a part."""
        if self.name == "fp8":
            return ArraySpec(HIDDEN, (num_layers, hidden_size + SCALE_BYTES), "uint8", chunk_tokens)
        if self.name == "int4":
            num_groups = -(-hidden_size // GROUP)
            return ArraySpec(HIDDEN, (num_layers, num_groups * (GROUP // 2 + 2)), "uint8", chunk_tokens)
        compression = None if self.name == "raw" else COMPRESSION
        return ArraySpec(HIDDEN, (num_layers, hidden_size), "uint16", chunk_tokens, compression)

    def encode(self, hidden_TKH: Tensor, channel_scale_KH: Tensor | None = None) -> np.ndarray:
        """Stored rows [T, K, W] of bfloat16 states [T, K, H]; `raw` and `lossless` copy nothing."""
        hidden_TKH = hidden_TKH.contiguous()
        if self.is_exact:
            return hidden_TKH.view(torch.uint16).numpy()
        spec = self.spec(*hidden_TKH.shape[1:], chunk_tokens=1)
        dtype = getattr(torch, spec.dtype)
        return by_blocks(
            lambda states: self._encode(states, channel_scale_KH), hidden_TKH, spec.row_shape, dtype
        ).numpy()

    def _encode(self, hidden_TKH: Tensor, channel_scale_KH: Tensor | None) -> Tensor:
        if self.name == "fp8":
            return encode_fp8(hidden_TKH)
        if self.name == "int4":
            assert channel_scale_KH is not None
            return encode_int4(hidden_TKH, channel_scale_KH)
        return round_mantissa(hidden_TKH, int(self.name[-1])).view(torch.uint16)

    def decode(self, rows_TKW: Tensor, hidden_size: int, channel_scale_KH: Tensor | None = None) -> Tensor:
        """States bfloat16 [T, K, H] from stored rows, on the rows' device; what is not fp8 or int4 copies nothing."""
        if self.name not in ("fp8", "int4"):
            return rows_TKW.view(torch.bfloat16)
        scale_KH = None if channel_scale_KH is None else channel_scale_KH.to(rows_TKW.device)
        row_shape = (rows_TKW.shape[1], hidden_size)
        return by_blocks(lambda rows: self._decode(rows, hidden_size, scale_KH), rows_TKW, row_shape, torch.bfloat16)

    def _decode(self, rows_TKW: Tensor, hidden_size: int, channel_scale_KH: Tensor | None) -> Tensor:
        if self.name == "fp8":
            return decode_fp8(rows_TKW, hidden_size)
        assert channel_scale_KH is not None
        return decode_int4(rows_TKW, hidden_size, channel_scale_KH)


def by_blocks(
    function: Callable[[Tensor], Tensor], tokens: Tensor, row_shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The function of the tokens, [T, *row_shape]; on a CPU a few tokens at a time, which then stay in its cache."""
    if tokens.device.type != "cpu":
        return function(tokens)
    found = torch.empty(len(tokens), *row_shape, dtype=dtype)
    num_tokens = max(1, BLOCK_ELEMENTS // tokens[0].numel())
    for block, target in zip(tokens.split(num_tokens), found.split(num_tokens), strict=True):
        target.copy_(function(block))
    return found


def measure_channels(hidden_TKH: Tensor) -> Tensor:
    """Scale of each channel, float32 [K, H]: its root mean square over the tokens.

    Never far below the layer's usual, as few tokens say little of a channel.
    """
    rms_KH = hidden_TKH.float().square().mean(dim=0).sqrt()
    usual_K1 = rms_KH.median(dim=1, keepdim=True).values
    return rms_KH.maximum(usual_K1 * LEAST_SCALE).clamp(min=TINY)


def round_mantissa(hidden_TKH: Tensor, bits: int) -> Tensor:
    """Rounds bfloat16 to the nearest value with `bits` bits of mantissa, ties to even; never to infinity."""
    dropped = BFLOAT16_MANTISSA_BITS - bits
    words = hidden_TKH.view(torch.int16)
    magnitude = words & 0x7FFF
    half = ((words >> dropped) & 1) + ((1 << (dropped - 1)) - 1)
    rounded = (words + half) & -(1 << dropped)
    largest = 0x7F7F >> dropped << dropped  # the largest finite value that is left
    if magnitude.max() > largest:
        kept = torch.where(magnitude < 0x7F80, torch.full_like(words, largest), magnitude) | (words & -0x8000)
        rounded = torch.where(magnitude > largest, kept, rounded)
    return rounded.view(torch.bfloat16)


def encode_fp8(hidden_TKH: Tensor) -> Tensor:
    """uint8 [T, K, H + 4]: e4m3 values, then the float32 scale to multiply them by (largest magnitude / 448)."""
    states = hidden_TKH.float()
    scale_TK1 = states.abs().amax(dim=-1, keepdim=True).clamp(min=TINY) / E4M3_MAX
    values = states.div_(scale_TK1).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.cat([values, scale_TK1.view(torch.uint8)], dim=-1)


def decode_fp8(rows_TKW: Tensor, hidden_size: int) -> Tensor:
    # A copy in any case: where it starts must be a multiple of four.
    scale_TK1 = rows_TKW[..., hidden_size:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    values = rows_TKW[..., :hidden_size]
    if rows_TKW.device.type != "cpu":
        return (values.view(torch.float8_e4m3fn).float() * scale_TK1).bfloat16()
    # torch casts e4m3 one by one on a CPU. Its bits, moved to bfloat16's places, give the value over 2**120. The sign
    # comes to bit 15, and to four bits below it, which are cleared.
    words = (values.view(torch.int8).to(torch.int16) << 4) & ~0x780F
    return words.view(torch.bfloat16).float().mul_(2.0**120).mul_(scale_TK1).bfloat16()


def encode_int4(hidden_TKH: Tensor, channel_scale_KH: Tensor) -> Tensor:
    """uint8 [T, K, R * 18]: for R groups of 32 channels first all nibbles (channel 2i low, 2i+1 high, offset 8),
    then all float16 scales."""
    num_tokens, num_layers, hidden_size = hidden_TKH.shape
    num_groups = -(-hidden_size // GROUP)
    scaled = hidden_TKH.float().div_(channel_scale_KH)
    scaled = torch.nn.functional.pad(scaled, (0, num_groups * GROUP - hidden_size))
    groups = scaled.view(num_tokens, num_layers, num_groups, GROUP)
    step = (groups.abs().amax(dim=-1, keepdim=True) / INT4_MAX).clamp(min=2.0**-24, max=65504.0).half()
    quantised = groups.div_(step.float()).round_().clamp_(-INT4_MAX, INT4_MAX).add_(8).to(torch.int8).flatten(-2)
    pairs = quantised.view(torch.int16)  # 0000hhhh0000llll, as the first channel of a pair is the low byte
    nibbles = (pairs | (pairs >> 4)).to(torch.uint8)
    return torch.cat([nibbles, step.squeeze(-1).contiguous().view(torch.uint8)], dim=-1)


def decode_int4(rows_TKW: Tensor, hidden_size: int, channel_scale_KH: Tensor) -> Tensor:
    num_tokens, num_layers, width = rows_TKW.shape
    num_groups = width // (GROUP // 2 + 2)
    nibbles = rows_TKW[..., : num_groups * GROUP // 2].to(torch.int16)
    step = rows_TKW[..., num_groups * GROUP // 2 :].clone(memory_format=torch.contiguous_format).view(torch.float16)
    pairs = (nibbles | (nibbles << 4)) & 0x0F0F
    groups = pairs.view(torch.int8).sub_(8).view(num_tokens, num_layers, num_groups, GROUP).float()
    hidden = groups.mul_(step.float().unsqueeze(-1)).flatten(-2)[..., :hidden_size]
    return hidden.mul_(channel_scale_KH).bfloat16()


def whitened_cosine(original_TKH: Tensor, decoded_TKH: Tensor) -> Tensor:
    """Cosine between states, float32 [T, K], after each channel is divided by its root mean square.

    The plain cosine shows the few massive channels alone.
    """
    original, decoded = original_TKH.float(), decoded_TKH.float()
    rms_KH = original.square().mean(dim=0).sqrt().clamp(min=TINY)
    return torch.nn.functional.cosine_similarity(original / rms_KH, decoded / rms_KH, dim=-1)
