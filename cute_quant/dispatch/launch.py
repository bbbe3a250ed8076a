"""Calls on real tensors: kept plans and kernels on a GPU, the reference on the CPU.

A GPU that no kernel is built for takes the reference too.

A warm call goes through `quantize_again` or `quantize_into_again` alone.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from cute_quant.contract import checks
from cute_quant.contract.calls import Call
from cute_quant.contract.contents import check_contents
from cute_quant.contract.dtypes import LOAD_BYTES, STORE_BYTES
from cute_quant.contract.formats import Format
from cute_quant.contract.reference.dequantize import dequantize_into
from cute_quant.contract.reference.quantize import fake_quantize_into, quantize_into
from cute_quant.contract.tensors import (
    Region,
    check_disjoint,
    check_no_tangents,
    check_real,
    interleaved,
    joined,
    last_column_rows,
    region,
    region_of_scales,
)
from cute_quant.contract.torch_private import (
    in_dual_level,
    increment_version,
    is_fake,
    look_alike_check,
    num_dispatch_modes,
    outside_of_graphs,
)
from cute_quant.contract.upper_scales import UpperScale
from cute_quant.dispatch.plan import (
    Destination,
    Function,
    Kernel,
    Plan,
    View,
    choose_dequantize_kernel,
    choose_kernel,
    make_plan,
)
from cute_quant.jit import library, lookup
from cute_quant.kernels import architectures

Results = tuple[torch.Tensor, ...]
"""q, sf, and the decode scales of rows if the format has them."""

# Checking and choosing anew took half the time of a call.
_plans: dict[tuple[object, ...], Plan] = {}
_MAX_PLANS = 4096


class _Recent(NamedTuple):
    """A plan of a recent call without rows, index and prologue, found again without a key.

    Attributes:
        kind: the argument that the upper scale was given as, None without one.
        matches: whether x, or x, q and sf, and then the upper scale, look like those of that call.
        upper_view: what the kernel takes the upper scale with, None where it is as given.
        x_offset, q_offset: their addresses over the alignment that loads and stores need.
    """

    fmt: Format
    kind: str | None
    matches: Callable[..., bool]
    upper_view: View | None
    x_offset: int
    q_offset: int
    plan: Plan
    function: Function
    numbers: tuple[int | float, ...]


_recent: list[_Recent] = []
"""Those that allocate, the last one first."""
_recent_out: list[_Recent] = []
"""Those into memory of the caller."""
MAX_RECENT = 8
"""A call that finds none has looked at them for a microsecond, a third of what a key takes."""


class Launch:
    """An operation bound to its memory: everything was checked, only the launch is left.

    Calling it runs the operation again on what its tensors hold now, on the current stream, and
    returns `results`. It may be captured in a CUDA graph after a first launch, or a warm-up.

    Attributes:
        results: what the operation returns, the same tensors at every launch.
    """

    __slots__ = ("_function", "_written", "results")

    results: Any

    def __init__(
        self,
        results: Any,
        function: functools.partial[Any],
        written: list[torch.Tensor],
    ) -> None:
        self.results = results
        self._function = function
        self._written = written

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Return what the compiled function is called on."""
        return self._function.args

    @outside_of_graphs
    def __call__(self) -> Any:
        """Launch the operation on the current stream, and return ``results``."""
        self._function()
        increment_version(self._written)
        return self.results


class _Capture(NamedTuple):
    """A launch that was left to the thread that binds."""

    function: functools.partial[Any]
    written: list[torch.Tensor]


_captures: dict[int, list[_Capture]] = {}
"""Launches that threads are binding, by thread."""


def bind(operation: Callable[..., Any], *args: Any, **kwargs: Any) -> Launch:
    """Run an operation up to its launch, and return that.

    Raises:
        TypeError: its tensors have no memory, or are of a subclass; else as it raises.
    """
    thread = threading.get_ident()
    captured = _captures[thread] = []
    try:
        results = operation(*args, **kwargs)
    finally:
        del _captures[thread]
    tensors = _tensors_of(results)
    # Without elements there is nothing to launch.
    expected = 0 if all(t.numel() == 0 for t in tensors) else 1
    if len(captured) > 1 or len(captured) < expected or any(map(is_fake, tensors)):
        kinds = {type(t).__name__ for t in tensors}
        raise TypeError(
            f"bind: expected plain tensors with memory, outside of a dispatch mode, got a call "
            f"that makes {len(captured)} launches and returns {', '.join(sorted(kinds))}"
        )
    if not captured:
        return Launch(results, functools.partial(_nothing), [])
    return Launch(results, captured[0].function, captured[0].written)


def _tensors_of(results: Any) -> list[torch.Tensor]:
    """Return the tensors of results, which may be pairs."""
    if not isinstance(results, tuple):
        return [results]
    return [t for result in results for t in _tensors_of(result)]


def _nothing() -> None:
    """Launch nothing, for results without elements."""


def run(
    function: Callable[..., object], arguments: tuple[Any, ...], written: list[torch.Tensor]
) -> None:
    """Call a function that writes to tensors, or leave it to the launch that the thread binds."""
    if _captures and (captured := _captures.get(threading.get_ident())) is not None:
        if written and written[0].is_cuda:
            arguments = library.as_kernel_arguments(arguments)
        captured.append(_Capture(functools.partial(function, *arguments), written))
        return
    # Autograd refuses to use what it saved of them.
    increment_version(written)
    function(*arguments)


def launches_now() -> bool:
    """Return whether calls are launched: nothing traces, differentiates or binds them."""
    return not (num_dispatch_modes() or in_dual_level() or _captures)


def quantize_again(x: torch.Tensor, fmt: Format, upper: UpperScale | None) -> Results | None:
    """Allocate and launch, for an x that looks like that of a recent call.

    Return None where there was none, or anything else is unusual: `quantize` then looks closer.
    """
    if not launches_now():
        return None
    kind: str | None = None
    tensors: tuple[torch.Tensor, ...] = (x,)
    if upper is not None:
        kind, tensors = upper.kind, (x, upper.tensor)
    for recent in _recent:
        if (
            recent.fmt is fmt
            and recent.kind == kind
            and recent.matches(*tensors)
            and recent.x_offset == x.data_ptr() % LOAD_BYTES
        ):
            break
    else:
        return None
    plan = recent.plan
    q, sf = plan.new_q(), plan.new_sf()
    if plan.new_row_scales is not None:
        row_scales = plan.new_row_scales()
        recent.function(x, q, sf, row_scales, None, None, None, 0, *recent.numbers)
        return q, sf, row_scales
    over_groups = None if upper is None else _upper_operand(recent, upper)
    recent.function(x, q, sf, over_groups, None, None, None, 0, *recent.numbers)
    return q, sf


def quantize_into_again(
    x: torch.Tensor, fmt: Format, upper: UpperScale | None, q: torch.Tensor, sf: torch.Tensor
) -> Results | None:
    """Launch into memory of the caller, for tensors that look like those of a recent call."""
    if not launches_now():
        return None
    kind: str | None = None
    tensors: tuple[torch.Tensor, ...] = (x, q, sf)
    if upper is not None:
        kind, tensors = upper.kind, (x, q, sf, upper.tensor)
    for recent in _recent_out:
        if (
            recent.fmt is fmt
            and recent.kind == kind
            and recent.matches(*tensors)
            and recent.x_offset == x.data_ptr() % LOAD_BYTES
            and recent.q_offset == q.data_ptr() % STORE_BYTES
        ):
            break
    else:
        return None
    plan = recent.plan
    start, q_start, sf_start = x.data_ptr(), q.data_ptr(), sf.data_ptr()
    end, q_end, sf_end = start + plan.x_bytes, q_start + plan.q_bytes, sf_start + plan.sf_bytes
    if (
        (q_start < end and start < q_end)
        or (sf_start < end and start < sf_end)
        or (sf_start < q_end and q_start < sf_end)
    ):
        return None
    over_groups = None
    if upper is not None:
        start = upper.tensor.data_ptr()
        end = start + upper.tensor.nbytes
        if (q_start < end and start < q_end) or (sf_start < end and start < sf_end):
            return None
        over_groups = _upper_operand(recent, upper)
    missing_rows = 0
    if plan.scale_rows > plan.mn:
        missing_rows = plan.scale_rows - last_column_rows(sf)
    increment_version((q, sf))
    recent.function(x, q, sf, over_groups, None, None, None, missing_rows, *recent.numbers)
    return q, sf


def _upper_operand(recent: _Recent, upper: UpperScale) -> torch.Tensor:
    """Return an upper scale as the kernel of a recent call takes it."""
    view = recent.upper_view
    return upper.tensor if view is None else upper.tensor.as_strided(*view)


def quantize(call: Call, *, check: bool = False, remember: bool = False) -> Results:
    """Run a call on tensors with memory.

    Args:
        call: not checked yet.
        check: read counts and indices, which synchronizes, and raise on those out of range.
        remember: have `quantize_again` find the plan.
    """
    if in_dual_level():
        check_no_tangents(call.tensors)
    if not has_kernels(call.x):
        return _quantize_by_reference(call, check=check)
    key = _key(call)
    plan = _plans.get(key)  # None of ()
    if plan is None:
        plan = make_plan(call)
        if plan.kernel is not None and key:
            if len(_plans) >= _MAX_PLANS:
                _plans.clear()
            _plans[key] = plan
    if check:
        check_contents(call, plan.mn)
    result = _execute(plan, call)
    if remember and key and plan.kernel is not None and not _captures:
        _remember(plan, plan.kernel, call)
    return result


def known_plan(call: Call) -> Plan | None:
    """Return the plan of a call on a GPU that was run before, None if there is none."""
    # Calls that cannot have a plan have the key ().
    return _plans.get(_key(call)) if call.x.is_cuda else None


def has_kernels(x: torch.Tensor) -> bool:
    """Return whether kernels are built for the device of a tensor."""
    if not x.is_cuda:
        return False
    if lookup.find_architecture(x.get_device()) is not None:
        return True
    _warn_of_reference(x.get_device())
    return False


@functools.cache
def _warn_of_reference(device_index: int) -> None:
    """Say once of a device that no kernel is built for it."""
    warnings.warn(
        f"cute_quant computes the same results in torch, slowly, on "
        f"{lookup.describe_device(device_index)}: its kernels are built for compute capability "
        f"{architectures.supported()}",
        UserWarning,
        stacklevel=2,
    )


def _remember(plan: Plan, kernel: Kernel, call: Call) -> None:
    """Put a plan where `quantize_again` finds it, if the call is of its kind."""
    x, fmt, q, sf, upper = call.x, call.fmt, call.q, call.sf, call.upper
    if not call.is_plain:
        return
    recent, q_offset, tensors = _recent, 0, [x]
    if q is not None and sf is not None and not fmt.row_scale:
        recent, q_offset, tensors = _recent_out, q.data_ptr() % STORE_BYTES, [x, q, sf]
    elif q is not None or sf is not None:
        return
    kind, read = None, [x]
    if upper is not None:
        kind, read = upper.kind, [x, upper.tensor]
        tensors.append(upper.tensor)
    # Whether gradients are recorded is no part of their looks.
    if any(type(t) is not torch.Tensor or t.requires_grad for t in read):
        return
    upper_view = None
    if kernel.views is not None:
        *others, upper_view = kernel.views[:3] + kernel.views[4:] + kernel.views[3:4]
        if any(others):
            return
    # One that looks the same was passed over for something else, and will be again.
    if any(other.plan is plan and other.matches(*tensors) for other in recent):
        return
    found = _Recent(
        fmt,
        kind,
        look_alike_check(*tensors),
        upper_view,
        x.data_ptr() % LOAD_BYTES,
        q_offset,
        plan,
        kernel.function,
        kernel.numbers,
    )
    recent[:] = [found, *recent[: MAX_RECENT - 1]]


def _execute(plan: Plan, call: Call) -> Results:
    """Allocate what a call does not give, and launch its kernel."""
    prologue = call.prologue
    q = plan.new_q() if call.q is None else call.q
    sf = plan.new_sf() if call.sf is None else call.sf
    row_scales = call.row_scales
    if row_scales is None and plan.new_row_scales is not None:
        row_scales = plan.new_row_scales()
    results = (q, sf) if row_scales is None else (q, sf, row_scales)
    missing_rows = 0
    if plan.scale_rows > plan.mn:
        missing_rows = plan.scale_rows - last_column_rows(sf)
    further_written = () if prologue is None else tuple(prologue.writes.values())
    if call.q is not None or call.sf is not None or call.row_scales is not None or further_written:
        sf_bytes = plan.sf_bytes - missing_rows * sf.element_size()
        q_region = Region("out q", q.data_ptr(), plan.q_bytes)
        _check_regions(call, q_region, Region("out sf", sf.data_ptr(), sf_bytes))
    kernel = plan.kernel
    if kernel is None:
        if row_scales is not None:
            row_scales.fill_(1.0)
        return results
    operands, further = kernel_tensors(call, q, sf, row_scales)
    written = [*results, *further_written]
    if kernel.views is not None:
        operands, further = _viewed(kernel.views, operands, further)
    try:
        run(kernel.function, (*operands, missing_rows, *kernel.numbers, *further), written)
    except (TypeError, ValueError):
        # The kernel refuses dtypes and devices that do not fit. Say so by name.
        checks.check_real_call(call)
        raise
    return results


def kernel_tensors(
    call: Call, q: torch.Tensor | None, sf: torch.Tensor | None, row_scales: torch.Tensor | None
) -> tuple[tuple[torch.Tensor | None, ...], tuple[torch.Tensor | None, ...]]:
    """Return the tensors of a call in the order of its kernel, and those of its prologue."""
    row_data = None if call.rows is None else call.rows.data
    upper = row_scales if call.upper is None else call.upper.tensor
    operands = call.x, q, sf, upper, row_data, call.row_map, call.rng_state
    return operands, () if call.prologue is None else call.prologue.operands


def _key(call: Call) -> tuple[object, ...]:
    """Return all that a plan depends on, () if a call cannot have one."""
    x, fmt, q, sf, rows, index, prologue, upper, row_scales, rng_state, scatter, num_rows = call
    try:
        key: tuple[object, ...] = (fmt, *map(_looks, (x, q, sf, index)))
        if scatter is not None or num_rows is not None:
            key += ("scatter", _looks(scatter), num_rows, type(num_rows))
        if upper is not None or row_scales is not None:
            given, kind = (row_scales, "") if upper is None else (upper.tensor, upper.kind)
            key += (kind, _looks(given))
        if rng_state is not None:
            key += ("rng_state", _looks(rng_state))
        if rows is not None:
            # 128.0 is equal to 128, but refused.
            alignment = rows.alignment
            key += (rows.kind, alignment, type(alignment), _looks(rows.data))
        if prologue is not None:
            tensors = prologue.tensors.values()
            key += (type(prologue), prologue.options, *map(_looks, tensors))
        hash(key)
        return key
    except (AttributeError, RuntimeError, TypeError, UserWarning):
        # Nothing is checked yet. What is no tensor, or has no strides, address or hash, raises one
        # of these (torch warns of a fake's address), and `make_plan` says by name what is wrong.
        return ()


def _looks(t: torch.Tensor | None) -> tuple[object, ...] | None:
    """Return all that a plan depends on of a tensor."""
    if t is None:
        return None
    aligned = t.data_ptr() % LOAD_BYTES
    return type(t), t.shape, t.stride(), t.dtype, t.device, t.is_neg(), t.requires_grad, aligned


def _viewed(
    views: tuple[View | None, ...],
    operands: tuple[torch.Tensor | None, ...],
    further: tuple[torch.Tensor | None, ...],
) -> tuple[tuple[torch.Tensor | None, ...], tuple[torch.Tensor | None, ...]]:
    """Return the tensors of a call, and those of its prologue, as a kernel takes them."""
    viewed = [
        t if view is None else view.of(t)
        for view, t in zip(views, (*operands, *further), strict=True)
    ]
    return tuple(viewed[: len(operands)]), tuple(viewed[len(operands) :])


def _check_regions(call: Call, q: Region, sf: Region) -> None:
    """Check that the memory that a call writes overlaps nothing else of it."""
    reads = [region(call.input_name, call.x)]
    writes = [q, sf]
    if call.strided_scales and call.q is not None and call.sf is not None:
        q_region, sf_region = region("out q", call.q), region("out sf", call.sf)
        in_records = interleaved(call.q, call.sf)
        writes = [joined(q_region, sf_region)] if in_records else [q_region, sf_region]
    for name, t in (("index", call.index), ("scatter", call.scatter)):
        if t is not None:
            reads.append(region(name, t))
    if call.rows is not None:
        reads.append(region(f"rows.{call.rows.data_name}", call.rows.data))
    if call.upper is not None:
        reads.append(region(call.upper.kind, call.upper.tensor))
    if call.rng_state is not None:
        reads.append(region("rng_state", call.rng_state))
    if call.row_scales is not None:
        writes.append(region("out row scales", call.row_scales))
    if call.prologue is not None:
        reads += (region(name, t) for name, t in call.prologue.reads.items())
        writes += (region(name, t) for name, t in call.prologue.writes.items())
    check_disjoint(reads, writes)


def _quantize_by_reference(call: Call, *, check: bool) -> Results:
    shape = checks.check_real_call(call)
    x, fmt = call.x, call.fmt
    if check:
        check_contents(call, shape.mn)
    q = x.new_empty(shape.values(fmt), dtype=fmt.values) if call.q is None else call.q
    sf = fmt.empty_scales(*shape, x.device) if call.sf is None else call.sf
    row_scales = call.row_scales
    if row_scales is None and fmt.row_scale:
        row_scales = x.new_empty((*shape.batch_shape, shape.mn), dtype=torch.float32)
    given = (call.q, call.sf, call.row_scales, call.prologue)
    if any(part is not None for part in given):
        padded = fmt.mn_major and not call.dense_scales
        sf_region = region_of_scales("out sf", sf, mn_major=padded)
        _check_regions(call, region("out q", q), sf_region)
    run(quantize_into, (call, q, sf, row_scales), [])
    return (q, sf) if row_scales is None else (q, sf, row_scales)


def fake_quantize(call: Call, out: torch.Tensor | None) -> torch.Tensor:
    """Run ``cute_quant.fake_quantize`` on tensors with memory."""
    checks.check_fake_quantize(call, out)
    x, tensors = call.x, {**call.tensors, "out": out}
    check_real(tensors)
    if in_dual_level():
        check_no_tangents(tensors)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    else:
        reads = [region(name, t) for name, t in call.tensors.items() if t is not None]
        check_disjoint(reads, [region("out", out)])
    if not has_kernels(x):
        run(fake_quantize_into, (call, out), [])
    elif x.numel():
        result = Destination(View(tuple(out.shape), out.stride()), out.data_ptr(), x.dtype)
        kernel = choose_kernel(call, result, None)
        upper = None if call.upper is None else call.upper.tensor
        operands: tuple[torch.Tensor | None, ...] = (x, out, None, upper, None, None, None)
        if kernel.views is not None:
            operands, _ = _viewed(kernel.views, operands, ())
        run(kernel.function, (*operands, 0, *kernel.numbers), [out])
    return out


def dequantize(
    q: torch.Tensor,
    sf: torch.Tensor,
    fmt: Format,
    dtype: torch.dtype,
    upper: UpperScale | None = None,
) -> torch.Tensor:
    """Run ``cute_quant.dequantize`` on tensors with memory."""
    shape = checks.check_dequantize(q, sf, fmt, dtype, upper)
    tensors: dict[str, torch.Tensor | None] = {"q": q, "sf": sf}
    if upper is not None:
        tensors[upper.kind] = upper.tensor
    check_real(tensors)
    if in_dual_level():
        check_no_tangents(tensors)
    y = torch.empty((*shape.batch_shape, shape.mn, shape.k), dtype=dtype, device=q.device)
    if not has_kernels(q):
        run(dequantize_into, (q, sf, fmt, y, upper), [])
    elif q.numel():
        kernel = choose_dequantize_kernel(q, sf, y, fmt, upper)
        run(kernel.function, kernel.arguments(q, sf, y, upper), [y])
    return y
