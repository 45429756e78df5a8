"""Codecs of the hidden states: how bfloat16 [T, K, H] is stored, and how it comes back.

Hidden states have a few channels hundreds of times larger than the rest. Every codec keeps the other channels: the
mantissa codecs and fp8 because they are floating point, int4 because it divides each channel by the channel's scale.
"""

# T tokens, K layers, H hidden width, W stored elements per token and layer, R groups of GROUP channels
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from ..lazy import LazyModule
from ..registry import Registry
from .array_spec import ArraySpec, BloscSettings

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

HIDDEN, CHANNEL_SCALE = "hidden", "channel_scale"
COMPRESSION = BloscSettings(typesize=2, cname="zstd", clevel=1, shuffle="shuffle", blocksize=1 << 20)
BFLOAT16_MANTISSA_BITS = 7
E4M3_MAX = 448.0
SCALE_BYTES = 4
GROUP = 32
INT4_MAX = 7
TINY = 1e-12
LEAST_SCALE = 0.1
"""Smallest scale of a channel, as a share of the layer's median channel."""
BLOCK_ELEMENTS = 1 << 18
"""Values that a CPU encodes or decodes at a time."""


class Codec:
    """Base of a way to store hidden states: a codec gives `spec`, `encode_block` and `decode_block`."""

    name = ""
    """The name that it is registered by."""
    is_exact = False
    """Whether every bit comes back."""
    needs_channel_scale = False
    """Whether a part stores a scale for each channel, float32 [K, H], that encoding and decoding use."""
    usual_share = 1.0
    """Bytes after compression, as a share of those before, for states of real models."""

    def spec(self, num_layers: int, hidden_size: int, chunk_tokens: int) -> ArraySpec:
        """The Zarr array that holds the states of a part."""
        raise NotImplementedError

    def encode_block(self, hidden_TKH: Tensor, channel_scale_KH: Tensor | None = None) -> Tensor:
        """Stored rows [T, K, W] of a few tokens."""
        raise NotImplementedError

    def decode_block(self, rows_TKW: Tensor, hidden_size: int, channel_scale_KH: Tensor | None = None) -> Tensor:
        """States bfloat16 [T, K, H] from the stored rows of a few tokens, or of many on a GPU."""
        raise NotImplementedError

    def channel_scale(self, hidden_TKH: Tensor) -> Tensor | None:
        """The scale of each channel, float32 [K, H], for a part whose first sequence has these states; None if the
        codec needs none."""
        return measure_channels(hidden_TKH) if self.needs_channel_scale else None

    def encode(self, hidden_TKH: Tensor, channel_scale_KH: Tensor | None = None) -> np.ndarray:
        """Stored rows [T, K, W] of bfloat16 states [T, K, H]; `raw` and `lossless` copy nothing."""
        hidden_TKH = hidden_TKH.contiguous()
        spec = self.spec(*hidden_TKH.shape[1:], chunk_tokens=1)
        dtype = getattr(torch, spec.dtype)
        return by_blocks(
            lambda states: self.encode_block(states, channel_scale_KH), hidden_TKH, spec.row_shape, dtype
        ).numpy()

    def decode(self, rows_TKW: Tensor, hidden_size: int, channel_scale_KH: Tensor | None = None) -> Tensor:
        """States bfloat16 [T, K, H] from stored rows, on the rows' device; codecs that store bfloat16 copy nothing."""
        scale_KH = None if channel_scale_KH is None else channel_scale_KH.to(rows_TKW.device)
        row_shape = (rows_TKW.shape[1], hidden_size)
        return by_blocks(
            lambda rows: self.decode_block(rows, hidden_size, scale_KH), rows_TKW, row_shape, torch.bfloat16
        )


CODECS = Registry[Codec]("codec")
CodecClass = TypeVar("CodecClass", bound=Codec)


def codec(name: str) -> Callable[[type[CodecClass]], type[CodecClass]]:
    """Registers a class as the codec of this name."""

    def register(cls: type[CodecClass]) -> type[CodecClass]:
        cls.name = name
        CODECS.add(name, cls())
        return cls

    return register


class Bfloat16Codec(Codec):
    """Base of the codecs that store bfloat16 values."""

    compression: BloscSettings | None = COMPRESSION

    def spec(self, num_layers: int, hidden_size: int, chunk_tokens: int) -> ArraySpec:
        return ArraySpec(HIDDEN, (num_layers, hidden_size), "uint16", chunk_tokens, self.compression)

    def decode(self, rows_TKW: Tensor, hidden_size: int, channel_scale_KH: Tensor | None = None) -> Tensor:
        return rows_TKW.view(torch.bfloat16)


@codec("raw")
class Raw(Bfloat16Codec):
    """The states as they are: H x bfloat16 per token and layer."""

    is_exact = True
    compression = None

    def encode(self, hidden_TKH: Tensor, channel_scale_KH: Tensor | None = None) -> np.ndarray:
        return hidden_TKH.contiguous().view(torch.uint16).numpy()


@codec("lossless")
class Lossless(Raw):
    """The states as they are, compressed by Blosc (Zstandard, byte shuffle)."""

    usual_share = 0.72
    compression = COMPRESSION


class RoundedCodec(Bfloat16Codec):
    """Base of the codecs that round the mantissa, which then compresses better."""

    mantissa_bits: int

    def encode_block(self, hidden_TKH: Tensor, channel_scale_KH: Tensor | None = None) -> Tensor:
        return round_mantissa(hidden_TKH, self.mantissa_bits).view(torch.uint16)


@codec("round4")
class Round4(RoundedCodec):
    """The states rounded to 4 bits of mantissa, compressed; loses half a unit in the last place kept."""

    usual_share = 0.53
    mantissa_bits = 4


@codec("round3")
class Round3(RoundedCodec):
    """The states rounded to 3 bits of mantissa, compressed; loses half a unit in the last place kept."""

    usual_share = 0.47
    mantissa_bits = 3


@codec("fp8")
class Fp8(Codec):
    """H x float8 e4m3, then one float32 scale, per token and layer: 3 bits of mantissa, over a range of 2**17 below the
    largest channel."""

    def spec(self, num_layers: int, hidden_size: int, chunk_tokens: int) -> ArraySpec:
        return ArraySpec(HIDDEN, (num_layers, hidden_size + SCALE_BYTES), "uint8", chunk_tokens)

    def encode_block(self, hidden_TKH: Tensor, channel_scale_KH: Tensor | None = None) -> Tensor:
        """uint8 [T, K, H + 4]: e4m3 values, then the float32 scale to multiply them by (largest magnitude / 448)."""
        states = hidden_TKH.float()
        scale_TK1 = states.abs().amax(dim=-1, keepdim=True).clamp(min=TINY) / E4M3_MAX
        values = states.div_(scale_TK1).to(torch.float8_e4m3fn).view(torch.uint8)
        return torch.cat([values, scale_TK1.view(torch.uint8)], dim=-1)

    def decode_block(self, rows_TKW: Tensor, hidden_size: int, channel_scale_KH: Tensor | None = None) -> Tensor:
        # A copy, because float32 values must start at a multiple of four bytes.
        scale_TK1 = rows_TKW[..., hidden_size:].clone(memory_format=torch.contiguous_format).view(torch.float32)
        values = rows_TKW[..., :hidden_size]
        if rows_TKW.device.type != "cpu":
            return (values.view(torch.float8_e4m3fn).float() * scale_TK1).bfloat16()
        # On a CPU torch casts e4m3 values one by one, which is slow. The bits of e4m3 in the places of bfloat16's bits
        # are the value divided by 2**120. The sign is in bit 15 and in the four bits below it, which are cleared.
        words = (values.view(torch.int8).to(torch.int16) << 4) & ~0x780F
        return words.view(torch.bfloat16).float().mul_(2.0**120).mul_(scale_TK1).bfloat16()


@codec("int4")
class Int4(Codec):
    """H x 4 bits, then a float16 scale for every 32 channels, per token and layer, after division by a scale for each
    channel; loses at most 1/14 of a group's span."""

    needs_channel_scale = True

    def spec(self, num_layers: int, hidden_size: int, chunk_tokens: int) -> ArraySpec:
        num_groups = -(-hidden_size // GROUP)
        return ArraySpec(HIDDEN, (num_layers, num_groups * (GROUP // 2 + 2)), "uint8", chunk_tokens)

    def encode_block(self, hidden_TKH: Tensor, channel_scale_KH: Tensor | None = None) -> Tensor:
        """uint8 [T, K, R * 18]: for R groups of 32 channels first all nibbles (channel 2i low, 2i+1 high, offset 8),
        then all float16 scales."""
        num_tokens, num_layers, hidden_size = hidden_TKH.shape
        num_groups = -(-hidden_size // GROUP)
        scaled = hidden_TKH.float().div_(self._required(channel_scale_KH))
        scaled = torch.nn.functional.pad(scaled, (0, num_groups * GROUP - hidden_size))
        groups = scaled.view(num_tokens, num_layers, num_groups, GROUP)
        step = (groups.abs().amax(dim=-1, keepdim=True) / INT4_MAX).clamp(min=2.0**-24, max=65504.0).half()
        quantized = groups.div_(step.float()).round_().clamp_(-INT4_MAX, INT4_MAX).add_(8).to(torch.int8).flatten(-2)
        pairs = quantized.view(torch.int16)  # 0000hhhh0000llll, as the first channel of a pair is the low byte
        nibbles = (pairs | (pairs >> 4)).to(torch.uint8)
        return torch.cat([nibbles, step.squeeze(-1).contiguous().view(torch.uint8)], dim=-1)

    def decode_block(self, rows_TKW: Tensor, hidden_size: int, channel_scale_KH: Tensor | None = None) -> Tensor:
        num_tokens, num_layers, width = rows_TKW.shape
        num_groups = width // (GROUP // 2 + 2)
        nibbles = rows_TKW[..., : num_groups * GROUP // 2].to(torch.int16)
        step = rows_TKW[..., num_groups * GROUP // 2 :].clone(memory_format=torch.contiguous_format).view(torch.float16)
        pairs = (nibbles | (nibbles << 4)) & 0x0F0F
        groups = pairs.view(torch.int8).sub_(8).view(num_tokens, num_layers, num_groups, GROUP).float()
        hidden = groups.mul_(step.float().unsqueeze(-1)).flatten(-2)[..., :hidden_size]
        return hidden.mul_(self._required(channel_scale_KH)).bfloat16()

    @staticmethod
    def _required(channel_scale_KH: Tensor | None) -> Tensor:
        if channel_scale_KH is None:
            raise ValueError("expected a scale for each channel, got none")
        return channel_scale_KH


def by_blocks(
    function: Callable[[Tensor], Tensor], tokens: Tensor, row_shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The function of the tokens, [T, *row_shape]. A CPU takes few tokens at a time, so that they stay in its cache."""
    if tokens.device.type != "cpu":
        return function(tokens)
    found = torch.empty(len(tokens), *row_shape, dtype=dtype)
    num_tokens = max(1, BLOCK_ELEMENTS // tokens[0].numel())
    for block, target in zip(tokens.split(num_tokens), found.split(num_tokens), strict=True):
        target.copy_(function(block))
    return found


def measure_channels(hidden_TKH: Tensor) -> Tensor:
    """Scale of each channel, float32 [K, H]: the channel's root mean square over the tokens.

    A few tokens say little about a channel, so the scale is at least `LEAST_SCALE` of the layer's median channel.
    """
    rms_KH = hidden_TKH.float().square().mean(dim=0).sqrt()
    median_K1 = rms_KH.median(dim=1, keepdim=True).values
    return rms_KH.maximum(median_K1 * LEAST_SCALE).clamp(min=TINY)


def round_mantissa(hidden_TKH: Tensor, bits: int) -> Tensor:
    """Rounds bfloat16 to the nearest value with `bits` bits of mantissa, ties to even; never to infinity."""
    dropped = BFLOAT16_MANTISSA_BITS - bits
    words = hidden_TKH.view(torch.int16)
    magnitude = words & 0x7FFF
    half = ((words >> dropped) & 1) + ((1 << (dropped - 1)) - 1)
    rounded = (words + half) & -(1 << dropped)
    largest = 0x7F7F >> dropped << dropped  # the largest finite value with so many bits
    if magnitude.max() > largest:
        kept = torch.where(magnitude < 0x7F80, torch.full_like(words, largest), magnitude) | (words & -0x8000)
        rounded = torch.where(magnitude > largest, kept, rounded)
    return rounded.view(torch.bfloat16)


def whitened_cosine(original_TKH: Tensor, decoded_TKH: Tensor) -> Tensor:
    """Cosine between states, float32 [T, K], after division of each channel by its root mean square.

    The plain cosine shows only the few largest channels.
    """
    original, decoded = original_TKH.float(), decoded_TKH.float()
    rms_KH = original.square().mean(dim=0).sqrt().clamp(min=TINY)
    return torch.nn.functional.cosine_similarity(original / rms_KH, decoded / rms_KH, dim=-1)
