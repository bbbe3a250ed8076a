"""The presets of `min_scale`: each library's formula, written here from its meaning in torch.

Where scales are powers of two all orders of multiplying and dividing give the same values, so
values and scales are compared bit for bit. Where they are not, the libraries differ among each
other in how they round; then scales are compared bit for bit, and values where it cannot matter.
"""

import pytest
import torch

from cute_quant import DEEP_GEMM, DEEP_GEMM_SM90, GROUPWISE_FP8, INT8, quantize
from tests.helpers import INPUT_DTYPES, assert_same_bits, bits
from tests.integrations.test_vllm import finite_activations, power_of_two_at_least

every_input_dtype = pytest.mark.parametrize("input_dtype", INPUT_DTYPES, ids=str)
every_group_size = pytest.mark.parametrize("group_size", [32, 64, 128])
E4M3_MAX, INT8_MAX = 448.0, 127.0


def group_amax(x: torch.Tensor, group_size: int) -> torch.Tensor:
    return x.float().abs().unflatten(1, (-1, group_size)).amax(2)


def activations(dtype: torch.dtype, mn: int = 37) -> torch.Tensor:
    if dtype is torch.float32:
        return finite_activations((mn, 896), torch.bfloat16).float() * 0.8123
    return finite_activations((mn, 896), dtype)


def divided(a: torch.Tensor, b: float) -> torch.Tensor:
    """Return a / b with IEEE rounding, on every device."""
    return a / torch.tensor(b, dtype=torch.float32)


def check_powers_of_two(x, group_size, scales, min_scale, device):
    x_groups = x.double().unflatten(1, (-1, group_size))
    values = (x_groups / scales.double()[:, :, None]).float().to(torch.float8_e4m3fn).flatten(1)
    q, sf = quantize(
        x.to(device),
        DEEP_GEMM.replace(scale_layout="row_major", group_size=group_size, min_scale=min_scale),
    )
    assert_same_bits(q, values)
    assert torch.equal(bits(sf).view(scales.shape), (scales.log2() + 127).to(torch.uint8))
    if min_scale != "ocp":
        choices = {"group_size": group_size, "round_scale": True, "min_scale": min_scale}
        q, sf = quantize(x.to(device), DEEP_GEMM_SM90.replace(**choices))
        assert_same_bits(q, values)
        assert_same_bits(sf, scales.float())


@every_group_size
@every_input_dtype
def test_vllm(input_dtype, group_size, device):
    """The packed kernel of vLLM: ``max(max(amax, 1e-10) / 448, 1e-10)``, rounded up."""
    x = activations(input_dtype)
    scales = divided(group_amax(x, group_size).clamp(min=1e-10), E4M3_MAX).clamp(min=1e-10)
    check_powers_of_two(x, group_size, power_of_two_at_least(scales), "vllm", device)


@every_group_size
@every_input_dtype
def test_deep_gemm(input_dtype, group_size, device):
    """DeepGEMM's ``per_token_cast_to_fp8``: ``amax.clamp(1e-4) / 448``, then ``x * (1 / s)``."""
    x = activations(input_dtype)
    scales = divided(group_amax(x, group_size).clamp(min=1e-4), E4M3_MAX)
    check_powers_of_two(x, group_size, power_of_two_at_least(scales), "deepgemm", device)
    q, sf = quantize(
        x.to(device), DEEP_GEMM_SM90.replace(group_size=group_size, min_scale="deepgemm")
    )
    assert_same_bits(sf, scales)
    values = x.float().unflatten(1, (-1, group_size)) * (1.0 / scales)[:, :, None]
    assert_same_bits(q, values.to(torch.float8_e4m3fn).flatten(1))


@every_group_size
@every_input_dtype
def test_sglang(input_dtype, group_size, device):
    """SGLang's ``per_token_group_quant_8bit``: ``max(amax, 1e-10) / 448``."""
    x = activations(input_dtype)
    scales = divided(group_amax(x, group_size).clamp(min=1e-10), E4M3_MAX)
    check_powers_of_two(x, group_size, power_of_two_at_least(scales), "sglang", device)
    _, sf = quantize(x.to(device), GROUPWISE_FP8.replace(group_size=group_size, min_scale="sglang"))
    assert_same_bits(sf, scales)


@every_group_size
@every_input_dtype
def test_tile_kernels(input_dtype, group_size, device):
    """TileKernels' ``per_token_cast`` with rounded scales: ``max(amax, 1e-4) / 448``, as DeepGEMM.

    Unrounded it multiplies by ``448 / amax``, whose last bit differs from ``1 / (amax / 448)``.
    """
    x = activations(input_dtype)
    amax = group_amax(x, group_size).clamp(min=1e-4)
    scales = divided(amax, E4M3_MAX)
    check_powers_of_two(x, group_size, power_of_two_at_least(scales), "deepgemm", device)
    q, sf = quantize(
        x.to(device), GROUPWISE_FP8.replace(group_size=group_size, min_scale="deepgemm")
    )
    assert_same_bits(sf, scales)
    values = x.float().unflatten(1, (-1, group_size)) * (E4M3_MAX / amax)[:, :, None]
    theirs = values.to(torch.float8_e4m3fn).flatten(1)
    assert (bits(q).int() - bits(theirs).int()).abs().max() <= 1
    assert (bits(q) != bits(theirs)).float().mean() < 1e-3


@every_input_dtype
def test_ocp(input_dtype, device):
    """OCP MX has no floor: a group of zeros gets the smallest scale, 2^-127."""
    x = activations(input_dtype)
    scales = power_of_two_at_least(group_amax(x, 32).double() / E4M3_MAX)
    scales = scales.where(group_amax(x, 32) > 0, 2.0**-127).clamp(min=2.0**-127)
    check_powers_of_two(x, 32, scales, "ocp", device)


def check_int8(x, group_size, amax, multipliers, round_, min_scale, device):
    q, sf = quantize(x.to(device), INT8.replace(group_size=group_size, min_scale=min_scale))
    assert_same_bits(sf, divided(amax, INT8_MAX))
    size = x.shape[1] if group_size == -1 else group_size
    products = x.double().unflatten(1, (-1, size)) * multipliers.double()[:, :, None]
    theirs = round_(products).clamp(-127, 127)
    ours = q.cpu().double().unflatten(1, (-1, size))
    assert (ours - theirs).abs().max() <= 1
    return ours, theirs, products


@every_input_dtype
def test_sglang_int8(input_dtype, device):
    """SGLang's ``per_token_quant_int8``: ``max(amax, 1e-10) / 127``, ``round(x * (127 / amax))``.

    It rounds ties away from zero and ours go to even, so values beside a tie may differ by one.
    """
    x = activations(input_dtype)
    amax = group_amax(x, x.shape[1]).clamp(min=1e-10)
    away = lambda t: t.sign() * (t.abs() + 0.5).floor()  # noqa: E731
    ours, theirs, products = check_int8(x, -1, amax, INT8_MAX / amax, away, "sglang", device)
    from_tie = ((products.abs() % 1.0) - 0.5).abs()
    assert torch.equal(ours[from_tie > 1e-4], theirs[from_tie > 1e-4])


@every_group_size
@every_input_dtype
def test_vllm_int8(input_dtype, group_size, device):
    """As vLLM's ``per_token_group_quant_int8``: ``max(amax, 1e-10) / 127``, ``x / s`` truncated.

    It cuts fractions off where ours are rounded, so values differ by one at most. Its floor is that
    of the amax; the preset's, which is that of its packed scales, lies above it.
    """
    x = activations(input_dtype)
    x = x.where(group_amax(x, group_size).repeat_interleave(group_size, 1) > 1e-6, 1.0)
    amax = group_amax(x, group_size)
    ours, theirs, products = check_int8(
        x, group_size, amax, INT8_MAX / amax, torch.trunc, "vllm", device
    )
    from_tie = ((products.abs() % 1.0) - 0.5).abs()
    assert torch.equal(ours[from_tie > 1e-4], products.round()[from_tie > 1e-4])
    assert (ours.abs() >= theirs.abs()).all()
