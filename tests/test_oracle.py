"""The oracle on arrays gives what exact rational arithmetic gives, element by element."""

import math

import numpy as np
import pytest
import torch

from cute_quant import DEEP_GEMM, DEEP_GEMM_SM90, NVFP4
from cute_quant.contract.upper_scales import UpperScale
from tests import oracle
from tests.exact import (
    exact_e4m3_group,
    exact_float32_group,
    exact_group,
    exact_upper_scale,
)
from tests.helpers import BYTE_DTYPES, EVERY_DTYPE, INPUT_DTYPES, random_bits

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
        assert (codes[row].tolist(), scales.codes[row, 0]) == expected


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


@every_input_dtype
@pytest.mark.parametrize("amax", [0.0, 2.0**-149, 1e-30, 0.3, 6.0, 2688.0, 2.0**127])
@pytest.mark.parametrize("min_scale", [None, "deepgemm", "torchao", 448.0])
def test_e4m3_scales(input_dtype, amax, min_scale):
    fmt = NVFP4.replace(min_scale=min_scale)
    floor = {None: 0.0, "deepgemm": 2.0**-9, "torchao": 2.0**-6}.get(min_scale, min_scale)
    x = groups(input_dtype)
    values = oracle.to_array(x)
    forms = oracle.forms_of(UpperScale("amax", torch.tensor([amax])))
    encode, decode = exact_upper_scale(float(np.float32(amax)))
    assert (forms.encode.item(), forms.decode.item()) == (encode, decode)
    scales = oracle.scales_of(values, fmt, oracle.Forms(*(form[0] for form in forms)))
    codes = oracle.codes_of(values, scales.floats, fmt)
    for row, group in enumerate(x.tolist()):
        expected = exact_e4m3_group(group, encode, decode, floor)
        assert (codes[row].tolist(), scales.codes[row, 0]) == expected


@pytest.mark.parametrize("kind", ["encode_scale", "decode_scale"])
def test_forms_of_an_upper_scale(kind):
    given = torch.tensor([1.0, 3.0, 2.0**117, 2.0**-117, 2.0**118, 2.0**-118, 0.0, -1.0])
    given = torch.cat([given, torch.tensor([math.inf, math.nan])])
    one, other = oracle.forms_of(UpperScale(kind, given))
    one, other = (one, other) if kind == "encode_scale" else (other, one)
    third = float(np.float32(1 / 3))
    nan = [math.nan] * 6
    expected = [1.0, 3.0, 2.0**117, 2.0**-117, *nan], [1.0, third, 2.0**-117, 2.0**117, *nan]
    for actual, wanted in zip((one, other), expected, strict=True):
        assert np.array_equal(actual.flatten(), wanted, equal_nan=True)


def test_nibbles():
    codes = np.arange(16, dtype=np.uint8).reshape(1, 2, 8)
    content = oracle.packed(codes, torch.float4_e2m1fn_x2)
    assert content.flatten().tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert np.array_equal(oracle.unpacked(content, torch.float4_e2m1fn_x2), codes)
    values = oracle.values_of(codes, torch.float4_e2m1fn_x2)
    assert values[0, 0].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert np.array_equal(values[0, 1], -values[0, 0]) and np.signbit(values[0, 1]).all()


@pytest.mark.parametrize("dtype", BYTE_DTYPES, ids=str)
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
