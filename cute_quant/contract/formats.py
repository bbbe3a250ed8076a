"""Output and scale formats: shapes, strides, padding and allocation of the results.

The one place that knows what a result looks like. Terms are DeepGEMM's: `mn` rows (tokens), `k`
columns, `sf` scaling factors; a group is `group_size` neighbours in a row that share one factor.
"""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
VALUE_DTYPE = torch.float8_e4m3fn
"""What values are quantized to unless the caller says otherwise."""

WHOLE_ROW = -1
GROUP_SIZES = (16, 32, 64, 128, 256)
BLOCKED_GROUP_SIZE = 32

UE8M0_PACKED = "ue8m0"
UE8M0_ROW_MAJOR = "ue8m0_row_major"
UE8M0_BLOCKED = "ue8m0_128x4"
FLOAT32 = "float32"
FLOAT32_ROW_MAJOR = "float32_row_major"
RECIPROCAL_FLOAT32 = "float32_reciprocal"
"""float32 scales as torch on CUDA computes ``amax / 448.0``: amax times float32(1 / 448). They
differ from the quotient in the last bit for half of all mantissas; `compat` needs them."""

SCALE_FORMATS = (UE8M0_PACKED, FLOAT32, FLOAT32_ROW_MAJOR, UE8M0_ROW_MAJOR, UE8M0_BLOCKED)
"""What `quantize` takes by name; ``RECIPROCAL_FLOAT32`` is not advertised."""

MAX_MIN_SCALE = 2.0**100
SMALLEST_NORMAL = 2.0**-126

LOAD_BYTES = 32
STORE_BYTES = 16
"""What a thread of a GPU loads of x and stores of q at once, and so how rows are aligned."""

E4M3_MAX = 448.0
E5M2_MAX = 57344.0
INT8_MAX = 127.0
"""int8 is symmetric: -128 is not used."""

FLOAT32_MANTISSA_BITS = 23
UE8M0_BIAS = 127
UE8M0_MAX = 254
UE8M0_NAN = 255

BYTES_PER_WORD = 4
SCALE_ROW_ALIGNMENT = 4
"""TMA's 16 bytes in words: a column of scales starts at a multiple of this many rows. The rows
between a masked expert's count and the next multiple are its padding."""

BLOCK_ROWS = 128
BLOCK_GROUPS = 4
"""A block of the 128x4 layout: 512 scale bytes in one piece, as cuBLAS and CUTLASS read them."""


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def align(a: int, b: int) -> int:
    return ceil_div(a, b) * b


def to_float32(value: float) -> float:
    """`value` rounded to float32, to nearest even; in arithmetic that a tracer can follow."""
    _, exponent = math.frexp(value)
    ulp = 2.0 ** max(exponent - 24, -149)
    return round(value / ulp) * ulp


class ValueType(NamedTuple):
    """What a dtype of values is to the quantizer.

    Attributes:
        max: the largest finite value, to which the amax of a group is scaled.
        nan_byte: each value of a group that is not finite.
    """

    max: float
    nan_byte: int

    @property
    def max_exponent(self) -> int:
        """p of max = 1.f * 2^p."""
        return math.frexp(self.max)[1] - 1

    @property
    def max_mantissa(self) -> int:
        """f of max = 1.f * 2^p, as the mantissa bits of a float32."""
        return int((self.max / 2.0**self.max_exponent - 1.0) * 2**FLOAT32_MANTISSA_BITS)


VALUE_TYPES = {
    torch.float8_e4m3fn: ValueType(E4M3_MAX, 0x7F),
    torch.float8_e5m2: ValueType(E5M2_MAX, 0x7F),
    torch.int8: ValueType(INT8_MAX, 0),
}

DEFAULT_MIN_SCALE = 1e-10
MIN_SCALES: dict[str, Callable[[float], float]] = {
    "vllm": lambda largest: DEFAULT_MIN_SCALE,
    "deepgemm": lambda largest: to_float32(1e-4) / largest,
    "sglang": lambda largest: to_float32(1e-10) / largest,
    "ocp": lambda largest: 0.0,
}
"""Lower bounds of the scales by the library that has them, from the largest value of the dtype.
DeepGEMM and SGLang bound the amax, a float32, and divide it."""


class Format(NamedTuple):
    """What one call of the quantizer produces. Get one from :func:`make_format`.

    Attributes:
        group_size: neighbours in a row that share a scale, or ``WHOLE_ROW``.
        scale_format: one of ``SCALE_FORMATS`` or ``RECIPROCAL_FLOAT32``.
        round_scale: whether float32 scales are rounded up to powers of two.
        dtype: of the values, a key of ``VALUE_TYPES``.
    """

    group_size: int
    scale_format: str
    round_scale: bool
    dtype: torch.dtype = VALUE_DTYPE

    @property
    def value_type(self) -> ValueType:
        return VALUE_TYPES[self.dtype]

    @property
    def packed(self) -> bool:
        """Whether an int32 holds the exponents of four neighbouring groups."""
        return self.scale_format == UE8M0_PACKED

    @property
    def blocked(self) -> bool:
        """Whether scales lie in blocks of 128 rows and 4 groups."""
        return self.scale_format == UE8M0_BLOCKED

    @property
    def mn_major(self) -> bool:
        """Whether the scales of neighbouring rows are neighbours, in columns aligned for TMA."""
        return self.scale_format in (UE8M0_PACKED, FLOAT32, RECIPROCAL_FLOAT32)

    @property
    def ue8m0(self) -> bool:
        """Whether scales are stored as bytes with an exponent, be they packed or not."""
        return self.scale_format in (UE8M0_PACKED, UE8M0_ROW_MAJOR, UE8M0_BLOCKED)

    @property
    def power_of_two(self) -> bool:
        return self.ue8m0 or self.round_scale

    @property
    def reciprocal(self) -> bool:
        return self.scale_format == RECIPROCAL_FLOAT32

    @property
    def scale_dtype(self) -> torch.dtype:
        if self.packed:
            return torch.int32
        return torch.float8_e8m0fnu if self.ue8m0 else torch.float32

    @property
    def groups_per_column(self) -> int:
        """Groups whose scales share a column of `sf`."""
        return BYTES_PER_WORD if self.packed else 1

    @property
    def groups_per_unit(self) -> int:
        """Groups whose scales are stored together, padding included: a word of them, or a block's
        row."""
        return BLOCK_GROUPS if self.blocked else self.groups_per_column

    def groups(self, k: int) -> int:
        """Groups in a row of `k`, of which the last may be short."""
        return min(k, 1) if self.group_size == WHOLE_ROW else ceil_div(k, self.group_size)

    def columns(self, k: int) -> int:
        """Columns of scales that the format stores of a row of `k`, padding included."""
        if self.blocked:
            return align(self.groups(k), BLOCK_GROUPS)
        return ceil_div(self.groups(k), self.groups_per_column)

    def scale_rows(self, mn: int) -> int:
        """Rows of scales that the format stores of `mn` rows, padding included."""
        if self.mn_major:
            return align(mn, SCALE_ROW_ALIGNMENT)
        return align(mn, BLOCK_ROWS) if self.blocked else mn

    def scale_shape(self, batch_shape: Sequence[int], mn: int, k: int) -> tuple[int, ...]:
        """Logical shape of the scales of an input (\\*batch_shape, mn, k)."""
        if self.blocked:
            return (*batch_shape, self.scale_rows(mn) * self.columns(k))
        return (*batch_shape, mn, self.columns(k))

    def scale_strides(self, batch_shape: Sequence[int], mn: int, k: int) -> tuple[int, ...]:
        """Strides in elements: MN-major, each column aligned for TMA, or contiguous."""
        rows, columns = self.scale_rows(mn), self.columns(k)
        if not self.mn_major:
            # Those of contiguous tensors, which torch computes as if no size were 0.
            rows, columns = max(rows, 1), max(columns, 1)
            batch_shape = [max(size, 1) for size in batch_shape]
        outer, matrix = [], rows * columns
        for size in reversed(batch_shape):
            outer.append(matrix)
            matrix = matrix * size
        if self.blocked:
            return (*reversed(outer), 1)
        return (*reversed(outer), *((1, rows) if self.mn_major else (columns, 1)))

    def empty_scales(
        self, batch_shape: Sequence[int], mn: int, k: int, device: torch.device
    ) -> torch.Tensor:
        """Uninitialized scales whose storage holds all padding, that of the last column too."""
        shape = self.scale_shape(batch_shape, mn, k)
        strides = self.scale_strides(batch_shape, mn, k)
        if not self.mn_major:
            return torch.empty(shape, dtype=self.scale_dtype, device=device)
        padded = torch.empty_strided(
            (*batch_shape, self.scale_rows(mn), shape[-1]),
            strides,
            dtype=self.scale_dtype,
            device=device,
        )
        return padded[..., :mn, :]


def _all_formats() -> dict[tuple[int, str, bool, torch.dtype], Format]:
    formats = [Format(128, RECIPROCAL_FLOAT32, False, torch.float8_e4m3fn)]
    for size, name, dtype in itertools.product(
        (*GROUP_SIZES, WHOLE_ROW), SCALE_FORMATS, VALUE_TYPES
    ):
        if name == UE8M0_BLOCKED and size != BLOCKED_GROUP_SIZE:
            continue
        formats.append(Format(size, name, False, dtype))
        if not formats[-1].ue8m0:
            formats.append(Format(size, name, True, dtype))
    return {(f.group_size, f.scale_format, f.round_scale, f.dtype): f for f in formats}


_FORMATS = _all_formats()


def make_format(
    group_size: int, scale_format: str, round_scale: bool, dtype: torch.dtype = VALUE_DTYPE
) -> Format:
    """The format of these choices.

    Raises:
        TypeError: `dtype` is none of ``VALUE_TYPES``.
        ValueError: another choice is not supported, or two of them contradict each other.
    """
    try:
        # 1 is equal to True, and 128.0 to 128.
        if isinstance(group_size, int) and isinstance(round_scale, bool):
            return _FORMATS[group_size, scale_format, round_scale, dtype]
    except (KeyError, TypeError):
        pass
    if not isinstance(group_size, int) or group_size not in (*GROUP_SIZES, WHOLE_ROW):
        raise ValueError(
            f"group_size: expected one of {GROUP_SIZES} or {WHOLE_ROW} for the whole row, "
            f"got {group_size!r}"
        )
    if not isinstance(scale_format, str) or scale_format not in SCALE_FORMATS:
        raise ValueError(f"scale_format: expected one of {SCALE_FORMATS}, got {scale_format!r}")
    if not isinstance(dtype, torch.dtype) or dtype not in VALUE_TYPES:
        raise TypeError(f"dtype: expected one of {tuple(VALUE_TYPES)}, got {dtype!r}")
    if scale_format == UE8M0_BLOCKED and group_size != BLOCKED_GROUP_SIZE:
        raise ValueError(
            f"group_size: expected {BLOCKED_GROUP_SIZE} for scale_format={UE8M0_BLOCKED!r}, which "
            f"cuBLAS, CUTLASS and torch._scaled_mm read for MXFP8 alone, got {group_size!r}"
        )
    raise ValueError(
        f"round_scale: expected a bool, and True only for scale_format={FLOAT32!r} or "
        f"{FLOAT32_ROW_MAJOR!r}, since the others' scales are powers of two anyway; "
        f"got {round_scale!r} for {scale_format!r}"
    )


def flat_batch(
    name: str, shape: Sequence[int], strides: Sequence[int], inner: int = 2
) -> tuple[int, int]:
    """Size and stride of the one dimension that all but the `inner` last ones make.

    Raises:
        ValueError: no single stride walks them.
    """
    count, stride = 1, 0
    for size, step in zip(reversed(shape[:-inner]), reversed(strides[:-inner]), strict=True):
        if size == 1:
            continue
        if count == 1:
            stride = step
        elif size != 0 and count != 0 and step != count * stride:
            raise ValueError(
                f"{name}: expected leading dimensions that one stride walks, got shape "
                f"{tuple(shape)}, strides {tuple(strides)}"
            )
        count = count * size
    return count, stride


def last_column_rows(sf: torch.Tensor) -> int:
    """Rows of the last column of MN-major `sf` that its storage holds, padding rows included.

    At least size(-2). A tensor of exactly the contract's strides that was allocated without the
    last column's padding, as vLLM does, has no more. The columns before it always have theirs,
    also those of the matrices before the last one.
    """
    mn = sf.shape[-2]
    aligned = align(mn, SCALE_ROW_ALIGNMENT)
    columns = math.prod(sf.shape[:-2]) * sf.shape[-1]
    if mn == aligned or columns == 0:
        return aligned
    end = sf.untyped_storage().nbytes() // sf.element_size() - sf.storage_offset()
    return min(aligned, end - (columns - 1) * aligned)


def resolve_min_scale(fmt: Format, min_scale: float | str) -> float:
    """The number that `min_scale` stands for, be it one or a key of ``MIN_SCALES``.

    Raises:
        TypeError: `min_scale` is neither a number nor a string.
        ValueError: `min_scale` is no such key, or outside of what `fmt` can represent.
    """
    value = min_scale
    if isinstance(min_scale, str):
        if min_scale not in MIN_SCALES:
            raise ValueError(
                f"min_scale: expected a number or one of {tuple(MIN_SCALES)}, got {min_scale!r}"
            )
        value = MIN_SCALES[min_scale](fmt.value_type.max)
    elif isinstance(min_scale, bool) or not isinstance(min_scale, numbers.Real):
        raise TypeError(
            f"min_scale: expected a number or one of {tuple(MIN_SCALES)}, got {min_scale!r}"
        )
    lowest = 0.0 if fmt.ue8m0 else SMALLEST_NORMAL
    if not lowest <= value <= MAX_MIN_SCALE:
        raise ValueError(
            f"min_scale: expected {lowest} <= min_scale <= {MAX_MIN_SCALE} "
            f"for scale_format={fmt.scale_format!r}, got {min_scale!r}"
        )
    return value


def scale_floor(fmt: Format, min_scale: float | str) -> int | float:
    """`min_scale` as the quantizer takes it: rounded to float32, and for scales that are powers
    of two the UE8M0 byte of the smallest one that is not below it.

    Raises:
        TypeError, ValueError: as :func:`resolve_min_scale`.
    """
    floor = to_float32(resolve_min_scale(fmt, min_scale))
    if not fmt.power_of_two:
        return floor
    if floor == 0.0:
        return 0
    mantissa, exponent = math.frexp(floor)
    return max(0, exponent - (mantissa == 0.5) + UE8M0_BIAS)
