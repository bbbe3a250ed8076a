"""Operations along the rows of activations: quantize, with what is fused before, and undo it."""

from __future__ import annotations

import torch
from torch.compiler import is_dynamo_compiling

from cute_quant.contract import checks
from cute_quant.contract.calls import Call
from cute_quant.contract.dtypes import INPUT_DTYPES, describe
from cute_quant.contract.formats import DEEP_GEMM, Format
from cute_quant.contract.prologues import (
    FUSED,
    make_rms_norm,
    make_silu_mul,
    make_silu_mul_backward,
)
from cute_quant.contract.rows import Rows
from cute_quant.contract.tensors import check_tensor
from cute_quant.contract.upper_scales import make_upper_scale
from cute_quant.dispatch import launch, torch_ops
from cute_quant.dispatch import tensor_amax as amaxes
from cute_quant.ops.arguments import (
    Out,
    check_bool,
    check_input,
    goes_to_tracer,
    inputs_of,
    is_traced,
    outputs_of,
)


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
    outputs = outputs_of(out, fmt)
    if upper is not None:
        check_input("quantize", *upper)
    check_input("quantize", "x", x)
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
    check_input("silu_mul_quantize", "gate_up", gate_up)
    if weight is not None:
        check_input("silu_mul_quantize", "weight", weight)
    outputs = outputs_of(out, fmt)
    upper = make_upper_scale(encode_scale=encode_scale, decode_scale=decode_scale, amax=amax)
    if upper is not None:
        check_input("silu_mul_quantize", *upper)
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
        check_input("silu_mul_backward_quantize", name, t)
    outputs = outputs_of(out, fmt)
    upper = make_upper_scale(encode_scale=encode_scale, decode_scale=decode_scale, amax=amax)
    if upper is not None:
        check_input("silu_mul_backward_quantize", *upper)
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
            check_input("rms_norm_quantize", name, t)
    outputs = outputs_of(out, fmt, with_residual=True)
    upper = make_upper_scale(encode_scale=encode_scale, decode_scale=decode_scale, amax=amax)
    if upper is not None:
        check_input("rms_norm_quantize", *upper)
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
    check_input("dequantize", "q", q)
    check_input("dequantize", "sf", sf)
    upper = make_upper_scale(encode_scale=encode_scale, decode_scale=decode_scale, amax=amax)
    if upper is not None:
        check_input("dequantize", *upper)
    if not (is_traced(q) or is_traced(sf)):
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
    check_input("fake_quantize", "x", x)
    upper = make_upper_scale(encode_scale=encode_scale, decode_scale=decode_scale, amax=amax)
    if upper is not None:
        check_input("fake_quantize", *upper)
    call = Call(x, fmt, upper=upper)
    if not is_traced(x):
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
    check_input("tensor_amax", "x", x)
    compute = torch.ops.cute_quant.tensor_amax if is_traced(x) else amaxes.run
    amax: torch.Tensor = compute(x, per_matrix)
    return amax


def _run(call: Call, check: bool) -> tuple[torch.Tensor, ...]:
    """Launch a call, or hand it to its operator."""
    check_bool("check", check)
    if goes_to_tracer(inputs_of(call.x, call.prologue), check, "counts"):
        return torch_ops.quantize(call)
    return launch.quantize(call, check=check, remember=not check)
