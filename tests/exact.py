"""Scales and values of one group in exact rational arithmetic, one element at a time.

It shares no line and no method with the package. `oracle`, which works on arrays, is held to it.
"""

from __future__ import annotations

import bisect
import itertools
import math
from fractions import Fraction

import torch

E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
E2M1 = torch.float4_e2m1fn_x2
LARGEST = {E4M3: 448, E5M2: 57344, INT8: 127, E2M1: 6}


def _float_magnitudes(mantissa_bits: int, bias: int, codes: int) -> list[Fraction]:
    """Return the magnitudes in the order of their codes, which is ascending."""
    magnitudes = []
    for code in range(codes):
        exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
        fraction = Fraction(mantissa, 1 << mantissa_bits)
        if exponent == 0:
            magnitudes.append(fraction * Fraction(2) ** (1 - bias))
        else:
            magnitudes.append((1 + fraction) * Fraction(2) ** (exponent - bias))
    return magnitudes


MAGNITUDES = {
    E4M3: _float_magnitudes(3, 7, 0x7F),
    E5M2: _float_magnitudes(2, 15, 0x7C),
    E2M1: _float_magnitudes(1, 1, 8),
    INT8: [Fraction(code) for code in range(128)],
}


def exact_code(magnitude: Fraction, dtype: torch.dtype) -> int:
    """Return the code of the nearest magnitude, ties to the even code, saturating."""
    table = MAGNITUDES[dtype]
    below = bisect.bisect_right(table, magnitude) - 1
    if below == len(table) - 1:
        return below
    to_low, to_high = magnitude - table[below], table[below + 1] - magnitude
    if to_low == to_high:
        return below + (below & 1)
    return below if to_low < to_high else below + 1


def exact_e4m3(magnitude: Fraction) -> int:
    return exact_code(magnitude, E4M3)


def with_sign(code: int, negative: bool, dtype: torch.dtype) -> int:
    """Return the code of a value, a byte or four bits, from its magnitude's and a sign."""
    if dtype is INT8:
        return (-code if negative else code) & 0xFF
    return code | ((0x8 if dtype is E2M1 else 0x80) if negative else 0)


def nan_byte(dtype: torch.dtype) -> int:
    return 0 if dtype in (INT8, E2M1) else 0x7F


def exact_exponent(group: list[float], min_scale: float, dtype: torch.dtype = E4M3) -> int:
    """Return the UE8M0 byte, found by search for the smallest power of two, not by logarithm."""
    if not all(map(math.isfinite, group)):
        return 255
    target = max(Fraction(max(map(abs, group))) / LARGEST[dtype], Fraction(min_scale))
    return next(e for e in itertools.count() if POWERS[e] >= target)


POWERS = [Fraction(2) ** (e - 127) for e in range(255)]


def exact_group(
    group: list[float], min_scale: float = 0.0, dtype: torch.dtype = E4M3
) -> tuple[list[int], int]:
    """Return the bytes of the values, and the UE8M0 byte, of one group."""
    exponent = exact_exponent(group, min_scale, dtype)
    if exponent == 255:
        return [nan_byte(dtype)] * len(group), exponent
    return _exact_bytes(group, 1 / POWERS[exponent], dtype), exponent


def exact_float32(value: Fraction) -> Fraction:
    """Return the nearest normal float32, ties to even."""
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    if value < Fraction(2) ** exponent:
        exponent -= 1
    ulp = Fraction(2) ** (exponent - 23)
    return round(value / ulp) * ulp


def exact_float32_group(
    group: list[float], min_scale: float, dtype: torch.dtype = E4M3
) -> tuple[list[int], float]:
    """Return the bytes of the values, and the float32 scale, of one group."""
    if not all(map(math.isfinite, group)):
        return [nan_byte(dtype)] * len(group), math.nan
    amax = max(map(abs, map(Fraction, group)))
    quotient = exact_float32(amax / LARGEST[dtype]) if amax else Fraction(0)
    scale = max(quotient, Fraction(min_scale))
    return _exact_bytes(group, exact_float32(1 / scale), dtype), float(scale)


def exact_upper_scale(amax: float) -> tuple[Fraction, Fraction]:
    """Return the encode and the decode scale over e4m3 scales for a largest magnitude."""
    limit = Fraction(2) ** 117
    encode = exact_float32(Fraction(2688) / Fraction(amax)) if amax else Fraction(1)
    encode = min(encode, limit)
    return encode, exact_float32(1 / encode)


def exact_e4m3_group(
    group: list[float], encode: Fraction, decode: Fraction, min_scale: float = 0.0
) -> tuple[list[int], int]:
    """Return the e2m1 codes of the values, and the byte of the e4m3 scale, of one group.

    Args:
        group: values in the precision of float32.
        encode: the upper scale that groups are multiplied with.
        decode: its inverse, rounded to float32.
        min_scale: the smallest scale, a value of e4m3.
    """
    if not all(map(math.isfinite, group)):
        return [0] * len(group), 0x7F
    amax = max(map(abs, map(Fraction, group)))
    sixth = exact_float32(Fraction(1, 6))
    product = amax * exact_float32(encode * sixth)
    code = exact_e4m3(exact_float32(product)) if product else 0
    code = max(code, exact_e4m3(Fraction(min_scale)))
    if code == 0:
        return _exact_bytes(group, Fraction(0), E2M1), 0
    scale = exact_float32(MAGNITUDES[E4M3][code] * decode)
    return _exact_bytes(group, exact_float32(1 / scale), E2M1), code


def _exact_bytes(group: list[float], multiplier: Fraction, dtype: torch.dtype) -> list[int]:
    codes = []
    for value in group:
        product = abs(Fraction(value)) * multiplier
        code = exact_code(exact_float32(product), dtype) if product else 0
        codes.append(with_sign(code, math.copysign(1.0, value) < 0, dtype))
    return codes


def exact_min_scale(
    min_scale: float | str | None, dtype: torch.dtype, scale_dtype: torch.dtype = torch.float32
) -> float:
    """Return a smallest scale, a number, a library's name for one, or the default, as a number.

    DeepGEMM, SGLang and torchao bound the amax by a float32 and divide it by the largest value.
    """
    if min_scale is None:
        min_scale = "none" if scale_dtype is E4M3 else "vllm"
    if not isinstance(min_scale, str):
        return min_scale
    if scale_dtype is E4M3:
        return {"none": 0.0, "deepgemm": 2.0**-9, "torchao": 2.0**-6}[min_scale]
    amax = {"deepgemm": 1e-4, "sglang": 1e-10, "torchao": 1e-12}
    if min_scale in amax:
        rounded = exact_float32(Fraction(amax[min_scale]))
        return float(exact_float32(rounded / LARGEST[dtype]))
    return {"vllm": 1e-10, "vllm_fused": 1 / (512 * LARGEST[dtype]), "ocp": 0.0}[min_scale]
