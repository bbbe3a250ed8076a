"""The peers' calls: their shapes, and their numbers by formulas written here from their meaning.

`test_deep_gemm` compares with DeepGEMM itself where it is installed.
"""

import pytest
import torch

from cute_quant.integrations.compat import (
    per_token_cast_to_fp8,
    per_token_group_quant_fp8_packed_for_deepgemm,
)
from tests.helpers import assert_same_bits, bits, poisoned_values, random_bits

DTYPES = [torch.bfloat16, torch.float16]


def finite_activations(shape, dtype, seed=0):
    x = random_bits(shape, dtype, seed)
    x = x.where(x.isfinite(), 1.0)
    flat = x.view(-1, 128)
    flat[1] = 0.0
    flat[2] *= torch.tensor(1e-9 if dtype == torch.bfloat16 else 1e-4, dtype=dtype)
    flat[3] = -0.0
    return x


def power_of_two_at_least(s):
    mantissa, exponent = torch.frexp(s.double())
    return torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).int())


def expected_values(x, scale):
    groups = x.float().view(*scale.shape, -1) * (1.0 / scale.float()).unsqueeze(-1)
    return groups.to(torch.float8_e4m3fn).view(x.shape)


@pytest.mark.parametrize("eps", [1e-10, 1e-4, 448 * 2.0**-20, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vllm(dtype, eps, device):
    x = finite_activations((67, 896), dtype)
    amax = x.view(67, 7, 128).abs().amax(2).float().clamp(min=eps)
    scale = power_of_two_at_least((amax / 448).clamp(min=1e-10))
    q, sf = per_token_group_quant_fp8_packed_for_deepgemm(x.to(device), 128, eps=eps)
    assert_same_bits(q, expected_values(x, scale))
    exponents = (scale.log2() + 127).to(torch.uint8)
    words = torch.nn.functional.pad(exponents, (0, 1)).view(torch.int32)
    assert_same_bits(sf, words)
    assert sf.stride() == (1, 68)


@pytest.mark.parametrize(
    "shape", [(256,), (1, 256), (5, 256), (2, 3, 256), (2, 0, 256), (2, 3, 4, 128)]
)
def test_vllm_shapes(shape, device):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).to(device)
    rows = x.numel() // shape[-1]
    flat_q, flat_sf = per_token_group_quant_fp8_packed_for_deepgemm(x.view(rows, shape[-1]), 128)
    q, sf = per_token_group_quant_fp8_packed_for_deepgemm(x, 128, use_ue8m0=None)
    assert q.shape == x.shape and q.is_contiguous()
    assert sf.shape == (rows, 1) and sf.stride() == (1, -(-rows // 4) * 4)
    assert_same_bits(q.view(rows, shape[-1]), flat_q)
    assert_same_bits(sf, flat_sf)
    out_q = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
    again, _ = per_token_group_quant_fp8_packed_for_deepgemm(x, 128, out_q=out_q)
    assert again.data_ptr() == out_q.data_ptr() and again.shape == x.shape
    assert_same_bits(out_q, q)


def test_vllm_strided_input(device):
    x = random_bits((4, 5, 512), torch.bfloat16, seed=1).where(torch.tensor(True), 0).to(device)
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


@pytest.mark.parametrize("use_ue8m0", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deep_gemm_cast(dtype, use_ue8m0, device):
    x = finite_activations((67, 896), dtype, seed=3)
    # On the device, because torch divides by a constant differently on a GPU.
    amax = x.to(device).view(67, 7, 128).abs().float().amax(2).clamp(1e-4)
    scale = (amax / 448.0).cpu()
    if use_ue8m0:
        scale = power_of_two_at_least(scale).float()
    q, sf = per_token_cast_to_fp8(x.to(device), use_ue8m0)
    assert_same_bits(sf, scale)
    assert_same_bits(q, expected_values(x, scale))
    assert sf.stride() == (1, 68)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deep_gemm_packed_cast(dtype, device):
    x = finite_activations((67, 1024), dtype, seed=4)
    scale = power_of_two_at_least(x.view(67, 8, 128).abs().amax(2).float().clamp(1e-4) / 448)
    q, sf = per_token_cast_to_fp8(x.to(device), True, use_packed_ue8m0=True)
    assert_same_bits(q, expected_values(x, scale))
    assert_same_bits(sf, (scale.log2() + 127).to(torch.uint8).view(torch.int32))
