"""The oracle on arrays gives what exact rational arithmetic gives, element by element."""

import math

import numpy as np
import pytest
import torch

from cute_quant import DEEP_GEMM, DEEP_GEMM_SM90
from tests import oracle
from tests.exact import exact_float32_group, exact_group
from tests.helpers import EVERY_DTYPE, INPUT_DTYPES, random_bits

every_dtype = pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
every_input_dtype = pytest.mark.parametrize("input_dtype", INPUT_DTYPES, ids=str)
SIZE = 16


def groups(dtype: torch.dtype) -> torch.Tensor:
    """Return groups of random bits, finite bits, normal values of all magnitudes, and zeros."""
    bits = random_bits((48, SIZE), dtype, seed=5)
    generator = torch.Generator().manual_seed(6)
    normal = torch.randn(48, SIZE, generator=generator) * 2.0 ** torch.arange(-30, 18).unsqueeze(1)
    x = torch.cat((bits, bits.where(bits.isfinite(), 1.0), normal.to(dtype)))
    x[0], x[1], x[2, :3] = 0.0, -0.0, torch.tensor([math.nan, math.inf, -math.inf])
    return x


@every_dtype
@every_input_dtype
@pytest.mark.parametrize("min_scale", [0.0, 1e-10, 3.0, 2.0**100])
def test_powers_of_two(dtype, input_dtype, min_scale):
    fmt = DEEP_GEMM.replace(values=dtype, group_size=SIZE, min_scale=min_scale)
    x = groups(input_dtype)
    values = oracle.to_array(x)
    scales = oracle.scales_of(values, fmt)
    codes = oracle.codes_of(values, scales.floats, fmt)
    for row, group in enumerate(x.tolist()):
        expected = exact_group(group, float(np.float32(min_scale)), dtype)
        assert (codes[row].tolist(), scales.exponents[row, 0]) == expected


@every_dtype
@every_input_dtype
@pytest.mark.parametrize("min_scale", [2.0**-126, 1e-10, 3.0])
def test_float32_scales(dtype, input_dtype, min_scale):
    fmt = DEEP_GEMM_SM90.replace(values=dtype, group_size=SIZE, min_scale=min_scale)
    x = groups(input_dtype)
    values = oracle.to_array(x)
    scales = oracle.scales_of(values, fmt).floats
    codes = oracle.codes_of(values, scales, fmt)
    for row, group in enumerate(x.tolist()):
        expected_codes, scale = exact_float32_group(group, float(np.float32(min_scale)), dtype)
        assert codes[row].tolist() == expected_codes
        assert np.array_equal(scales[row, 0], scale, equal_nan=True)


@every_dtype
def test_values_of_codes_are_torch_s(dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(dtype).double().numpy()
    assert np.array_equal(oracle.values_of(codes.numpy(), dtype), expected, equal_nan=True)


@every_input_dtype
def test_rounding_is_torch_s(input_dtype):
    x = random_bits((4096,), torch.float32, seed=1)
    expected = x.to(input_dtype)
    actual = oracle._rounded(x.numpy(), input_dtype)
    assert torch.equal(actual.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(actual.isnan(), expected.isnan())
