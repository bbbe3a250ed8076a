"""Operations with groups along the columns, and along both rows and columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cute_quant.contract.columns import ColumnCall, Output, Pair
from cute_quant.contract.dtypes import describe
from cute_quant.contract.formats import Format
from cute_quant.contract.prologues import (
    FUSED,
    make_silu_mul,
    make_silu_mul_backward,
)
from cute_quant.contract.rows import PrefixSum
from cute_quant.dispatch import column_ops
from cute_quant.dispatch import columns as column_launches
from cute_quant.ops.arguments import (
    Out,
    check_bool,
    check_input,
    goes_to_tracer,
    inputs_of,
    outputs_of,
)


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
    check_input("quantize_columns", "x", x)
    outputs = outputs_of(out, fmt)
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
    check_input("quantize_both", "x", x)
    along_k, columns = _outputs_of_both(out, fmt, column_fmt)
    call = ColumnCall(x, columns, transposed, rows, along_k, rng_state=rng_state)
    return _run_both(call, check)


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
    check_input("silu_mul_quantize_both", "gate_up", gate_up)
    if weight is not None:
        check_input("silu_mul_quantize_both", "weight", weight)
    prologue = make_silu_mul(
        interleaved=interleaved,
        clamp=clamp,
        alpha=alpha,
        beta=beta,
        rounding=rounding,
        weight=weight,
    )
    along_k, columns = _outputs_of_both(out, fmt, column_fmt)
    call = ColumnCall(gate_up, columns, transposed, rows, along_k, prologue, rng_state)
    return _run_both(call, check)


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
        check_input("silu_mul_backward_quantize_both", name, t)
    prologue = make_silu_mul_backward(
        grad, interleaved=interleaved, clamp=clamp, alpha=alpha, beta=beta
    )
    along_k, columns = _outputs_of_both(out, fmt, column_fmt)
    call = ColumnCall(gate_up, columns, transposed, rows, along_k, prologue, rng_state)
    return _run_both(call, check)


def _outputs_of_both(
    out: Sequence[Out | None] | None, fmt: Format, column_fmt: Format
) -> tuple[Output, Output]:
    """Return what `out` gives for the rows, and for the columns."""
    if out is not None and not (isinstance(out, (tuple, list)) and len(out) == 2):
        got = f"{len(out)} items" if isinstance(out, (tuple, list)) else describe(out)
        raise TypeError(f"out: expected ((q, sf), (q, sf)), got {got}")
    for pair in out or ():
        if isinstance(pair, torch.Tensor):
            raise TypeError(f"out: expected ((q, sf), (q, sf)), got {describe(pair)} for a pair")
    of_rows, of_columns = out or (None, None)
    outputs, column_outputs = outputs_of(of_rows, fmt), outputs_of(of_columns, column_fmt)
    return (
        Output(fmt, outputs.q, outputs.sf),
        Output(column_fmt, column_outputs.q, column_outputs.sf),
    )


def _run_both(call: ColumnCall, check: bool) -> tuple[Pair, Pair]:
    """Run a call with results in both directions."""
    results = _run_columns(call, check)
    assert results.along_k is not None
    return results.along_k, results.columns


def _run_columns(call: ColumnCall, check: bool) -> column_launches.Results:
    """Launch a call, or hand it to its operator."""
    check_bool("check", check)
    if goes_to_tracer(inputs_of(call.x, call.prologue), check, "counts"):
        return column_ops.run(call)
    return column_launches.run(call, check=check)
