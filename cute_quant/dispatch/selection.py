"""Which kernel a call takes, how the kernel takes its tensors, and with which numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from cute_quant.contract import reference
from cute_quant.contract.formats import LOAD_BYTES, Format, align, flat_batch
from cute_quant.contract.prologues import UNFUSED, Prologue, RmsNorm, SiluMul
from cute_quant.contract.rows import DENSE, Masked, Rows
from cute_quant.contract.tensors import MAX_SIZE
from cute_quant.jit import lookup
from cute_quant.kernels import heuristics
from cute_quant.kernels.config import (
    DEFAULT_TILE,
    Access,
    DequantizeSpec,
    Domain,
    QuantizeSpec,
    RmsNormSpec,
    SiluMulSpec,
)

View = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape and strides that a kernel takes a tensor with."""


def quantize_kernel(
    x: torch.Tensor,
    result: View,
    result_address: int,
    scales: View | None,
    fmt: Format,
    dtype: torch.dtype,
    floor: int | float,
    rows: Rows | None = None,
    index: torch.Tensor | None = None,
    prologue: Prologue | None = None,
) -> tuple[Callable[..., None], tuple[View | None, ...] | None, tuple[int | float, ...]]:
    """The kernel for operands that look like these, how it takes them, and its numbers.

    Args:
        result, dtype: q, or what `fake_quantize` returns where there are no scales.
    """
    arch = lookup.architecture(x.get_device())
    sms = lookup.multiprocessors(x.get_device())
    *batch_shape, q_rows, k = result[0]
    kind = DENSE if rows is None else rows.kind
    matrices = math.prod(batch_shape)
    size = matrices, q_rows, k, fmt, kind == Masked.kind, sms
    match prologue:
        case None:
            shape = heuristics.shape(*size)
        case SiluMul():
            shape = heuristics.silu_shape(*size, arch)
        case RmsNorm():
            shape = heuristics.norm_shape(*size)
    domain = Domain(kind, index is not None, bool(batch_shape) or shape.tall)
    batched = domain.batched
    x_view = _matrix_view(tuple(x.shape), x.stride(), x.element_size(), batched and index is None)
    q_view = _matrix_view(*result, dtype.itemsize, batched)
    views = [
        None if x_view == (x.shape, x.stride()) else x_view,
        None if q_view == result else q_view,
        None,
        None,
        None,
    ]
    if scales is not None and batched and len(batch_shape) != 1:
        inner = 1 if fmt.blocked else 2
        stride = scales[1][-inner - 1] if batch_shape else 0
        views[2] = (matrices, *scales[0][-inner:]), (stride, *scales[1][-inner:])
    if index is not None and batched and index.ndim == 1:
        views[4] = (1, *index.shape), (0, 1)
    load_bytes = _alignment(x.data_ptr(), x_view[1], x.element_size(), LOAD_BYTES)
    numbers = 1 if rows is None else rows.alignment, shape.row_ctas, floor
    match prologue:
        case None:
            spec_class, choices = QuantizeSpec, (scales is None,)
        case SiluMul():
            spec_class, choices = SiluMulSpec, _silu_mul_choices(prologue)
            numbers += _silu_mul_numbers(prologue, x.dtype)
            views += [_factors_view(prologue.weight, batched)]
            if not prologue.interleaved:
                load_bytes = math.gcd(load_bytes, k * x.element_size())
        case RmsNorm():
            spec_class, choices = RmsNormSpec, (*shape.warps, *_rms_norm_choices(prologue))
            # Adding -0.0 keeps a weight of -0.0.
            numbers += prologue.eps, prologue.weight_offset or -0.0
            load_bytes = math.gcd(load_bytes, prologue.weight.data_ptr())
            views += [None]
            for t in prologue.operands[1:]:
                view = None
                if t is not None:
                    view = _matrix_view(tuple(t.shape), t.stride(), t.element_size(), batched)
                    load_bytes = _alignment(t.data_ptr(), view[1], t.element_size(), load_bytes)
                views += [view]
    access = Access(
        load_bytes,
        _alignment(
            result_address, q_view[1], dtype.itemsize, heuristics.store_bytes(shape.tile, dtype)
        ),
        k % shape.tile.values_per_thread != 0,
    )
    spec = spec_class(x.dtype, fmt, shape.tile, domain, access, *choices)
    return lookup.function(spec, arch), tuple(views) if any(views) else None, numbers


def dequantize_kernel(
    q: torch.Tensor, sf: torch.Tensor, y: torch.Tensor, fmt: Format
) -> tuple[Callable[..., None], tuple[View, ...]]:
    """The kernel for operands that look like these, and how it takes them."""
    values = DEFAULT_TILE.values_per_thread
    q_view = _matrix_view(tuple(q.shape), q.stride(), q.element_size(), True)
    y_view = _matrix_view(tuple(y.shape), y.stride(), y.element_size(), True)
    inner = 1 if fmt.blocked else 2
    batch, stride = flat_batch("sf", sf.shape, sf.stride(), inner)
    sf_view = (batch, *sf.shape[-inner:]), (stride, *sf.stride()[-inner:])
    store_bytes = heuristics.store_bytes(DEFAULT_TILE, y.dtype)
    access = Access(
        _alignment(q.data_ptr(), q_view[1], q.element_size(), values),
        _alignment(y.data_ptr(), y_view[1], y.element_size(), store_bytes),
        q.shape[-1] % values != 0,
    )
    arch = lookup.architecture(q.get_device())
    function = lookup.function(DequantizeSpec(fmt, y.dtype, access), arch)
    return function, (q_view, sf_view, y_view)


def _silu_mul_choices(prologue: SiluMul) -> tuple:
    """Those of a `SiluMulSpec` that are the prologue's."""
    return (
        prologue.interleaved,
        prologue.rounding == UNFUSED,
        prologue.clamp is not None,
        prologue.alpha != 1.0,
        prologue.beta != 0.0,
        prologue.weight is not None,
    )


def _silu_mul_numbers(prologue: SiluMul, dtype: torch.dtype) -> tuple[float, ...]:
    """What the kernel takes of them; the bound as the reference rounds it."""
    bound = 0.0
    if prologue.clamp is not None:
        bound = reference.clamp_limit(prologue, dtype)
    return bound, prologue.alpha, prologue.beta


def _rms_norm_choices(prologue: RmsNorm) -> tuple:
    """Those of a `RmsNormSpec` that are the prologue's."""
    return (
        prologue.weight.dtype,
        prologue.rounding == UNFUSED,
        prologue.residual is not None,
        prologue.normalized is not None,
    )


def _factors_view(weight: torch.Tensor | None, batched: bool) -> View | None:
    """(batch, mn), or (mn,), of contiguous factors of rows (..., mn)."""
    if weight is None or weight.ndim == 1 + batched:
        return None
    mn = weight.shape[-1]
    return (math.prod(weight.shape[:-1]), mn), (mn, 1)


def _matrix_view(
    shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, batched: bool
) -> View:
    """(rows, k) or (batch, rows, k) of a tensor (..., rows, k).

    What a stride of a dimension of size 1 or less says does not matter, but kernels check it.
    """
    *batch_shape, rows, k = shape
    unused = align(k, LOAD_BYTES)
    row_stride = strides[-2]
    if rows <= 1 and (row_stride * itemsize % LOAD_BYTES or row_stride * itemsize > MAX_SIZE):
        row_stride = unused
    if not batched:
        return (rows, k), (row_stride, 1)
    count, batch_stride = flat_batch("", tuple(shape), tuple(strides))
    if len(batch_shape) == 1 and count <= 1 and strides[0] * itemsize % LOAD_BYTES == 0:
        batch_stride = strides[0]
    return (count, rows, k), (batch_stride, row_stride, 1)


def _alignment(address: int, strides: tuple[int, ...], itemsize: int, limit: int) -> int:
    """The largest power of two up to `limit` that divides the address of each row."""
    return math.gcd(limit, address, *(stride * itemsize for stride in strides[:-1]))


def as_viewed(
    operands: tuple[torch.Tensor | None, ...], views: tuple[View | None, ...]
) -> tuple[torch.Tensor | None, ...]:
    """Operands as a kernel takes them, those without a view as they are."""
    return tuple(
        t if view is None else t.as_strided(*view) for t, view in zip(operands, views, strict=False)
    )
