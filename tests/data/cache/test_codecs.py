"""Codecs against slow references: a codec loses no more than it states, and keeps the many small channels."""

# T tokens, K layers, H hidden width
import math
import struct
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.tiny import same_bits
from torch import Tensor
from vpd.data.cache import codecs
from vpd.data.cache.codecs import (
    CODECS,
    E4M3_MAX,
    GROUP,
    INT4_MAX,
    measure_channels,
    round_mantissa,
    whitened_cosine,
)

NAMES, FP8, INT4 = [*CODECS], CODECS["fp8"], CODECS["int4"]
INFINITY = 0x7F80
BFLOAT16_STEP = 2.0**-8
"""Largest relative error of rounding to bfloat16."""


def to_states(words: list[int]) -> Tensor:
    """bfloat16 [1, 1, n] of these bits."""
    return torch.tensor(words, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).view(1, 1, -1)


def value_of(word: int) -> float:
    """A bfloat16 is the upper half of a float32."""
    return struct.unpack("<f", struct.pack("<I", word << 16))[0]


def massive_states(num_tokens: int, num_layers: int, width: int, seed: int = 0) -> Tensor:
    """States like those of real models: the channels have different scales, and two are hundreds of times larger than
    the others."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(num_tokens, num_layers, width, generator=generator)
    states *= torch.rand(width, generator=generator) + 0.5
    massive = torch.randperm(width, generator=generator)[:2]
    states[..., massive] = 400 + 40 * states[..., massive]
    return states.bfloat16()


# Mantissa


def slow_round(word: int, bits: int) -> int:
    """The nearest value with that many bits of mantissa; of two equally near values, the one with an even last bit."""
    sign, magnitude = word & 0x8000, word & 0x7FFF
    if magnitude >= INFINITY:
        return word
    unit = 1 << (7 - bits)
    below = magnitude - magnitude % unit
    above = below + unit
    if above >= INFINITY:
        return sign | below
    error_below, error_above = (abs(value_of(magnitude) - value_of(near)) for near in (below, above))
    if error_below == error_above:
        return sign | (below if below // unit % 2 == 0 else above)
    return sign | (below if error_below < error_above else above)


@pytest.mark.parametrize("bits", [3, 4])
def test_rounding_gives_the_nearest_value_for_every_bfloat16(bits: int):
    largest = 0x7F80 - (1 << (7 - bits))
    usual = [word for word in range(1 << 16) if word & 0x7FFF <= largest]
    at_the_end = [[word] for word in (*range(0x7F60, 0x8000), *range(0xFF60, 1 << 16))]
    for words in (range(1 << 16), usual, *at_the_end):  # with and without values near infinity, and these alone
        found = round_mantissa(to_states([*words]), bits).view(torch.uint16).flatten().tolist()
        assert found == [slow_round(word, bits) for word in words]


@pytest.mark.parametrize("bits", [3, 4])
def test_rounding_never_overflows_and_keeps_what_is_no_number(bits: int):
    words = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    states = words.view(torch.bfloat16)
    rounded = round_mantissa(states, bits)
    assert torch.equal(torch.isfinite(rounded), torch.isfinite(states))
    kept = ~torch.isfinite(states)
    assert same_bits(rounded[kept], states[kept])
    assert same_bits(round_mantissa(rounded, bits), rounded)
    usual = torch.isfinite(states) & (states.abs() >= 2.0**-126) & (states.abs() < 2.0**127)
    error = (rounded[usual].double() - states[usual].double()).abs() / states[usual].double().abs()
    assert error.max() <= 2.0 ** -(bits + 1)


# fp8


def test_every_float8_comes_back_as_torch_casts_it():
    """All bytes but the two NaNs, at scales from tiny to huge."""
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    for scale in (1e-12 / E4M3_MAX, 2.0**-30, 1 / 3, 1.0, 7.7, 3e38 / E4M3_MAX):
        stored_scale = torch.tensor([scale]).view(torch.uint8)
        rows = torch.cat([codes, stored_scale]).view(1, 1, -1)
        expected = (codes.view(torch.float8_e4m3fn).float() * torch.tensor([scale])).bfloat16()
        assert same_bits(FP8.decode_block(rows, len(codes)).flatten(), expected)


@given(st.integers(1, 70), st.integers(1, 3), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_fp8_is_off_by_a_sixteenth_at_most(width: int, num_layers: int, num_tokens: int, seed: int):
    states = massive_states(num_tokens, num_layers, width + 2, seed)
    rows = FP8.encode_block(states)
    assert (rows.dtype, rows.shape) == (torch.uint8, (num_tokens, num_layers, width + 2 + 4))
    decoded = FP8.decode_block(rows, width + 2)
    assert (decoded.dtype, decoded.shape) == (torch.bfloat16, states.shape)
    largest_TK1 = states.double().abs().amax(dim=-1, keepdim=True)
    # Half a unit in the last of three places; below the smallest normal value the unit no longer shrinks.
    allowed = (states.double().abs() / 16).clamp(min=2.0**-10 * largest_TK1 / E4M3_MAX)
    error = (decoded.double() - states.double()).abs()
    assert (error <= allowed * 1.001 + states.double().abs() * BFLOAT16_STEP).all()


@pytest.mark.parametrize("value", [0.0, 1e-38, -3e-20, 1.0, 3e38])
def test_fp8_of_equal_values_is_close_and_finite(value: float):
    states = torch.full((2, 1, 8), value).bfloat16()
    decoded = FP8.decode_block(FP8.encode_block(states), 8)
    assert torch.isfinite(decoded).all()
    torch.testing.assert_close(decoded, states, rtol=2 * BFLOAT16_STEP, atol=1e-14)


# int4


def slow_int4(states_H: list[float], scale_H: list[float]) -> tuple[list[float], list[float]]:
    """For one token and layer: the decoded values, and the largest error that each channel may have."""
    decoded: list[float] = []
    allowed: list[float] = []
    for start in range(0, len(states_H), GROUP):
        channels = range(start, min(start + GROUP, len(states_H)))
        scaled = [np.float32(states_H[c]) / np.float32(scale_H[c]) for c in channels]
        exact = max(abs(float(x)) for x in scaled) / INT4_MAX
        step = float(np.float16(min(max(exact, 2.0**-24), 65504.0)))
        for c, x in zip(channels, scaled, strict=True):
            code = max(-INT4_MAX, min(INT4_MAX, round(float(x) / step)))
            decoded.append(code * step * scale_H[c])
            allowed.append((0.5 * step + INT4_MAX * abs(exact - step)) * scale_H[c])
    return decoded, allowed


@given(st.integers(1, 100), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
@example(width=33, num_layers=1, num_tokens=1, seed=0)
@settings(max_examples=30, deadline=None)
def test_int4_is_within_half_a_step_in_every_group(width: int, num_layers: int, num_tokens: int, seed: int):
    states = massive_states(num_tokens, num_layers, width + 2, seed)
    scale_KH = measure_channels(states)
    rows = INT4.encode_block(states, scale_KH)
    num_groups = math.ceil((width + 2) / GROUP)
    assert (rows.dtype, rows.shape) == (torch.uint8, (num_tokens, num_layers, 18 * num_groups))
    decoded = INT4.decode_block(rows, width + 2, scale_KH)
    assert (decoded.dtype, decoded.shape) == (torch.bfloat16, states.shape)
    for t in range(num_tokens):
        for k in range(num_layers):
            found, original = (tensor[t, k].double().tolist() for tensor in (decoded, states))
            expected, allowed = slow_int4(original, scale_KH[k].tolist())
            # The last step to bfloat16 rounds.
            assert found == pytest.approx(expected, rel=BFLOAT16_STEP, abs=1e-30)
            for value, truth, bound in zip(found, original, allowed, strict=True):
                assert abs(value - truth) <= bound * 1.001 + abs(value) * BFLOAT16_STEP


def test_channels_are_measured_by_their_root_mean_square_and_never_far_below_the_usual():
    states = torch.tensor([[[3.0, -2.0, 0.0, 500.0]], [[4.0, 2.0, 0.0, 0.0]]]).bfloat16()
    usual = 2.0  # the lower median of the sizes 0, 2, 12.5 ** 0.5 and 125_000 ** 0.5
    expected = [12.5**0.5, 2.0, 0.1 * usual, 125_000**0.5]
    assert measure_channels(states)[0].tolist() == pytest.approx(expected, rel=1e-6)
    assert (measure_channels(torch.zeros(3, 2, 4).bfloat16()) > 0).all()


# Massive channels


def slow_whitened_cosine(original: list[list[float]], decoded: list[list[float]]) -> list[float]:
    """The cosines of the tokens of one layer."""
    width = len(original[0])
    rms = [math.sqrt(sum(token[c] ** 2 for token in original) / len(original)) for c in range(width)]
    found = []
    for one, other in zip(original, decoded, strict=True):
        a, b = ([token[c] / rms[c] for c in range(width)] for token in (one, other))
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        found.append(dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b)))
    return found


def test_the_whitened_cosine_is_the_cosine_after_division_by_each_channel_s_size():
    original = massive_states(7, 3, 12)
    decoded = (original.float() + torch.randn(7, 3, 12, generator=torch.Generator().manual_seed(1))).bfloat16()
    found_TK = whitened_cosine(original, decoded)
    for k in range(3):
        expected = slow_whitened_cosine(original[:, k].tolist(), decoded[:, k].tolist())
        assert found_TK[:, k].tolist() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(whitened_cosine(original, original), torch.ones(7, 3), rtol=0, atol=1e-5)


def naive_int8(states_TKH: Tensor) -> Tensor:
    """One scale for each token, and twice the bits of int4."""
    scale_TK1 = states_TKH.float().abs().amax(dim=-1, keepdim=True) / 127
    return ((states_TKH.float() / scale_TK1).round() * scale_TK1).bfloat16()


@pytest.mark.parametrize(
    ("name", "least"),
    [("raw", 1), ("lossless", 1), ("round4", 0.9995), ("round3", 0.999), ("fp8", 0.999), ("int4", 0.98)],
)
def test_codecs_keep_the_small_channels_beside_massive_ones(name: str, least: float):
    states = massive_states(200, 2, 128)
    codec, scale_KH = CODECS[name], measure_channels(states)
    decoded = codec.decode(torch.from_numpy(codec.encode(states, scale_KH)), 128, scale_KH)
    cosine_TK = whitened_cosine(states, decoded)
    assert cosine_TK.min() >= least - 1e-5
    # The naive codec loses most channels, but the plain cosine does not show this.
    naive = naive_int8(states)
    assert torch.cosine_similarity(states.float(), naive.float(), dim=-1).min() > 0.999
    assert whitened_cosine(states, naive).mean() < 0.7 < 0.99 < cosine_TK.mean()


# All of them


@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 5), st.sampled_from(NAMES))
@settings(max_examples=40, deadline=None)
def test_stored_rows_fit_the_array_and_exact_codecs_keep_every_bit(
    width: int, num_layers: int, num_tokens: int, name: str
):
    codec, generator = CODECS[name], torch.Generator().manual_seed(width)
    shape = (num_tokens, num_layers, width)
    states = torch.randn(shape, generator=generator).bfloat16()
    if codec.is_exact:
        states = torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16).view(torch.bfloat16)
    scale_KH = measure_channels(states) if codec.needs_channel_scale else None
    rows, spec = codec.encode(states, scale_KH), codec.spec(num_layers, width, 64)
    assert (rows.dtype, rows.shape[1:]) == (np.dtype(spec.dtype), spec.row_shape)
    decoded = codec.decode(torch.from_numpy(rows), width, scale_KH)
    assert (decoded.dtype, decoded.shape) == (torch.bfloat16, states.shape)
    if codec.is_exact:
        assert same_bits(decoded, states)
        assert decoded.data_ptr() == states.data_ptr()  # nothing was copied


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_tokens", [1, 6, 7, 23])
def test_a_long_sequence_is_encoded_and_decoded_as_if_at_once(
    num_tokens: int, name: str, monkeypatch: pytest.MonkeyPatch
):
    states = massive_states(num_tokens, 3, 40)
    codec, scale_KH = CODECS[name], measure_channels(states)
    found = []
    for block in (1 << 20, 6 * 3 * 40, 1):
        monkeypatch.setattr(codecs, "BLOCK_ELEMENTS", block)
        before = states.clone()
        rows = codec.encode(states, scale_KH)
        found.append((rows.tobytes(), codec.decode(torch.from_numpy(rows), 40, scale_KH)))
        assert same_bits(states, before)
    for rows, decoded in found[1:]:
        assert rows == found[0][0]
        assert same_bits(decoded, found[0][1])


def test_states_that_do_not_lie_in_a_row_are_encoded_too():
    states = massive_states(5, 6, 8)[:, ::2].transpose(0, 1)
    scale_KH = measure_channels(states)
    for name in NAMES:
        arguments: tuple[Any, ...] = (scale_KH,) if CODECS[name].needs_channel_scale else ()
        found, expected = (CODECS[name].encode(x, *arguments) for x in (states, states.clone()))
        assert found.tobytes() == expected.tobytes()
