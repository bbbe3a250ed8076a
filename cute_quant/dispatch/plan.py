"""Plans: which kernel a call takes, how the kernel views its tensors, and with which numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from cute_quant.contract import checks
from cute_quant.contract.calls import Call, ResultShape
from cute_quant.contract.dtypes import LOAD_BYTES, align
from cute_quant.contract.formats import Format
from cute_quant.contract.prologues import RmsNorm, SiluMul, SiluMulBackward, clamp_limit
from cute_quant.contract.rows import DENSE, Masked
from cute_quant.contract.tensors import MAX_SIZE, flat_batch, last_column_rows, span
from cute_quant.contract.upper_scales import UpperScale
from cute_quant.dispatch.call_range import CallRange, row_alignment
from cute_quant.jit import lookup
from cute_quant.kernels import architectures, heuristics
from cute_quant.kernels.config import (
    DEFAULT_TILE,
    Access,
    DequantizeSpec,
    Domain,
    QuantizerSpec,
    QuantizeSpec,
    RmsNormSpec,
    SiluMulBackwardSpec,
    SiluMulSpec,
    Spec,
)

Function = Callable[..., None]
"""A compiled kernel, called on torch tensors and numbers."""


class View(NamedTuple):
    """Shape and strides that a kernel takes a tensor with."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, t: torch.Tensor | None) -> torch.Tensor | None:
        """Return a tensor so viewed."""
        return None if t is None else t.as_strided(self.shape, self.strides)


class Destination(NamedTuple):
    """Memory that a kernel writes values to.

    Attributes:
        address: 0 for memory that torch is about to allocate, which is aligned.
        dtype: of the values: the format's, or x's for fake quantization.
    """

    view: View
    address: int
    dtype: torch.dtype


class Gpu(NamedTuple):
    """The facts of a GPU that choose a kernel: its target and its number of multiprocessors."""

    arch: str
    sms: int


class Choice(NamedTuple):
    """The kernel of a call before it is compiled: its spec, and the rest as in a `Kernel`."""

    spec: Spec
    views: tuple[View | None, ...] | None
    numbers: tuple[int | float, ...]


class Kernel(NamedTuple):
    """A compiled kernel and how it takes a call.

    Attributes:
        function: called on x, q, sf, the upper scale or memory for those of rows, counts, index,
            the state of random numbers, the missing rows of the last scale column, the `numbers`,
            and the tensors of the prologue.
        views: of the tensors of a call, in this order, None for those it takes as they are.
        numbers: alignment of row groups, CTAs that share masked rows, smallest scale, and those of
            the prologue.
    """

    function: Function
    views: tuple[View | None, ...] | None
    numbers: tuple[int | float, ...]


class Plan(NamedTuple):
    """The part of a call that depends on shapes, strides and alignment alone.

    Attributes:
        kernel: None where there is nothing to write.
        scale_rows: rows of a column of MN-major scales, padding included; mn in other layouts.
        new_q, new_sf: allocate results, the scales with all padding in their storage.
        new_row_scales: allocates those of rows; None where the format has none.
        x_bytes, q_bytes, sf_bytes: from the first element to the last, for memory of the caller;
            of sf with all padding.
    """

    kernel: Kernel | None
    mn: int
    scale_rows: int
    new_q: Callable[[], torch.Tensor]
    new_sf: Callable[[], torch.Tensor]
    new_row_scales: Callable[[], torch.Tensor] | None
    x_bytes: int
    q_bytes: int
    sf_bytes: int


def make_plan(call: Call) -> Plan:
    """Check a call on a GPU, and choose its kernel.

    Raises:
        TypeError, ValueError: an argument is wrong.
        RuntimeError: the GPU is not supported.
    """
    shape = checks.check_real_call(call)
    fmt = call.fmt
    values_shape = shape.values(fmt)
    q_view = View(values_shape, contiguous_strides(values_shape))
    dense = call.dense_scales
    sf_strides = checks.dense_column_strides(fmt, shape) if dense else fmt.scale_strides(*shape)
    sf_view = View(fmt.scale_shape(*shape), sf_strides)
    given, address = q_view, 0
    if call.q is not None:
        given, address = View(tuple(call.q.shape), call.q.stride()), call.q.data_ptr()
    kernel = None
    if math.prod(given.shape):
        kernel = choose_kernel(call, Destination(given, address, fmt.values), sf_view)
    scale_rows = fmt.scale_rows(shape.mn) if fmt.mn_major and not dense else shape.mn
    padded = sf_view.shape
    if fmt.mn_major:
        padded = (*shape.batch_shape, scale_rows, padded[-1])
    device = call.x.device
    # Partial functions take less time than calls with keywords.
    empty_q = functools.partial(torch.empty_strided, *q_view, dtype=fmt.values, device=device)
    empty_sf = functools.partial(
        torch.empty_strided, padded, sf_view.strides, dtype=fmt.sf_dtype, device=device
    )
    empty_row_scales = None
    if fmt.row_scale:
        rows_shape = (*shape.batch_shape, shape.mn)
        empty_row_scales = functools.partial(
            torch.empty, rows_shape, dtype=torch.float32, device=device
        )
    return Plan(
        kernel,
        shape.mn,
        scale_rows,
        empty_q,
        empty_sf if scale_rows == shape.mn else lambda: empty_sf().narrow(-2, 0, shape.mn),
        empty_row_scales,
        x_bytes=span(call.x),
        q_bytes=math.prod(values_shape) * fmt.values.itemsize if call.q is None else span(call.q),
        sf_bytes=math.prod(padded) * fmt.sf_dtype.itemsize,
    )


class PrologueChoice(NamedTuple):
    """The part of a kernel's choice that depends on the prologue of a call.

    Attributes:
        spec_class: names the kernel.
        choices: fields of the spec besides those that all specs have.
        numbers: what the kernel takes after the smallest scale.
        views: of the prologue's tensors, None for those that the kernel takes as they are.
        load_bytes: what the rows of its tensors, and the ups of a row, are aligned to.
        part: columns that a thread's values must not straddle the end of, None for all of them.
    """

    spec_class: type[QuantizerSpec]
    choices: dict[str, Any]
    numbers: tuple[float, ...] = ()
    views: tuple[View | None, ...] = ()
    load_bytes: int = LOAD_BYTES
    part: int | None = None


def choose_kernel(call: Call, result: Destination, scales: View | None) -> Kernel:
    """Choose the kernel for a call as `choose_spec` does, and have it compiled.

    Raises:
        RuntimeError: the GPU is not supported, or the kernel is missing and cannot be compiled.
    """
    device = call.x.get_device()
    gpu = Gpu(lookup.architecture(device), lookup.multiprocessors(device))
    spec, views, numbers = choose_spec(call, result, scales, gpu)
    calls = functools.partial(_range_of, call, result)
    if _watcher is not None:
        _watcher(calls())
    function = compiled(spec, gpu.arch, lambda: calls().remedy(gpu.arch))
    return Kernel(function, views, numbers)


def _range_of(call: Call, result: Destination) -> CallRange:
    nbytes = row_alignment(result.address, *result.view, result.dtype.itemsize)
    return CallRange.of(call, result.dtype, nbytes)


_watcher: Callable[[CallRange], None] | None = None


def watch_calls(watcher: Callable[[CallRange], None] | None) -> None:
    """Have a function told the range of each call that chooses a kernel; None for no more."""
    global _watcher
    _watcher = watcher


def choose_spec(call: Call, result: Destination, scales: View | None, gpu: Gpu) -> Choice:
    """Choose the spec of the kernel for a call, as ``heuristics`` has it for its size.

    Args:
        call: the call, which was checked; its tensors need no memory.
        result: memory for the values of the call.
        scales: view of the scales; None for fake quantization, which stores none.
        gpu: that the call is for.
    """
    x, rows, index = call.x, call.rows, call.index
    kind = DENSE if rows is None else rows.kind
    *batch_shape, q_rows, _ = result.view.shape
    k = call.result_shape.k
    shape = ResultShape(tuple(batch_shape), q_rows, k)
    launch = _launch_shape(call, shape, gpu, fake=scales is None)
    scattered = call.scatter is not None
    batched = bool(batch_shape) or (launch.tall and not scattered)
    domain = Domain(kind, index is not None, batched, call.upper_of_groups, scattered)
    # Rows of x are those of one matrix where they are scattered.
    x_batched = batched and not scattered
    match call.prologue:
        case None:
            stochastic = call.rng_state is not None
            prologue = PrologueChoice(
                QuantizeSpec, {"fake": scales is None, "stochastic": stochastic}
            )
        case SiluMul() as silu_mul:
            prologue = choose_silu_mul(silu_mul, x.dtype, k, batched=x_batched)
        case SiluMulBackward() as backward:
            prologue = choose_silu_mul_backward(backward, k, batched=batched)
            prologue.choices["stochastic"] = call.rng_state is not None
        case RmsNorm() as rms_norm:
            prologue = _rms_norm(rms_norm, batched=x_batched)
    x_view = matrix_view(x, batched=x_batched and index is None)
    q_view = view_as_matrices(result.view, result.dtype.itemsize, batched=batched)
    index_view = None
    if index is not None and batched and index.ndim == 1:
        index_view = View((1, *index.shape), (0, 1))
    views = (
        None if x_view == (x.shape, x.stride()) else x_view,
        None if q_view == result.view else q_view,
        _scales_view(scales, call.fmt, shape) if batched else None,
        _upper_view(call, shape, batched=batched),
        None,
        index_view,
        None,
        *prologue.views,
    )
    store_bytes = heuristics.store_bytes(launch.tile, result.dtype)
    access = Access(
        alignment(x.data_ptr(), x_view, x.element_size(), prologue.load_bytes),
        alignment(result.address, q_view, result.dtype.itemsize, store_bytes),
        ragged=(prologue.part or k) % launch.tile.values_per_thread != 0,
        dense_scales=call.dense_scales,
        strided_scales=call.strided_scales,
    )
    fmt = call.fmt.kernel_format
    upper = None if call.upper is None else call.upper.kind
    pdl = architectures.named(gpu.arch).pdl
    choices = {**prologue.choices, "upper": upper, "pdl": pdl}
    if isinstance(launch, heuristics.NormShape):
        choices["max_warps"] = launch.max_warps
        if isinstance(call.prologue, RmsNorm):
            choices["tiles_per_thread"] = launch.tiles_per_thread
        else:
            choices["held"] = launch.held
    spec = prologue.spec_class(x.dtype, fmt, launch.tile, domain, access, **choices)
    row_alignment = 1 if rows is None else rows.alignment
    numbers = row_alignment, launch.row_ctas, call.fmt.floor, *prologue.numbers
    return Choice(spec, views if any(views) else None, numbers)


def _launch_shape(
    call: Call, shape: ResultShape, gpu: Gpu, *, fake: bool
) -> heuristics.Shape | heuristics.NormShape:
    """Return tile and grid for the size of a call."""
    masked = isinstance(call.rows, Masked)
    matrices, rows = math.prod(shape.batch_shape), shape.mn
    if call.scatter is not None:
        matrices, rows, masked = 1, call.x.shape[0], False
    size = matrices, rows, shape.k, call.fmt, masked, gpu.sms
    if call.fmt.by_row and not isinstance(call.prologue, RmsNorm):
        return heuristics.row_shape(*size, gpu.arch)
    match call.prologue:
        case None if fake:
            return heuristics.fake_shape(*size, gpu.arch)
        case None if call.scatter is not None:
            return heuristics.shape(*size, gpu.arch, DEFAULT_TILE)
        case None if call.rng_state is not None:
            return heuristics.wide_shape(*size, gpu.arch)
        case None:
            return heuristics.shape(*size, gpu.arch)
        case SiluMul() | SiluMulBackward():
            return heuristics.silu_shape(*size, gpu.arch)
        case RmsNorm():
            return heuristics.norm_shape(*size, least_tiles=heuristics.norm_tiles(gpu.arch))


def choose_silu_mul(
    prologue: SiluMul, dtype: torch.dtype, k: int, *, batched: bool
) -> PrologueChoice:
    """Choose what gates times ups, of `dtype` and k columns of the result, ask of a kernel."""
    choices = {
        "interleaved": prologue.interleaved,
        "rounding": prologue.rounding,
        "clamped": prologue.clamp is not None,
        "scaled": prologue.alpha != 1.0,
        "shifted": prologue.beta != 0.0,
        "weighted": prologue.weight is not None,
    }
    # The bound as the reference rounds it.
    bound = 0.0 if prologue.clamp is None else clamp_limit(prologue, dtype)
    numbers = bound, prologue.alpha, prologue.beta
    views = (_factors_view(prologue.weight, batched=batched),)
    # The ups of a row start k elements after its gates.
    load_bytes = LOAD_BYTES if prologue.interleaved else math.gcd(LOAD_BYTES, k * dtype.itemsize)
    return PrologueChoice(SiluMulSpec, choices, numbers, views, load_bytes)


def choose_silu_mul_backward(
    prologue: SiluMulBackward, columns: int, *, batched: bool
) -> PrologueChoice:
    """Choose what gradients of gates and ups, so many columns of both, ask of a kernel."""
    choices = {
        "interleaved": prologue.interleaved,
        "clamped": prologue.clamp is not None,
        "scaled": prologue.alpha != 1.0,
        "shifted": prologue.beta != 0.0,
    }
    numbers = prologue.clamp or 0.0, prologue.alpha, prologue.beta
    grad = prologue.grad
    view = matrix_view(grad, batched=batched)
    k = columns // 2
    load_bytes = alignment(grad.data_ptr(), view, grad.element_size(), LOAD_BYTES)
    part = None
    if not prologue.interleaved:
        # The ups of a row start k elements after its gates.
        load_bytes, part = math.gcd(load_bytes, k * grad.element_size()), k
    return PrologueChoice(SiluMulBackwardSpec, choices, numbers, (view,), load_bytes, part)


def _rms_norm(prologue: RmsNorm, *, batched: bool) -> PrologueChoice:
    choices = {
        "weight_dtype": prologue.weight.dtype,
        "rounding": prologue.rounding,
        "residual": prologue.residual is not None,
        "normalized": prologue.normalized is not None,
    }
    # Adding -0.0 keeps a weight of -0.0.
    numbers = prologue.eps, prologue.weight_offset or -0.0
    load_bytes = math.gcd(LOAD_BYTES, prologue.weight.data_ptr())
    views: list[View | None] = [None]
    for t in (prologue.residual, prologue.residual_out, prologue.normalized):
        view = None
        if t is not None:
            view = matrix_view(t, batched=batched)
            load_bytes = alignment(t.data_ptr(), view, t.element_size(), load_bytes)
        views.append(view)
    return PrologueChoice(RmsNormSpec, choices, numbers, tuple(views), load_bytes)


class Dequantization(NamedTuple):
    """A compiled kernel and how it takes q, sf, the scale over those of groups and the result."""

    function: Function
    q: View
    sf: View
    upper: View | None
    result: View

    def arguments(
        self, q: torch.Tensor, sf: torch.Tensor, y: torch.Tensor, upper: UpperScale | None
    ) -> tuple[torch.Tensor | None, ...]:
        """Return the tensors of a call as the function takes them."""
        given = None if self.upper is None or upper is None else self.upper.of(upper.tensor)
        return self.q.of(q), self.sf.of(sf), given, self.result.of(y)


def choose_dequantize_kernel(
    q: torch.Tensor, sf: torch.Tensor, y: torch.Tensor, fmt: Format, upper: UpperScale | None
) -> Dequantization:
    """Choose the kernel that multiplies values by their scales."""
    q_view, y_view = matrix_view(q, batched=True), matrix_view(y, batched=True)
    sf_view = view_of_scales(sf, fmt.scale_dims)
    batch = sf_view.shape[0]
    arch = lookup.architecture(q.get_device())
    upper_view = None
    if upper is not None and fmt.row_scale:
        upper_view = View((batch, y.shape[-2]), (y.shape[-2], 1))
    elif upper is not None:
        upper_view = View((batch,), (int(upper.tensor.numel() > 1),))
    spec = choose_dequantize_spec(q, y, fmt, upper, arch)
    calls = functools.partial(CallRange.of_dequantize, q, fmt, y.dtype, upper)
    function = compiled(spec, arch, lambda: calls().remedy(arch))
    return Dequantization(function, q_view, sf_view, upper_view, y_view)


def choose_dequantize_spec(
    q: torch.Tensor, y: torch.Tensor, fmt: Format, upper: UpperScale | None, arch: str
) -> DequantizeSpec:
    """Choose the spec of the kernel that multiplies values by their scales."""
    tile = heuristics.DEQUANTIZE_TILES[architectures.named(arch).widest_load]
    values = tile.values_per_thread
    load_bytes = values // fmt.value_type.per_byte
    store_bytes = heuristics.store_bytes(tile, y.dtype)
    access = Access(
        alignment(q.data_ptr(), matrix_view(q, batched=True), q.element_size(), load_bytes),
        alignment(y.data_ptr(), matrix_view(y, batched=True), y.element_size(), store_bytes),
        ragged=y.shape[-1] % values != 0,
    )
    kind, pdl = None if upper is None else upper.kind, architectures.named(arch).pdl
    return DequantizeSpec(fmt.kernel_format, y.dtype, tile, access, kind, pdl=pdl)


def compiled(spec: Spec, arch: str, remedy: Callable[[], str]) -> Function:
    """Return a compiled kernel; `remedy` says how to have it compiled before.

    Raises:
        RuntimeError: the kernel is missing and cannot be compiled.
    """
    try:
        return lookup.function(spec, arch)
    except lookup.NotBuilt as error:
        raise RuntimeError(f"{error}: {remedy()}") from None


def view_of_scales(sf: torch.Tensor, inner: int) -> View:
    """Return the view of scales with one batch dimension before the `inner` last ones."""
    batch, stride = flat_batch("sf", sf.shape, sf.stride(), inner)
    return View((batch, *sf.shape[-inner:]), (stride, *sf.stride()[-inner:]))


def missing_scale_rows(sf: torch.Tensor, fmt: Format) -> int:
    """Return the padding rows of the last column of MN-major scales that have no storage."""
    return fmt.scale_rows(sf.shape[-2]) - last_column_rows(sf) if fmt.mn_major else 0


def _scales_view(scales: View | None, fmt: Format, shape: ResultShape) -> View | None:
    """Return the view of scales with one batch dimension, None if they have it."""
    if scales is None or len(shape.batch_shape) == 1:
        return None
    inner = fmt.scale_dims
    stride = scales.strides[-inner - 1] if shape.batch_shape else 0
    matrices = math.prod(shape.batch_shape)
    return View((matrices, *scales.shape[-inner:]), (stride, *scales.strides[-inner:]))


def _upper_view(call: Call, shape: ResultShape, *, batched: bool) -> View | None:
    """Return the view of the upper scale, or of the memory for those of rows, None if it fits."""
    if call.fmt.row_scale:
        # Without memory for them (fake quantization) their view is of nothing.
        mn = call.result_shape.mn
        fits = len(shape.batch_shape) == batched
        return None if fits else View((math.prod(shape.batch_shape), mn), (mn, 1))
    if call.upper is None:
        return None
    t = call.upper.tensor
    if call.upper_of_groups:
        return None
    size, stride = (math.prod(shape.batch_shape), int(t.numel() > 1)) if batched else (1, 1)
    return None if t.shape == (size,) else View((size,), (stride,))


def _factors_view(weight: torch.Tensor | None, *, batched: bool) -> View | None:
    """Return the view (batch, mn), or (mn,), of contiguous factors of rows (..., mn)."""
    if weight is None or weight.ndim == 1 + batched:
        return None
    mn = weight.shape[-1]
    return View((math.prod(weight.shape[:-1]), mn), (mn, 1))


def matrix_view(t: torch.Tensor, *, batched: bool) -> View:
    """Return the view (rows, k) or (batch, rows, k) of a tensor (..., rows, k)."""
    return view_as_matrices(View(tuple(t.shape), t.stride()), t.element_size(), batched=batched)


def view_as_matrices(view: View, itemsize: int, *, batched: bool) -> View:
    """Return `view`, (..., rows, k), with one leading dimension or none.

    The stride of a dimension of size 1 or less does not matter, but kernels check it.
    """
    *batch_shape, rows, k = view.shape
    unused = align(k, LOAD_BYTES)
    row_stride = view.strides[-2]
    if rows <= 1 and (row_stride * itemsize % LOAD_BYTES or row_stride * itemsize > MAX_SIZE):
        row_stride = unused
    if not batched:
        return View((rows, k), (row_stride, 1))
    count, batch_stride = flat_batch("", *view)
    if len(batch_shape) == 1 and count <= 1 and view.strides[0] * itemsize % LOAD_BYTES == 0:
        batch_stride = view.strides[0]
    return View((count, rows, k), (batch_stride, row_stride, 1))


def alignment(address: int, view: View, itemsize: int, limit: int) -> int:
    """Return the largest power of two up to `limit` that divides the address of each row."""
    return math.gcd(limit, address, *(stride * itemsize for stride in view.strides[:-1]))


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides))
