"""Calls on real tensors: plans that are kept, kernels on a GPU, the reference on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd.graph import increment_version

from cute_quant.contract import checks, reference
from cute_quant.contract.formats import (
    LOAD_BYTES,
    STORE_BYTES,
    Format,
    last_column_rows,
    scale_floor,
)
from cute_quant.contract.prologues import Prologue
from cute_quant.contract.rows import Rows
from cute_quant.contract.tensors import (
    check_disjoint,
    check_no_tangents,
    check_real,
    in_dual_level,
    region,
    span,
)
from cute_quant.dispatch import selection
from cute_quant.dispatch.selection import View, as_viewed


class _Plan(NamedTuple):
    """What calls on tensors of the same shapes, strides and alignment have in common.

    Attributes:
        launch: the compiled kernel; None where there is nothing to write.
        mn: rows of the results.
        scale_rows: rows of a column of scales, padding included; 0 where they are not MN-major.
        views: of operands, those of the prologue last, where the kernel does not take them as they
            are.
        numbers: what the kernel takes after the missing rows of the last column of scales.
        q_shape, q_strides, sf_shape, sf_strides: of results to be allocated; the scales with all
            padding.
        x_bytes, q_bytes, sf_bytes: from the first element to the last; of sf with all padding.
    """

    fmt: Format
    launch: Callable[..., None] | None
    mn: int
    scale_rows: int
    views: tuple[View | None, ...] | None
    numbers: tuple[int | float, ...]
    q_shape: tuple[int, ...]
    q_strides: tuple[int, ...]
    sf_shape: tuple[int, ...]
    sf_strides: tuple[int, ...]
    x_bytes: int
    q_bytes: int
    sf_bytes: int


# Checking all this anew took half the time of a call.
_plans: dict[tuple, _Plan] = {}
_MAX_PLANS = 4096


def quantize(
    x: torch.Tensor,
    q: torch.Tensor | None,
    sf: torch.Tensor | None,
    choices: tuple,
    rows: Rows | None = None,
    index: torch.Tensor | None = None,
    check: bool = False,
    prologue: Prologue | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`cute_quant.quantize` of real tensors, or of what `prologue` makes of them.

    Args:
        choices: group_size, scale_format, dtype, round_scale, min_scale.
        prologue: what comes before; what else it writes is in its tensors.
    """
    if in_dual_level():
        check_no_tangents(_by_name(x, q, sf, index, prologue))
    if not x.is_cuda:
        return _quantize_on_cpu(x, q, sf, choices, rows, index, check, prologue)
    plan = _look_up_plan(x, q, sf, choices, rows, index, prologue)
    if check:
        checks.check_counts(rows, index, x.shape[-2], plan.mn)
    fmt, launch, mn, scale_rows, views, numbers = plan[:6]
    out = q, sf
    if q is None:
        device = x.device
        q = torch.empty_strided(plan.q_shape, plan.q_strides, dtype=fmt.dtype, device=device)
    if sf is None:
        device, dtype = x.device, fmt.scale_dtype
        sf = torch.empty_strided(plan.sf_shape, plan.sf_strides, dtype=dtype, device=device)
        if scale_rows > mn:
            sf = sf.narrow(-2, 0, mn)
    missing_rows = 0 if scale_rows <= mn else scale_rows - last_column_rows(sf)
    if out[0] is not None or out[1] is not None or prologue is not None:
        sf_bytes = plan.sf_bytes - missing_rows * sf.element_size()
        _check_disjoint(x, plan.x_bytes, q, plan.q_bytes, sf, sf_bytes, rows, index, prologue)
        written = out if prologue is None else (*out, *prologue.writes.values())
        # Autograd refuses to use what it saved of them.
        increment_version([t for t in written if t is not None])
    if launch is None:
        return q, sf
    operands = x, q, sf, None if rows is None else rows.data, index
    further = () if prologue is None else prologue.operands
    if views is not None:
        operands, further = as_viewed(operands, views), as_viewed(further, views[5:])
    try:
        launch(*operands, missing_rows, *numbers, *further)
    except (TypeError, ValueError):
        # The kernel refuses dtypes and devices that do not fit. Say so by name.
        _check(x, *out, choices, rows, index, prologue)
        raise
    return q, sf


def _quantize_on_cpu(
    x: torch.Tensor,
    q: torch.Tensor | None,
    sf: torch.Tensor | None,
    choices: tuple,
    rows: Rows | None,
    index: torch.Tensor | None,
    check: bool,
    prologue: Prologue | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    fmt, batch_shape, mn, k = _check(x, q, sf, choices, rows, index, prologue)
    if check:
        checks.check_counts(rows, index, x.shape[-2], mn)
    given = q is not None or sf is not None or prologue is not None
    if q is None:
        q = x.new_empty((*batch_shape, mn, k), dtype=fmt.dtype)
    if sf is None:
        sf = fmt.empty_scales(batch_shape, mn, k, x.device)
    if given:
        sf_bytes = span(sf)
        if sf_bytes and fmt.mn_major:
            sf_bytes += (last_column_rows(sf) - mn) * sf.element_size()
        _check_disjoint(x, span(x), q, span(q), sf, sf_bytes, rows, index, prologue)
    reference.quantize_into(x, q, sf, fmt, scale_floor(fmt, choices[-1]), rows, index, prologue)
    return q, sf


def _check(
    x: torch.Tensor,
    q: torch.Tensor | None,
    sf: torch.Tensor | None,
    choices: tuple,
    rows: Rows | None,
    index: torch.Tensor | None,
    prologue: Prologue | None,
) -> checks.Call:
    call = checks.check_call(x, q, sf, choices, rows, index, prologue)
    tensors = _by_name(x, q, sf, index, prologue)
    if rows is not None:
        tensors[f"rows.{rows.data_name}"] = rows.data
    check_real(tensors)
    return call


def _by_name(
    x: torch.Tensor,
    q: torch.Tensor | None,
    sf: torch.Tensor | None,
    index: torch.Tensor | None,
    prologue: Prologue | None,
) -> dict[str, torch.Tensor | None]:
    """Tensors of a call by the names of its arguments."""
    name = "x" if prologue is None else prologue.input_name
    tensors = {name: x, "out q": q, "out sf": sf, "index": index}
    return tensors if prologue is None else tensors | prologue.tensors


def _check_disjoint(
    x: torch.Tensor,
    x_bytes: int,
    q: torch.Tensor,
    q_bytes: int,
    sf: torch.Tensor,
    sf_bytes: int,
    rows: Rows | None,
    index: torch.Tensor | None,
    prologue: Prologue | None,
) -> None:
    start, q_start, sf_start = x.data_ptr(), q.data_ptr(), sf.data_ptr()
    end, q_end, sf_end = start + x_bytes, q_start + q_bytes, sf_start + sf_bytes
    apart = (
        (end <= q_start or q_end <= start)
        and (end <= sf_start or sf_end <= start)
        and (q_end <= sf_start or sf_end <= q_start)
    )
    if apart and rows is None and index is None and prologue is None:
        return
    name = "x" if prologue is None else prologue.input_name
    reads = [(name, start, x_bytes)]
    writes = [("out q", q_start, q_bytes), ("out sf", sf_start, sf_bytes)]
    if index is not None:
        reads.append(region("index", index))
    if rows is not None:
        reads.append(region(f"rows.{rows.data_name}", rows.data))
    if prologue is not None:
        reads += (region(name, t) for name, t in prologue.reads.items())
        writes += (region(name, t) for name, t in prologue.writes.items())
    check_disjoint(reads, writes)


def _look_up_plan(
    x: torch.Tensor,
    q: torch.Tensor | None,
    sf: torch.Tensor | None,
    choices: tuple,
    rows: Rows | None,
    index: torch.Tensor | None,
    prologue: Prologue | None,
) -> _Plan:
    """The plan of an earlier call on tensors that look alike, or a new one.

    dtypes and devices of all but x do not count among looks: the kernel refuses those that do not
    fit by itself.
    """
    # 128.0 is equal to 128, 0 to False, and True to 1.0, but they are refused.
    key: tuple = (*choices, type(choices[0]), type(choices[3]), type(choices[4]))
    try:
        aligned = x.data_ptr() % LOAD_BYTES
        key += (x.shape, x.stride(), x.dtype, x.device, x.is_neg(), aligned)
        if q is not None:
            aligned = q.data_ptr() % STORE_BYTES
            key += (type(q), q.shape, q.stride(), q.is_neg(), q.requires_grad, aligned)
        if sf is not None:
            key += (type(sf), sf.is_neg(), sf.requires_grad, sf.shape, sf.stride())
        if rows is not None:
            data = rows.data
            key += (type(data), rows.kind, rows.alignment, data.shape, data.stride(), data.is_neg())
        if index is not None:
            key += (type(index), index.stride(), index.shape, index.is_neg())
        if prologue is not None:
            key += (type(prologue), *prologue.options, *map(_looks, prologue.tensors.values()))
        plan = _plans.get(key)
    except (AttributeError, RuntimeError, TypeError, UserWarning):
        # No tensor, no strides, no hash; torch warns of fakes, which have no address.
        plan = None
        key = ()
    if plan is None:
        plan = _plan(x, q, sf, choices, rows, index, prologue)
        if plan.launch is not None and key:
            if len(_plans) >= _MAX_PLANS:
                _plans.clear()
            _plans[key] = plan
    return plan


def _looks(t: torch.Tensor | None) -> tuple | None:
    """All that a plan is checked for of a tensor of a prologue."""
    if t is None:
        return None
    aligned = t.data_ptr() % LOAD_BYTES
    return type(t), t.shape, t.stride(), t.dtype, t.device, t.is_neg(), t.requires_grad, aligned


def _plan(
    x: torch.Tensor,
    q: torch.Tensor | None,
    sf: torch.Tensor | None,
    choices: tuple,
    rows: Rows | None,
    index: torch.Tensor | None,
    prologue: Prologue | None,
) -> _Plan:
    """Check a call on a GPU, and find the kernel."""
    fmt, batch_shape, mn, k = _check(x, q, sf, choices, rows, index, prologue)
    q_shape = (*batch_shape, mn, k)
    q_strides = _contiguous_strides(q_shape)
    sf_shape = fmt.scale_shape(batch_shape, mn, k)
    sf_strides = fmt.scale_strides(batch_shape, mn, k)
    scale_rows = fmt.scale_rows(mn) if fmt.mn_major else 0
    launch, views, numbers = None, None, ()
    q_view = (q_shape, q_strides) if q is None else (q.shape, q.stride())
    if math.prod(q_view[0]):
        q_address = 0 if q is None else q.data_ptr()
        floor = scale_floor(fmt, choices[-1])
        sf_view = sf_shape, sf_strides
        launch, views, numbers = selection.quantize_kernel(
            x, q_view, q_address, sf_view, fmt, fmt.dtype, floor, rows, index, prologue
        )
    if fmt.mn_major:
        sf_shape = (*sf_shape[:-2], scale_rows, sf_shape[-1])
    return _Plan(
        fmt,
        launch,
        mn,
        scale_rows,
        views,
        numbers,
        q_shape,
        q_strides,
        sf_shape,
        sf_strides,
        span(x),
        0 if q is None else span(q),
        0 if sf is None else math.prod(sf_shape) * fmt.scale_dtype.itemsize,
    )


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides))


def fake_quantize(x: torch.Tensor, out: torch.Tensor | None, choices: tuple) -> torch.Tensor:
    """`cute_quant.fake_quantize` of real tensors."""
    fmt = checks.check_fake_call(x, out, choices)
    check_real({"x": x, "out": out})
    if in_dual_level():
        check_no_tangents({"x": x, "out": out})
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    else:
        check_disjoint([region("x", x)], [region("out", out)])
    floor = scale_floor(fmt, choices[-1])
    if not x.is_cuda:
        return out.copy_(reference.fake_quantize(x, fmt, floor))
    if x.numel():
        increment_version(out)
        result = out.shape, out.stride()
        function, views, numbers = selection.quantize_kernel(
            x, result, out.data_ptr(), None, fmt, x.dtype, floor
        )
        operands = x, out, None, None, None
        function(*(operands if views is None else as_viewed(operands, views)), 0, *numbers)
    return out


def dequantize(
    q: torch.Tensor, sf: torch.Tensor, group_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """`cute_quant.dequantize` of real tensors."""
    fmt = checks.check_dequantize_call(q, sf, group_size, dtype)
    check_real({"q": q, "sf": sf})
    if in_dual_level():
        check_no_tangents({"q": q, "sf": sf})
    if not q.is_cuda:
        return reference.dequantize(q, sf, fmt, dtype)
    y = torch.empty(q.shape, dtype=dtype, device=q.device)
    if q.numel():
        function, views = selection.dequantize_kernel(q, sf, y, fmt)
        function(*as_viewed((q, sf, y), views))
    return y
