"""The public operations: dispatch, and their registration with torch."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from cute_quant import checks, execution
from cute_quant.formats import (
    DEFAULT_MIN_SCALE,
    VALUE_DTYPE,
    Format,
    make_format,
    resolve_min_scale,
)
from cute_quant.rows import Rows, from_operands, to_operands


def quantize(
    x: torch.Tensor,
    group_size: int = 128,
    scale_format: str = "ue8m0",
    *,
    dtype: torch.dtype = VALUE_DTYPE,
    round_scale: bool = False,
    min_scale: float | str = DEFAULT_MIN_SCALE,
    rows: Rows | None = None,
    index: torch.Tensor | None = None,
    check: bool = False,
    out: tuple[torch.Tensor | None, torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows to 8 bits in groups that share a scale.

    Each group of `group_size` neighbours in a row gets the scale ``s = max(amax / M, min_scale)``,
    M the largest value of `dtype`, rounded up to a power of two in the UE8M0 formats and with
    `round_scale`; its values are x times 1 / s, both float32, rounded to nearest even. A group that
    holds NaN or Inf becomes NaN, values and scale; int8 has no NaN, so there its values are 0.

    On a GPU this is one kernel on the current stream. It is compiled at the first call for a
    dtype, format and architecture; call it once before capturing it in a CUDA graph. It runs as a
    programmatic dependent of the kernel before; one launched so after it has to wait for it
    (``griddepcontrol.wait``), as other kernels do anyway. On the CPU plain torch computes the same
    bits. Gradients do not flow through it.

    Args:
        x: (..., mn, k), bfloat16, float16 or float32, neighbours in a row contiguous. Other
            strides are free, 0 included, as long as one of them walks the leading dimensions. k is
            at most 2^20 and need not be a multiple of `group_size`: the last group may be short.
        group_size: 16, 32, 64, 128, 256, or -1 for the whole row.
        scale_format: what `sf` looks like, see below. "ue8m0_128x4" takes groups of 32 alone,
            since those who read it do.
        dtype: of the values: float8_e4m3fn, float8_e5m2 or int8 (-127 to 127).
        round_scale: round float32 scales up to powers of two.
        min_scale: lower bound of the scales, rounded to float32: a number from 0 (2^-126 for
            float32 scales) to 2^100, or whose bound to take: "vllm" (1e-10), "deepgemm" (1e-4 / M),
            "sglang" (1e-10 / M) or "ocp" (0). The default gives a group of zeros the UE8M0 byte
            94, as vLLM does.
        rows: which rows exist: all of them, :class:`Masked`, :class:`PrefixSum` or
            :class:`Indexed`. They are read on the device of x.
        index: int32, contiguous, (mn,) or (b, mn), for x of shape (T, k): row i of the result is
            ``x[index[i]]``. An index outside of 0 to T - 1 gives values 0 and scales 0.
        check: whether to read what `rows` and `index` say, which waits for the device, and refuse
            counts and indices that make no sense. Otherwise they are clamped.
        out: q and sf to write into, either of them None to have it allocated. `q` has the leading
            dimensions of the result, any strides that do not overlap, and, unless rows are
            ``Masked``, may have more rows, which become 0. `sf` has the shape and strides below.
            Padding rows of the last column become 0 as far as its storage goes, so nothing else
            may live there: leave room for them, or end the storage with the last row. Memory that
            overlaps is refused, but not under ``torch.compile``, which cannot see it.

    Returns:
        q: that of `out`, or (..., mn, k), `dtype`, contiguous; with an index, (*index.shape, k).
        sf: that of `out`, or a new one. With g = ceil(k / group_size) groups in a row, p columns
            and A = mn rounded up to a multiple of 4:

            "ue8m0": int32 (..., mn, p = ceil(g / 4)), strides (p A, 1, A), the exponents of four
            groups in a word, the first in the low byte; bytes past the last group 0.
            "float32": float32 (..., mn, p = g), strides (p A, 1, A).
            "float32_row_major": float32 (..., mn, g), contiguous.
            "ue8m0_row_major": float8_e8m0fnu (..., mn, g), contiguous.
            "ue8m0_128x4": float8_e8m0fnu (..., align(mn, 128) align(g, 4)), contiguous: blocks of
            128 rows and 4 groups, as cuBLAS, CUTLASS and ``torch._scaled_mm`` read them. The byte
            of (row, group) is ``((row // 128) * (align(g, 4) // 4) + group // 4) * 512
            + row % 32 * 16 + row % 128 // 32 * 4 + group % 4``; all others are 0.

            DeepGEMM reads the first on SM100, the second on SM90.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong value, shape, stride, alignment or device.
        RuntimeError: x requires a gradient while gradients are recorded, or its GPU is not
            supported.
    """
    _check_no_gradient("quantize", "x", x)
    if check is not False and check is not True:
        raise TypeError(f"check: expected a bool, got {check!r}")
    q, sf = (None, None) if out is None else _out_pair(out)
    choices = (group_size, scale_format, dtype, round_scale, min_scale)
    if not is_traced(x):
        return execution.quantize(x, q, sf, choices, rows, index, check)
    if check:
        raise ValueError("check: expected False under a tracer, which has no counts to read")
    fmt, batch_shape, mn = checks.check_call(x, q, sf, choices, rows, index)
    operands = (*choices[:4], resolve_min_scale(fmt, min_scale), *to_operands(rows), index)
    if out is None:
        return torch.ops.cute_quant.quantize(x, *operands)
    q = _empty_values(x, fmt, batch_shape, mn) if q is None else q
    if fmt.scale_dtype is not torch.float8_e8m0fnu:
        sf = fmt.empty_scales(batch_shape, mn, x.shape[-1], x.device) if sf is None else sf
        torch.ops.cute_quant.quantize_out(x, q, sf, *operands)
        return q, sf
    # As bytes, because Inductor cannot hand float8_e8m0fnu to an operator that writes them.
    if sf is None:
        stored = x.new_empty(fmt.scale_shape(batch_shape, mn, x.shape[-1]), dtype=torch.uint8)
        sf = stored.view(fmt.scale_dtype)
    else:
        checks.check_tensor("out sf", sf, (fmt.scale_dtype,))
        stored = sf.view(torch.uint8)
    torch.ops.cute_quant.quantize_out(x, q, stored, *operands)
    return q, sf


def dequantize(
    q: torch.Tensor,
    sf: torch.Tensor,
    group_size: int = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Multiply quantized values by their scales.

    Args:
        q: (..., mn, k), float8_e4m3fn, float8_e5m2 or int8, neighbours in a row contiguous, other
            strides free as long as one of them walks the leading dimensions; without rows past
            those of `sf`.
        sf: the scales that `quantize` returned with it: int32 are packed UE8M0, float8_e8m0fnu
            row-major or, where they have a dimension less than q, in blocks of 128x4 (groups of
            32). Strides are free, but for those inside of blocks and as for q.
        group_size: neighbours that share a scale, as in `quantize`.
        dtype: of the result: bfloat16, float16 or float32. Products are computed in float32 and
            rounded once, to Inf where they are beyond its largest number.

    Returns:
        (..., mn, k), `dtype`, contiguous.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: `group_size`, the shapes or devices do not belong together.
        RuntimeError: q or sf requires a gradient while gradients are recorded.
    """
    _check_no_gradient("dequantize", "q", q)
    _check_no_gradient("dequantize", "sf", sf)
    if is_traced(q) or is_traced(sf):
        checks.check_dequantize_call(q, sf, group_size, dtype)
        return torch.ops.cute_quant.dequantize(q, sf, group_size, dtype)
    return execution.dequantize(q, sf, group_size, dtype)


def fake_quantize(
    x: torch.Tensor,
    group_size: int = 128,
    scale_format: str = "ue8m0",
    *,
    dtype: torch.dtype = VALUE_DTYPE,
    round_scale: bool = False,
    min_scale: float | str = DEFAULT_MIN_SCALE,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """What is left of `x` after `quantize` and `dequantize`, in one pass and without scales.

    Equal to ``dequantize(*quantize(x, ...), group_size, x.dtype)``, so a group with NaN or Inf is
    all NaN. Gradients do not flow through it.

    Args:
        x, group_size, scale_format, dtype, round_scale, min_scale: as for :func:`quantize`.
        out: to write into: the shape and dtype of x, any strides that do not overlap.

    Returns:
        `out`, or a contiguous tensor of x's shape and dtype.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`quantize`.
    """
    _check_no_gradient("fake_quantize", "x", x)
    choices = (group_size, scale_format, dtype, round_scale, min_scale)
    if not is_traced(x):
        return execution.fake_quantize(x, out, choices)
    fmt = checks.check_fake_call(x, out, choices)
    operands = (*choices[:4], resolve_min_scale(fmt, min_scale))
    result = torch.ops.cute_quant.fake_quantize(x, *operands)
    return result if out is None else out.copy_(result)


def _check_no_gradient(function: str, name: str, t: object) -> None:
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    if t.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(_not_differentiable(function, name))


def _not_differentiable(function: str, name: str) -> str:
    return (
        f"{name}: expected a tensor that requires no gradient, since {function} is not "
        "differentiable; got one that does: detach it or call under torch.no_grad()"
    )


def _out_pair(out: object) -> tuple[torch.Tensor | None, torch.Tensor | None]:
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


def _empty_values(
    x: torch.Tensor, fmt: Format, batch_shape: tuple[int, ...], mn: int
) -> torch.Tensor:
    return x.new_empty((*batch_shape, mn, x.shape[-1]), dtype=fmt.dtype)


_CHOICES = "int group_size, str scale_format, ScalarType dtype, bool round_scale, float min_scale"
_ROWS = 'str rows="dense", Tensor? row_data=None, int alignment=1, Tensor? index=None'


def _rows_of(
    rows: str = "dense",
    row_data: torch.Tensor | None = None,
    alignment: int = 1,
    index: torch.Tensor | None = None,
) -> tuple[Rows | None, torch.Tensor | None]:
    return from_operands(rows, row_data, alignment), index


@torch.library.custom_op(
    "cute_quant::quantize",
    mutates_args=(),
    schema=f"(Tensor x, {_CHOICES}, {_ROWS}) -> (Tensor, Tensor)",
)
def _quantize_op(x: torch.Tensor, *operands: object) -> tuple[torch.Tensor, torch.Tensor]:
    return execution.quantize(x, None, None, operands[:5], *_rows_of(*operands[5:]))


@_quantize_op.register_fake
def _(x: torch.Tensor, *operands: object) -> tuple[torch.Tensor, torch.Tensor]:
    fmt, batch_shape, mn = checks.check_call(x, None, None, operands[:5], *_rows_of(*operands[5:]))
    # Not `empty_scales`: its storage, which a fake has none of, depends on mn % 4.
    shape = fmt.scale_shape(batch_shape, mn, x.shape[-1])
    if fmt.mn_major:
        strides = fmt.scale_strides(batch_shape, mn, x.shape[-1])
        sf = x.new_empty_strided(shape, strides, dtype=fmt.scale_dtype)
    else:
        sf = x.new_empty(shape, dtype=fmt.scale_dtype)
    return _empty_values(x, fmt, batch_shape, mn), sf


@torch.library.custom_op(
    "cute_quant::quantize_out",
    mutates_args=("q", "sf"),
    schema=f"(Tensor x, Tensor(a!) q, Tensor(b!) sf, {_CHOICES}, {_ROWS}) -> ()",
)
def _quantize_out_op(x: torch.Tensor, q: torch.Tensor, sf: torch.Tensor, *operands: object) -> None:
    execution.quantize(x, q, _typed(sf, operands), operands[:5], *_rows_of(*operands[5:]))


def _typed(sf: torch.Tensor, operands: tuple) -> torch.Tensor:
    """Scales that came as bytes, in the dtype of their format."""
    group_size, scale_format, dtype, round_scale = operands[:4]
    fmt = make_format(group_size, scale_format, round_scale, dtype)
    as_bytes = sf.dtype is torch.uint8 and fmt.scale_dtype is torch.float8_e8m0fnu
    return sf.view(fmt.scale_dtype) if as_bytes else sf


@_quantize_out_op.register_fake
def _(x: torch.Tensor, q: torch.Tensor, sf: torch.Tensor, *operands: object) -> None:
    checks.check_call(x, q, _typed(sf, operands), operands[:5], *_rows_of(*operands[5:]))


@torch.library.custom_op(
    "cute_quant::dequantize",
    mutates_args=(),
    schema="(Tensor q, Tensor sf, int group_size, ScalarType dtype) -> Tensor",
)
def _dequantize_op(
    q: torch.Tensor, sf: torch.Tensor, group_size: int, dtype: torch.dtype
) -> torch.Tensor:
    return execution.dequantize(q, sf, group_size, dtype)


@_dequantize_op.register_fake
def _(q: torch.Tensor, sf: torch.Tensor, group_size: int, dtype: torch.dtype) -> torch.Tensor:
    checks.check_dequantize_call(q, sf, group_size, dtype)
    return q.new_empty(q.shape, dtype=dtype)


@torch.library.custom_op(
    "cute_quant::fake_quantize",
    mutates_args=(),
    schema=f"(Tensor x, {_CHOICES}) -> Tensor",
)
def _fake_quantize_op(x: torch.Tensor, *choices: object) -> torch.Tensor:
    return execution.fake_quantize(x, None, choices)


@_fake_quantize_op.register_fake
def _(x: torch.Tensor, *choices: object) -> torch.Tensor:
    checks.check_fake_call(x, None, choices)
    return x.new_empty(x.shape)


def _refuse_gradients(operator: torch.library.CustomOpDef, function: str, name: str) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(_not_differentiable(function, name))

    operator.register_autograd(refuse, setup_context=refuse)


_refuse_gradients(_quantize_op, "quantize", "x")
_refuse_gradients(_dequantize_op, "dequantize", "q and sf")
_refuse_gradients(_fake_quantize_op, "fake_quantize", "x")
