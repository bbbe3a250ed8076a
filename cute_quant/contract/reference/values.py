"""Values under scales that are known: encoded, rounded, and multiplied back."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from cute_quant.contract import format_choices
from cute_quant.contract.dtypes import (
    BELOW_HALF,
    FLOAT32_MAX,
    UE8M0_BIAS,
    UE8M0_MAX,
    UE8M0_NAN,
    VLLM_ZERO_MULTIPLIER,
)
from cute_quant.contract.format_choices import DEEPGEMM, VLLM_EMULATION
from cute_quant.contract.formats import Format
from cute_quant.contract.rcp_approx import rcp_approx
from cute_quant.contract.upper_scales import Factors

E2M1_SIGN = 8
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def group_values(
    x: torch.Tensor,
    scales: torch.Tensor,
    fmt: Format,
    upper: Factors | None = None,
    random: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the values of `x` (..., k) under the scales of `group_scales`.

    With `random`, 32-bit words (..., k), they are rounded stochastically.

    Returns:
        (..., k), or (..., k / 2) bytes of two, ``fmt.values``.
    """
    groups = split_into_groups(x.float(), fmt)
    if fmt.power_of_two:
        finite = scales != UE8M0_NAN
        multipliers = ue8m0_to_float32((UE8M0_MAX - scales).where(finite, UE8M0_NAN))
        if fmt.flushes:
            multipliers = multipliers.where(scales != 0, 0.0)
        values = groups * multipliers.unsqueeze(-1)
    elif upper is None:
        finite = scales.isfinite()
        values = _scaled(groups, scales, fmt)
    elif fmt.numerics == DEEPGEMM:
        finite = scales.isfinite()
        values = groups / (scales * upper.decode).unsqueeze(-1)
    else:
        finite = scales.isfinite()
        values = groups * _e4m3_multipliers(scales, upper, fmt).unsqueeze(-1)
        if fmt.numerics == VLLM_EMULATION:
            values = values + 0.0  # which makes 0 of -0
    values = values.where(finite.unsqueeze(-1), torch.nan).flatten(-2)[..., : x.shape[-1]]
    return encode(values if random is None else round_stochastically(values, random, fmt), fmt)


def round_stochastically(values: torch.Tensor, random: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Return float32 `values` rounded to those of a format, up or down by a random word.

    A magnitude lies n + f steps from 0, n whole and f in units of 2^-F, F the format's
    ``fraction_bits``: exact for normal values, rounded to nearest even below. It becomes n + 1
    steps where f plus the first F bits of the word reaches 1, and n else.
    """
    value_type = fmt.value_type
    bits = value_type.fraction_bits
    magnitudes = values.abs().clamp(max=value_type.max).nan_to_num().double()
    exponents = torch.frexp(magnitudes)[1] - 1
    exponents = exponents.clamp(min=value_type.min_exponent) - value_type.mantissa_bits
    step = ue8m0_to_float32(exponents + UE8M0_BIAS)
    units = (magnitudes / step * 2**bits).round().long()
    rounded: torch.Tensor = ((units + (random >> 32 - bits)) >> bits) * step
    rounded = rounded.copysign(values)
    return rounded.where(~values.isnan(), torch.nan)


def _scaled(groups: torch.Tensor, scales: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Return float32 values (..., groups, size) under float32 scales, as the numerics compute."""
    if fmt.divides:
        return groups / scales.unsqueeze(-1)
    # As a tensor: torch divides a number by a CUDA tensor with two roundings.
    largest = scales.new_full((), fmt.value_type.max)
    amax = groups.abs().amax(-1).clamp(min=fmt.floor)
    match fmt.steps.multiplier:
        case format_choices.APPROXIMATE_OF_SCALE:
            multipliers = rcp_approx(scales)
        case format_choices.APPROXIMATE_OF_AMAX:
            multipliers = rcp_approx(amax) * largest
        case format_choices.OF_AMAX:
            multipliers = largest / amax
        case format_choices.BF16_OF_SCALE:
            multipliers = (1.0 / scales).bfloat16().float()
        case _:
            multipliers = 1.0 / scales
    values = groups * multipliers.where(scales != 0, 0.0).unsqueeze(-1)
    return values.bfloat16().float() if fmt.in_bf16 else values


def _e4m3_multipliers(scales: torch.Tensor, upper: Factors, fmt: Format) -> torch.Tensor:
    """Return what values are multiplied with under e4m3 scales."""
    encode, decode = upper
    match fmt.numerics:
        case "vllm" | "flashinfer":
            multipliers = rcp_approx(scales * rcp_approx(encode))
        case "te":
            return (1.0 / (scales * decode)).clamp(max=FLOAT32_MAX)
        case "vllm_emulation":
            return (1.0 / (scales * decode)).where(scales != 0, VLLM_ZERO_MULTIPLIER)
        case "torchao":
            multipliers = 1.0 / decode / scales
        case _:
            multipliers = 1.0 / (scales * decode)
    return multipliers.where(scales != 0, 0.0)


def ue8m0_to_float32(exponents: torch.Tensor) -> torch.Tensor:
    """Return 2^(exponent - 127) for biased exponents 0 .. 254, NaN for 255."""
    bits = exponents.int() << 23
    scales = bits.where(exponents != 0, 0x400000).view(torch.float32)
    return scales.where(exponents != UE8M0_NAN, torch.nan)


def encode(values: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Return float32 in the dtype of a format, rounded to nearest even and saturated.

    Formats that truncate round towards zero, or with a half added halves away from it. NaN becomes
    what a group that is not finite holds.
    """
    value_type, nan = fmt.value_type, values.isnan()
    if fmt.values is torch.float4_e2m1fn_x2:
        codes = e2m1_codes(values).where(~nan, value_type.nan_byte)
        if fmt.positive_zero:
            codes = codes.where(codes != E2M1_SIGN, 0)
        return (codes[..., 0::2] | codes[..., 1::2] << 4).view(fmt.values)
    if fmt.values is torch.int8:
        if fmt.adds_half:
            values = values + values.new_tensor(BELOW_HALF).copysign(values)
        rounded = values.trunc() if fmt.truncates else values.round()
        values = rounded.where(~nan, 0.0)
    # Torch 2.11 turns what is past the largest value of e4m3 into NaN.
    values = values.clamp(-value_type.max, value_type.max)
    codes = values.to(fmt.values).view(torch.uint8)
    return codes.where(~nan, value_type.nan_byte).view(fmt.values)


def e2m1_codes(values: torch.Tensor) -> torch.Tensor:
    """Return the codes of float32, uint8 in the low four bits, rounded to nearest even."""
    magnitudes = values.new_tensor(E2M1_VALUES)
    middles = (magnitudes[:-1] + magnitudes[1:]) / 2
    # A tie belongs to the even one of two codes: to 0 rather than 1, and to 2 rather than 1.
    below = torch.nextafter(middles, middles.new_zeros(()))
    even = torch.arange(len(middles), device=values.device) % 2 == 0
    bounds = middles.where(even, below)
    codes = torch.bucketize(values.abs(), bounds) + E2M1_SIGN * values.signbit()
    return codes.to(torch.uint8)


def decode(q: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Return values (..., k), or (..., k / 2) bytes of two, as float32 (..., k)."""
    if fmt.values is not torch.float4_e2m1fn_x2:
        return q.float()
    packed = q.view(torch.uint8)
    codes = torch.stack([packed & 0xF, packed >> 4], -1).flatten(-2).long()
    table = torch.tensor(E2M1_VALUES, device=q.device)
    return torch.cat([table, -table])[codes]


def multiply_back(
    q: torch.Tensor, scales: torch.Tensor, fmt: Format, dtype: torch.dtype
) -> torch.Tensor:
    """Return `q` (..., k) times the float32 `scales` (..., groups) of its groups, in `dtype`."""
    decoded = decode(q, fmt)
    values = split_into_groups(decoded, fmt) * scales.unsqueeze(-1)
    return values.to(dtype).flatten(-2)[..., : decoded.shape[-1]]


def split_into_groups(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Return `x` (..., k) as (..., groups, group_size), the last group filled up with zeros."""
    k = x.shape[-1]
    size = k if fmt.whole_row else fmt.group_size
    padded = pad(x, (0, -k % size))
    return padded.view(*x.shape[:-1], padded.shape[-1] // size, size)
