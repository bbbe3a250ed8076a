"""The public operations: dispatch, and their registration with torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from cute_quant import checks, reference
from cute_quant.formats import (
    BYTES_PER_WORD,
    DEFAULT_MIN_SCALE,
    GROUP_SIZES,
    LOAD_BYTES,
    STORE_BYTES,
    VALUE_DTYPE,
    Format,
    last_column_rows,
    make_format,
    scale_floor,
)

OUTPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NOT_DIFFERENTIABLE = (
    "x: expected a tensor that requires no gradient, since quantize is not differentiable; "
    "got one that does: detach it or call under torch.no_grad()"
)


def quantize(
    x: torch.Tensor,
    group_size: int = 128,
    scale_format: str = "ue8m0",
    *,
    round_scale: bool = False,
    min_scale: float = DEFAULT_MIN_SCALE,
    out: tuple[torch.Tensor | None, torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize the rows of a matrix to FP8 e4m3 in groups that share a scale.

    Each group of `group_size` neighbours in a row gets the scale
    ``s = max(amax / 448, min_scale)``, rounded up to a power of two in the UE8M0 format and with
    `round_scale`; its values are x / s, rounded to nearest even. A group that holds NaN or Inf
    becomes NaN, values and scale.

    On a GPU this is one kernel on the current stream. It is compiled at the first call for a
    dtype, format and architecture; call it once before capturing it in a CUDA graph. It runs as a
    programmatic dependent of the kernel before; one launched so after it has to wait for it
    (``griddepcontrol.wait``), as other kernels do anyway. On the CPU plain torch computes the same
    bits. Gradients do not flow through it.

    Args:
        x: (mn, k), bfloat16 or float16, k a multiple of `group_size`, neighbours contiguous. On a
            GPU (compute capability 9.0, 10.0 or 10.3) its rows start at multiples of 32 bytes;
            their stride is free.
        group_size: 128.
        scale_format: "ue8m0", the exponents of four groups packed to an int32, the first in the
            low byte; or "float32".
        round_scale: round float32 scales up to powers of two.
        min_scale: lower bound of the scales, rounded to float32; from 0 (2^-126 for "float32") to
            2^100. The default gives a group of zeros the UE8M0 byte 94, as vLLM does.
        out: q and sf to write into, either of them None to have it allocated. `q` may have more
            rows than x, which become 0, and any row stride that starts rows at multiples of 16
            bytes. `sf` has the shape and strides below. Its padding rows become 0 as far as its
            storage goes, so nothing else may live there: leave room for them, or end the storage
            with the last row.

    Returns:
        q: that of `out`, or (mn, k), float8_e4m3fn, contiguous.
        sf: MN-major and aligned for TMA: strides (1, mn rounded up to a multiple of 4). For
            "ue8m0" int32 of shape (mn, ceil(k / group_size / 4)), bytes past the last group 0; for
            "float32" float32 of shape (mn, k / group_size). DeepGEMM reads the first on SM100, the
            second on SM90.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong value, shape, stride, alignment or device.
        RuntimeError: x requires a gradient while gradients are recorded, or its GPU is not
            supported.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(NOT_DIFFERENTIABLE)
    q, sf = _out_pair(out)
    choices = (group_size, scale_format, round_scale, min_scale)
    if not is_traced(x):
        return _quantize(x, q, sf, choices)
    if out is None:
        return torch.ops.cute_quant.quantize(x, *choices)
    fmt = make_format(*choices[:3])
    checks.check_input(x, fmt)
    q = _empty_values(x) if q is None else q
    sf = fmt.empty_scales(*x.shape, x.device) if sf is None else sf
    torch.ops.cute_quant.quantize_out(x, q, sf, *choices)
    return q, sf


def dequantize(
    q: torch.Tensor,
    sf: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
    group_size: int | None = None,
) -> torch.Tensor:
    """Multiply quantized values by their scales.

    Args:
        q: (mn, k), float8_e4m3fn; without rows past those of `sf`.
        sf: the scales that `quantize` returned with it: int32 of packed UE8M0, or float32. Their
            strides are free.
        dtype: of the result: bfloat16, float16 or float32. Products are computed in float32 and
            rounded once, to Inf where they are beyond its largest number.
        group_size: neighbours that share a scale; by default what the shapes say.

    Returns:
        (mn, k), `dtype`, contiguous.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: the shapes or devices do not belong together.
    """
    checks.check_tensor("q", q, (VALUE_DTYPE,))
    checks.check_tensor("sf", sf, (torch.int32, torch.float32))
    if dtype not in OUTPUT_DTYPES:
        raise TypeError(f"dtype: expected one of {OUTPUT_DTYPES}, got {dtype!r}")
    if q.device != sf.device:
        raise ValueError(f"sf: expected the device of q, {q.device}, got {sf.device}")
    if q.ndim != 2:
        raise ValueError(f"q: expected 2 dimensions (mn, k), got shape {tuple(q.shape)}")
    scale_format = "ue8m0" if sf.dtype is torch.int32 else "float32"
    sizes = GROUP_SIZES if group_size is None else (group_size,)
    formats = [make_format(size, scale_format, False) for size in sizes]
    for fmt in formats:
        if tuple(sf.shape) == fmt.scale_shape(*q.shape):
            checks.check_groups("q", q, fmt)
            return reference.dequantize(q, sf, fmt, dtype)
    expected = " or ".join(
        f"{fmt.scale_shape(*q.shape)} for groups of {fmt.group_size}" for fmt in formats
    )
    raise ValueError(
        f"sf: expected the {scale_format} scales of q {tuple(q.shape)}, {expected}, "
        f"got shape {tuple(sf.shape)}"
    )


def _out_pair(out: object) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if out is None:
        return None, None
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        raise TypeError(f"out: expected a pair (q, sf), got {type(out).__name__}")
    return out[0], out[1]


def is_traced(x: torch.Tensor) -> bool:
    """Whether the dispatcher has to see this call: a tracer, a mode or a subclass wants it."""
    return (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or type(x) not in (torch.Tensor, torch.nn.Parameter)
        or x.is_meta
    )


def _empty_values(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, dtype=VALUE_DTYPE, memory_format=torch.contiguous_format)


class _Plan(NamedTuple):
    """What calls on tensors of the same shapes and strides have in common.

    Attributes:
        launch: the compiled kernel; None on the CPU and where x has no elements.
        x_bytes, q_bytes, sf_bytes: from the first element to the last; of sf with all padding.
        scale_rows: rows of a column of scales, padding included.
    """

    fmt: Format
    floor: int | float
    launch: Callable[..., None] | None
    x_bytes: int
    q_bytes: int
    sf_bytes: int
    scale_rows: int


# Checking all this anew took half the time of a call.
_plans: dict[tuple, _Plan] = {}
_MAX_PLANS = 4096


def _plan(
    x: torch.Tensor, q: torch.Tensor | None, sf: torch.Tensor | None, choices: tuple
) -> _Plan:
    """Check everything that tensors say of themselves, and find the kernel."""
    *format_choices, min_scale = choices
    fmt = make_format(*format_choices)
    checks.check_input(x, fmt)
    checks.check_not_negated("x", x)
    floor = scale_floor(fmt, min_scale)
    if q is not None:
        checks.check_values_out(q, x)
    if sf is not None:
        checks.check_scales_out(sf, x, fmt)
        checks.check_not_negated("out sf", sf)
    if not (x.is_cuda or x.is_cpu):
        raise ValueError(f"x: expected a tensor on a CUDA device or the CPU, got {x.device}")
    mn, k = x.shape
    q_rows = mn if q is None else q.shape[0]
    launch = None
    if x.is_cuda and x.numel():
        launch = _kernel(x.dtype, fmt, x.get_device(), q_rows, k)
    q_bytes = q_rows * k if q is None else checks.span(q)
    _, columns = fmt.scale_shape(mn, k)
    scale_rows = fmt.scale_strides(mn)[1]
    sf_bytes = BYTES_PER_WORD * columns * scale_rows
    return _Plan(fmt, floor, launch, checks.span(x), q_bytes, sf_bytes, scale_rows)


def _look_up_plan(
    x: torch.Tensor, q: torch.Tensor | None, sf: torch.Tensor | None, choices: tuple
) -> _Plan:
    """The plan of an earlier call on tensors that look alike, or a new one.

    Only plans that launch are kept, since dtypes and devices of q and sf do not count among looks:
    the kernel refuses those that do not fit, and addresses that are not aligned, by itself.
    """
    try:
        key = (
            (x.shape, x.stride(), x.dtype, x.device, x.is_neg(), choices)
            + (() if q is None else (q.shape, q.stride(), q.is_neg(), q.requires_grad))
            + (() if sf is None else (sf.is_neg(), sf.requires_grad, sf.shape, sf.stride()))
        )
        plan = _plans.get(key)
    except (AttributeError, RuntimeError, TypeError):  # no tensor, no strides, no hash
        return _plan(x, q, sf, choices)
    if plan is None:
        plan = _plan(x, q, sf, choices)
        if plan.launch is not None:
            if len(_plans) >= _MAX_PLANS:
                _plans.clear()
            _plans[key] = plan
    return plan


def _quantize(
    x: torch.Tensor, q: torch.Tensor | None, sf: torch.Tensor | None, choices: tuple
) -> tuple[torch.Tensor, torch.Tensor]:
    plan = _look_up_plan(x, q, sf, choices)
    out = q, sf
    given = q is not None or sf is not None
    if q is None:
        q = _empty_values(x)
    if sf is None:
        sf = plan.fmt.empty_scales(*x.shape, x.device)
    last_rows = plan.scale_rows
    if last_rows != x.shape[0]:
        last_rows = last_column_rows(sf)
    if given:
        sf_bytes = plan.sf_bytes - BYTES_PER_WORD * (plan.scale_rows - last_rows)
        checks.check_disjoint(
            x.data_ptr(), plan.x_bytes, q.data_ptr(), plan.q_bytes, sf.data_ptr(), sf_bytes
        )
    if plan.launch is not None:
        try:
            plan.launch(x, q, sf, last_rows, plan.floor)
        except (TypeError, ValueError):
            # The kernel refuses dtypes, devices and addresses that do not fit. Say so by name.
            _plan(x, *out, choices)
            checks.check_rows("x", x, LOAD_BYTES)
            checks.check_rows("out q", q, STORE_BYTES)
            raise
    elif x.is_cpu:
        reference.quantize_into(x, q, sf, plan.fmt, plan.floor)
    else:
        q.view(torch.uint8).zero_()  # x has no elements, but a caller's q may have rows
    return q, sf


def _kernel(
    dtype: torch.dtype, fmt: Format, device_index: int, rows: int, k: int
) -> Callable[..., None]:
    # CuTe DSL takes a second to import and CPU users need not have it.
    from cute_quant import compile
    from cute_quant.kernels import launch
    from cute_quant.kernels.quantize import Quantize

    arch = compile.architecture(device_index)
    shape = launch.shape(rows, k, compile.multiprocessors(device_index))
    return compile.function(Quantize, arch, compile.ELEMENT_TYPES[dtype], fmt, *shape)


_CHOICES = "int group_size, str scale_format, bool round_scale, float min_scale"


@torch.library.custom_op(
    "cute_quant::quantize",
    mutates_args=(),
    schema=f"(Tensor x, {_CHOICES}) -> (Tensor, Tensor)",
)
def _quantize_op(x: torch.Tensor, *choices: object) -> tuple[torch.Tensor, torch.Tensor]:
    return _quantize(x, None, None, choices)


def _refuse_gradient(*_: object, **__: object) -> None:
    raise RuntimeError(NOT_DIFFERENTIABLE)


_quantize_op.register_autograd(_refuse_gradient, setup_context=_refuse_gradient)


@_quantize_op.register_fake
def _(x: torch.Tensor, *choices: object) -> tuple[torch.Tensor, torch.Tensor]:
    *format_choices, min_scale = choices
    fmt = make_format(*format_choices)
    checks.check_input(x, fmt)
    scale_floor(fmt, min_scale)
    # Not `empty_scales`: its storage, which a fake has none of, depends on mn % 4.
    shape, strides = fmt.scale_shape(*x.shape), fmt.scale_strides(x.shape[0])
    return _empty_values(x), x.new_empty_strided(shape, strides, dtype=fmt.scale_dtype)


@torch.library.custom_op(
    "cute_quant::quantize_out",
    mutates_args=("q", "sf"),
    schema=f"(Tensor x, Tensor(a!) q, Tensor(b!) sf, {_CHOICES}) -> ()",
)
def _quantize_out_op(x: torch.Tensor, q: torch.Tensor, sf: torch.Tensor, *choices: object) -> None:
    _quantize(x, q, sf, choices)


@_quantize_out_op.register_fake
def _(x: torch.Tensor, q: torch.Tensor, sf: torch.Tensor, *choices: object) -> None:
    *format_choices, min_scale = choices
    fmt = make_format(*format_choices)
    checks.check_input(x, fmt)
    checks.check_values_out(q, x)
    checks.check_scales_out(sf, x, fmt)
    scale_floor(fmt, min_scale)
