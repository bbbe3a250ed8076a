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

from cute_quant.contract.calls import Call, ResultShape
from cute_quant.contract.dtypes import LOAD_BYTES, VALUE_TYPES, align
from cute_quant.contract.prologues import Prologue, make_rms_norm, make_silu_mul
from cute_quant.contract.rows import (
    DENSE,
    Indexed,
    Masked,
    PrefixSum,
    RowOperands,
    Rows,
    from_operands,
)
from cute_quant.contract.tensors import MAX_MATRICES
from cute_quant.contract.upper_scales import UpperScale
from cute_quant.dispatch.blocks import choose_spec as choose_blocks_spec
from cute_quant.dispatch.call_range import (
    DEQUANTIZE,
    FAKE_QUANTIZE,
    QUANTIZE_BLOCKS,
    RMS_NORM,
    SILU_MUL,
    CallRange,
)
from cute_quant.dispatch.plan import (
    Destination,
    Gpu,
    View,
    choose_dequantize_spec,
    choose_spec,
    contiguous_strides,
)
from cute_quant.kernels.config import Spec

GROUPS = 2
"""Groups of rows stacked along M in a call that stands for others; one group is no batch."""


class Variant(NamedTuple):
    """Calls of a range with one number of columns and the same further tensors.

    Attributes:
        weighted: whether rows have a factor, in `silu_mul_quantize`.
        residual, normalized: whether there are such tensors, in `rms_norm_quantize`.
        upper_of_groups: whether each group of rows stacked along M has an upper scale of its own.
        along_n: whether weights are contiguous along n, in `quantize_blocks`.
        strided_scales: whether rows of scales lie apart, in memory of the caller.
    """

    calls: CallRange
    k: int
    weighted: bool = False
    residual: bool = False
    normalized: bool = False
    upper_of_groups: bool = False
    along_n: bool = False
    strided_scales: bool = False

    @property
    def input_columns(self) -> int:
        """Return the columns of x."""
        return 2 * self.k if self.calls.operation == SILU_MUL else self.k

    def call(self, x: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor) -> Call:
        """Return a call for results of this shape; `like` says where its other tensors are.

        Counts and indices are 0, so that every row exists or none does.
        """
        index = like.new_zeros(shape[:-1], dtype=torch.int32) if self.calls.gathered else None
        prologue, rows = self._prologue(x, shape, like), self._rows(shape, like)
        upper = self.upper_scale(shape, like)
        call = Call(x, self.calls.fmt, None, None, rows, index, prologue, upper)
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

    def _rows(self, shape: tuple[int, ...], like: torch.Tensor) -> Rows | None:
        kind = self.calls.kind
        if kind == DENSE:
            return None
        counts = shape[0] if kind == Masked.kind else shape[-2]
        if kind == PrefixSum.kind:
            counts = GROUPS
        return from_operands(RowOperands(kind, like.new_zeros(counts, dtype=torch.int32)))

    def _prologue(
        self, x: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor
    ) -> Prologue | None:
        calls = self.calls
        of_rows = x.shape[:-1] if calls.scattered else shape[:-1]
        match calls.operation:
            case "silu_mul_quantize":
                return make_silu_mul(
                    interleaved=calls.interleaved,
                    clamp=7.0 if calls.clamped else None,
                    alpha=2.0 if calls.scaled else 1.0,
                    beta=1.0 if calls.shifted else 0.0,
                    rounding=calls.rounding,
                    weight=like.new_ones(of_rows, dtype=torch.float32) if self.weighted else None,
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
    if calls.operation == SILU_MUL:
        weighted = (False, True)
    every_row = calls.scattered or (calls.kind == DENSE and not calls.gathered)
    if calls.operation == RMS_NORM and every_row:
        residual = normalized = (False, True)
    grouped = calls.kind in (PrefixSum.kind, Indexed.kind) and not calls.scattered
    if calls.upper is not None and grouped:
        of_groups = (False, True)
    if calls.operation == QUANTIZE_BLOCKS:
        along_n = (False, True)
    row_major = not (calls.fmt.mn_major or calls.fmt.blocked)
    if calls.scattered and row_major and calls.kind != Masked.kind:
        strided = (False, True)
    options = weighted, residual, normalized, of_groups, along_n, strided
    for choices in itertools.product(calls.k, *options):
        yield Variant(calls, *choices)


def specs(calls: CallRange, gpu: Gpu) -> dict[Spec, Variant]:
    """Return the specs that calls of a range can take on a GPU, each with a variant that does."""
    found: dict[Spec, Variant] = {}
    if not calls.max_rows:
        return found
    for variant in variants(calls):
        result_dtype = calls.fmt.values
        if calls.operation in (DEQUANTIZE, FAKE_QUANTIZE):
            result_dtype = calls.dtype
        x_dtype = calls.fmt.values if calls.operation == DEQUANTIZE else calls.dtype
        # Any number of weights may be contiguous along n.
        x_columns = 1 if variant.along_n else variant.input_columns
        alignments = itertools.product(
            _alignments(calls.alignment, _row_bytes(x_columns, x_dtype), x_dtype),
            _alignments(calls.alignment, _row_bytes(variant.k, result_dtype), result_dtype),
        )
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


def _specs_up_to(max_rows: int, spec_of: Callable[[int], Spec]) -> set[Spec]:
    """Return the specs for 1 to `max_rows` rows.

    A size class is found if it has a power of two, or parts two that are looked at.
    """
    counts = sorted({*(1 << i for i in range(max_rows.bit_length())), min(3, max_rows), max_rows})
    by_count = {rows: spec_of(rows) for rows in counts}
    found = set(by_count.values())
    spans = list(itertools.pairwise(counts))
    while spans:
        low, high = spans.pop()
        if high - low > 1 and by_count[low] != by_count[high]:
            middle = (low + high) // 2
            by_count[middle] = spec_of(middle)
            found.add(by_count[middle])
            spans += [(low, middle), (middle, high)]
    return found


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
    if calls.operation == QUANTIZE_BLOCKS:
        *matrices, n = leading
        w = _aligned((*matrices, k, n) if variant.along_n else shape, calls.dtype, x_bytes)
        q = _aligned(values_shape, calls.fmt.values, q_bytes)
        return choose_blocks_spec(w.mT if variant.along_n else w, calls.fmt, q, gpu.arch)
    tokens = (2,) if calls.gathered else leading
    if calls.scattered:
        tokens = leading[-1:]
    x = _aligned((*tokens, variant.input_columns), calls.dtype, x_bytes)
    call = variant.call(x, shape, nowhere)
    fake = calls.operation == FAKE_QUANTIZE
    result_dtype = calls.dtype if fake else calls.fmt.values
    q = _aligned(shape if fake else values_shape, result_dtype, q_bytes)
    result = Destination(View(tuple(q.shape), q.stride()), q.data_ptr(), result_dtype)
    scales = None
    if calls.operation != FAKE_QUANTIZE:
        sizes = ResultShape(leading[:-1], leading[-1], k)
        scales = View(calls.fmt.scale_shape(*sizes), calls.fmt.scale_strides(*sizes))
    return choose_spec(call, result, scales, gpu).spec


def _aligned(shape: tuple[int, ...], dtype: torch.dtype, nbytes: int) -> torch.Tensor:
    """Return a tensor without memory whose rows start at multiples of `nbytes` and no more."""
    step = nbytes // dtype.itemsize if nbytes < LOAD_BYTES else 0
    *leading, k = shape
    row = align(k, LOAD_BYTES // dtype.itemsize) + step
    strides = tuple(stride * row for stride in contiguous_strides(tuple(leading)))
    storage = torch.empty(step + math.prod(leading) * row, dtype=dtype, device="meta")
    return storage.as_strided(shape, (*strides, 1), step)
