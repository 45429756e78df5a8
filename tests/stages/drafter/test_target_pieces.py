"""Products with the LM head against those in float64; the RoPE base of a target's config."""

# P positions, I inputs, O outputs
from typing import Any

import pytest
import torch
from vpd.data.errors import DrafterError
from vpd.stages.drafter.target_pieces import full_attention_theta, linear

NUM_INPUTS, NUM_OUTPUTS = 48, 31
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
"""For sums of 48 products of numbers below one: float32's rounding, and half a unit of bfloat16's last bit."""


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("num_positions", [0, 1, 7])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_is_that_of_float64(dtype: torch.dtype, num_positions: int, with_bias: bool, transposed: bool):
    generator = torch.Generator().manual_seed(0)
    # Every other row, as a view.
    x_PI = torch.rand(2 * num_positions, NUM_INPUTS, generator=generator).to(dtype)[::2]
    sizes = (NUM_INPUTS, NUM_OUTPUTS) if transposed else (NUM_OUTPUTS, NUM_INPUTS)
    weight_OI = torch.rand(*sizes, generator=generator).to(dtype)
    weight_OI = weight_OI.T if transposed else weight_OI
    bias_O = torch.rand(NUM_OUTPUTS, generator=generator).to(dtype) if with_bias else None
    found_PO = linear(x_PI, weight_OI, bias_O)
    expected_PO = x_PI.double() @ weight_OI.double().T + (0 if bias_O is None else bias_O.double())
    assert found_PO.dtype == dtype
    torch.testing.assert_close(found_PO.double(), expected_PO, rtol=TOLERANCES[dtype], atol=0)


LINEAR, LOCAL = {"rope_type": "linear", "factor": 8.0}, {"rope_type": "default", "rope_theta": 1e4}
THETAS: dict[str, dict[str, Any]] = {
    "older": {"rope_theta": 1000000},
    "older-scaled": {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}},
    "newer": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "within-scaling": {"rope_scaling": {"rope_type": "llama3", "rope_theta": 1e6}, "rope_theta": 7.0},
    "by-layer-type": {"rope_parameters": {"sliding_attention": LOCAL, "full_attention": {**LINEAR, "rope_theta": 1e6}}},
    "by-one-layer-type": {"rope_parameters": {"compressed_attention": {"rope_type": "default", "rope_theta": 1e6}}},
    "gemma-3-of-old": {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None},
    "global-and-local": {"global_rope_theta": 1e6, "local_rope_theta": 1e4},
    "neox": {"rotary_emb_base": 1000000},
}


@pytest.mark.parametrize("spelling", THETAS)
def test_the_rope_base_is_that_of_full_attention(spelling: str):
    assert full_attention_theta(THETAS[spelling]) == 1e6


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"rope_parameters": None},
        {"rope_parameters": {"sliding_attention": LOCAL, "linear_attention": {**LOCAL, "rope_theta": 1e6}}},
        {"rope_parameters": LINEAR},
    ],
    ids=["nothing", "null", "no-full-attention", "no-base"],
)
def test_an_unknown_rope_base_is_asked_for(config: dict[str, Any]):
    with pytest.raises(DrafterError, match=r"RoPE base .*Set drafter\.rope_theta"):
        full_attention_theta(config)
