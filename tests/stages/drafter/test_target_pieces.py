"""Products with the LM head against those in float64."""

# P positions, I inputs, O outputs
import pytest
import torch
from vpd.stages.drafter.target_pieces import linear

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
