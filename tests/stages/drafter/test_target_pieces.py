"""Products with the LM head against those in float64."""

# P positions, K inner width, N outer width
import pytest
import torch
from vpd.stages.drafter.target_pieces import linear

K, N = 48, 31
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
"""Of sums of 48 products of numbers below one: float32's rounding, and half a unit in the last of bfloat16's 8 bits."""


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("num_positions", [0, 1, 7])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_is_that_of_float64(dtype: torch.dtype, num_positions: int, with_bias: bool, transposed: bool):
    generator = torch.Generator().manual_seed(0)
    # Every other row, as a view.
    x_PK = torch.rand(2 * num_positions, K, generator=generator).to(dtype)[::2]
    weight_NK = torch.rand(*((K, N) if transposed else (N, K)), generator=generator).to(dtype)
    weight_NK = weight_NK.T if transposed else weight_NK
    bias_N = torch.rand(N, generator=generator).to(dtype) if with_bias else None
    found_PN = linear(x_PK, weight_NK, bias_N)
    expected_PN = x_PK.double() @ weight_NK.double().T + (0 if bias_N is None else bias_N.double())
    assert found_PN.dtype == dtype
    torch.testing.assert_close(found_PN.double(), expected_PN, rtol=TOLERANCES[dtype], atol=0)
