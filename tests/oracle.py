"""An oracle that shares no line and no method with the package: exact rational arithmetic.

It works on lists of Python floats, one element at a time, and places each byte by arithmetic.
"""

from __future__ import annotations

import bisect
import itertools
import math
import struct
from dataclasses import dataclass
from fractions import Fraction

import torch

E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
LARGEST = {E4M3: 448, E5M2: 57344, INT8: 127}


def _float8_magnitudes(mantissa_bits: int, bias: int, codes: int) -> list[Fraction]:
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
    E4M3: _float8_magnitudes(3, 7, 0x7F),
    E5M2: _float8_magnitudes(2, 15, 0x7C),
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
    """Return the byte of a magnitude's code and a sign."""
    if dtype is INT8:
        return (-code if negative else code) & 0xFF
    return code | (0x80 if negative else 0)


def nan_byte(dtype: torch.dtype) -> int:
    return 0 if dtype is INT8 else 0x7F


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


def _exact_bytes(group: list[float], multiplier: Fraction, dtype: torch.dtype) -> list[int]:
    codes = []
    for value in group:
        product = abs(Fraction(value)) * multiplier
        code = exact_code(exact_float32(product), dtype) if product else 0
        codes.append(with_sign(code, math.copysign(1.0, value) < 0, dtype))
    return codes


def exact_min_scale(min_scale: float | str, dtype: torch.dtype) -> float:
    """Return a smallest scale, a number or a library's name for one, as a number.

    DeepGEMM and SGLang bound the amax by a float32 and divide it by the largest value.
    """
    if not isinstance(min_scale, str):
        return min_scale
    amax = {"deepgemm": 1e-4, "sglang": 1e-10}
    if min_scale in amax:
        rounded = exact_float32(Fraction(amax[min_scale]))
        return float(exact_float32(rounded / LARGEST[dtype]))
    return {"vllm": 1e-10, "ocp": 0.0}[min_scale]


@dataclass
class Choices:
    """A call of `quantize`, its live rows and their sources as Python lists.

    Attributes:
        sources: for each matrix of the batch and each of its rows the row of values, or None where
            the row does not exist.
        counts: of masked matrices, the rows of each that are written; None where all are.
    """

    dtype: torch.dtype
    group_size: int
    scale_layout: str
    scale_dtype: torch.dtype
    round_scale: bool
    min_scale: float
    k: int
    sources: list[list[list[float] | None]]
    counts: list[int] | None = None


def scale_offset(
    scale_layout: str, nbytes: int, batch: int, row: int, group: int, mn: int, groups: int
) -> int:
    """Return the offset in bytes of a group's scale, which has `nbytes`."""
    aligned = (mn + 3) // 4 * 4
    if scale_layout == "mn_major_packed":
        words = (groups + 3) // 4
        return 4 * ((batch * words + group // 4) * aligned + row) + group % 4
    if scale_layout == "mn_major":
        return nbytes * ((batch * groups + group) * aligned + row)
    if scale_layout == "row_major":
        return nbytes * ((batch * mn + row) * groups + group)
    stored_groups = (groups + 3) // 4 * 4
    stored_rows = (mn + 127) // 128 * 128
    block = (row // 128) * (stored_groups // 4) + group // 4
    inside = (row % 32) * 16 + (row % 128) // 32 * 4 + group % 4
    return batch * stored_rows * stored_groups + block * 512 + inside


def expected_bytes(
    choices: Choices, q_before: bytes, q_rows: int, sf_before: bytes
) -> tuple[bytes, bytes]:
    """Return contiguous q (batch, q_rows, k), and the storage of sf, after the call."""
    c = choices
    q, sf = bytearray(q_before), bytearray(sf_before)
    mn = len(c.sources[0])
    size = c.k if c.group_size == -1 else c.group_size
    groups = -(-c.k // size)
    stored_groups = groups
    if c.scale_layout in ("mn_major_packed", "128x4"):
        stored_groups = (groups + 3) // 4 * 4
    stored_rows = {"row_major": 1, "128x4": 128}.get(c.scale_layout, 4)
    stored_rows = (mn + stored_rows - 1) // stored_rows * stored_rows
    nbytes = c.scale_dtype.itemsize

    def put_scale(batch: int, row: int, group: int, content: bytes) -> None:
        at = scale_offset(c.scale_layout, nbytes, batch, row, group, mn, groups)
        if at < len(sf):
            sf[at : at + nbytes] = content

    for batch, rows in enumerate(c.sources):
        count = q_rows if c.counts is None else c.counts[batch]
        zeroed = stored_rows if c.counts is None else min((count + 3) // 4 * 4, stored_rows)
        for row in range(zeroed):
            for group in range(stored_groups):
                put_scale(batch, row, group, bytes(nbytes))
        for row in range(count):
            source = rows[row] if row < mn else None
            codes = [0] * c.k
            if source is not None:
                codes = []
                for group in range(groups):
                    part, scale = _scaled(source[group * size : (group + 1) * size], c)
                    codes += part
                    put_scale(batch, row, group, scale)
            q[(batch * q_rows + row) * c.k : (batch * q_rows + row + 1) * c.k] = bytes(codes)
    return bytes(q), bytes(sf)


def _scaled(group: list[float], c: Choices) -> tuple[list[int], bytes]:
    min_scale = struct.unpack("f", struct.pack("f", c.min_scale))[0]
    if c.scale_dtype is torch.float32 and not c.round_scale:
        codes, scale = exact_float32_group(group, min_scale, c.dtype)
        return codes, FLOAT32_NAN if math.isnan(scale) else struct.pack("<f", scale)
    codes, exponent = exact_group(group, min_scale, c.dtype)
    if not c.round_scale:
        return codes, bytes([exponent])
    return codes, FLOAT32_NAN if exponent == 255 else struct.pack("<f", 2.0 ** (exponent - 127))


FLOAT32_NAN = bytes.fromhex("0000c07f")
