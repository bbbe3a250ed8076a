"""Output and scale formats: shapes, strides, padding and allocation of the results.

The one place that knows what a result looks like. Terms are DeepGEMM's: `mn` rows (tokens), `k`
columns, `sf` scaling factors; a group is `group_size` neighbours in a row that share one factor.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

import torch

VALUE_DTYPE = torch.float8_e4m3fn
INPUT_DTYPES = (torch.bfloat16, torch.float16)
GROUP_SIZES = (128,)
SCALE_FORMATS = ("ue8m0", "float32")
RECIPROCAL_FLOAT32 = "float32_reciprocal"
"""float32 scales as torch on CUDA computes ``amax / 448.0``: amax times float32(1 / 448). They
differ from the quotient in the last bit for half of all mantissas; `compat` needs them."""

DEFAULT_MIN_SCALE = 1e-10
MAX_MIN_SCALE = 2.0**100
SMALLEST_NORMAL = 2.0**-126

LOAD_BYTES = 32
STORE_BYTES = 16
"""What a thread of a GPU loads of x and stores of q at once, and so how rows are aligned."""

E4M3_MAX = 448.0
UE8M0_BIAS = 127
UE8M0_MAX = 254
UE8M0_NAN = 255

BYTES_PER_WORD = 4
SCALE_ROW_ALIGNMENT = 4
"""TMA's 16 bytes in words: a column of scales starts at a multiple of this many rows."""


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def align(a: int, b: int) -> int:
    return ceil_div(a, b) * b


def to_float32(value: float) -> float:
    """`value` rounded to float32, to nearest even; in arithmetic that a tracer can follow."""
    _, exponent = math.frexp(value)
    ulp = 2.0 ** max(exponent - 24, -149)
    return round(value / ulp) * ulp


@dataclass(frozen=True)
class Format:
    """What one call of the quantizer produces. Get one from :func:`make_format`.

    Attributes:
        group_size: neighbours in a row that share a scale.
        scale_format: "ue8m0", four scale exponents packed to an int32; "float32"; or
            ``RECIPROCAL_FLOAT32``.
        round_scale: whether float32 scales are rounded up to powers of two.
    """

    group_size: int
    scale_format: str
    round_scale: bool

    @property
    def packed(self) -> bool:
        return self.scale_format == "ue8m0"

    @property
    def power_of_two(self) -> bool:
        return self.packed or self.round_scale

    @property
    def reciprocal(self) -> bool:
        return self.scale_format == RECIPROCAL_FLOAT32

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.int32 if self.packed else torch.float32

    @property
    def groups_per_column(self) -> int:
        """Groups whose scales share a column of `sf`."""
        return BYTES_PER_WORD if self.packed else 1

    def scale_shape(self, mn: int, k: int) -> tuple[int, int]:
        """Logical shape of the scales of an (mn, k) input."""
        return mn, ceil_div(k, self.group_size * self.groups_per_column)

    def scale_strides(self, mn: int) -> tuple[int, int]:
        """Strides in elements: MN-major, each column aligned for TMA."""
        return 1, align(mn, SCALE_ROW_ALIGNMENT)

    def empty_scales(self, mn: int, k: int, device: torch.device) -> torch.Tensor:
        """Uninitialized scales whose storage holds the padding rows of every column."""
        _, columns = self.scale_shape(mn, k)
        strides = self.scale_strides(mn)
        padded = torch.empty_strided(
            (strides[1], columns), strides, dtype=self.scale_dtype, device=device
        )
        return padded if mn == strides[1] else padded[:mn]


_FORMATS = {
    (group_size, scale_format, round_scale): Format(group_size, scale_format, round_scale)
    for group_size in GROUP_SIZES
    for scale_format, round_scale in (
        ("ue8m0", False),
        ("float32", False),
        ("float32", True),
        (RECIPROCAL_FLOAT32, False),
    )
}


def make_format(group_size: int, scale_format: str, round_scale: bool) -> Format:
    """The format of these choices.

    Raises:
        ValueError: a choice is not supported, or two of them contradict each other.
    """
    try:
        return _FORMATS[group_size, scale_format, round_scale]
    except (KeyError, TypeError):
        pass
    if not isinstance(group_size, int) or group_size not in GROUP_SIZES:
        raise ValueError(f"group_size: expected one of {GROUP_SIZES}, got {group_size!r}")
    if not isinstance(scale_format, str) or scale_format not in SCALE_FORMATS:
        raise ValueError(f"scale_format: expected one of {SCALE_FORMATS}, got {scale_format!r}")
    raise ValueError(
        "round_scale: expected a bool, and False for scale_format='ue8m0', whose scales are powers "
        f"of two anyway; got {round_scale!r} for {scale_format!r}"
    )


def last_column_rows(sf: torch.Tensor) -> int:
    """Rows of the last column of `sf` that its storage holds, padding rows included.

    At least size(0). A tensor of exactly the contract's strides that was allocated without the
    last column's padding, as vLLM does, has no more.
    """
    mn, columns = sf.shape
    aligned = align(mn, SCALE_ROW_ALIGNMENT)
    if mn == aligned:
        return mn
    end = sf.untyped_storage().nbytes() // sf.element_size() - sf.storage_offset()
    return min(aligned, end - (columns - 1) * aligned)


def scale_floor(fmt: Format, min_scale: float) -> int | float:
    """`min_scale` as the quantizer takes it: rounded to float32, and for scales that are powers
    of two the UE8M0 byte of the smallest one that is not below it.

    Raises:
        TypeError: `min_scale` is not a number.
        ValueError: `min_scale` is outside of what `fmt` can represent.
    """
    if not isinstance(min_scale, numbers.Real):
        raise TypeError(f"min_scale: expected a number, got {min_scale!r}")
    lowest = 0.0 if fmt.packed else SMALLEST_NORMAL
    if not lowest <= min_scale <= MAX_MIN_SCALE:
        raise ValueError(
            f"min_scale: expected {lowest} <= min_scale <= {MAX_MIN_SCALE} "
            f"for scale_format={fmt.scale_format!r}, got {min_scale}"
        )
    floor = to_float32(min_scale)
    if not fmt.power_of_two:
        return floor
    if floor == 0.0:
        return 0
    mantissa, exponent = math.frexp(floor)
    return max(0, exponent - (mantissa == 0.5) + UE8M0_BIAS)
