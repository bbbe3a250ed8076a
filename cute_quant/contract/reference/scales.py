"""Scales of groups, and what lies over them."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from cute_quant.contract import format_choices
from cute_quant.contract.calls import Call
from cute_quant.contract.dtypes import E2M1_MAX, E4M3_MAX, UE8M0_BIAS, UE8M0_NAN
from cute_quant.contract.formats import Format
from cute_quant.contract.reference.rows import groups_of_rows
from cute_quant.contract.reference.values import (
    group_values,
    multiply_back,
    split_into_groups,
)
from cute_quant.contract.upper_scales import Factors, factors, factors_of_amax


def group_scales(x: torch.Tensor, fmt: Format, upper: Factors | None = None) -> torch.Tensor:
    """Return the scales of the groups of `x` (..., k), k > 0.

    Args:
        x: (..., k).
        fmt: the format of the scales.
        upper: forms of the scale over e4m3 scales, broadcast against (..., groups).

    Returns:
        (..., groups): int32 biased exponents where scales are powers of two, else float32.
    """
    amax = split_into_groups(x, fmt).abs().amax(-1)
    if upper is not None:
        quotients = _e4m3_quotients(amax.float(), upper, fmt)
        scales = _e4m3_scales(quotients, fmt)
        return _better_scales(x, scales, quotients, upper, fmt) if fmt.four_over_six else scales
    return scales_of_amax(amax, fmt)


def scales_of_amax(amax: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Return the scales for largest magnitudes, without an upper scale; NaN stays NaN.

    Returns:
        amax's shape: int32 biased exponents where scales are powers of two, else float32.
    """
    # As a tensor: torch multiplies a CUDA tensor with the reciprocal of a number.
    exact = torch.float64 if fmt.power_of_two else torch.float32
    largest = amax.new_full((), fmt.value_type.max, dtype=exact)
    if not fmt.power_of_two:
        bounded = amax.float().clamp(min=fmt.floor) if fmt.bounds_amax else amax.float()
        match fmt.steps.scale:
            case format_choices.PRODUCT:
                scales = bounded * (1.0 / largest)
            case format_choices.INVERTED:
                scales = 1.0 / (largest / bounded)
            case format_choices.BF16_PRODUCT:
                scales = _bf16_scales(bounded, fmt)
            case _:
                scales = bounded / largest
        scales = scales if fmt.bounds_amax else scales.clamp(min=fmt.floor)
        if fmt.zeros_have_zero:
            scales = scales.where(amax != 0, 0.0)
        return scales.where(amax.isfinite(), torch.nan)
    if fmt.rounds_half_up:
        return _half_up_exponents(amax.float(), fmt)
    if fmt.in_bf16:
        logarithms = _bf16_scales(amax.float(), fmt).log2().bfloat16()
        exponents = logarithms.ceil().clamp(-UE8M0_BIAS, UE8M0_BIAS).int() + UE8M0_BIAS
        return exponents.clamp(min=fmt.floor).where(amax.isfinite(), UE8M0_NAN)
    # In float64 no quotient of a float32 amax rounds onto a power of two that it is not.
    quotients = amax.double() / largest
    if fmt.rounds_quotient:
        quotients = quotients.float().double()
    mantissa, exponent = torch.frexp(quotients)
    exponent = (exponent - (mantissa == 0.5).int() + UE8M0_BIAS).where(amax > 0, 0)
    return exponent.clamp(min=fmt.floor).where(amax.isfinite(), UE8M0_NAN)


def _bf16_scales(amax: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Return amax times the inverse of the maximum, each rounded to bfloat16, as float32."""
    inverse = amax.new_tensor(1.0 / fmt.value_type.max).bfloat16().float()
    return (amax * inverse).bfloat16().float()


def _half_up_exponents(amax: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Return the exponent of amax, one more from the mantissa 1.75 on, less that of the maximum."""
    mantissa, exponent = torch.frexp(amax)
    exponent = exponent - 1 + (mantissa >= 1.75 / 2).int()
    exponent = exponent + (UE8M0_BIAS - fmt.value_type.max_exponent)
    exponent = exponent.where(amax > 0, 0).clamp(min=fmt.floor)
    return exponent.where(amax.isfinite(), UE8M0_NAN)


def _e4m3_quotients(amax: torch.Tensor, upper: Factors, fmt: Format) -> torch.Tensor:
    """Return the scales of groups before they are rounded to e4m3, at least the floor.

    They are NaN where amax or the upper scale is not finite.
    """
    encode, decode = upper
    largest = encode.new_full((), E2M1_MAX)
    sixth = 1.0 / largest
    match fmt.numerics:
        case "vllm" | "vllm_emulation" | "flashinfer":
            scales = encode * (amax * sixth)
        case "torchao":
            scales = amax / largest / decode
        case "deepgemm":
            scales = amax * sixth * (1.0 / decode)
        case _:
            scales = amax * (encode * sixth)
    finite = amax.isfinite() & encode.isfinite()
    return scales.clamp(min=fmt.floor).where(finite, torch.nan)


def _e4m3_scales(quotients: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Return quotients rounded to e4m3, as float32; NaN stays NaN."""
    scales = quotients.clamp(max=E4M3_MAX).to(fmt.scale_dtype).float()
    return scales.where(quotients.isfinite() | (quotients > 0), torch.nan)


def _better_scales(
    x: torch.Tensor,
    scales: torch.Tensor,
    quotients: torch.Tensor,
    upper: Factors,
    fmt: Format,
) -> torch.Tensor:
    """Return scales that map the amax of a group to 6, or to 4 where that has the smaller error."""
    larger = _e4m3_scales(1.5 * quotients, fmt)
    better = _errors(x, larger, upper, fmt) < _errors(x, scales, upper, fmt)
    return larger.where(better, scales)


def _errors(x: torch.Tensor, scales: torch.Tensor, upper: Factors, fmt: Format) -> torch.Tensor:
    """Return the sum of absolute errors of each group, added in order, in float32."""
    q = group_values(x, scales, fmt, upper)
    decoded = multiply_back(q, scales * upper.decode, fmt, torch.float32)
    differences = split_into_groups((decoded - x.float()).abs(), fmt)
    total = torch.zeros_like(differences[..., 0])
    for difference in differences.unbind(-1):
        total = total + difference
    return total


def upper_factors(x: torch.Tensor, call: Call) -> Factors | None:
    """Return forms of the upper scale of rows `x` (batch, mn, k), each (batch or 1, mn or 1, 1)."""
    if call.fmt.row_scale:
        return factors_of_amax(x.abs().amax(-1, keepdim=True).float())
    if call.upper is None:
        return None
    forms = factors(call.upper)
    if call.upper_of_groups:
        group = groups_of_rows(call.rows, x.shape[1])
        exists = (group >= 0) & (group < call.upper.tensor.shape[0])
        padded = (pad(form, (0, 1), value=torch.nan) for form in forms)
        return Factors(*(form[group.where(exists, -1)].view(1, -1, 1) for form in padded))
    return Factors(*(form.view(-1, 1, 1) for form in forms))
