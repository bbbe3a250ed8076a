"""Ranges of calls that are alike but for their sizes and strides."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from cute_quant.contract.blocks import check_block_format
from cute_quant.contract.calls import Call
from cute_quant.contract.dtypes import LOAD_BYTES
from cute_quant.contract.format_choices import MAX_COLUMNS
from cute_quant.contract.formats import NAMED_FORMATS, Format
from cute_quant.contract.prologues import FUSED, MAX_NORM_COLUMNS, RmsNorm, SiluMul
from cute_quant.contract.rows import DENSE, Masked
from cute_quant.contract.upper_scales import DECODE, UpperScale

QUANTIZE, SILU_MUL, RMS_NORM, DEQUANTIZE, FAKE_QUANTIZE, QUANTIZE_BLOCKS = OPERATIONS = (
    "quantize",
    "silu_mul_quantize",
    "rms_norm_quantize",
    "dequantize",
    "fake_quantize",
    "quantize_blocks",
)
"""Names of the public operations."""
GROUPED = (QUANTIZE, SILU_MUL, RMS_NORM)
"""Operations on rows of a domain."""


class CallRange(NamedTuple):
    """Calls of one operation, of one dtype, in one format.

    Attributes:
        operation: one of ``OPERATIONS``.
        fmt, dtype: as of the call; for ``dequantize`` dtype is that of the result.
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
    scattered: bool = False

    @property
    def possible(self) -> bool:
        """Return whether the operation takes rows of this kind."""
        if self.scattered and (self.gathered or self.batched != (self.kind == Masked.kind)):
            return False
        if self.kind == Masked.kind:
            return self.operation in GROUPED and self.batched
        if self.kind != DENSE:
            return self.operation in GROUPED and not self.batched
        return self.operation in GROUPED or not (self.gathered or self.scattered)

    def with_upper_scale(self, kind: str) -> CallRange:
        """Return these calls with their upper scale given as an argument, where they take one."""
        if not self.fmt.upper_scale:
            return self
        if self.fmt.row_scale:
            # Operations compute and return them.
            return self._replace(upper=DECODE if self.operation == DEQUANTIZE else None)
        return self._replace(upper=kind)

    def check_columns(self) -> None:
        """Check that calls may have these columns.

        Raises:
            ValueError: one number is too large, or of values that do not fill their bytes, or the
                format has no blocks.
        """
        if self.operation == QUANTIZE_BLOCKS:
            check_block_format(self.fmt)
        whole_rows = self.operation == RMS_NORM or self.fmt.row_scale
        bounded = whole_rows and self.operation != DEQUANTIZE
        most = MAX_NORM_COLUMNS if bounded else MAX_COLUMNS
        per_byte = self.fmt.value_type.per_byte
        for k in self.k:
            if k > most:
                raise ValueError(
                    f"k: expected at most {most} for {self.operation} to {self.fmt}, got {k}"
                )
            if k % per_byte:
                raise ValueError(f"k: expected multiples of {per_byte} for {self.fmt}, got {k}")

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

    def arguments(self) -> Iterator[tuple[str, str | None]]:
        """Yield the options of ``cute-quant warm-up`` for these calls, with their values."""
        yield "operation", self.operation
        named = (name for name, fmt in NAMED_FORMATS.items() if fmt is self.fmt.kernel_format)
        yield "format", next(named, self.fmt.kernel_format.text)
        yield "dtype", _name(self.dtype)
        for k in self.k:
            yield "k", str(k)
        yield "max-rows", str(self.max_rows)
        if self.kind != DENSE:
            yield "rows", self.kind
        choices = "gathered", "scattered", "batched", "interleaved", "clamped", "scaled", "shifted"
        for name in choices:
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
