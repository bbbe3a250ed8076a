"""Ranges of calls that are alike but for their sizes and strides."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from cute_quant.contract.blocks import (
    check_block_format,
    check_requantized_format,
    is_transposed,
)
from cute_quant.contract.calls import Call
from cute_quant.contract.columns import ColumnCall, check_column_format, check_group_format
from cute_quant.contract.dtypes import BLOCK_SIZES, LOAD_BYTES
from cute_quant.contract.format_choices import MAX_COLUMNS
from cute_quant.contract.formats import NAMED_FORMATS, Format
from cute_quant.contract.prologues import (
    FUSED,
    MAX_NORM_COLUMNS,
    RmsNorm,
    SiluMul,
    SiluMulBackward,
)
from cute_quant.contract.rows import DENSE, Masked, PrefixSum
from cute_quant.contract.scale_conversion import Conversion, check_formats
from cute_quant.contract.upper_scales import DECODE, UpperScale

QUANTIZE = "quantize"
SILU_MUL = "silu_mul_quantize"
SILU_MUL_BACKWARD = "silu_mul_backward_quantize"
RMS_NORM = "rms_norm_quantize"
DEQUANTIZE = "dequantize"
FAKE_QUANTIZE = "fake_quantize"
QUANTIZE_BLOCKS = "quantize_blocks"
DEQUANTIZE_BLOCKS = "dequantize_blocks"
REQUANTIZE_BLOCKS = "requantize_blocks"
CONVERT_SCALES = "convert_scales"
QUANTIZE_COLUMNS = "quantize_columns"
QUANTIZE_BOTH = "quantize_both"
SILU_MUL_BOTH = "silu_mul_quantize_both"
SILU_MUL_BACKWARD_BOTH = "silu_mul_backward_quantize_both"
BOTH = (QUANTIZE_BOTH, SILU_MUL_BOTH, SILU_MUL_BACKWARD_BOTH)
OF_COLUMNS = (QUANTIZE_COLUMNS, *BOTH)
"""Operations on groups along rows, of which those of both directions have a format of columns."""
GATHERING = (QUANTIZE, SILU_MUL, RMS_NORM)
"""Operations whose rows an index or a scatter may name."""
OPERATIONS = (
    *GATHERING,
    SILU_MUL_BACKWARD,
    DEQUANTIZE,
    FAKE_QUANTIZE,
    QUANTIZE_BLOCKS,
    DEQUANTIZE_BLOCKS,
    REQUANTIZE_BLOCKS,
    CONVERT_SCALES,
    *OF_COLUMNS,
)
"""Names of the public operations."""
FLAGS = (
    "gathered",
    "scattered",
    "batched",
    "interleaved",
    "clamped",
    "scaled",
    "shifted",
    "stochastic",
    "transposed",
)
"""Fields of a `CallRange` that are options of the command line without a value."""
WITH_ROWS = (*GATHERING, SILU_MUL_BACKWARD, CONVERT_SCALES, *OF_COLUMNS)
"""Operations on rows of a domain."""
STOCHASTIC = (QUANTIZE, SILU_MUL_BACKWARD, *OF_COLUMNS)
"""Operations that round by random numbers, if asked to."""


class CallRange(NamedTuple):
    """Calls of one operation, of one dtype, in one format.

    Attributes:
        operation: one of ``OPERATIONS``.
        fmt, dtype: as of the call; for ``dequantize`` dtype is that of the result, and for
            ``requantize_blocks`` and ``convert_scales`` it has no say.
        k: numbers of columns of the result.
        max_rows: most rows of the result, all leading dimensions together.
        kind: of the rows.
        gathered: whether calls have an index.
        scattered: whether rows are scattered; then `max_rows` counts rows of x too.
        batched: whether there are leading dimensions; masked rows have them in any case.
        alignment: bytes, a power of two. Rows of inputs and results lie as in a contiguous tensor,
            or start at multiples of it.
        interleaved, clamped, scaled, shifted, rounding: as of `silu_mul_quantize`, with or without
            `clamp`, `alpha` and `beta`; with and without `weight`.
        weight_dtype: of the weight of `rms_norm_quantize`, with and without `residual` and
            `normalized`.
        upper: the argument that the scale over e4m3 scales is given as; None where calls take none.
        stochastic: whether values are rounded by random numbers.
        to: as of `convert_scales`; None for other operations.
        source_blocks: sizes of the blocks whose scales `requantize_blocks` reads.
        column_fmt, transposed: as of operations on both directions; `transposed` of
            ``quantize_columns`` too, whose only format is `fmt`.
    """

    operation: str
    fmt: Format
    dtype: torch.dtype
    k: tuple[int, ...]
    max_rows: int
    kind: str = DENSE
    gathered: bool = False
    batched: bool = False
    alignment: int = LOAD_BYTES
    interleaved: bool = False
    clamped: bool = False
    scaled: bool = False
    shifted: bool = False
    rounding: str = FUSED
    weight_dtype: torch.dtype = torch.bfloat16
    upper: str | None = None
    stochastic: bool = False
    to: Format | None = None
    source_blocks: tuple[int, ...] = BLOCK_SIZES
    scattered: bool = False
    column_fmt: Format | None = None
    transposed: bool = False

    @property
    def possible(self) -> bool:
        """Return whether the operation takes rows of this kind, and random numbers."""
        if self.stochastic and self.operation not in STOCHASTIC:
            return False
        if (self.gathered or self.scattered) and self.operation not in GATHERING:
            return False
        if self.scattered and (self.gathered or self.batched != (self.kind == Masked.kind)):
            return False
        if self.kind == DENSE:
            return True
        if self.operation in OF_COLUMNS and self.kind != PrefixSum.kind:
            return False
        return self.operation in WITH_ROWS and self.batched == (self.kind == Masked.kind)

    def with_upper_scale(self, kind: str) -> CallRange:
        """Return these calls with their upper scale given as an argument, where they take one."""
        if not self.fmt.upper_scale or self.operation == CONVERT_SCALES:
            return self
        if self.fmt.row_scale:
            # Operations compute and return them.
            return self._replace(upper=DECODE if self.operation == DEQUANTIZE else None)
        return self._replace(upper=kind)

    def check_columns(self) -> None:
        """Check that calls may have these columns.

        Raises:
            TypeError: `to` is no format.
            ValueError: one number is too large, or of values that do not fill their bytes, or the
                operation does not take the format.
        """
        match self.operation:
            case "quantize_blocks" | "dequantize_blocks":
                check_block_format(self.fmt)
            case "requantize_blocks":
                check_requantized_format(self.fmt)
            case "convert_scales":
                check_formats(self.fmt, self.to)
            case "quantize_columns":
                check_column_format(self.fmt)
        if self.operation in BOTH:
            check_group_format(self.fmt, "fmt")
            check_column_format(self.column_fmt, "column_fmt")
        whole_rows = self.operation == RMS_NORM or self.fmt.row_scale
        bounded = whole_rows and self.operation not in (DEQUANTIZE, CONVERT_SCALES)
        most = MAX_NORM_COLUMNS if bounded else MAX_COLUMNS
        per_byte = self.fmt.value_type.per_byte
        values = str(self.fmt)
        if self.operation in (SILU_MUL_BACKWARD, SILU_MUL_BACKWARD_BOTH):
            per_byte, values = 2, self.operation  # columns of gates and ups
        for k in self.k:
            if k > most:
                raise ValueError(
                    f"k: expected at most {most} for {self.operation} to {self.fmt}, got {k}"
                )
            if k % per_byte:
                raise ValueError(f"k: expected multiples of {per_byte} for {values}, got {k}")

    @staticmethod
    def of(call: Call, result_dtype: torch.dtype, result_alignment: int) -> CallRange:
        """Return the range of a call and of those like it with as many rows or less."""
        batch_shape, mn, k = call.result_shape
        max_rows = mn
        for size in batch_shape:
            max_rows *= size
        calls = CallRange(
            QUANTIZE if result_dtype is call.fmt.values else FAKE_QUANTIZE,
            call.fmt,
            call.x.dtype,
            (k,),
            max_rows,
            DENSE if call.rows is None else call.rows.kind,
            call.index is not None,
            bool(batch_shape),
            min(_alignment(call.x), result_alignment),
            upper=None if call.upper is None else call.upper.kind,
            scattered=call.scatter is not None,
            stochastic=call.rng_state is not None,
        )
        match call.prologue:
            case SiluMul() as silu_mul:
                return calls._replace(
                    operation=SILU_MUL,
                    interleaved=silu_mul.interleaved,
                    clamped=silu_mul.clamp is not None,
                    scaled=silu_mul.alpha != 1.0,
                    shifted=silu_mul.beta != 0.0,
                    rounding=silu_mul.rounding,
                )
            case SiluMulBackward() as backward:
                return calls._replace(
                    operation=SILU_MUL_BACKWARD,
                    interleaved=backward.interleaved,
                    clamped=backward.clamp is not None,
                    scaled=backward.alpha != 1.0,
                    shifted=backward.beta != 0.0,
                    alignment=min(calls.alignment, _alignment(backward.grad)),
                )
            case RmsNorm() as rms_norm:
                tensors = [t for t in rms_norm.tensors.values() if t is not None]
                return calls._replace(
                    operation=RMS_NORM,
                    rounding=rms_norm.rounding,
                    weight_dtype=rms_norm.weight.dtype,
                    alignment=min(calls.alignment, _alignment(*tensors)),
                )
        return calls

    @staticmethod
    def of_dequantize(
        q: torch.Tensor, fmt: Format, dtype: torch.dtype, upper: UpperScale | None
    ) -> CallRange:
        """Return the range of a call of ``dequantize``."""
        columns = q.shape[-1]
        return CallRange(
            DEQUANTIZE,
            fmt,
            dtype,
            (columns * fmt.value_type.per_byte,),
            q.numel() // max(columns, 1),
            batched=q.ndim > 2,
            alignment=_alignment(q),
            upper=None if upper is None else upper.kind,
        )

    @staticmethod
    def of_weights(
        operation: str,
        w: torch.Tensor,
        fmt: Format,
        result: torch.Tensor,
        upper: UpperScale | None = None,
    ) -> CallRange:
        """Return the range of a call on weights, or on quantized ones, and of those like it."""
        back = operation == DEQUANTIZE_BLOCKS
        values, numbers = (w, result) if back else (result, w)
        *leading, n, columns = values.shape
        return CallRange(
            operation,
            fmt,
            numbers.dtype,
            (columns * fmt.value_type.per_byte,),
            math.prod(leading) * n,
            batched=bool(leading),
            alignment=_alignment(w.mT if is_transposed(w) else w, result),
            upper=None if upper is None else upper.kind,
        )

    @staticmethod
    def of_columns(
        call: ColumnCall, q: torch.Tensor, row_q: torch.Tensor | None = None
    ) -> CallRange:
        """Return the range of a call on columns, with memory for values, and of those like it."""
        batch_shape, mn, k = call.shape
        tensors = [call.x, q] if row_q is None else [call.x, q, row_q]
        calls = CallRange(
            QUANTIZE_COLUMNS if call.along_k is None else QUANTIZE_BOTH,
            call.outputs[0].fmt,
            call.x.dtype,
            (k,),
            math.prod(batch_shape) * mn,
            DENSE if call.rows is None else call.rows.kind,
            batched=bool(batch_shape),
            alignment=_alignment(*tensors),
            stochastic=call.rng_state is not None,
            column_fmt=None if call.along_k is None else call.columns.fmt,
            transposed=call.transposed,
        )
        match call.prologue:
            case SiluMul() as silu_mul:
                calls = calls._replace(operation=SILU_MUL_BOTH, rounding=silu_mul.rounding)
            case SiluMulBackward() as backward:
                nbytes = min(calls.alignment, _alignment(backward.grad))
                calls = calls._replace(operation=SILU_MUL_BACKWARD_BOTH, alignment=nbytes)
        if call.prologue is None:
            return calls
        return calls._replace(
            interleaved=call.prologue.interleaved,
            clamped=call.prologue.clamp is not None,
            scaled=call.prologue.alpha != 1.0,
            shifted=call.prologue.beta != 0.0,
        )

    @staticmethod
    def of_conversion(call: Conversion, result: torch.Tensor) -> CallRange:
        """Return the range of a call of ``convert_scales`` and of those like it."""
        batch_shape, mn, k = call.shape
        both = ((call.sf, call.fmt), (result, call.to))
        return CallRange(
            CONVERT_SCALES,
            call.fmt,
            torch.bfloat16,
            (k,),
            math.prod(batch_shape) * mn,
            DENSE if call.rows is None else call.rows.kind,
            batched=bool(batch_shape),
            alignment=min(
                math.gcd(LOAD_BYTES, t.data_ptr()) if fmt.mn_major else _alignment(t)
                for t, fmt in both
            ),
            to=call.to,
        )

    def arguments(self) -> Iterator[tuple[str, str | None]]:
        """Yield the options of ``cute-quant warm-up`` for these calls, with their values."""
        yield "operation", self.operation
        yield "format", _name_of(self.fmt)
        if self.to is not None:
            yield "to", _name_of(self.to)
        if self.column_fmt is not None:
            yield "column-format", _name_of(self.column_fmt)
        if self.operation not in (REQUANTIZE_BLOCKS, CONVERT_SCALES):
            yield "dtype", _name(self.dtype)
        for k in self.k:
            yield "k", str(k)
        yield "max-rows", str(self.max_rows)
        if self.kind != DENSE:
            yield "rows", self.kind
        for name in FLAGS:
            if getattr(self, name):
                yield name, None
        if self.alignment != LOAD_BYTES:
            yield "alignment", str(self.alignment)
        if self.rounding != FUSED:
            yield "rounding", self.rounding
        if self.upper is not None:
            yield "upper-scale", self.upper
        if self.operation == RMS_NORM and self.weight_dtype is not torch.bfloat16:
            yield "weight-dtype", _name(self.weight_dtype)

    def remedy(self, arch: str) -> str:
        """Return what to do where a kernel of these calls is missing, for a message."""
        words = [
            f"--{name}" if value is None else f"--{name} {value}"
            for name, value in (*self.arguments(), ("arch", arch))
        ]
        return (
            f"call cute_quant.warm_up before, or run `cute-quant warm-up {' '.join(words)}`, or "
            f"cute-quant build with the same options"
        )


def _name_of(fmt: Format) -> str:
    """Return the name of a format, or its text, for all smallest scales."""
    named = (name for name, one in NAMED_FORMATS.items() if one is fmt.kernel_format)
    return next(named, fmt.kernel_format.text)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _alignment(*tensors: torch.Tensor) -> int:
    """Return the `alignment` of a range that rows of the tensors lie in."""
    return min(
        (row_alignment(t.data_ptr(), t.shape, t.stride(), t.element_size()) for t in tensors),
        default=LOAD_BYTES,
    )


def row_alignment(address: int, shape: Sequence[int], strides: Sequence[int], itemsize: int) -> int:
    """Return the `alignment` of a range that rows at an address, of these strides, lie in."""
    *leading, k = shape
    rows = [n * k for n in itertools.accumulate(reversed(leading), operator.mul, initial=1)]
    contiguous = all(
        size == 1 or stride == expected
        for size, stride, expected in zip(leading, strides, reversed(rows[:-1]), strict=False)
    )
    if contiguous and address % math.gcd(LOAD_BYTES, k * itemsize) == 0:
        return LOAD_BYTES
    used = (stride for size, stride in zip(leading, strides, strict=False) if size > 1)
    return math.gcd(LOAD_BYTES, address, *(stride * itemsize for stride in used))
