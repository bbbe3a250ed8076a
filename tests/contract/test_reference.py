"""Values and scales: the contract, bit for bit, on every device."""

import math
import struct
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cute_quant import DEEP_GEMM, DEEP_GEMM_SM90, dequantize, quantize
from cute_quant.contract.dtypes import to_float32
from tests.exact import E2M1, LARGEST, exact_float32, exact_float32_group, exact_group
from tests.helpers import (
    EVERY_DTYPE,
    FLOAT32,
    FLOAT32_ROUNDED,
    FORMATS,
    UE8M0,
    assert_same_bits,
    bits,
    check_every_byte,
    random_bits,
)

DTYPES = [torch.bfloat16, torch.float16]
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def all_patterns(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def groups_with_amax(magnitudes: torch.Tensor) -> torch.Tensor:
    """Return a group of 128 per pattern: it at a moving column, smaller values around it."""
    n = magnitudes.numel()
    factors = torch.linspace(-1, 1, 128, dtype=torch.float64)
    finite = magnitudes.double().nan_to_num(1.0, 1.0, 1.0)
    x = (finite[:, None] * factors * 0.999).to(magnitudes.dtype)
    x[torch.arange(n), torch.arange(n) % 128] = magnitudes
    return x


@every_dtype
@every_format
@pytest.mark.parametrize("min_scale", [1e-10, 2.0**-126])
def test_every_pattern_as_amax(dtype, fmt, min_scale, device):
    x = groups_with_amax(all_patterns(dtype)).view(-1, 1024).to(device)
    check_every_byte(x, fmt.replace(min_scale=min_scale))


@every_dtype
def test_every_pattern_as_amax_without_floor(dtype, device):
    x = groups_with_amax(all_patterns(dtype)).view(-1, 1024).to(device)
    check_every_byte(x, UE8M0.replace(min_scale=0.0))


@every_dtype
@every_format
def test_random_bits(dtype, fmt, device):
    x = random_bits((257, 1280), dtype, seed=1).to(device)
    check_every_byte(x, fmt)


@every_dtype
@every_format
def test_random_finite_bits(dtype, fmt, device):
    x = random_bits((130, 1280), dtype, seed=2)
    x = x.where(x.isfinite(), 0.75).to(device)
    q, sf = check_every_byte(x, fmt)
    assert q.float().isfinite().all() and sf.float().isfinite().all()


def ue8m0_bytes(sf: torch.Tensor, groups: int) -> torch.Tensor:
    return bits(sf).view(sf.shape[0], -1)[:, :groups]


@every_dtype
@pytest.mark.parametrize("min_scale", [0.0, 1e-10, 2.0**-126, 3.0, 2.0**100])
def test_exact_oracle(dtype, min_scale, device):
    x = random_bits((64, 128), dtype, seed=3)
    x[::2] = torch.randn(32, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1] = 0.0
    x[3] = x[3].where(x[3].isfinite(), 1.0)
    q, sf = quantize(x.to(device), DEEP_GEMM.replace(min_scale=min_scale))
    exponents = ue8m0_bytes(sf, 1)
    for row in range(len(x)):
        codes, exponent = exact_group(x[row].tolist(), struct_float32(min_scale))
        assert exponents[row].item() == exponent
        assert bits(q[row]).tolist() == codes


@every_dtype
def test_exact_oracle_of_float32_scales(dtype, device):
    x = random_bits((48, 128), dtype, seed=7)
    x[::2] = torch.randn(24, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    x = x.where(x.isfinite(), 1.0)
    q, sf = quantize(x.to(device), DEEP_GEMM_SM90.replace(min_scale=2.0**-126))
    for row in range(len(x)):
        codes, scale = exact_float32_group(x[row].tolist(), 2.0**-126)
        assert sf[row].item() == scale
        assert bits(q[row]).tolist() == codes


@pytest.mark.parametrize("value", [1e-10, 3.0, 1 / 3, 2.0**-149, 1e-40, 1e-46, 2.0**100, 1e-4, 0.1])
def test_rounding_to_float32(value):
    assert to_float32(value) == struct_float32(value)


def struct_float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


@every_dtype
def test_float32_scale_is_the_rounded_quotient(dtype, device):
    x = all_patterns(dtype)
    x = x.where(x.isfinite(), 1.0)[:, None].expand(-1, 128).contiguous()
    _, sf = quantize(x.to(device), DEEP_GEMM_SM90.replace(min_scale=2.0**-126))
    quotient = (x[:, 0].abs().double() / 448).float().clamp(min=2.0**-126)
    assert torch.equal(sf[:, 0].cpu(), quotient)


@every_dtype
@pytest.mark.parametrize("values", EVERY_DTYPE, ids=str)
def test_float32_scale_of_deepgemm_is_a_rounded_product(values, dtype, device):
    """Scales are amax times float32(1 / M); values are x times float32(1 / scale) as always."""
    x = groups_with_amax(all_patterns(dtype))
    x = x.where(x.isfinite(), 1.0).view(-1, 1024)
    choices = {"values": values, "numerics": "deepgemm", "min_scale": 2.0**-126}
    q, sf = check_every_byte(x.to(device), DEEP_GEMM_SM90.replace(**choices))
    inverse = float(exact_float32(Fraction(1, LARGEST[values])))
    amax = x.double().unflatten(1, (8, 128)).abs().amax(2)
    # Both factors have 24 bits, so that their product is exact in float64.
    scales = (amax * inverse).float().clamp(min=2.0**-126)
    assert_same_bits(sf.contiguous(), scales)
    _, quotients = quantize(x.to(device), DEEP_GEMM_SM90.replace(**choices | {"numerics": "ieee"}))
    assert (bits(quotients) != bits(sf)).any()
    if values is E2M1:
        return
    products = x.float().unflatten(1, (8, 128)) * (1.0 / scales).unsqueeze(2)
    if values is torch.int8:
        products = products.round().clamp(-127, 127)
    assert_same_bits(q, products.flatten(1).to(values))


@pytest.mark.parametrize(
    ("value", "byte", "code"),
    [
        (0.0, 0x5E, 0x00),
        (-0.0, 0x5E, 0x80),
        (448.0, 127, 0x7E),
        (-448.0, 127, 0xFE),
        (450.0, 128, 0x76),
        (672.0, 128, 0x7A),  # 336 lies between 320 and 352 and goes to the even mantissa
        (2.0**-33 * 448, 94, 0x7E),
        (2.0**-34 * 448, 94, 0x76),
        (math.inf, 255, 0x7F),
        (-math.inf, 255, 0x7F),
        (math.nan, 255, 0x7F),
    ],
)
def test_known_values(value, byte, code, device):
    x = torch.full((1, 128), value, dtype=torch.bfloat16, device=device)
    q, sf = quantize(x)
    assert ue8m0_bytes(sf, 4).tolist() == [[byte, 0, 0, 0]]
    assert bits(q).tolist() == [code] * 128


@every_dtype
@every_format
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_one_special_value_poisons_its_group_alone(dtype, fmt, special, device):
    x = torch.randn(8, 1024, generator=torch.Generator().manual_seed(4)).to(dtype)
    clean = dequantize(*quantize(x, fmt), fmt, dtype=torch.float32)
    positions = [(row, 131 * row % 1024) for row in range(8)]
    for position in positions:
        x[position] = special
    q, sf = check_every_byte(x.to(device), fmt)
    y = dequantize(q, sf, fmt, dtype=torch.float32).cpu()
    for row, column in positions:
        group = slice(column // 128 * 128, column // 128 * 128 + 128)
        assert bits(q[row, group]).eq(0x7F).all()
        clean[row, group] = torch.nan
    torch.testing.assert_close(y, clean, rtol=0, atol=0, equal_nan=True)


def test_nan_payloads_and_signs_do_not_matter(device):
    patterns = torch.cat([torch.arange(0x7F81, 0x8000), torch.arange(0xFF81, 0x10000)])
    x = torch.zeros(patterns.numel(), 128, dtype=torch.int32)
    x[:, 5] = patterns
    x = x.to(torch.int16).view(torch.bfloat16)
    q, sf = check_every_byte(x.to(device), UE8M0)
    assert bits(q).eq(0x7F).all() and ue8m0_bytes(sf, 1).eq(255).all()


@every_format
def test_each_group_has_its_scale(fmt, device):
    """Each of 13 groups has another power of two, so that swapped scales show."""
    x = torch.ones(6, 13 * 128, dtype=torch.bfloat16)
    exponents = torch.arange(6)[:, None] * 13 + torch.arange(13)
    x = x.unflatten(1, (13, 128)) * 2.0 ** (exponents - 40)[:, :, None]
    x = x.to(torch.bfloat16).flatten(1)
    q, sf = check_every_byte(x.to(device), fmt)
    assert torch.equal(dequantize(q, sf, fmt).cpu(), x) == fmt.power_of_two


def test_dequantize_is_contiguous(device):
    q, sf = quantize(torch.ones(6, 256, dtype=torch.bfloat16, device=device))
    wide = q.view(torch.uint8).repeat(1, 2).view(q.dtype)[:, :256]
    assert dequantize(wide, sf).is_contiguous()


def test_flushing_subnormals_on_the_cpu():
    x = torch.zeros(2, 128, dtype=torch.bfloat16)
    expected = quantize(x, DEEP_GEMM.replace(min_scale=0.0))
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        results = quantize(x, DEEP_GEMM.replace(min_scale=0.0))
    finally:
        torch.set_flush_denormal(False)
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(bits(result), bits(wanted))
    assert bits(results[0]).eq(0).all()


@every_format
def test_dequantize_is_close(fmt, device):
    x = torch.randn(33, 1536, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    q, sf = quantize(x.to(device), fmt)
    y = dequantize(q, sf, fmt, dtype=torch.float32).cpu()
    x = x.float()
    scale = x.unflatten(1, (12, 128)).abs().amax(2, keepdim=True) / 448 * 2
    half_ulp = torch.maximum(x.unflatten(1, (12, 128)).abs() / 16, scale * 2.0**-10)
    assert ((y - x).unflatten(1, (12, 128)).abs() <= half_ulp * 1.001).all()


def test_quantization_has_no_bias():
    x = torch.randn(4096, 128, generator=torch.Generator().manual_seed(6)).to(torch.bfloat16)
    y = dequantize(*quantize(x), dtype=torch.float32)
    error = (y - x.float()).double()
    standard_error = error.std() / math.sqrt(error.numel())
    assert error.mean().abs() < 4 * standard_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@every_format
def test_dequantize_is_exact_for_every_code(dtype, fmt, device):
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    q = codes.view(torch.float8_e4m3fn).to(device)
    sf = fmt.empty_scales((), 2, 128, torch.device(device))
    sf.copy_(torch.tensor([[120], [133]]) if fmt.packed else torch.tensor([[2**-7], [2**6]]))
    expected = codes.view(torch.float8_e4m3fn).double() * torch.tensor([[2.0**-7], [2.0**6]])
    y = dequantize(q, sf, fmt, dtype=dtype).cpu()
    assert y.dtype == dtype
    torch.testing.assert_close(
        y.double(), expected.to(dtype).double(), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("fmt", [UE8M0, FLOAT32_ROUNDED, FLOAT32], ids=str)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_hypothesis_values(fmt, data):
    hypothesis_values(fmt, data, "cpu")


@pytest.mark.gpu
@every_format
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_hypothesis_values_on_gpu(fmt, data):
    hypothesis_values(fmt, data, "cuda")


def hypothesis_values(fmt, data, device):
    dtype = data.draw(st.sampled_from(DTYPES))
    patterns = data.draw(st.lists(st.integers(-(2**15), 2**15 - 1), min_size=128, max_size=128))
    lowest = 0.0 if fmt.packed else 2.0**-126
    min_scale = data.draw(st.floats(lowest, 2.0**100, allow_nan=False))
    x = torch.tensor([patterns], dtype=torch.int16).view(dtype)
    q, sf = check_every_byte(x.to(device), fmt.replace(min_scale=min_scale))
    if fmt.packed:
        codes, exponent = exact_group(x[0].tolist(), struct_float32(min_scale))
        assert ue8m0_bytes(sf, 1).item() == exponent and bits(q).tolist() == codes
