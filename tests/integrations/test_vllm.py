"""Calls of vLLM and DeepGEMM: shapes, and numbers by formulas that follow from their meaning.

`test_deep_gemm` compares with DeepGEMM itself where it is installed.
"""

import math

import pytest
import torch

from cute_quant.integrations.deep_gemm import per_token_cast_to_fp8
from cute_quant.integrations.vllm import per_token_group_quant_fp8_packed_for_deepgemm
from tests.helpers import assert_same_bits, bits, poisoned_values, random_bits

DTYPES = [torch.bfloat16, torch.float16]

both_sizes = pytest.mark.parametrize("group_size", [32, 128])


def finite_activations(shape, dtype, seed=0):
    x = random_bits(shape, dtype, seed)
    x = x.where(x.isfinite(), 1.0)
    flat = x.view(-1)
    flat[128:256] = 0.0
    flat[256:384] *= torch.tensor(1e-9 if dtype == torch.bfloat16 else 1e-4, dtype=dtype)
    flat[384:512] = -0.0
    return x


def in_groups(x, group_size):
    """(m, n) as (m, groups, group_size), the last group filled up with zeros."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % group_size))
    return padded.view(x.shape[0], -1, group_size)


def power_of_two_at_least(s):
    mantissa, exponent = torch.frexp(s.double())
    return torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).int())


def expected_values(x, scale, group_size):
    multiplied = in_groups(x.float(), group_size) * (1.0 / scale.float()).unsqueeze(-1)
    return multiplied.flatten(1)[:, : x.shape[1]].to(torch.float8_e4m3fn)


def packed(scale):
    """UE8M0 bytes of powers of two, four to a word, the last word filled up with zeros."""
    exponents = (scale.log2() + 127).to(torch.uint8)
    return torch.nn.functional.pad(exponents, (0, -scale.shape[1] % 4)).view(torch.int32)


@pytest.mark.parametrize("eps", [1e-10, 1e-4, 448 * 2.0**-20, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@both_sizes
def test_vllm(group_size, dtype, eps, device):
    x = finite_activations((67, 896), dtype)
    amax = in_groups(x, group_size).abs().amax(2).float().clamp(min=eps)
    scale = power_of_two_at_least((amax / 448).clamp(min=1e-10))
    q, sf = per_token_group_quant_fp8_packed_for_deepgemm(x.to(device), group_size, eps=eps)
    assert_same_bits(q, expected_values(x, scale, group_size))
    assert_same_bits(sf, packed(scale))
    assert sf.stride() == (1, 68)


@pytest.mark.parametrize(("excess", "exponent"), [(0.5, 107), (0.6, 108)])
def test_eps_is_rounded_to_float32(excess, exponent, device):
    """More than half a unit of the last place over 448 * 2^-20 is a unit, and another scale."""
    x = torch.zeros(4, 128, dtype=torch.bfloat16, device=device)
    eps = 448 * 2.0**-20 * (1 + excess * 2.0**-24)
    _, sf = per_token_group_quant_fp8_packed_for_deepgemm(x, 128, eps=eps)
    assert sf.eq(exponent).all()


@pytest.mark.parametrize(
    "shape", [(256,), (1, 256), (5, 256), (2, 3, 256), (2, 0, 256), (2, 3, 4, 128), (2, 3, 0)]
)
@both_sizes
def test_vllm_shapes(group_size, shape, device):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).to(device)
    k = shape[-1]
    rows, columns = math.prod(shape[:-1]), -(-k // (4 * group_size))
    flat_q, flat_sf = per_token_group_quant_fp8_packed_for_deepgemm(x.view(rows, k), group_size)
    q, sf = per_token_group_quant_fp8_packed_for_deepgemm(x, group_size, use_ue8m0=None)
    assert q.shape == x.shape and q.is_contiguous()
    assert sf.shape == (rows, columns) and sf.stride() == (1, -(-rows // 4) * 4)
    assert_same_bits(q.view(rows, k), flat_q)
    assert_same_bits(sf, flat_sf)
    out_q = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
    again, _ = per_token_group_quant_fp8_packed_for_deepgemm(x, group_size, out_q=out_q)
    assert again.data_ptr() == out_q.data_ptr() and again.shape == x.shape
    assert_same_bits(out_q, q)


def test_vllm_strided_input(device):
    x = random_bits((4, 5, 512), torch.bfloat16, seed=1).to(device)
    for view in (x[:, :, 128:384], x.transpose(0, 1), x[:, ::2], x[1:3, 1:4, :128], x[:, :, 3:259]):
        q, sf = per_token_group_quant_fp8_packed_for_deepgemm(view, 128)
        expected = per_token_group_quant_fp8_packed_for_deepgemm(view.contiguous(), 128)
        assert_same_bits(q, expected[0])
        assert_same_bits(sf, expected[1])


def test_vllm_larger_out_q(device):
    x = random_bits((5, 256), torch.bfloat16, seed=2).to(device)
    out_q = poisoned_values(8, 256, device)
    q, _ = per_token_group_quant_fp8_packed_for_deepgemm(x, 128, out_q=out_q)
    assert q.shape == (5, 256) and q.data_ptr() == out_q.data_ptr()
    assert bits(out_q[5:]).eq(0).all() and not bits(q).eq(0xA5).all()


# n is a multiple of the group size, or leaves the last group short.
every_cast = pytest.mark.parametrize(
    ("gran_k", "n"), [(128, 896), (128, 900), (128, 70), (32, 896), (32, 901), (32, 7)]
)


@pytest.mark.parametrize("use_ue8m0", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_cast
def test_deep_gemm_cast(gran_k, n, dtype, use_ue8m0, device):
    x = finite_activations((67, n), dtype, seed=3)
    # On the device, because torch divides by a constant differently on a GPU.
    amax = in_groups(x.to(device), gran_k).abs().float().amax(2).clamp(1e-4)
    scale = (amax / 448.0).cpu()
    if use_ue8m0:
        scale = power_of_two_at_least(scale).float()
    q, sf = per_token_cast_to_fp8(x.to(device), use_ue8m0, gran_k=gran_k)
    assert_same_bits(sf, scale)
    assert_same_bits(q, expected_values(x, scale, gran_k))
    assert sf.stride() == (1, 68) and q.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_cast
def test_deep_gemm_packed_cast(gran_k, n, dtype, device):
    x = finite_activations((67, n), dtype, seed=4)
    amax = in_groups(x, gran_k).abs().amax(2).float().clamp(1e-4)
    scale = power_of_two_at_least(amax / 448)
    q, sf = per_token_cast_to_fp8(x.to(device), True, gran_k, use_packed_ue8m0=True)
    assert_same_bits(q, expected_values(x, scale, gran_k))
    assert_same_bits(sf, packed(scale))
    assert sf.stride() == (1, 68)
