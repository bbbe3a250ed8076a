"""The public operations: calls on tensors with memory are launched, a tracer gets an operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.compiler import is_dynamo_compiling

from cute_quant.contract import checks
from cute_quant.contract.blocks import check_block_format, stored_once
from cute_quant.contract.blocks import empty_scales as empty_block_scales
from cute_quant.contract.calls import Call
from cute_quant.contract.columns import ColumnCall, Output
from cute_quant.contract.dtypes import INPUT_DTYPES, describe
from cute_quant.contract.formats import DEEP_GEMM, DEEP_GEMM_SM90, Format
from cute_quant.contract.prologues import (
    FUSED,
    GatedPrologue,
    Prologue,
    make_rms_norm,
    make_silu_mul,
    make_silu_mul_backward,
)
from cute_quant.contract.reader_checks.arguments import check_arguments
from cute_quant.contract.reader_checks.quantized import Finding, Quantized
from cute_quant.contract.reader_checks.search import findings
from cute_quant.contract.readers import READERS
from cute_quant.contract.rows import PrefixSum, Rows
from cute_quant.contract.scale_conversion import Conversion
from cute_quant.contract.tensors import check_tensor
from cute_quant.contract.torch_private import (
    is_fake,
    jit_tracing_state,
    num_dispatch_modes,
    outside_of_graphs,
)
from cute_quant.contract.upper_scales import make_upper_scale
from cute_quant.dispatch import block_ops, column_ops, launch, operators, torch_ops
from cute_quant.dispatch import blocks as block_launches
from cute_quant.dispatch import columns as column_launches
from cute_quant.dispatch import convert_scales as conversions
from cute_quant.dispatch import tensor_amax as amaxes
from cute_quant.dispatch.launch import Launch

Out = Sequence[torch.Tensor | None]
Pair = tuple[torch.Tensor, torch.Tensor]
"""Values and scales."""


def quantize(
    x: torch.Tensor,
    fmt: Format = DEEP_GEMM,
    *,
    rows: Rows | None = None,
    index: torch.Tensor | None = None,
    scatter: torch.Tensor | None = None,
    num_rows: int | None = None,
    encode_scale: torch.Tensor | None = None,
    decode_scale: torch.Tensor | None = None,
    amax: torch.Tensor | None = None,
    rng_state: torch.Tensor | None = None,
    check: bool = False,
    out: Out | None = None,
) -> tuple[torch.Tensor, ...]:
    """Quantize rows in groups that share a scale.

    Each group of ``fmt.group_size`` elements contiguous along k gets the scale
    ``s = max(amax / M, min_scale)``, M the largest value of ``fmt.values``. It is rounded up to a
    power of two for UE8M0 scales and with ``round_scale``, as DeepGEMM does. An e4m3 scale is
    amax / M times the encode scale, rounded to e4m3, and s is its product with the decode scale.
    The values are x times 1 / s, both float32, rounded to nearest even. A group that holds NaN or
    Inf becomes NaN, values and scale; int8 and FP4 have no NaN, so their values are 0 there.

    On a GPU this is one kernel on the current stream. Dtype, format, size, strides and alignment
    choose it, and the first call that takes it compiles it; :func:`warm_up` does so before calls of
    a range are served, or captured in a CUDA graph. It runs as a programmatic dependent of the
    kernel before; one launched so after it has to wait for it (``griddepcontrol.wait``), as other
    kernels do anyway. On the CPU, and on a GPU without FP8, plain torch computes the same bits.
    Gradients do not flow through it.

    Args:
        x: (..., mn, k), bfloat16, float16 or float32, contiguous along k. Other strides are free, 0
            included, as long as one of them walks the leading dimensions. k is at most 2^20; it
            need not be a multiple of the group size: the last group may be short. For FP4 it is
            even.
        fmt: what the result looks like: dtypes, group size, layout of the scales.
        rows: which rows exist: all of them, or :class:`Masked`, :class:`PrefixSum` or
            :class:`Indexed`. Their counts are read on the device of x. Every byte of the result is
            defined, but for the rows of a ``Masked`` expert past its count and the padding of its
            scales: these keep what memory held.
        index: int32, contiguous, (mn,) or (b, mn), for x of shape (T, k): row i of the result is
            ``x[index[i]]``. An index outside of 0 to T - 1 gives values 0 and scales 0.
        scatter: int32, contiguous, (T, places), up to 32 of them, for x of shape (T, k): row t is
            read and quantized once, and written to each row of the result that ``scatter[t]``
            names; of ``Masked`` experts row r of expert e is ``e * max_m + r``. -1, what is out of
            range, and rows that do not exist are no place. Each row that exists is promised to be
            named once: one that nobody names keeps what memory held, of one that several name it is
            not defined which they get, or parts of which. All others are as without. An upper scale
            is one number. Rows of an `sf` in `out` that is row-major may lie apart, also in records
            with those of q.
        num_rows: rows of the result of a scatter: M, or max_m of ``Masked`` experts. None where a q
            in `out`, which then has no more rows, or ``Indexed`` rows tell.
        encode_scale: for e4m3 scales without `row_scale`, about 2688 over the largest magnitude:
            float32, contiguous, on the device of x, () or (1,) for the tensor, or of the leading
            dimensions for each of its matrices. For rows stacked along M it may be (G,), one for
            each end of a ``PrefixSum`` or each index of an ``Indexed``. It is read on the device,
            never waited for. Groups become NaN unless it is from 2^-117 to 2^117, and so do those
            of rows whose index is past its end. A call gives one of these three.
        decode_scale: the same, but its reciprocal, with which GEMMs multiply their result.
        amax: the same, but the largest magnitude, from which the encode scale is computed: 2688
            over it, at most 2^117, and 1 for an amax of 0.
        rng_state: int64, (2,), contiguous, on the device of x: seed and offset of Philox 4x32-10
            (Salmon et al., 2011). With it values are rounded stochastically, up or down with
            probabilities that make their mean exact. The random bits of an element depend on the
            state and on its matrix, row and column in the result alone, with a scatter on its row
            and column in x: a call with the same state draws the same ones, so add to the offset
            between calls, on the device. Bits 0 to 46 of the offset count. Numerics other than
            "ieee" and `four_over_six` are refused.
        check: whether to read the counts of `rows`, `index`, `scatter` and the upper scale, which
            synchronizes, and raise on those that are out of range or do not fit x, or on a promise
            of `scatter` that is not kept. Otherwise counts are clamped.
        out: q and sf to write into, and with ``fmt.row_scale`` the scales of rows, each of them
            None to have it allocated. `q` has the leading
            dimensions of the result, any strides that do not overlap, and, unless rows are
            ``Masked``, may have more rows, which become 0. `sf` has the shape and strides of the
            format; :func:`empty_scales` makes one. MN-major scales may also have columns without
            padding rows, strides (..., 1, mn). Padding rows of its last column become 0 as far
            as its storage goes, so nothing else may live there. Memory that overlaps is refused,
            but not under ``torch.compile``, which cannot see it.

    Returns:
        q: that of `out`, or (..., mn, k), ``fmt.values``, contiguous; with an index,
            (*index.shape, k), with a scatter (num_rows, k) or (E, num_rows, k). FP4 has two values
            in an element, so k / 2 of them.
        sf: that of `out`, or a new one: ``fmt.sf_dtype``, shape and strides as in :class:`Format`.
        row_scales: with ``fmt.row_scale``, that of `out`, or (..., mn), float32: decode scales.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong value, shape, stride, alignment or device.
        RuntimeError: x requires a gradient while gradients are recorded, a tensor has a tangent of
            forward-mode differentiation or is inside of vmap or jit.trace, or the GPU is not
            supported.
    """
    upper = None
    if not (encode_scale is decode_scale is amax is None):
        upper = make_upper_scale(encode_scale=encode_scale, decode_scale=decode_scale, amax=amax)
    moved = index is not None or scatter is not None or num_rows is not None
    plain = rows is None and not moved and rng_state is None and check is False
    if plain and not is_dynamo_compiling():
        results = None
        if out is None:
            results = launch.quantize_again(x, fmt, upper)
        elif isinstance(out, (tuple, list)) and len(out) == 2:
            q, sf = out
            if q is not None and sf is not None:
                results = launch.quantize_into_again(x, fmt, upper, q, sf)
        if results is not None:
            return results
    outputs = _outputs(out, fmt)
    if upper is not None:
        _check_input("quantize", *upper)
    _check_input("quantize", "x", x)
    call = Call(x, fmt, outputs.q, outputs.sf, rows, index, None, upper, outputs.row_scales)
    return _run(call._replace(rng_state=rng_state, scatter=scatter, num_rows=num_rows), check)


def silu_mul_quantize(
    gate_up: torch.Tensor,
    fmt: Format = DEEP_GEMM,
    *,
    interleaved: bool = False,
    clamp: float | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    weight: torch.Tensor | None = None,
    rounding: str = FUSED,
    rows: Rows | None = None,
    index: torch.Tensor | None = None,
    scatter: torch.Tensor | None = None,
    num_rows: int | None = None,
    encode_scale: torch.Tensor | None = None,
    decode_scale: torch.Tensor | None = None,
    amax: torch.Tensor | None = None,
    check: bool = False,
    out: Out | None = None,
) -> tuple[torch.Tensor, ...]:
    """Apply a gated activation and quantize its result, in one pass.

    A row of `gate_up` holds gates g and ups u. Its result, which is quantized as by
    :func:`quantize`, is ``(u + beta) * g * sigmoid(alpha * g)``: by default SwiGLU (Shazeer, 2020),
    and with ``clamp=7, alpha=1.702, beta=1, interleaved=True`` the activation of gpt-oss.

    Args:
        gate_up: (..., mn, 2 k), bfloat16, float16 or float32, with strides as x of
            :func:`quantize`. k is at most 2^20.
        fmt: what the result looks like.
        interleaved: whether columns 0, 2, 4 are gates and 1, 3, 5 ups. By default the first half of
            a row is gates, the second ups.
        clamp: None, or c above 0: g becomes at most c, u at least -c and at most c. NaN stays NaN.
        alpha: factor of g in the sigmoid: finite, of magnitude up to 2^100, rounded to float32 like
            `clamp`.
        beta: added to u: finite, rounded to float32.
        weight: a factor for each row of the result, such as the routing weight of a token: float32,
            contiguous, of q's shape without k; with an index, of its shape; with a scatter, (T,).
        rounding: "fused" computes in float64 on the CPU, in float32 on a GPU, and quantizes float32
            values: rounded once, and once more when multiplied by a weight. "unfused" rounds to
            the dtype of `gate_up` after each operation, `clamp` too, as torch does: equal to
            ``quantize(F.silu(g) * u)``, or with an alpha that is not 1 to
            ``quantize(g * torch.sigmoid(alpha * g) * (u + beta))`` (except for a beta that the
            dtype does not have: on the CPU torch rounds it first); the product with a weight is
            computed in float32, and rounded. "vllm" rounds the product of activation and up alone,
            as vLLM's ``silu_mul_quant_fp8_packed_triton`` does: all before it is float32, `clamp`
            too. "vllm_triton" rounds the bound, the activation, the sum of u and beta, and the
            product, as vLLM's ``silu_mul_per_token_group_quant_fp8_colmajor`` does: "unfused" with
            an alpha rounds in the sigmoid, too. "vllm_bf16" rounds the same, and "vllm_cuda" as
            "fused"; on a GPU both have the exponential of CUDA C++, and the latter its division.
            "sglang" rounds the sum of u and beta alone, as SGLang's
            ``silu_and_mul_masked_post_quant_fwd`` does. On a GPU a sigmoid below 2^-126,
            of gates below -87, may be 0.
        rows: which rows exist, as for :func:`quantize`.
        index: int32, (mn,) or (b, mn): rows of `gate_up`, as for :func:`quantize`.
        scatter: int32, (T, places): places of rows of `gate_up`, as for :func:`quantize`.
        num_rows: rows of the result of a scatter, as for :func:`quantize`.
        encode_scale: as for :func:`quantize`.
        decode_scale: as for :func:`quantize`.
        amax: as for :func:`quantize`.
        check: whether to read counts and indices and raise on those out of range.
        out: q and sf to write into, as for :func:`quantize`.

    Returns:
        q, sf: as :func:`quantize` of the (..., mn, k) values returns them. A group in which a
            result is NaN or beyond the largest float32, or where it is rounded beyond the largest
            of its dtype, becomes NaN.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`quantize`.
    """
    _check_input("silu_mul_quantize", "gate_up", gate_up)
    if weight is not None:
        _check_input("silu_mul_quantize", "weight", weight)
    outputs = _outputs(out, fmt)
    upper = make_upper_scale(encode_scale=encode_scale, decode_scale=decode_scale, amax=amax)
    if upper is not None:
        _check_input("silu_mul_quantize", *upper)
    prologue = make_silu_mul(
        interleaved=interleaved,
        clamp=clamp,
        alpha=alpha,
        beta=beta,
        rounding=rounding,
        weight=weight,
    )
    call = Call(
        gate_up, fmt, outputs.q, outputs.sf, rows, index, prologue, upper, outputs.row_scales
    )
    return _run(call._replace(scatter=scatter, num_rows=num_rows), check)


def silu_mul_backward_quantize(
    grad: torch.Tensor,
    gate_up: torch.Tensor,
    fmt: Format = DEEP_GEMM,
    *,
    interleaved: bool = False,
    clamp: float | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    rows: Rows | None = None,
    encode_scale: torch.Tensor | None = None,
    decode_scale: torch.Tensor | None = None,
    amax: torch.Tensor | None = None,
    rng_state: torch.Tensor | None = None,
    check: bool = False,
    out: Out | None = None,
) -> tuple[torch.Tensor, ...]:
    """Compute the gradients of gates and ups of a gated activation, and quantize them, in one pass.

    With gates g and ups u, bounded by `clamp`, and s = sigmoid(alpha * g), the gradients of
    ``(u + beta) * g * s`` are ``grad * (u + beta) * s * (1 + alpha * g * (1 - s))`` for gates and
    ``grad * g * s`` for ups, and 0 for those beyond their bounds. They are computed in float64 on
    the CPU, in float32 on a GPU, and quantized as float32 by :func:`quantize`, in the places of
    gates and ups. Products with Inf are Inf or NaN, so their groups become NaN.

    Args:
        grad: (..., mn, k), of the dtype of `gate_up`, with strides as x of :func:`quantize`: the
            gradient of what :func:`silu_mul_quantize` quantizes.
        gate_up: (..., mn, 2 k), bfloat16, float16 or float32, with strides as x of
            :func:`quantize`. k is at most 2^19.
        fmt: what the result looks like. Groups are of columns of the result: where k is no multiple
            of their size, one has gates and ups.
        interleaved: as for :func:`silu_mul_quantize`.
        clamp: as for :func:`silu_mul_quantize`.
        alpha: as for :func:`silu_mul_quantize`.
        beta: as for :func:`silu_mul_quantize`.
        rows: which rows exist, as for :func:`quantize`.
        encode_scale: as for :func:`quantize`.
        decode_scale: as for :func:`quantize`.
        amax: as for :func:`quantize`.
        rng_state: as for :func:`quantize`.
        check: whether to read counts and raise on those out of range.
        out: q and sf to write into, as for :func:`quantize`.

    Returns:
        q, sf: as :func:`quantize` of the (..., mn, 2 k) gradients returns them.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`quantize`.
    """
    for name, t in (("grad", grad), ("gate_up", gate_up)):
        _check_input("silu_mul_backward_quantize", name, t)
    outputs = _outputs(out, fmt)
    upper = make_upper_scale(encode_scale=encode_scale, decode_scale=decode_scale, amax=amax)
    if upper is not None:
        _check_input("silu_mul_backward_quantize", *upper)
    prologue = make_silu_mul_backward(
        grad, interleaved=interleaved, clamp=clamp, alpha=alpha, beta=beta
    )
    call = Call(
        gate_up, fmt, outputs.q, outputs.sf, rows, None, prologue, upper, outputs.row_scales
    )
    return _run(call._replace(rng_state=rng_state), check)


def rms_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    fmt: Format = DEEP_GEMM,
    *,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
    weight_offset: float = 0.0,
    rounding: str = FUSED,
    normalized: bool | torch.Tensor = False,
    rows: Rows | None = None,
    index: torch.Tensor | None = None,
    scatter: torch.Tensor | None = None,
    num_rows: int | None = None,
    encode_scale: torch.Tensor | None = None,
    decode_scale: torch.Tensor | None = None,
    amax: torch.Tensor | None = None,
    check: bool = False,
    out: Out | None = None,
) -> tuple[torch.Tensor, ...]:
    """Add a residual, divide rows by their root mean square, and quantize them, in one pass.

    With ``r = x + residual``, or x without one, rows of ``r / sqrt(mean(r^2) + eps) * weight``
    (RMSNorm: Zhang and Sennrich, 2019) are quantized as by :func:`quantize`.

    A NaN in a row of r makes all of the row NaN, and so does a row of zeros if `eps` is 0. Over the
    root mean square of a row that holds Inf all its numbers become 0, and Inf itself NaN, and so
    its group. Squares are summed in the range of float32: a sum beyond it is Inf too, and a mean
    square plus `eps` below 2^-126 is 0. Numbers are multiplied by their weight first, in float32 on
    a GPU: a product beyond it makes its group NaN, one below 2^-126 has fewer bits.

    Args:
        x: (..., mn, k), bfloat16, float16 or float32, with strides as for :func:`quantize`. k is at
            most 32768.
        weight: (k,), contiguous, float32 or the dtype of x.
        fmt: what the result looks like.
        eps: finite, 0 or more, rounded to float32.
        residual: of x's shape and dtype, contiguous along k, any other strides that do not overlap
            as long as one of them walks the leading dimensions. It is updated in place to
            x + residual, a float32 sum rounded to that dtype, unless `out` has another place.
        weight_offset: finite, rounded to float32; added to `weight` in float32, such as the 1 of
            Gemma.
        rounding: "fused" normalizes the float32 sum, in float64 on the CPU, in float32 on a GPU,
            and quantizes float32 values. "unfused" rounds the sum to x's dtype before it is
            normalized, and the result before it is quantized, as torch does: equal to
            ``quantize(F.rms_norm(x + residual, (k,), weight, eps))``, whose squares are float32.
            "huggingface" rounds the sum, the row over its root mean square, and the product with
            the weight, as LlamaRMSNorm of transformers does. "vllm" normalizes the float32 sum,
            rounds the row to the weight's dtype, and the product to x's, as vLLM's ``rms_norm``,
            ``fused_add_rms_norm`` and fused quantizers do. Both without `weight_offset`.
        normalized: whether to return the normalized rows too, or where to write them: a tensor as
            `residual` has to be. They are of x's dtype: what is quantized, in "fused" that
            rounded.
        rows: which rows exist, as for :func:`quantize`; without `residual` and `normalized`, unless
            there is a scatter, which takes every row of x.
        index: int32, (mn,) or (b, mn): rows of x, as for :func:`quantize`, without `residual` and
            `normalized`.
        scatter: int32, (T, places): places of rows of x, as for :func:`quantize`. `residual` and
            `normalized` are (T, k), as x.
        num_rows: rows of the result of a scatter, as for :func:`quantize`.
        encode_scale: as for :func:`quantize`.
        decode_scale: as for :func:`quantize`.
        amax: as for :func:`quantize`.
        check: whether to read counts and indices and raise on those out of range.
        out: as for :func:`quantize`, and maybe one more for the updated residual, each of them None
            to have it as by default. That one is a tensor as `residual` has to be, or `residual`
            itself; with another, `residual` is only read.

    Returns:
        q, sf: as :func:`quantize` of the normalized rows returns them.
        residual: if there is one, the updated: that of `out`, or `residual`.
        normalized: if asked for; contiguous, unless it is the caller's.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`quantize`.
    """
    for name, t in (("x", x), ("weight", weight), ("residual", residual)):
        if t is not None or name != "residual":
            _check_input("rms_norm_quantize", name, t)
    outputs = _outputs(out, fmt, with_residual=True)
    upper = make_upper_scale(encode_scale=encode_scale, decode_scale=decode_scale, amax=amax)
    if upper is not None:
        _check_input("rms_norm_quantize", *upper)
    if not isinstance(normalized, (bool, torch.Tensor)):
        raise TypeError(f"normalized: expected a bool or a tensor, got {describe(normalized)}")
    if normalized is True:
        check_tensor("x", x, INPUT_DTYPES)
        normalized = x.new_empty(x.shape)
    prologue = make_rms_norm(
        weight,
        eps=eps,
        weight_offset=weight_offset,
        rounding=rounding,
        residual=residual,
        residual_out=outputs.residual,
        normalized=None if normalized is False else normalized,
    )
    call = Call(x, fmt, outputs.q, outputs.sf, rows, index, prologue, upper, outputs.row_scales)
    call = call._replace(scatter=scatter, num_rows=num_rows)
    further = (prologue.residual_out, prologue.normalized)
    return *_run(call, check), *(t for t in further if t is not None)


def dequantize(
    q: torch.Tensor,
    sf: torch.Tensor,
    fmt: Format = DEEP_GEMM,
    *,
    dtype: torch.dtype = torch.bfloat16,
    encode_scale: torch.Tensor | None = None,
    decode_scale: torch.Tensor | None = None,
    amax: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply quantized values by their scales.

    Args:
        q: (..., mn, k), ``fmt.values``, contiguous along k, other strides free as long as one of
            them walks the leading dimensions; without rows past those of `sf`.
        sf: the scales that :func:`quantize` returned with it. Strides are free, except inside of
            blocks and as for q.
        fmt: the format that they were quantized to.
        dtype: of the result: bfloat16, float16 or float32. Products are computed in float32 and
            rounded once, to Inf where they are beyond its largest number.
        encode_scale: as for :func:`quantize`.
        decode_scale: as for :func:`quantize`, but of any value; or, of a format with `row_scale`,
            the scales of rows that :func:`quantize` returned, (..., mn).
        amax: as for :func:`quantize`.

    Returns:
        (..., mn, k), `dtype`, contiguous.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: the shapes or devices do not belong together.
        RuntimeError: q or sf requires a gradient while gradients are recorded.
    """
    _check_input("dequantize", "q", q)
    _check_input("dequantize", "sf", sf)
    upper = make_upper_scale(encode_scale=encode_scale, decode_scale=decode_scale, amax=amax)
    if upper is not None:
        _check_input("dequantize", *upper)
    if not (_is_traced(q) or _is_traced(sf)):
        return launch.dequantize(q, sf, fmt, dtype, upper)
    checks.check_format(fmt)
    return torch_ops.dequantize(q, sf, fmt, dtype, upper)


def fake_quantize(
    x: torch.Tensor,
    fmt: Format = DEEP_GEMM,
    *,
    encode_scale: torch.Tensor | None = None,
    decode_scale: torch.Tensor | None = None,
    amax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return what is left of `x` after `quantize` and `dequantize`, in one pass, without scales.

    Equal to ``dequantize(*quantize(x, fmt), fmt, dtype=x.dtype)``, so a group with NaN or Inf is
    all NaN. Gradients do not flow through it.

    Args:
        x: (..., mn, k), bfloat16, float16 or float32, with strides as for :func:`quantize`.
        fmt: the format to quantize to.
        encode_scale: as for :func:`quantize`.
        decode_scale: as for :func:`quantize`.
        amax: as for :func:`quantize`.
        out: to write into: the shape and dtype of x, any strides that do not overlap.

    Returns:
        `out`, or a contiguous tensor of x's shape and dtype.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`quantize`.
    """
    _check_input("fake_quantize", "x", x)
    upper = make_upper_scale(encode_scale=encode_scale, decode_scale=decode_scale, amax=amax)
    if upper is not None:
        _check_input("fake_quantize", *upper)
    call = Call(x, fmt, upper=upper)
    if not _is_traced(x):
        return launch.fake_quantize(call, out)
    checks.check_format(fmt)
    result = torch_ops.fake_quantize(call)
    if out is None:
        return result
    if not is_dynamo_compiling():
        checks.check_fake_quantize(call, out)
    return out.copy_(result)


def tensor_amax(x: torch.Tensor, *, per_matrix: bool = False) -> torch.Tensor:
    """Return the largest magnitude of a tensor, in one pass over it.

    Operations take it as `amax` for formats with e4m3 scales. It is exact. A NaN makes it NaN, an
    Inf Inf, and a tensor without elements has 0. It stays on the device: the call does not
    synchronize. On a GPU the first call for a dtype and an alignment compiles the kernel.

    Args:
        x: (..., mn, k), bfloat16, float16 or float32, with strides as for :func:`quantize`.
        per_matrix: whether each matrix has a largest magnitude of its own.

    Returns:
        float32, (), or (...) with `per_matrix`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`quantize`.
    """
    _check_input("tensor_amax", "x", x)
    compute = torch.ops.cute_quant.tensor_amax if _is_traced(x) else amaxes.run
    amax: torch.Tensor = compute(x, per_matrix)
    return amax


def quantize_blocks(
    w: torch.Tensor, fmt: Format = DEEP_GEMM, *, out: Out | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize weights in square blocks that share a scale.

    A block is ``fmt.group_size`` rows and as many columns, 128 or 32, short ones at both ends. Its
    scale is that of its largest magnitude, by the rules of :func:`quantize`: the same smallest
    scale, numerics and rounding, NaN for a block that is not finite. Values are those of
    :func:`quantize` under it. w is read once.

    Args:
        w: (..., N, K), bfloat16, float16 or float32, contiguous along k or along n. Other strides
            are free, as long as one of them walks the leading dimensions. K is at most 2^20; for
            FP4 it is even.
        fmt: what the result looks like. Its scales are float32 or UE8M0: NVFP4 has groups of rows,
            so `quantize` them. Where scales are float32 its layout has no say.
        out: q and sf to write into, each of them None to have it allocated; as for
            :func:`quantize`, but q has no more rows than w.

    Returns:
        q: that of `out`, or (..., N, K), ``fmt.values``, contiguous, also where w is contiguous
            along n. FP4 has two values in an element, so K / 2 of them.
        sf: that of `out`, or a new one. Where scales are float32: a scale for each block,
            (..., ceil(N / b), ceil(K / b)), contiguous. Where they are UE8M0: a scale for each row
            of a block, in shape, strides and padding as :func:`quantize` lays out those of
            (..., N, K). DeepGEMM and cuBLAS read them so, and :func:`dequantize` does.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`quantize`.
    """
    _check_input("quantize_blocks", "w", w)
    outputs = _outputs(out, fmt)
    run = block_ops.quantize if _is_traced(w) else block_launches.quantize
    return run(w, fmt, outputs.q, outputs.sf)


def dequantize_blocks(
    q: torch.Tensor,
    sf: torch.Tensor,
    fmt: Format = DEEP_GEMM,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Multiply weights that were quantized in square blocks by their scales.

    Args:
        q: (..., N, K), ``fmt.values``, with strides as for :func:`dequantize`.
        sf: the scales that :func:`quantize_blocks` returned with it. Strides of float32 scales are
            free, as long as one of them walks the leading dimensions.
        fmt: the format that they were quantized to.
        dtype: of the result, as for :func:`dequantize`.

    Returns:
        (..., N, K), `dtype`, contiguous.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`dequantize`.
    """
    checks.check_format(fmt)
    if not stored_once(fmt):
        check_block_format(fmt)
        return dequantize(q, sf, fmt, dtype=dtype)
    _check_input("dequantize_blocks", "q", q)
    _check_input("dequantize_blocks", "sf", sf)
    traced = _is_traced(q) or _is_traced(sf)
    run = block_ops.dequantize if traced else block_launches.dequantize
    return run(q, sf, fmt, dtype)


def requantize_blocks(
    w8: torch.Tensor,
    w_sf: torch.Tensor,
    fmt: Format = DEEP_GEMM,
    *,
    encode_scale: torch.Tensor | None = None,
    decode_scale: torch.Tensor | None = None,
    amax: torch.Tensor | None = None,
    check: bool = False,
    out: Out | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize the weights of an FP8 checkpoint anew, in another format.

    The products of values and scales are float32, as if they were stored, and are quantized: in
    square blocks as by :func:`quantize_blocks`, or, to FP4, in groups of rows as by
    :func:`quantize`. They stay in registers: a GPU reads the 8-bit values once, and holds no copy
    in a wider type.

    Args:
        w8: (..., N, K), float8_e4m3fn, with strides as for :func:`quantize_blocks`. For FP4 it is
            contiguous along k, as its groups are.
        w_sf: float32, the scales of blocks, which checkpoints call ``weight_scale_inv``:
            (..., ceil(N / b), ceil(K / b)) for blocks of b x b, b being 128 or 32. Strides are
            free, as long as one of them walks the leading dimensions.
        fmt: what the result looks like: for 8-bit values as for :func:`quantize_blocks`, for FP4 as
            for :func:`quantize`, without `row_scale`.
        encode_scale: as for :func:`quantize`.
        decode_scale: as for :func:`quantize`.
        amax: as for :func:`quantize`, of the products.
        check: whether to read `w8`, `w_sf` and the scale over e4m3 scales, which synchronizes, and
            raise on NaN among the values, on scales that are negative or not finite, on products
            that are Inf, and on a scale that does not fit the products.
        out: as for :func:`quantize_blocks`.

    Returns:
        q, sf: as :func:`quantize_blocks` or, for FP4, :func:`quantize` returns them.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`quantize`.
    """
    _check_input("requantize_blocks", "w8", w8)
    _check_input("requantize_blocks", "w_sf", w_sf)
    upper = make_upper_scale(encode_scale=encode_scale, decode_scale=decode_scale, amax=amax)
    if upper is not None:
        _check_input("requantize_blocks", *upper)
    _check_bool("check", check)
    outputs = _outputs(out, fmt)
    call = w8, w_sf, fmt, upper, outputs.q, outputs.sf
    if not _is_traced(w8):
        return block_launches.requantize(*call, check=check)
    if check:
        raise ValueError(
            "check: expected False under a tracer or dispatch mode, or with a tensor subclass, "
            "whose values are not read"
        )
    return block_ops.requantize(*call)


def quantize_columns(
    x: torch.Tensor,
    fmt: Format,
    *,
    transposed: bool = False,
    rows: PrefixSum | None = None,
    rng_state: torch.Tensor | None = None,
    check: bool = False,
    out: Out | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize columns in groups of rows that share a scale, as weight gradients are computed with.

    A group is ``fmt.group_size`` rows, 32 or 128, of one column. The result is that of
    ``quantize(x.mT, fmt)``, the same bits of values and scales in other places: x is not
    transposed before, and read once. On a GPU this is one kernel, as of :func:`quantize`.

    Args:
        x: (..., mn, k), bfloat16, float16 or float32, contiguous along k, with strides as for
            :func:`quantize`. mn need not be a multiple of the group size: the last group may be
            short.
        fmt: the format of the rows of the transpose: 8-bit values, and scales that are float32 and
            MN-major in groups of 32 or 128, or UE8M0 in groups of 32, packed and MN-major or in
            blocks of 128x4.
        transposed: whether q is the transpose too, as GEMMs read it that want both operands
            contiguous along the dimension that they sum over.
        rows: None, or a :class:`PrefixSum` of experts stacked along M, for x of shape (M, k). Its
            `alignment` is a multiple of the group size, of 128 where four scales share a word or a
            block's row, so that none of these has rows of two experts. Rows that do not exist get
            values 0, and count as zeros in the group of an expert's last rows. A group without
            rows gets scales 0.
        rng_state: as for :func:`quantize`: values are rounded stochastically. The random bits of an
            element depend on the state and on its matrix, row and column in x alone, and are others
            than those of :func:`quantize` for it. So they are independent of these, and of
            `transposed`.
        check: whether to read the ends of `rows`, which synchronizes, and raise on those out of
            range. Otherwise they are clamped.
        out: q and sf to write into, each of them None to have it allocated: `q` with the shape of
            the result, any strides that do not overlap and rows that are contiguous, `sf`
            contiguous, both in memory of their own.

    Returns:
        q: that of `out`, or (..., mn, k), or (..., k, mn) if it is `transposed`; ``fmt.values``,
            contiguous.
        sf: that of `out`, or a new one, contiguous, with a row for each group or word: float32
            (..., ceil(mn / g), k), or int32 (..., ceil(mn / 128), k), where group j of a column is
            byte j % 4 of word j / 4, the low one first, and bytes past the last group are 0. In
            128x4 blocks it is that of :func:`quantize` for the transpose: (..., align(k, 128)
            align(ceil(mn / 32), 4)).

        DeepGEMM's k-grouped GEMMs read float32 and int32 scales on SM100 with q as x lies,
        and float32 ones on SM90 with q transposed, of one expert; cuBLAS reads 128x4 blocks with
        q transposed. ``dequantize(q, sf.mT, fmt)`` is the transpose of x again where q is
        transposed and scales are MN-major.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`quantize`.
    """
    _check_input("quantize_columns", "x", x)
    outputs = _outputs(out, fmt)
    columns = Output(fmt, outputs.q, outputs.sf)
    call = ColumnCall(x, columns, transposed, rows, rng_state=rng_state)
    return _run_columns(call, check).columns


def quantize_both(
    x: torch.Tensor,
    fmt: Format,
    column_fmt: Format,
    *,
    transposed: bool = False,
    rows: PrefixSum | None = None,
    rng_state: torch.Tensor | None = None,
    check: bool = False,
    out: Sequence[Out | None] | None = None,
) -> tuple[Pair, Pair]:
    """Quantize rows in groups along k, and columns in groups of rows, from one read of x.

    FP8 training needs both of each activation and gradient: groups along k for the forward GEMM and
    the gradient of the input, groups along rows for the gradient of the weight. Equal to the bit to
    ``quantize(x, fmt, rows=rows)`` and
    ``quantize_columns(x, column_fmt, transposed=transposed, rows=rows)``, and both of them with the
    same `rng_state`.

    Args:
        x: (..., mn, k), as for :func:`quantize_columns`.
        fmt: of the rows, as for :func:`quantize`: 8-bit values in groups of 32 or 128, any layout.
        column_fmt: of the columns, as for :func:`quantize_columns`.
        transposed: whether the values of the columns are (..., k, mn).
        rows: None or a :class:`PrefixSum`, as for :func:`quantize_columns`.
        rng_state: as for :func:`quantize` and :func:`quantize_columns`; each direction has random
            bits of its own.
        check: whether to read the ends of `rows`, which synchronizes, and raise on those out of
            range.
        out: memory for the two results, each a pair as `out` of :func:`quantize_columns` or None;
            q of the rows has no more rows than x.

    Returns:
        The pair (q, sf) of the rows as :func:`quantize` returns it, and that of the columns.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`quantize`.
    """
    _check_input("quantize_both", "x", x)
    return _run_both(x, fmt, column_fmt, None, transposed, rows, rng_state, check, out)


def silu_mul_quantize_both(
    gate_up: torch.Tensor,
    fmt: Format,
    column_fmt: Format,
    *,
    transposed: bool = False,
    interleaved: bool = False,
    clamp: float | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    weight: torch.Tensor | None = None,
    rounding: str = FUSED,
    rows: PrefixSum | None = None,
    rng_state: torch.Tensor | None = None,
    check: bool = False,
    out: Sequence[Out | None] | None = None,
) -> tuple[Pair, Pair]:
    """Apply a gated activation and quantize its result in both directions, in one pass.

    The pair of rows is that of :func:`silu_mul_quantize`, to the bit. The columns are quantized as
    by :func:`quantize_columns` from the same numbers: float32 products where `rounding` is "fused",
    and else products in the dtype of `gate_up`. No copy of them is written.

    Args:
        gate_up: (..., mn, 2 k), as for :func:`silu_mul_quantize`.
        fmt: of the rows, as for :func:`quantize_both`.
        column_fmt: of the columns, as for :func:`quantize_columns`.
        transposed: whether the values of the columns are (..., k, mn).
        interleaved: as for :func:`silu_mul_quantize`.
        clamp: as for :func:`silu_mul_quantize`.
        alpha: as for :func:`silu_mul_quantize`.
        beta: as for :func:`silu_mul_quantize`.
        weight: as for :func:`silu_mul_quantize`.
        rounding: as for :func:`silu_mul_quantize`.
        rows: None or a :class:`PrefixSum`, as for :func:`quantize_columns`.
        rng_state: as for :func:`quantize_both`.
        check: whether to read the ends of `rows`, which synchronizes, and raise on those out of
            range.
        out: memory for the two results, as for :func:`quantize_both`.

    Returns:
        The pair (q, sf) of the rows of the (..., mn, k) products, and that of their columns.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`quantize`.
    """
    _check_input("silu_mul_quantize_both", "gate_up", gate_up)
    if weight is not None:
        _check_input("silu_mul_quantize_both", "weight", weight)
    prologue = make_silu_mul(
        interleaved=interleaved,
        clamp=clamp,
        alpha=alpha,
        beta=beta,
        rounding=rounding,
        weight=weight,
    )
    return _run_both(gate_up, fmt, column_fmt, prologue, transposed, rows, rng_state, check, out)


def silu_mul_backward_quantize_both(
    grad: torch.Tensor,
    gate_up: torch.Tensor,
    fmt: Format,
    column_fmt: Format,
    *,
    transposed: bool = False,
    interleaved: bool = False,
    clamp: float | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    rows: PrefixSum | None = None,
    rng_state: torch.Tensor | None = None,
    check: bool = False,
    out: Sequence[Out | None] | None = None,
) -> tuple[Pair, Pair]:
    """Compute the gradients of gates and ups, and quantize them in both directions, in one pass.

    The pair of rows is that of :func:`silu_mul_backward_quantize`, to the bit. The columns are
    quantized as by :func:`quantize_columns` from the same float32 gradients. Where k is a multiple
    of 128, or columns are interleaved, `grad` and `gate_up` are read once; else once more from the
    L2 cache.

    Args:
        grad: (..., mn, k), as for :func:`silu_mul_backward_quantize`.
        gate_up: (..., mn, 2 k), as for :func:`silu_mul_backward_quantize`.
        fmt: of the rows, as for :func:`quantize_both`.
        column_fmt: of the columns, as for :func:`quantize_columns`.
        transposed: whether the values of the columns are (..., 2 k, mn).
        interleaved: as for :func:`silu_mul_quantize`.
        clamp: as for :func:`silu_mul_quantize`.
        alpha: as for :func:`silu_mul_quantize`.
        beta: as for :func:`silu_mul_quantize`.
        rows: None or a :class:`PrefixSum`, as for :func:`quantize_columns`.
        rng_state: as for :func:`quantize_both`.
        check: whether to read the ends of `rows`, which synchronizes, and raise on those out of
            range.
        out: memory for the two results, as for :func:`quantize_both`.

    Returns:
        The pair (q, sf) of the rows of the (..., mn, 2 k) gradients, and that of their columns.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`quantize`.
    """
    for name, t in (("grad", grad), ("gate_up", gate_up)):
        _check_input("silu_mul_backward_quantize_both", name, t)
    prologue = make_silu_mul_backward(
        grad, interleaved=interleaved, clamp=clamp, alpha=alpha, beta=beta
    )
    return _run_both(gate_up, fmt, column_fmt, prologue, transposed, rows, rng_state, check, out)


def convert_scales(
    sf: torch.Tensor,
    fmt: Format,
    to: Format,
    shape: Sequence[int],
    *,
    rows: Rows | None = None,
    check: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convert scales to another layout that holds the same numbers, in one pass.

    The values that they belong to stay as they are. Any layout converts to any other, and float32
    scales that are powers of two to UE8M0 and back. A float32 that is no power of two would be
    lost: it becomes the UE8M0 NaN, 255, so that the GEMM does not hide it, and so do NaN and Inf.
    The byte 255 becomes NaN, and the byte 0 becomes 2^-127, or 0 where the smallest scale of `fmt`
    is above that: rows that do not exist have it. Padding becomes 0, as operations leave it.

    In place of DeepGEMM's ``get_mn_major_tma_aligned_packed_ue8m0_tensor`` and
    ``get_mn_major_tma_aligned_tensor``, and FlashInfer's ``block_scale_interleave``. On a GPU this
    is one kernel on the current stream; the first call that takes it compiles it.

    Args:
        sf: scales in the dtype and shape of `fmt`, with any strides as for :func:`dequantize`.
        fmt: the format of `sf`. Float32 scales that are powers of two have one with
            ``round_scale=True``.
        to: the format of the result, with the same values and group size.
        shape: shape of the values, (..., mn, k); of FP4 the numbers, not the bytes.
        rows: which rows exist, as for :func:`quantize`; all others get the scale 0, dead rows of
            ``Masked`` experts too.
        check: whether to read the scales and the counts of `rows`, which synchronizes, and raise on
            float32 scales that are lost, and on counts out of range.
        out: to write into: the shape and strides of `to`, as for :func:`quantize`.

    Returns:
        `out`, or new scales: ``to.sf_dtype``, shape and strides as in :class:`Format`.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong value, shape, stride or device, or `to` cannot hold the
            scales of `fmt`.
        RuntimeError: as :func:`quantize`.
    """
    _check_input("convert_scales", "sf", sf)
    _check_bool("check", check)
    if out is not None and not isinstance(out, torch.Tensor):
        raise TypeError(f"out: expected a tensor or None, got {describe(out)}")
    call = Conversion(sf, fmt, to, checks.check_values_shape(shape), rows, out)
    if not _is_traced(sf):
        return conversions.run(call, check=check)
    if check:
        raise ValueError(
            "check: expected False under a tracer or dispatch mode, or with a tensor subclass, "
            "whose scales are not read"
        )
    # A schema cannot name what is wrong with these.
    checks.check_format(fmt)
    checks.check_format(to, "to")
    checks.check_row_kind(rows)
    return conversions.trace(call)


@outside_of_graphs
def check_scales(
    q: torch.Tensor,
    sf: torch.Tensor,
    fmt: Format,
    reader: str,
    *,
    rows: Rows | None = None,
    encode_scale: torch.Tensor | None = None,
    decode_scale: torch.Tensor | None = None,
    amax: torch.Tensor | None = None,
    x: torch.Tensor | None = None,
) -> list[Finding]:
    """Find what is wrong between a producer of quantized values and the GEMM that reads them.

    Looks at dtypes, shapes, strides, alignment, padding, scales that are no powers of two, NaN, an
    upper scale of the other convention, and scales that are not in blocks. With `x` it also sees
    that values and scales belong to it. It reads values and scales, so it synchronizes: it is for
    finding a mistake, not for serving. Nothing is found in what operations return for a reader.

    Args:
        q: values, (..., mn, k), of any producer; bytes of two for FP4.
        sf: their scales. For "deep_gemm_sm90" and "deep_gemm_sm100", float32 scales of groups of
            128 may be those of square blocks of weights, (..., ceil(N / 128), ceil(K / 128)), as
            :func:`quantize_blocks` returns them: q is the B operand then, and `rows` is None.
        fmt: the format that they are said to have.
        reader: "deep_gemm_sm90" or "deep_gemm_sm100", whose dense, masked, contiguous and psum
            GEMMs `rows` tells apart; "deep_gemm_sm90_k_grouped" or "deep_gemm_sm100_k_grouped",
            with q and sf as these take them; "scaled_mm" (cuBLAS), "cutlass" or "trtllm_8x4".
        rows: which rows exist, as for :func:`quantize`. None for k-grouped readers.
        encode_scale: the scale over e4m3 scales that values are multiplied back with, as for
            :func:`dequantize`; with ``PrefixSum`` or ``Indexed`` rows also (G,), one for each
            group, as for :func:`quantize`. Each is judged by the rows under it.
        decode_scale: as `encode_scale`. With ``row_scale``, the scales of rows.
        amax: as `encode_scale`.
        x: what was quantized, (..., mn, k), on the device of q, where it is at hand. Dead rows and
            groups that are not finite are left out. None for k-grouped readers.

    Returns:
        A finding for each mistake: a `rule` and a `text`, one sentence. Empty if all is right.

    Raises:
        TypeError: an argument is no tensor with memory, Format or row domain, or the upper scale or
            `x` has a wrong dtype.
        ValueError: there is no such reader, or `rows`, the upper scale or the device of `x` do not
            fit. A wrong shape of `x` is a finding.
        RuntimeError: a tensor is inside a transform of ``torch.func``.
    """
    for name, t in (("q", q), ("sf", sf), ("x", x)):
        if not isinstance(t, torch.Tensor) and not (t is None and name == "x"):
            raise TypeError(f"{name}: expected a torch.Tensor, got {describe(t)}")
    checks.check_format(fmt)
    if not isinstance(reader, str) or reader not in READERS:
        raise ValueError(f"reader: expected one of {tuple(READERS)}, got {describe(reader)}")
    checks.check_row_kind(rows)
    upper = make_upper_scale(encode_scale=encode_scale, decode_scale=decode_scale, amax=amax)
    given = Quantized(q, sf, fmt, READERS[reader], reader, rows, upper, x)
    with torch.no_grad():
        check_arguments(given)
        return findings(given)


@outside_of_graphs
def bind(*args: Any, operation: Callable[..., Any] = quantize, **kwargs: Any) -> Launch:
    """Check a call once, and return its launch, for loops over the same memory.

    ``launch = bind(x, fmt, out=(q, sf))`` checks what ``quantize(x, fmt, out=(q, sf))`` does,
    compiles the kernel and allocates what `out` leaves out, but launches nothing. Each ``launch()``
    runs the operation on what the tensors hold then, on the current stream, without checks, and
    returns its results, the same tensors every time. It may be captured in a CUDA graph after a
    launch of it, or after :func:`warm_up`.

    The launch keeps its tensors. It does not see that one of them is resized, or given other
    storage. `check` reads counts once, here. Under ``torch.compile`` neither is traced.

    Args:
        *args: positional arguments of `operation`.
        **kwargs: keyword arguments of `operation`.
        operation: :func:`quantize`, :func:`silu_mul_quantize`,
            :func:`silu_mul_backward_quantize`, :func:`rms_norm_quantize`, :func:`dequantize`,
            :func:`fake_quantize`, :func:`quantize_blocks`, :func:`dequantize_blocks`,
            :func:`requantize_blocks`, :func:`quantize_columns`, :func:`quantize_both`,
            :func:`silu_mul_quantize_both`, :func:`silu_mul_backward_quantize_both` or
            :func:`convert_scales`.

    Returns:
        The launch: a callable whose ``results`` are what `operation` returns.

    Raises:
        TypeError: `operation` is none of them, its tensors have no memory, or as it raises itself.
        ValueError, RuntimeError: as `operation` raises them.
    """
    operations = (
        quantize,
        silu_mul_quantize,
        silu_mul_backward_quantize,
        rms_norm_quantize,
        dequantize,
        fake_quantize,
        quantize_blocks,
        dequantize_blocks,
        requantize_blocks,
        convert_scales,
        quantize_columns,
        quantize_both,
        silu_mul_quantize_both,
        silu_mul_backward_quantize_both,
    )
    if not any(operation is function for function in operations):
        names = ", ".join(function.__name__ for function in operations)
        raise TypeError(f"operation: expected one of {names}, got {describe(operation)}")
    return launch.bind(operation, *args, **kwargs)


def empty_scales(
    fmt: Format,
    shape: Sequence[int],
    *,
    blocks: bool = False,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Return uninitialized memory for the scales of values, as `out` of an operation takes it.

    Args:
        fmt: the format of values and scales.
        shape: shape of the values, (..., mn, k).
        blocks: whether they are scales of square blocks, as :func:`quantize_blocks` writes them.
        device: device of the scales, by default torch's.

    Returns:
        ``fmt.sf_dtype``, shape and strides as :class:`Format` says, in storage that holds all
        padding; float32 scales of blocks as :func:`quantize_blocks` says.

    Raises:
        TypeError: `fmt` is no Format, `shape` is no sequence, or `blocks` is no bool.
        ValueError: `shape` has less than 2 dimensions, or too many columns, or there are no such
            blocks.
    """
    checks.check_format(fmt)
    _check_bool("blocks", blocks)
    sizes = checks.check_values_shape(shape)
    if blocks:
        check_block_format(fmt)
        return empty_block_scales(fmt, sizes, device)
    return fmt.empty_scales(*sizes, device)


def deep_gemm_format(device: torch.device | str | int | None = None) -> Format:
    """Return the format that DeepGEMM reads on a CUDA device.

    Args:
        device: a CUDA device, by default the current one.

    Returns:
        ``DEEP_GEMM`` on compute capability 10, ``DEEP_GEMM_SM90`` on 9.

    Raises:
        ValueError: `device` is no CUDA device.
        RuntimeError: DeepGEMM has no GEMMs for the GPU.
    """
    try:
        kind = torch.device("cuda" if device is None else device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: expected a CUDA device, got {describe(device)}") from None
    if kind.type != "cuda":
        raise ValueError(f"device: expected a CUDA device, got {kind}")
    try:
        major, minor = torch.cuda.get_device_capability(kind)
    except (AssertionError, RuntimeError) as error:
        raise RuntimeError(f"device: expected a CUDA device that is there, got {kind}") from error
    formats = {9: DEEP_GEMM_SM90, 10: DEEP_GEMM}
    if major not in formats:
        raise RuntimeError(
            f"device: expected compute capability 9 or 10, which DeepGEMM has GEMMs for, "
            f"got {major}.{minor}"
        )
    return formats[major]


_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


def _check_input(function: str, name: str, t: object) -> None:
    """Check that an input is a tensor that requires no gradient."""
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {describe(t)}")
    if t.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(operators.not_differentiable(function, name))


def _check_bool(name: str, value: object) -> None:
    if value is not False and value is not True:
        raise TypeError(f"{name}: expected a bool, got {describe(value)}")


def _is_traced(t: torch.Tensor) -> bool:
    """Return whether the dispatcher has to see a call: a tracer, a mode or a subclass wants it."""
    if is_dynamo_compiling():
        return True
    if jit_tracing_state() is not None:
        raise RuntimeError(
            "torch.jit.trace is not supported, it would record results as constants: use "
            "torch.export or torch.compile"
        )
    return num_dispatch_modes() > 0 or type(t) not in _PLAIN_TYPES or t.is_meta


def _inputs_of(x: torch.Tensor, prologue: Prologue | None) -> list[torch.Tensor]:
    """Return the inputs of a call that a tracer may ask for."""
    # A fake beside a real input is a mistake that the checks name.
    further = () if prologue is None else prologue.operands
    return [x, *(t for t in further if isinstance(t, torch.Tensor) and not is_fake(t))]


def _run(call: Call, check: bool) -> tuple[torch.Tensor, ...]:
    """Launch a call, or hand it to its operator."""
    _check_bool("check", check)
    if not any(map(_is_traced, _inputs_of(call.x, call.prologue))):
        return launch.quantize(call, check=check, remember=not check)
    _refuse_check(check)
    return torch_ops.quantize(call)


def _run_both(
    x: torch.Tensor,
    fmt: Format,
    column_fmt: Format,
    prologue: GatedPrologue | None,
    transposed: bool,
    rows: PrefixSum | None,
    rng_state: torch.Tensor | None,
    check: bool,
    out: Sequence[Out | None] | None,
) -> tuple[Pair, Pair]:
    """Run a call with results in both directions."""
    if out is not None and not (isinstance(out, (tuple, list)) and len(out) == 2):
        got = f"{len(out)} items" if isinstance(out, (tuple, list)) else describe(out)
        raise TypeError(f"out: expected ((q, sf), (q, sf)), got {got}")
    of_rows, of_columns = out or (None, None)
    outputs, column_outputs = _outputs(of_rows, fmt), _outputs(of_columns, column_fmt)
    along_k = Output(fmt, outputs.q, outputs.sf)
    columns = Output(column_fmt, column_outputs.q, column_outputs.sf)
    call = ColumnCall(x, columns, transposed, rows, along_k, prologue, rng_state)
    results = _run_columns(call, check)
    assert results.along_k is not None
    return results.along_k, results.columns


def _run_columns(call: ColumnCall, check: bool) -> column_launches.Results:
    """Launch a call, or hand it to its operator."""
    _check_bool("check", check)
    if not any(map(_is_traced, _inputs_of(call.x, call.prologue))):
        return column_launches.run(call, check=check)
    _refuse_check(check)
    return column_ops.run(call)


def _refuse_check(check: bool) -> None:
    """Refuse to check counts where a tracer sees the call."""
    if check:
        raise ValueError(
            "check: expected False under a tracer or dispatch mode, or with a tensor subclass, "
            "whose counts are not read"
        )


class _Outputs(NamedTuple):
    """Memory of the caller, None where there is none."""

    q: torch.Tensor | None = None
    sf: torch.Tensor | None = None
    row_scales: torch.Tensor | None = None
    residual: torch.Tensor | None = None


def _outputs(out: Out | None, fmt: Format, *, with_residual: bool = False) -> _Outputs:
    """Return what `out` gives, by name."""
    if out is None:
        return _Outputs()
    names = ["q", "sf"]
    if isinstance(fmt, Format) and fmt.row_scale:
        names.append("row_scales")
    expected = [f"({', '.join(names)})"]
    if with_residual:
        names.append("residual")
        expected.append(f"({', '.join(names)})")
    most = len(names)
    least = most - with_residual
    if not isinstance(out, (tuple, list)) or not least <= len(out) <= most:
        got = f"{len(out)} items" if isinstance(out, (tuple, list)) else describe(out)
        raise TypeError(f"out: expected {' or '.join(expected)}, got {got}")
    return _Outputs(**dict(zip(names, out, strict=False)))
