"""The specs that the calls of a range can take.

`plan` chooses them, for tensors without memory of every size class and alignment. So there are no
rules here of which kernel a call takes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from cute_quant.contract import blocks
from cute_quant.contract.calls import Call, ResultShape
from cute_quant.contract.columns import ColumnCall, Output
from cute_quant.contract.dtypes import (
    LOAD_BYTES,
    SOURCE_BLOCK,
    SOURCE_DTYPE,
    STORE_BYTES,
    VALUE_TYPES,
    align,
)
from cute_quant.contract.formats import Format
from cute_quant.contract.prologues import (
    Prologue,
    RmsNorm,
    make_rms_norm,
    make_silu_mul,
    make_silu_mul_backward,
)
from cute_quant.contract.rows import (
    DENSE,
    PREFIX_SUMS,
    Indexed,
    Masked,
    RowOperands,
    Rows,
    from_operands,
)
from cute_quant.contract.scale_conversion import Conversion
from cute_quant.contract.tensors import MAX_MATRICES
from cute_quant.contract.upper_scales import UpperScale
from cute_quant.dispatch.blocks import choose_dequantize_spec as choose_dequantize_blocks_spec
from cute_quant.dispatch.blocks import choose_requantize_spec
from cute_quant.dispatch.blocks import choose_spec as choose_blocks_spec
from cute_quant.dispatch.call_range import (
    DEQUANTIZE,
    DEQUANTIZE_BLOCKS,
    FAKE_QUANTIZE,
    OF_COLUMNS,
    QUANTIZE_BLOCKS,
    REQUANTIZE_BLOCKS,
    RMS_NORM,
    SILU_MUL,
    SILU_MUL_BACKWARD,
    SILU_MUL_BACKWARD_BOTH,
    SILU_MUL_BOTH,
    CallRange,
)
from cute_quant.dispatch.columns import Results
from cute_quant.dispatch.columns import choose_spec as choose_columns_spec
from cute_quant.dispatch.convert_scales import choose_spec as choose_conversion_spec
from cute_quant.dispatch.plan import (
    Destination,
    Gpu,
    View,
    choose_dequantize_spec,
    choose_spec,
    contiguous_strides,
)
from cute_quant.kernels.config import Spec

COLUMN_ALIGNMENT = 128
"""Rows that groups start at multiples of, in calls on columns of any format."""
GROUPS = 2
"""Groups of rows stacked along M in a call that stands for others; one group is no batch."""


class Variant(NamedTuple):
    """Calls of a range with one number of columns and the same further tensors.

    Attributes:
        weighted: whether rows have a factor, in `silu_mul_quantize`.
        residual, normalized: whether there are such tensors, in `rms_norm_quantize`.
        upper_of_groups: whether each group of rows stacked along M has an upper scale of its own.
        along_n: whether weights are contiguous along n.
        source_block: size of the blocks whose scales `requantize_blocks` reads.
        strided_scales: whether rows of scales lie apart, in memory of the caller.
    """

    calls: CallRange
    k: int
    weighted: bool = False
    residual: bool = False
    normalized: bool = False
    upper_of_groups: bool = False
    along_n: bool = False
    source_block: int = SOURCE_BLOCK
    strided_scales: bool = False

    @property
    def input_columns(self) -> int:
        """Return the columns of x."""
        return 2 * self.k if self.calls.operation in (SILU_MUL, SILU_MUL_BOTH) else self.k

    @property
    def input_dtype(self) -> torch.dtype:
        """Return the dtype of x, or of the values that come in."""
        match self.calls.operation:
            case "dequantize" | "dequantize_blocks":
                return self.calls.fmt.values
            case "requantize_blocks":
                return SOURCE_DTYPE
        return self.calls.dtype

    @property
    def result_dtype(self) -> torch.dtype:
        """Return the dtype of the result."""
        calls = self.calls
        multiplied = calls.operation in (DEQUANTIZE, DEQUANTIZE_BLOCKS, FAKE_QUANTIZE)
        return calls.dtype if multiplied else calls.fmt.values

    def call(self, x: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor) -> Call:
        """Return a call for results of this shape; `like` says where its other tensors are.

        Counts and indices are 0, so that every row exists or none does.
        """
        index = like.new_zeros(shape[:-1], dtype=torch.int32) if self.calls.gathered else None
        prologue, rows = self._prologue(x, shape, like), self.rows(shape, like)
        upper = self.upper_scale(shape, like)
        rng_state = like.new_zeros(2, dtype=torch.int64) if self.calls.stochastic else None
        call = Call(
            x, self.calls.fmt, None, None, rows, index, prologue, upper, rng_state=rng_state
        )
        if not self.calls.scattered:
            return call
        places = like.new_zeros((x.shape[0], 1), dtype=torch.int32)
        sf = None
        if self.strided_scales:
            fmt, columns = self.calls.fmt, self.calls.fmt.columns(self.k)
            records = like.new_empty((shape[-2], 2 * columns), dtype=fmt.sf_dtype)
            sf = records[:, :columns]
        return call._replace(scatter=places, num_rows=shape[-2], sf=sf)

    def upper_scale(self, shape: tuple[int, ...], like: torch.Tensor) -> UpperScale | None:
        """Return the scale over those of groups that a call of this shape has, if any."""
        kind = self.calls.upper
        if kind is None:
            return None
        size: tuple[int, ...] = (GROUPS,) if self.upper_of_groups else ()
        if self.calls.fmt.row_scale:
            size = shape[:-1]
        return UpperScale(kind, like.new_ones(size, dtype=torch.float32))

    def rows(self, shape: tuple[int, ...], like: torch.Tensor) -> Rows | None:
        """Return the row domain of a call for results of this shape."""
        kind = self.calls.kind
        if kind == DENSE:
            return None
        counts = shape[0] if kind == Masked.kind else shape[-2]
        if kind in PREFIX_SUMS:
            counts = GROUPS
        alignment = COLUMN_ALIGNMENT if self.calls.operation in OF_COLUMNS else 1
        counted = like.new_zeros(counts, dtype=torch.int32)
        return from_operands(RowOperands(kind, counted, alignment))

    def column_call(
        self, x: torch.Tensor, q: torch.Tensor, row_q: torch.Tensor | None
    ) -> ColumnCall:
        """Return a call on columns, into memory for values; `row_q` is that of groups along k."""
        calls, shape = self.calls, (*x.shape[:-1], self.k)
        columns, along_k = Output(calls.fmt, q), None
        if calls.column_fmt is not None:
            columns, along_k = Output(calls.column_fmt, q), Output(calls.fmt, row_q)
        prologue = self._prologue(x, shape, x)
        assert not isinstance(prologue, RmsNorm)
        rng_state = x.new_zeros(2, dtype=torch.int64) if calls.stochastic else None
        rows = self.rows(shape, x)
        return ColumnCall(x, columns, calls.transposed, rows, along_k, prologue, rng_state)

    def _prologue(
        self, x: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor
    ) -> Prologue | None:
        calls = self.calls
        of_rows = x.shape[:-1] if calls.scattered else shape[:-1]
        match calls.operation:
            case "silu_mul_quantize" | "silu_mul_quantize_both":
                return make_silu_mul(
                    interleaved=calls.interleaved,
                    clamp=7.0 if calls.clamped else None,
                    alpha=2.0 if calls.scaled else 1.0,
                    beta=1.0 if calls.shifted else 0.0,
                    rounding=calls.rounding,
                    weight=like.new_ones(of_rows, dtype=torch.float32) if self.weighted else None,
                )
            case "silu_mul_backward_quantize" | "silu_mul_backward_quantize_both":
                return make_silu_mul_backward(
                    x[..., : self.k // 2],
                    interleaved=calls.interleaved,
                    clamp=7.0 if calls.clamped else None,
                    alpha=2.0 if calls.scaled else 1.0,
                    beta=1.0 if calls.shifted else 0.0,
                )
            case "rms_norm_quantize":
                return make_rms_norm(
                    like.new_ones(self.k, dtype=calls.weight_dtype),
                    eps=1.0,
                    weight_offset=0.0,
                    rounding=calls.rounding,
                    residual=torch.zeros_like(x) if self.residual else None,
                    normalized=torch.zeros_like(x) if self.normalized else None,
                )
        return None


def variants(calls: CallRange) -> Iterator[Variant]:
    """Yield the variants of a range."""
    weighted: tuple[bool, ...] = (False,)
    residual = normalized = of_groups = along_n = strided = weighted
    if calls.operation in (SILU_MUL, SILU_MUL_BOTH):
        weighted = (False, True)
    every_row = calls.scattered or (calls.kind == DENSE and not calls.gathered)
    if calls.operation == RMS_NORM and every_row:
        residual = normalized = (False, True)
    grouped = calls.kind in (*PREFIX_SUMS, Indexed.kind) and not calls.scattered
    if calls.upper is not None and grouped:
        of_groups = (False, True)
    requantized = calls.operation == REQUANTIZE_BLOCKS
    in_blocks = requantized and not blocks.quantized_by_row(calls.fmt)
    if calls.operation == QUANTIZE_BLOCKS or in_blocks:
        along_n = (False, True)
    source_blocks = calls.source_blocks if requantized else (SOURCE_BLOCK,)
    row_major = not (calls.fmt.mn_major or calls.fmt.blocked)
    if calls.scattered and row_major and calls.kind != Masked.kind:
        strided = (False, True)
    options = weighted, residual, normalized, of_groups, along_n, source_blocks, strided
    for choices in itertools.product(calls.k, *options):
        yield Variant(calls, *choices)


def specs(calls: CallRange, gpu: Gpu) -> dict[Spec, Variant]:
    """Return the specs that calls of a range can take on a GPU, each with a variant that does."""
    found: dict[Spec, Variant] = {}
    if not calls.max_rows:
        return found
    for variant in variants(calls):
        if calls.operation in OF_COLUMNS:
            found |= dict.fromkeys(_column_specs(variant, gpu), variant)
            continue
        alignments = _operand_alignments(variant)
        for (x_bytes, q_bytes), shape in itertools.product(alignments, _shapes(calls)):

            def spec_of(
                rows: int,
                variant: Variant = variant,
                nbytes: tuple[int, int] = (x_bytes, q_bytes),
                shape: Callable[[int], tuple[int, ...]] = shape,
            ) -> Spec:
                return _spec(variant, shape(rows), *nbytes, gpu)

            for spec in _specs_up_to(calls.max_rows, spec_of):
                found.setdefault(spec, variant)
    return found


def spec_of(variant: Variant, rows: int, gpu: Gpu) -> Spec:
    """Return the spec of calls on contiguous tensors, for a number of rows."""
    *_, (x_bytes, q_bytes) = _operand_alignments(variant)
    return _spec(variant, (rows,), x_bytes, q_bytes, gpu)


def _column_specs(variant: Variant, gpu: Gpu) -> Iterator[Spec]:
    """Yield the specs of calls on columns. Of their sizes that of rows of q alone matters."""
    calls, k = variant.calls, variant.k
    for mn in column_rows(calls):
        row = mn if calls.transposed else k
        q_alignments = _alignments(calls.alignment, row, calls.fmt.values)
        both = itertools.product(_operand_alignments(variant), q_alignments)
        for (x_bytes, row_bytes), q_bytes in both:
            x = _aligned((mn, variant.input_columns), calls.dtype, x_bytes)
            q_shape = (k, mn) if calls.transposed else (mn, k)
            q = _aligned(q_shape, calls.fmt.values, q_bytes)
            row_q = _aligned((mn, k), calls.fmt.values, row_bytes)
            call = variant.column_call(x, q, row_q)
            along_k = None if call.along_k is None else (row_q, row_q)
            yield choose_columns_spec(call, Results((q, q), along_k), gpu.arch).spec


def column_rows(calls: CallRange) -> tuple[int, ...]:
    """Return numbers of rows, more than one, of every choice of kernels of columns."""
    if not calls.transposed:
        return (STORE_BYTES,)
    return (STORE_BYTES, STORE_BYTES + 1) if calls.max_rows >= STORE_BYTES else (STORE_BYTES + 1,)


def _operand_alignments(variant: Variant) -> Iterator[tuple[int, int]]:
    """Yield the alignments that rows of the input and of the result can have."""
    calls, k = variant.calls, variant.k
    if calls.to is not None:
        both = [
            _alignments(calls.alignment, _scale_row_bytes(fmt, k), fmt.sf_dtype)
            for fmt in (calls.fmt, calls.to)
        ]
    else:
        # Any number of weights may be contiguous along n.
        x_columns = 1 if variant.along_n else variant.input_columns
        if calls.operation in (SILU_MUL_BACKWARD, SILU_MUL_BACKWARD_BOTH):
            x_columns = k // 2  # those of the gradient, whose rows are aligned the least
        both = [
            _alignments(calls.alignment, _row_bytes(columns, dtype), dtype)
            for columns, dtype in (
                (x_columns, variant.input_dtype),
                (k, variant.result_dtype),
            )
        ]
    yield from itertools.product(*both)


def _scale_row_bytes(fmt: Format, k: int) -> int:
    """Return the bytes of a row of scales; other layouts than row-major have rows of vectors."""
    row_major = not (fmt.mn_major or fmt.blocked)
    return fmt.columns(k) * fmt.sf_dtype.itemsize if row_major else LOAD_BYTES


def _row_bytes(columns: int, dtype: torch.dtype) -> int:
    """Return the bytes of a contiguous row."""
    per_byte = VALUE_TYPES[dtype].per_byte if dtype in VALUE_TYPES else 1
    return columns // per_byte * dtype.itemsize


def _alignments(least: int, row_bytes: int, dtype: torch.dtype) -> list[int]:
    """Return the alignments that rows can have: as in a contiguous tensor, or `least` and more."""
    first = min(least, math.gcd(LOAD_BYTES, row_bytes))
    first = max(first, dtype.itemsize)
    return [first << i for i in range((LOAD_BYTES // first).bit_length())]


def _shapes(calls: CallRange) -> list[Callable[[int], tuple[int, ...]]]:
    """Return functions from a number of rows to the leading dimensions of a result."""
    if not calls.batched and calls.kind != Masked.kind:
        return [lambda rows: (rows,)]
    return [lambda rows: (1, rows), lambda rows: (min(rows, MAX_MATRICES), 1)]


def _specs_up_to(max_rows: int, spec_of: Callable[[int], Spec]) -> list[Spec]:
    """Return the specs for 1 to `max_rows` rows, each once, those of fewer rows first.

    A size class is found if it has a power of two, or parts two that are looked at.
    """
    counts = sorted({*(1 << i for i in range(max_rows.bit_length())), min(3, max_rows), max_rows})
    by_count = {rows: spec_of(rows) for rows in counts}
    spans = list(itertools.pairwise(counts))
    while spans:
        low, high = spans.pop()
        if high - low > 1 and by_count[low] != by_count[high]:
            middle = (low + high) // 2
            by_count[middle] = spec_of(middle)
            spans += [(low, middle), (middle, high)]
    return list(dict.fromkeys(by_count[rows] for rows in sorted(by_count)))


def _spec(variant: Variant, leading: tuple[int, ...], x_bytes: int, q_bytes: int, gpu: Gpu) -> Spec:
    """Return the spec of the call whose rows of x and q have exactly these alignments."""
    calls, k = variant.calls, variant.k
    shape, values_shape = (*leading, k), (*leading, calls.fmt.value_columns(k))
    nowhere = torch.empty(0, device="meta")
    if calls.operation == DEQUANTIZE:
        q = _aligned(values_shape, calls.fmt.values, x_bytes)
        y = _aligned(shape, calls.dtype, q_bytes)
        upper = variant.upper_scale(shape, nowhere)
        return choose_dequantize_spec(q, y, calls.fmt, upper, gpu.arch)
    if calls.operation == DEQUANTIZE_BLOCKS:
        q = _aligned(values_shape, calls.fmt.values, x_bytes)
        y = _aligned(shape, calls.dtype, q_bytes)
        return choose_dequantize_blocks_spec(q, y, calls.fmt, gpu.arch)
    if calls.operation in (QUANTIZE_BLOCKS, REQUANTIZE_BLOCKS):
        *matrices, n = leading
        w_shape = (*matrices, k, n) if variant.along_n else shape
        w = _aligned(w_shape, variant.input_dtype, x_bytes)
        w = w.mT if variant.along_n else w
        q = _aligned(values_shape, calls.fmt.values, q_bytes)
        block = variant.source_block
        if calls.operation == REQUANTIZE_BLOCKS and blocks.quantized_by_row(calls.fmt):
            return choose_requantize_spec(w, calls.fmt, q, calls.upper, gpu, block)
        return choose_blocks_spec(w, calls.fmt, q, gpu.arch, block)
    if calls.to is not None:
        sizes = ResultShape(leading[:-1], leading[-1], k)
        sf = _scales(calls.fmt, sizes, x_bytes, apart=True)
        conversion = Conversion(sf, calls.fmt, calls.to, sizes, variant.rows(shape, nowhere))
        result = _scales(calls.to, sizes, q_bytes, apart=False)
        return choose_conversion_spec(conversion, result, gpu.arch)
    tokens = (2,) if calls.gathered else leading
    if calls.scattered:
        tokens = leading[-1:]
    x = _aligned((*tokens, variant.input_columns), calls.dtype, x_bytes)
    call = variant.call(x, shape, nowhere)
    fake = calls.operation == FAKE_QUANTIZE
    q = _aligned(shape if fake else values_shape, variant.result_dtype, q_bytes)
    destination = Destination(View(tuple(q.shape), q.stride()), q.data_ptr(), q.dtype)
    scales = None
    if calls.operation != FAKE_QUANTIZE:
        sizes = ResultShape(leading[:-1], leading[-1], k)
        scales = View(calls.fmt.scale_shape(*sizes), calls.fmt.scale_strides(*sizes))
    return choose_spec(call, destination, scales, gpu).spec


def _aligned(shape: tuple[int, ...], dtype: torch.dtype, nbytes: int) -> torch.Tensor:
    """Return a tensor without memory whose rows start at multiples of `nbytes` and no more."""
    step = nbytes // dtype.itemsize if nbytes < LOAD_BYTES else 0
    *leading, k = shape
    row = align(k, LOAD_BYTES // dtype.itemsize) + step
    strides = tuple(stride * row for stride in contiguous_strides(tuple(leading)))
    storage = torch.empty(step + math.prod(leading) * row, dtype=dtype, device="meta")
    return storage.as_strided(shape, (*strides, 1), step)


def _scales(fmt: Format, shape: ResultShape, nbytes: int, *, apart: bool) -> torch.Tensor:
    """Return scales without memory at a multiple of `nbytes` and no more.

    Rows of row-major scales, and matrices in blocks, may lie as far `apart`.
    """
    sizes = fmt.scale_shape(*shape)
    if apart and not fmt.mn_major and len(sizes) > 1:
        return _aligned(sizes, fmt.sf_dtype, nbytes)
    step = nbytes // fmt.sf_dtype.itemsize if nbytes < LOAD_BYTES else 0
    matrices = math.prod(shape.batch_shape)
    elements = matrices * fmt.scale_rows(shape.mn) * fmt.columns(shape.k)
    storage = torch.empty(step + elements, dtype=fmt.sf_dtype, device="meta")
    return storage.as_strided(sizes, fmt.scale_strides(*shape), step)
