"""Binary floating-point formats: decoding to float64, and rounding from it to nearest even.

Every format here fits in float64 with room to spare, so values are computed there and rounded
once. Where a result needs more than the 53 bits of float64, `to_odd` keeps that single rounding
right: the last bit stands for everything that was cut off (Boldo and Melquiond, 2008).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Format:
    """A binary floating-point format: one sign bit, an exponent and a fraction.

    Attributes:
        width: its bits.
        fraction_bits: bits of the fraction.
        min_exponent: of normal numbers.
        largest: the largest finite value.
        infinity: the bits of +Inf, None if there is none.
        nan: the bits that PTX instructions return for NaN.
        has_nan: whether they mean NaN, and not a number.
    """

    width: int
    fraction_bits: int
    min_exponent: int
    largest: float
    infinity: int | None
    nan: int
    has_nan: bool = True

    @property
    def bits(self) -> type:
        """Return numpy's type of the bits."""
        return {4: np.uint8, 8: np.uint8, 16: np.uint16, 32: np.uint32}[self.width]


E2M1 = Format(4, 1, 0, 6.0, None, 0x7, has_nan=False)
E4M3 = Format(8, 3, -6, 448.0, None, 0x7F)
E5M2 = Format(8, 2, -14, 57344.0, 0x7C, 0x7F)
F16 = Format(16, 10, -14, 65504.0, 0x7C00, 0x7FFF)
BF16 = Format(16, 7, -126, (2 - 2.0**-7) * 2.0**127, 0x7F80, 0x7FFF)
F32 = Format(32, 23, -126, (2 - 2.0**-23) * 2.0**127, 0x7F800000, 0x7FFFFFFF)


def decode(bits: np.ndarray, fmt: Format) -> np.ndarray:
    """Return the values of bit patterns, exact, in float64."""
    bits = bits.astype(np.int64)
    magnitude = bits & ((1 << (fmt.width - 1)) - 1)
    fraction = magnitude & ((1 << fmt.fraction_bits) - 1)
    exponent = magnitude >> fmt.fraction_bits
    significand = np.where(exponent > 0, fraction + (1 << fmt.fraction_bits), fraction)
    scale = np.maximum(exponent, 1) - 1 + fmt.min_exponent - fmt.fraction_bits
    values = np.ldexp(significand.astype(np.float64), scale)
    if fmt.infinity is None:
        if fmt.has_nan:
            values[magnitude == fmt.nan] = np.nan
    else:
        values[magnitude == fmt.infinity] = np.inf
        values[magnitude > fmt.infinity] = np.nan
    return np.where(bits >> (fmt.width - 1), -values, values)


def encode(values: np.ndarray, fmt: Format, saturate: bool = False) -> np.ndarray:
    """Return the bit patterns of float64 `values`, rounded to nearest even; NaN is ``fmt.nan``.

    Past the largest finite value comes infinity, or with `saturate` that largest value itself.
    """
    magnitude = np.abs(np.where(np.isnan(values), 0.0, values))
    overflowed = np.isinf(magnitude)
    magnitude[overflowed] = 0.0
    _, exponent = np.frexp(magnitude)
    exponent = np.maximum(exponent - 1, fmt.min_exponent)
    exponent[magnitude == 0.0] = fmt.min_exponent
    # In units of the last place. A significand that rounds up to the next power of two carries
    # into the exponent field by itself.
    significand = np.rint(np.ldexp(magnitude, fmt.fraction_bits - exponent)).astype(np.int64)
    bits = ((exponent - fmt.min_exponent).astype(np.int64) << fmt.fraction_bits) + significand
    overflowed |= (
        np.ldexp(significand.astype(np.float64), exponent - fmt.fraction_bits) > fmt.largest
    )
    if saturate:
        limit = int(encode(np.array([fmt.largest]), fmt)[0])
    elif fmt.infinity is None:
        limit = fmt.nan
    else:
        limit = fmt.infinity
    bits[overflowed] = limit
    bits |= np.signbit(values).astype(np.int64) << (fmt.width - 1)
    bits[np.isnan(values)] = fmt.nan
    return bits.astype(fmt.bits)


def to_odd(rounded: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Round `rounded` + `error`, where `error` is below half a unit of `rounded`, to odd."""
    bits = rounded.view(np.int64)
    inexact = (error != 0) & np.isfinite(rounded) & np.isfinite(error) & (bits & 1 == 0)
    away_from_zero = (error > 0) == (rounded > 0)
    return (bits + np.where(inexact, np.where(away_from_zero, 1, -1), 0)).view(np.float64)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return a * b + c, rounded to odd, for float64 values of at most 24 significant bits."""
    product = a * b
    total = product + c
    rest = total - product
    return to_odd(total, (product - (total - rest)) + (c - rest))
