"""Formats: what a result looks like. Dtypes, group size, and how scales lie in memory.

Terms are DeepGEMM's: `mn` rows (tokens), `k` columns, `sf` scaling factors. A group is `group_size`
elements contiguous along k that share one scale.
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from cute_quant.contract.dtypes import (
    BLOCK_GROUPS,
    BYTES_PER_WORD,
    SCALE_ROW_ALIGNMENT,
    VALUE_TYPES,
    ValueType,
    align,
    ceil_div,
    dtype_name,
    is_number,
)
from cute_quant.contract.format_choices import (
    BLOCK_ROWS,
    BLOCKED,
    BLOCKED_GROUP_SIZES,
    DEEPGEMM,
    DIVIDED,
    E4M3_GROUP_SIZE,
    FLASHINFER,
    FLOAT32_STEPS,
    GROUP_SIZES,
    IEEE,
    MAX_COLUMNS,
    MN_MAJOR,
    MN_MAJOR_PACKED,
    ROW_MAJOR,
    ROW_MAJOR_PACKED,
    SCALE_LAYOUTS,
    TORCHAO,
    VLLM,
    VLLM_BF16,
    WHOLE_ROW,
    Choices,
    Steps,
    adds_half,
    check_choices,
    check_numerics,
    check_upper_scale,
    choices_text,
    default_min_scale,
    float32_steps,
    parse_choices,
    scale_floor,
    truncates,
    zeros_have_zero,
)
from cute_quant.contract.readers import describe_readers
from cute_quant.contract.torch_private import constant_in_graphs


class Format:
    """The format of a quantizer's results: one immutable object, checked where it is made.

    Equal choices give the same object, so formats compare and hash by identity. Take a named one,
    such as ``cute_quant.DEEP_GEMM``, or change one with :meth:`replace`.

    Args:
        values: dtype of the values: float8_e4m3fn, float8_e5m2, int8 (-127 to 127), or
            float4_e2m1fn_x2: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, two in a byte, the
            earlier element in the low four bits.
        group_size: elements contiguous along k that share a scale: 16, 32, 64, 128, 256, or -1 for
            the whole row.
        scale_dtype: float8_e8m0fnu (UE8M0, powers of two), float32, or, for FP4 in groups of 16
            (NVFP4), float8_e4m3fn. Over e4m3 scales there is one more, a float32: see `row_scale`.
        scale_layout: how scales lie in memory. For (..., mn, k) values with g = ceil(k /
            group_size) groups in a row, p columns and A = align(mn, 4):

            "mn_major_packed" (bytes): int32 (..., mn, p = ceil(g / 4)), strides (p A, 1, A). Byte
            j % 4 of word j / 4, the low one first, is the scale of group j.
            "row_major_packed" (bytes): the same words (..., mn, p), contiguous.
            "mn_major" (float32): float32 (..., mn, p = g), strides (p A, 1, A).
            "row_major": (..., mn, g), contiguous.
            "128x4" (bytes, UE8M0 for groups of 32, e4m3 for 16): (..., align(mn, 128) align(g, 4)),
            contiguous blocks of 128 rows and 4 groups. The byte of (row, group) is
            ``((row // 128) * (align(g, 4) // 4) + group // 4) * 512 + row % 32 * 16
            + row % 128 // 32 * 4 + group % 4``.
            "8x4" (the same): (..., align(mn, 8) align(g, 4)), contiguous blocks of 8 rows and 4
            groups. The byte of (row, group) is ``((row // 8) * (align(g, 4) // 4) + group // 4)
            * 32 + row % 8 * 4 + group % 4``.

            Bytes past the last group and rows past mn are 0.
        round_scale: whether float32 scales are rounded up to powers of two.
        min_scale: the smallest scale, rounded to float32: a number from 0 (2^-126 for float32
            scales) to 2^100, or the name of a library with that bound: "vllm" (1e-10), "deepgemm"
            (1e-4 / M), "sglang" (1e-10 / M), "vllm_fused" (1 / (512 M)), "torchao" (1e-12 / M) or
            "ocp" (0), M being the largest value. The default is "vllm", which gives a group of
            zeros the UE8M0 byte 94, or that of `numerics`. With numerics of a library other than
            "deepgemm" a float32 scale is at least 2^-90. For
            e4m3 scales it is rounded to e4m3: a number from 0 to 448, "deepgemm" (2^-9), "torchao"
            (2^-6), or "none" (0), the default but with these numerics.
        numerics: "ieee", where each operation is rounded correctly, or the bits of a library on
            finite input: "vllm", "vllm_emulation" (its reference in torch), "flashinfer", "te"
            (TransformerEngine), "torchao" or "deepgemm"
            for NVFP4, MXFP4 (not "te") and MXFP8. For e4m3 values under float32 scales "vllm" (its
            kernels for whole rows and the fused ones), "vllm_triton", "sglang", "torchao",
            "tilekernels" or "deepgemm", and for int8 "vllm", "sglang" (groups) or "deepgemm". For
            e4m3 values but MXFP8 "vllm_bf16" (its kernel for masked experts): see the page on
            numerics.
        row_scale: whether each row has a float32 scale over its e4m3 scales, computed from the
            row's own amax and returned. If not, operations take one for the tensor, or one for each
            matrix of a batch.
        four_over_six: whether each group under an e4m3 scale takes the better of two scales: the
            one that maps its amax to 6, or the one that maps it to 4, where that has the smaller
            sum of absolute errors.

    Attributes:
        sf_dtype: dtype of the scale tensor: int32 if four scales share a word, else `scale_dtype`.
        sf_shape_facts, readers: shape and strides of the scale tensor, and who reads the result, as
            text for people.

    Raises:
        TypeError: `values`, `scale_dtype`, `min_scale` or a flag has a wrong type.
        ValueError: a choice is not supported, or two of them contradict each other.
    """

    values: torch.dtype
    group_size: int
    scale_dtype: torch.dtype
    scale_layout: str
    round_scale: bool
    min_scale: float | str | None
    numerics: str
    row_scale: bool
    four_over_six: bool

    # What follows from the fields, computed once.
    value_type: ValueType
    sf_dtype: torch.dtype
    floor: int | float
    """The smallest scale as kernels take it: its UE8M0 byte if scales are powers of two."""
    whole_row: bool
    by_row: bool
    """Scales depend on all of a row: it is one group, or has a scale over those of its groups."""
    packed: bool
    """An int32 holds the scales of four groups."""
    block_rows: int
    """Rows of a block of scales, 0 without blocks."""
    blocked: bool
    """Scales lie in blocks of some rows and 4 groups."""
    mn_major: bool
    """Scales of consecutive rows are contiguous, in columns aligned for TMA."""
    byte_scales: bool
    """Scales have a byte each, UE8M0 or e4m3, packed or not."""
    ue8m0: bool
    """Scales are stored as exponent bytes, packed or not."""
    upper_scale: bool
    """Over the e4m3 scales there is one more, of the tensor, a matrix or a row."""
    power_of_two: bool
    steps: Steps
    """To values under float32 scales."""
    bounds_amax: bool
    """`floor` is the smallest amax, in place of the smallest scale."""
    divides: bool
    """Values are divided by float32 scales, not multiplied with an inverse."""
    in_bf16: bool
    """Each step to scales, and to values under float32 scales, is rounded to bf16."""
    truncates: bool
    """Values are rounded towards zero."""
    zeros_have_zero: bool
    """The scale of zeros is 0, whatever the smallest one."""
    adds_half: bool
    """Before that they move away from zero by a half: they are rounded to nearest."""
    rounds_half_up: bool
    """A power of two is rounded from amax at the mantissa 1.75, not up."""
    rounds_quotient: bool
    """A power of two is rounded up from amax / M in float32, whose subnormals are coarser."""
    flushes: bool
    """Values under the smallest power of two become 0."""
    positive_zero: bool
    """Values that round to 0 have no sign."""
    scale_dims: int
    """Dimensions of the scales of one matrix: 1 in blocks, else 2."""
    groups_per_column: int
    """Groups whose scales share a column of sf."""
    groups_per_unit: int
    """Groups whose scales are stored together, padding included: a word, or a block's row."""
    kernel_format: Format
    """This format with the default `min_scale`. Kernels take the smallest scale as an argument, so
    formats that differ in nothing else share code."""
    text: str
    """The text that :meth:`parse` reads."""

    def __new__(
        cls,
        values: torch.dtype = torch.float8_e4m3fn,
        group_size: int = 128,
        scale_dtype: torch.dtype = torch.float8_e8m0fnu,
        scale_layout: str = MN_MAJOR_PACKED,
        *,
        round_scale: bool = False,
        min_scale: float | str | None = None,
        numerics: str = IEEE,
        row_scale: bool = False,
        four_over_six: bool = False,
    ) -> Format:
        """Return the one format of these choices."""
        check_choices(values, group_size, scale_dtype, scale_layout)
        check_numerics(values, group_size, scale_dtype, round_scale, numerics)
        check_upper_scale(scale_dtype, numerics, row_scale, four_over_six)
        power_of_two = scale_dtype is torch.float8_e8m0fnu or round_scale
        largest = VALUE_TYPES[values].max
        steps = FLOAT32_STEPS[IEEE]
        if scale_dtype is torch.float32 and not round_scale:
            steps = float32_steps(values, group_size, numerics)
        default = default_min_scale(values, scale_dtype, numerics)
        floor = scale_floor(min_scale, largest, scale_dtype, power_of_two, numerics, steps, default)
        if min_scale == default:
            min_scale = None
        elif is_number(min_scale):
            min_scale = float(min_scale) + 0.0  # -0.0 becomes 0.0
        choices = Choices(
            values,
            group_size,
            scale_dtype,
            scale_layout,
            round_scale,
            min_scale,
            numerics,
            row_scale,
            four_over_six,
        )
        with _lock:
            fmt = _formats.get(choices)
            if fmt is None:
                fmt = super().__new__(cls)
                fmt.__dict__.update(
                    choices._asdict(), floor=floor, power_of_two=power_of_two, steps=steps
                )
                fmt._derive(choices)
                _formats[choices] = fmt
        return fmt

    def __init_subclass__(cls) -> None:
        """Refuse subclasses.

        Raises:
            TypeError: always.
        """
        raise TypeError("Format: expected no subclass, equal choices give one object")

    def _derive(self, choices: Choices) -> None:
        packed = self.scale_layout in (MN_MAJOR_PACKED, ROW_MAJOR_PACKED)
        blocked = self.scale_layout in BLOCK_ROWS
        mx = self.scale_dtype is torch.float8_e8m0fnu
        fp4 = self.values is torch.float4_e2m1fn_x2
        self.__dict__.update(
            value_type=VALUE_TYPES[self.values],
            sf_dtype=torch.int32 if packed else self.scale_dtype,
            whole_row=self.group_size == WHOLE_ROW,
            by_row=self.row_scale or self.group_size == WHOLE_ROW,
            packed=packed,
            block_rows=BLOCK_ROWS.get(self.scale_layout, 0),
            blocked=blocked,
            mn_major=self.scale_layout in (MN_MAJOR, MN_MAJOR_PACKED),
            byte_scales=self.scale_dtype.itemsize == 1,
            ue8m0=self.scale_dtype is torch.float8_e8m0fnu,
            upper_scale=self.scale_dtype is torch.float8_e4m3fn,
            bounds_amax=self.steps.bounds_amax,
            divides=self.steps.multiplier == DIVIDED,
            in_bf16=self.numerics == VLLM_BF16,
            truncates=truncates(self.values, self.group_size, self.numerics),
            zeros_have_zero=zeros_have_zero(self.values, self.group_size, self.numerics),
            adds_half=adds_half(self.values, self.group_size, self.numerics),
            rounds_half_up=mx and self.numerics == VLLM and fp4,
            rounds_quotient=mx and self.numerics not in (IEEE, VLLM_BF16),
            flushes=mx and self.numerics in _FLUSH.get(self.values, ()),
            positive_zero=fp4 and self.numerics == DEEPGEMM,
            scale_dims=1 if blocked else 2,
            groups_per_column=BYTES_PER_WORD if packed else 1,
            groups_per_unit=BYTES_PER_WORD if packed else BLOCK_GROUPS if blocked else 1,
            text=choices_text(choices),
            kernel_format=self if self.min_scale is None else self.replace(min_scale=None),
        )

    @constant_in_graphs
    def replace(self, **choices: Any) -> Format:
        """Return this format with other choices, which are keywords of the constructor.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        return Format(**({name: getattr(self, name) for name in Choices._fields} | choices))

    @staticmethod
    @constant_in_graphs
    def parse(text: str) -> Format:
        """Return the format that ``str`` made `text` of, or that has this name.

        Raises:
            TypeError: `text` is no string.
            ValueError: it is neither.
        """
        if not isinstance(text, str):
            raise TypeError(f"fmt: expected a str, got {type(text).__name__}")
        try:
            return _from_text(text)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"fmt: expected one of {', '.join(NAMED_FORMATS)}, or text such as "
                f"{DEEP_GEMM.text!r}, got {text!r}: {error}"
            ) from error

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        choices = f"{dtype_name(self.values)}, {self.group_size}, {dtype_name(self.scale_dtype)}"
        options = "".join(
            f", {name}={getattr(self, name)!r}"
            for name, default in Choices._field_defaults.items()
            if getattr(self, name) != default
        )
        name = "".join(f"{name} = " for name, fmt in NAMED_FORMATS.items() if fmt is self)
        return (
            f"<{name}Format({choices}, {self.scale_layout!r}{options}): "
            f"sf {self.sf_shape_facts}; read by {self.readers}>"
        )

    @property
    def sf_shape_facts(self) -> str:
        """Return dtype, shape and strides of the scales of (mn, k) values, as text for people."""
        size = self.group_size * self.groups_per_column
        columns = "1" if self.whole_row else f"ceil(k/{size})"
        facts = f"(mn, {columns}), contiguous"
        if self.mn_major:
            facts = f"(mn, {columns}), strides (1, align(mn, 4))"
        elif self.blocked:
            facts = (
                f"(align(mn, {self.block_rows}) * align({columns}, {BLOCK_GROUPS}),), contiguous "
                f"blocks of {self.scale_layout}"
            )
        return f"{dtype_name(self.sf_dtype)} {facts}"

    @property
    def readers(self) -> str:
        """Return the GEMMs that read this format, as text for people."""
        return describe_readers(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return Format.parse, (self.text,)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name}: a Format does not change, use replace()")

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)

    # Shapes name the methods that they call by the class: tracers find those of a format that a
    # graph makes, whose own methods they cannot guard.

    def groups(self, k: int) -> int:
        """Return the number of groups in a row of `k`, of which the last may be short."""
        # In arithmetic that symbolic sizes take without a branch.
        return ceil_div(k, 2 * MAX_COLUMNS if self.whole_row else self.group_size)

    def columns(self, k: int) -> int:
        """Return the columns of scales that are stored for a row of `k`, padding included."""
        if self.blocked:
            return align(Format.groups(self, k), BLOCK_GROUPS)
        return ceil_div(Format.groups(self, k), self.groups_per_column)

    def scale_rows(self, mn: int) -> int:
        """Return the rows of scales that are stored for `mn` rows, padding included."""
        if self.mn_major:
            return align(mn, SCALE_ROW_ALIGNMENT)
        return align(mn, self.block_rows) if self.blocked else mn

    def value_columns(self, k: int) -> int:
        """Return the size of the last dimension of the tensor of values, for rows of `k`."""
        # Without a division where there is nothing to divide: `k` may be symbolic.
        per_byte = self.value_type.per_byte
        return k if per_byte == 1 else k // per_byte

    def scale_shape(self, batch_shape: Sequence[int], mn: int, k: int) -> tuple[int, ...]:
        """Return the shape of the scales of values (..., mn, k), ``...`` being `batch_shape`."""
        if self.blocked:
            return (*batch_shape, Format.scale_rows(self, mn) * Format.columns(self, k))
        return (*batch_shape, mn, Format.columns(self, k))

    def scale_strides(self, batch_shape: Sequence[int], mn: int, k: int) -> tuple[int, ...]:
        """Return the strides of the scales of values (..., mn, k), in elements."""
        rows, columns = Format.scale_rows(self, mn), Format.columns(self, k)
        matrix = rows * columns
        if not self.mn_major:
            # Those of contiguous tensors, which torch computes as if no size were 0.
            rows, columns = _larger(rows, 1), _larger(columns, 1)
            matrix = _larger(matrix, 1) if self.blocked else rows * columns
            batch_shape = [_larger(size, 1) for size in batch_shape]
        outer = []
        for size in reversed(batch_shape):
            outer.append(matrix)
            matrix = matrix * size
        if self.blocked:
            return (*reversed(outer), 1)
        return (*reversed(outer), *((1, rows) if self.mn_major else (columns, 1)))

    def empty_scales(
        self, batch_shape: Sequence[int], mn: int, k: int, device: torch.device | str | None
    ) -> torch.Tensor:
        """Return uninitialized scales whose storage holds all padding, the last column's too."""
        shape = self.scale_shape(batch_shape, mn, k)
        if not self.mn_major:
            return torch.empty(shape, dtype=self.sf_dtype, device=device)
        strides = self.scale_strides(batch_shape, mn, k)
        padded_shape = (*batch_shape, self.scale_rows(mn), shape[-1])
        padded = torch.empty_strided(padded_shape, strides, dtype=self.sf_dtype, device=device)
        return padded[..., :mn, :]


_FLUSH = {
    torch.float8_e4m3fn: (FLASHINFER, TORCHAO),
    torch.float4_e2m1fn_x2: (VLLM, FLASHINFER, TORCHAO),
}
"""Numerics in which values under the smallest UE8M0 scale become 0."""

_formats: weakref.WeakValueDictionary[Choices, Format] = weakref.WeakValueDictionary()
_lock = threading.RLock()


def _larger(a: int, b: int) -> int:
    """Return the larger of two sizes, also of those that only the run can tell.

    Dynamo of torch 2.11 does not trace ``sym_max`` of two integers.
    """
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b)
    larger: int = torch.sym_max(a, b)
    return larger


@functools.lru_cache(1024)
def _from_text(text: str) -> Format:
    return NAMED_FORMATS.get(text) or Format(**parse_choices(text))


_E2M1, _E4M3, _E8M0 = torch.float4_e2m1fn_x2, torch.float8_e4m3fn, torch.float8_e8m0fnu

DEEP_GEMM = Format()
DEEP_GEMM_32 = Format(group_size=32)
DEEP_GEMM_SM90 = Format(_E4M3, 128, torch.float32, MN_MAJOR)
MXFP8 = Format(_E4M3, 32, _E8M0, BLOCKED)
MXFP4 = Format(_E2M1, 32, _E8M0, BLOCKED)
NVFP4 = Format(_E2M1, 16, _E4M3, BLOCKED)
GROUPWISE_FP8 = Format(_E4M3, 128, torch.float32, ROW_MAJOR)
ROWWISE_FP8 = Format(_E4M3, WHOLE_ROW, torch.float32, ROW_MAJOR)
INT8 = Format(torch.int8, 128, torch.float32, ROW_MAJOR)
ROWWISE_INT8 = Format(torch.int8, WHOLE_ROW, torch.float32, ROW_MAJOR)

NAMED_FORMATS: dict[str, Format] = {
    "DEEP_GEMM": DEEP_GEMM,
    "DEEP_GEMM_32": DEEP_GEMM_32,
    "DEEP_GEMM_SM90": DEEP_GEMM_SM90,
    "MXFP8": MXFP8,
    "MXFP4": MXFP4,
    "NVFP4": NVFP4,
    "GROUPWISE_FP8": GROUPWISE_FP8,
    "ROWWISE_FP8": ROWWISE_FP8,
    "INT8": INT8,
    "ROWWISE_INT8": ROWWISE_INT8,
}


def all_formats() -> list[Format]:
    """Return every format with the default smallest scale and numerics."""
    formats = []
    for values, (scale_dtype, layouts) in itertools.product(VALUE_TYPES, SCALE_LAYOUTS.items()):
        for layout, group_size in itertools.product(layouts, (*GROUP_SIZES, WHOLE_ROW)):
            if layout in BLOCK_ROWS and group_size != BLOCKED_GROUP_SIZES[scale_dtype]:
                continue
            if scale_dtype is _E4M3 and (values is not _E2M1 or group_size != E4M3_GROUP_SIZE):
                continue
            formats.append(Format(values, group_size, scale_dtype, layout))
            if scale_dtype is torch.float32:
                formats.append(formats[-1].replace(round_scale=True))
            if scale_dtype is _E4M3:
                formats.append(formats[-1].replace(row_scale=True))
    return formats
