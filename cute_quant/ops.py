"""The public operations: calls on real tensors go to `execution`, traced ones to operators."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from cute_quant.contract import checks
from cute_quant.contract.checks import Call
from cute_quant.contract.formats import (
    DEFAULT_MIN_SCALE,
    INPUT_DTYPES,
    VALUE_DTYPE,
    resolve_min_scale,
)
from cute_quant.contract.prologues import FUSED, make_rms_norm, make_silu_mul
from cute_quant.contract.rows import Rows, to_operands
from cute_quant.contract.tensors import check_tensor
from cute_quant.dispatch import execution
from cute_quant.dispatch.torch_ops import as_stored, empty_values, not_differentiable


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
        RuntimeError: x requires a gradient while gradients are recorded, a tensor has a tangent of
            forward-mode differentiation, or the GPU of x is not supported.
    """
    _check_no_gradient("quantize", "x", x)
    q, sf = (None, None) if out is None else _out_pair(out)
    choices = (group_size, scale_format, dtype, round_scale, min_scale)
    if not _goes_to_operator(x, check):
        return execution.quantize(x, q, sf, choices, rows, index, check)
    call = checks.check_call(x, q, sf, choices, rows, index)
    operands = *_as_operands(choices, call), *to_operands(rows), index
    if q is None and sf is None:
        return torch.ops.cute_quant.quantize(x, *operands)
    q, sf, stored = _outputs(x, q, sf, call)
    torch.ops.cute_quant.quantize_out(x, q, stored, *operands)
    return q, sf


def silu_mul_quantize(
    gate_up: torch.Tensor,
    group_size: int = 128,
    scale_format: str = "ue8m0",
    *,
    interleaved: bool = False,
    clamp: float | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    weight: torch.Tensor | None = None,
    rounding: str = FUSED,
    dtype: torch.dtype = VALUE_DTYPE,
    round_scale: bool = False,
    min_scale: float | str = DEFAULT_MIN_SCALE,
    rows: Rows | None = None,
    index: torch.Tensor | None = None,
    check: bool = False,
    out: tuple[torch.Tensor | None, torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply a gated activation, and quantize what comes of it, in one pass.

    A row of `gate_up` holds gates g and ups u. Its result, which is quantized as by
    :func:`quantize`, is ``(u + beta) * g * sigmoid(alpha * g)``: SwiGLU by default, and with
    ``clamp=7, alpha=1.702, beta=1, interleaved=True`` that of gpt-oss.

    Args:
        gate_up: (..., mn, 2 k), bfloat16, float16 or float32, with strides as x of
            :func:`quantize`. k is at most 2^20.
        group_size, scale_format, dtype, round_scale, min_scale, check: as for :func:`quantize`.
        interleaved: whether columns 0, 2, 4 are gates and 1, 3, 5 ups. By default the first half of
            a row is gates, the second ups.
        clamp: None, or c above 0: g becomes at most c, u at least -c and at most c. NaN stays NaN.
        alpha, beta: finite, alpha up to 2^100; like `clamp` they are rounded to float32.
        weight: a factor for each row of the result, such as the routing weight of a token: float32,
            contiguous, of q's shape without k; with an index, of its shape.
        rounding: "fused" computes in float64 on the CPU, in float32 on a GPU, and quantizes float32
            values: rounded once, and once more when multiplied by a weight. "unfused" rounds to
            the dtype of `gate_up` after each operation, `clamp` too, as torch does: equal to
            ``quantize(F.silu(g) * u)``, or with an alpha that is not 1 to
            ``quantize(g * torch.sigmoid(alpha * g) * (u + beta))`` (but for a beta that the dtype
            does not have: on the CPU torch rounds it first); the product with a weight is computed
            in float32, and rounded. On a GPU a sigmoid below 2^-126, of gates below -87, may be 0.
        rows, index: as for :func:`quantize`; an index names rows of `gate_up`.
        out: as for :func:`quantize`.

    Returns:
        q: (..., mn, k) and sf, as :func:`quantize` of the (..., mn, k) values returns them. A group
        in which a result is NaN or beyond the largest float32, or in "unfused" beyond the largest
        of its dtype, becomes NaN.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`quantize`.
    """
    _check_no_gradient("silu_mul_quantize", "gate_up", gate_up)
    if weight is not None:
        _check_no_gradient("silu_mul_quantize", "weight", weight)
    q, sf = (None, None) if out is None else _out_pair(out)
    choices = (group_size, scale_format, dtype, round_scale, min_scale)
    prologue = make_silu_mul(interleaved, clamp, alpha, beta, rounding, weight)
    if not _goes_to_operator(gate_up, check, weight):
        return execution.quantize(gate_up, q, sf, choices, rows, index, check, prologue)
    call = checks.check_call(gate_up, q, sf, choices, rows, index, prologue)
    operands = (
        *_as_operands(choices, call),
        *prologue.options,
        weight,
        *to_operands(rows),
        index,
    )
    if q is None and sf is None:
        return torch.ops.cute_quant.silu_mul_quantize(gate_up, *operands)
    q, sf, stored = _outputs(gate_up, q, sf, call)
    torch.ops.cute_quant.silu_mul_quantize_out(gate_up, q, stored, *operands)
    return q, sf


def rms_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
    group_size: int = 128,
    scale_format: str = "ue8m0",
    *,
    weight_offset: float = 0.0,
    rounding: str = FUSED,
    normalized: bool | torch.Tensor = False,
    dtype: torch.dtype = VALUE_DTYPE,
    round_scale: bool = False,
    min_scale: float | str = DEFAULT_MIN_SCALE,
    rows: Rows | None = None,
    index: torch.Tensor | None = None,
    check: bool = False,
    out: tuple[torch.Tensor | None, ...] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Add a residual, divide rows by their root mean square, and quantize them, in one pass.

    With ``r = x + residual``, or x without one, rows of ``r / sqrt(mean(r^2) + eps) * weight`` are
    quantized as by :func:`quantize`. A NaN in a row of r makes all of the row NaN, and so does
    a row of zeros if `eps` is 0. Over the root mean square of a row that holds Inf all its numbers
    become 0, and Inf itself NaN, and so its group. Squares are summed in the range of float32: a
    sum beyond it is Inf too, and a mean square plus `eps` below 2^-126 is 0. Numbers are multiplied
    by their weight first, in float32 on a GPU: a product beyond it makes its group NaN, one below
    2^-126 has fewer bits.

    Args:
        x: (..., mn, k), bfloat16, float16 or float32, with strides as for :func:`quantize`. k is at
            most 32768.
        weight: (k,), contiguous, float32 or the dtype of x.
        eps: finite, 0 or more, rounded to float32.
        residual: of x's shape and dtype, neighbours in a row contiguous, any other strides that do
            not overlap as long as one of them walks the leading dimensions. It is updated in place
            to x + residual, a float32 sum rounded to that dtype, unless `out` has another place.
        group_size, scale_format, dtype, round_scale, min_scale, check: as for :func:`quantize`.
        weight_offset: finite, rounded to float32; what is added to `weight` in float32, such as the
            1 of Gemma.
        rounding: "fused" normalizes the float32 sum, in float64 on the CPU, in float32 on a GPU,
            and quantizes float32 values. "unfused" rounds the sum to x's dtype before it is
            normalized, and the result before it is quantized, as torch does: equal to
            ``quantize(F.rms_norm(x + residual, (k,), weight, eps))``, whose squares are float32.
        normalized: whether to return the normalized rows too, or where to write them: a tensor as
            `residual` has to be. They are of x's dtype: what is quantized in "unfused", that
            rounded in "fused".
        rows, index: as for :func:`quantize`, but with neither `residual` nor `normalized`.
        out: q and sf as for :func:`quantize`, and maybe a third for the updated residual, each of
            them None to have it as by default. The third is a tensor as `residual` has to be, or
            `residual` itself; with another, `residual` is only read.

    Returns:
        q, sf: as :func:`quantize` of the normalized rows returns them.
        residual: if there is one, the updated: that of `out`, or `residual`.
        normalized: if asked for; contiguous, unless it is the caller's.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`quantize`.
    """
    for name, t in (("x", x), ("weight", weight), ("residual", residual)):
        if t is not None or name != "residual":
            _check_no_gradient("rms_norm_quantize", name, t)
    q, sf, residual_out = (None, None, None) if out is None else _out_triple(out)
    choices = (group_size, scale_format, dtype, round_scale, min_scale)
    if not isinstance(normalized, (bool, torch.Tensor)):
        raise TypeError(f"normalized: expected a bool or a tensor, got {type(normalized).__name__}")
    if normalized is True:
        check_tensor("x", x, INPUT_DTYPES)
        normalized = x.new_empty(x.shape)
    elif normalized is False:
        normalized = None
    prologue = make_rms_norm(
        weight, eps, weight_offset, rounding, residual, residual_out, normalized
    )
    residual_out = prologue.residual_out
    if not _goes_to_operator(x, check, weight, residual, residual_out, normalized):
        q, sf = execution.quantize(x, q, sf, choices, rows, index, check, prologue)
    else:
        call = checks.check_call(x, q, sf, choices, rows, index, prologue)
        in_place = residual_out is residual
        tensors = x, weight, None if in_place else residual, residual_out, normalized
        operands = *_as_operands(choices, call), *prologue.options, *to_operands(rows), index
        if q is None and sf is None:
            q, stored = torch.ops.cute_quant.rms_norm_quantize(*tensors, *operands)
            sf = stored.view(call.fmt.scale_dtype)
        else:
            q, sf, stored = _outputs(x, q, sf, call)
            torch.ops.cute_quant.rms_norm_quantize_out(*tensors, q, stored, *operands)
    return q, sf, *(t for t in (residual_out, normalized) if t is not None)


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
        raise RuntimeError(not_differentiable(function, name))


def _out_pair(out: object) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        raise TypeError(f"out: expected a pair (q, sf), got {type(out).__name__}")
    return out[0], out[1]


def _out_triple(
    out: object,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    if not isinstance(out, (tuple, list)) or len(out) not in (2, 3):
        raise TypeError(f"out: expected (q, sf) or (q, sf, residual), got {type(out).__name__}")
    return out[0], out[1], out[2] if len(out) == 3 else None


def _goes_to_operator(x: torch.Tensor, check: object, *others: torch.Tensor | None) -> bool:
    """Whether an operator takes this call. It then has no counts to check."""
    if check is not False and check is not True:
        raise TypeError(f"check: expected a bool, got {check!r}")
    # A fake beside a real input is a mistake that `checks` names.
    further = (t for t in others if t is not None and not isinstance(t, FakeTensor))
    traced = is_traced(x) or any(map(is_traced, further))
    if traced and check:
        raise ValueError("check: expected False under a tracer, which has no counts to read")
    return traced


def is_traced(x: torch.Tensor) -> bool:
    """Whether the dispatcher has to see this call: a tracer, a mode or a subclass wants it."""
    return (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or type(x) not in (torch.Tensor, torch.nn.Parameter)
        or x.is_meta
    )


def _as_operands(choices: tuple, call: Call) -> tuple:
    """The choices as operators take them: with a number for `min_scale`."""
    return *choices[:4], resolve_min_scale(call.fmt, choices[4])


def _outputs(
    x: torch.Tensor, q: torch.Tensor | None, sf: torch.Tensor | None, call: Call
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q and sf for an operator to write, those that are None allocated, and sf as it takes them."""
    fmt, batch_shape, mn, k = call
    q = empty_values(x, call) if q is None else q
    if sf is not None:
        return q, sf, as_stored(sf)
    if fmt.scale_dtype is not torch.float8_e8m0fnu:
        sf = fmt.empty_scales(batch_shape, mn, k, x.device)
        return q, sf, sf
    stored = x.new_empty(fmt.scale_shape(batch_shape, mn, k), dtype=torch.uint8)
    return q, stored.view(fmt.scale_dtype), stored
