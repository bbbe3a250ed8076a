"""Checks of calls: each failure names the argument, what was expected and what came."""

from __future__ import annotations

from typing import NamedTuple

import torch

from cute_quant.contract.formats import (
    INPUT_DTYPES,
    UE8M0_BLOCKED,
    UE8M0_ROW_MAJOR,
    VALUE_TYPES,
    Format,
    align,
    ceil_div,
    flat_batch,
    make_format,
    resolve_min_scale,
)
from cute_quant.contract.prologues import Prologue, RmsNorm, SiluMul
from cute_quant.contract.rows import KINDS, Masked, PrefixSum, Rows
from cute_quant.contract.tensors import (
    MAX_COLUMNS,
    MAX_SIZE,
    check_count,
    check_device,
    check_matrices,
    check_operand,
    check_rows_apart,
    check_tensor,
    check_written,
)

ROWS_PER_TILE = 4
"""Of a CTA at least, so that no more tiles are counted."""
MAX_SCALES = 2**32 - 1
"""Of a matrix in columns, which kernels index with 32 bits."""
SCALE_DTYPES = (torch.int32, torch.float32, torch.float8_e8m0fnu)


class Call(NamedTuple):
    """What a call asks for: a format, and the batch shape, rows and columns of the results."""

    fmt: Format
    batch_shape: tuple[int, ...]
    mn: int
    k: int


def check_call(
    x: torch.Tensor,
    q: torch.Tensor | None,
    sf: torch.Tensor | None,
    choices: tuple,
    rows: Rows | None,
    index: torch.Tensor | None,
    prologue: Prologue | None = None,
) -> Call:
    """Check everything that tensors say of themselves, be they real or fake.

    Args:
        choices: group_size, scale_format, dtype, round_scale, min_scale.
        prologue: what comes before the quantizer.
    """
    group_size, scale_format, dtype, round_scale, min_scale = choices
    fmt = make_format(group_size, scale_format, round_scale, dtype)
    name = "x" if prologue is None else prologue.input_name
    check_tensor(name, x, INPUT_DTYPES)
    check_matrices(name, x, MAX_COLUMNS if prologue is None else prologue.max_columns)
    resolve_min_scale(fmt, min_scale)
    batch_shape, mn = check_rows(rows, index, x, name)
    # The tiles of all experts are counted together.
    rows_per_tile = 1 if isinstance(prologue, RmsNorm) else ROWS_PER_TILE
    tiles = ceil_div(mn, rows_per_tile) if isinstance(rows, Masked) else 1
    check_count(name if index is None else "index", batch_shape, max(tiles, 1))
    k = x.shape[-1]
    if prologue is not None:
        k = prologue.columns(k)
        if isinstance(prologue, SiluMul):
            _check_silu_mul(prologue, x, (*batch_shape, mn))
        else:
            _check_rms_norm(prologue, x, rows is None and index is None)
    if fmt.mn_major and fmt.scale_rows(mn) * fmt.columns(k) > MAX_SCALES:
        raise ValueError(
            f"{name}: expected up to {MAX_SCALES} elements of scales in a matrix, "
            f"got {mn} rows of {fmt.columns(k)}"
        )
    if q is not None:
        check_written("out q", q, dtype, x, name)
        _check_values_out(q, batch_shape, mn, k, exact=isinstance(rows, Masked))
    if sf is not None:
        check_written("out sf", sf, fmt.scale_dtype, x, name)
        _check_scales_out(sf, fmt, batch_shape, mn, k)
    return Call(fmt, batch_shape, mn, k)


def _check_silu_mul(prologue: SiluMul, gate_up: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Check the input and the weight for results of `shape`, but for their columns."""
    if gate_up.shape[-1] % 2:
        raise ValueError(
            "gate_up: expected an even number of columns, a gate and an up for each of the "
            f"result's, got shape {tuple(gate_up.shape)}"
        )
    weight = prologue.weight
    if weight is not None:
        check_tensor("weight", weight, (torch.float32,))
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"weight: expected shape {shape}, one for each row of the result, "
                f"got {tuple(weight.shape)}"
            )
        check_operand("weight", weight, gate_up, "gate_up")


def _check_rms_norm(prologue: RmsNorm, x: torch.Tensor, every_row: bool) -> None:
    """Check the tensors of `prologue` against the input.

    Args:
        every_row: whether the rows of the result are all those of x in their order.
    """
    weight = prologue.weight
    check_tensor("weight", weight, dict.fromkeys((x.dtype, torch.float32)))
    if tuple(weight.shape) != (x.shape[-1],):
        raise ValueError(
            f"weight: expected shape ({x.shape[-1]},), one for each column of x, "
            f"got {tuple(weight.shape)}"
        )
    check_operand("weight", weight, x, "x")
    for name, t in prologue.tensors.items():
        if t is None or name == "weight":
            continue
        if not every_row:
            raise ValueError(
                f"{name}: expected None with rows or an index, which leave rows of it undefined, "
                f"got {type(t).__name__}"
            )
        # What is only read may be a parameter.
        if t is prologue.residual:
            check_tensor(name, t, (x.dtype,))
            check_device(name, t, x, "x")
        else:
            check_written(name, t, x.dtype, x, "x")
        if t.shape != x.shape:
            raise ValueError(f"{name}: expected shape {tuple(x.shape)}, got {tuple(t.shape)}")
        check_rows_apart(name, t)


def check_fake_call(x: torch.Tensor, out: torch.Tensor | None, choices: tuple) -> Format:
    """The same for `fake_quantize`."""
    fmt = check_call(x, None, None, choices, None, None).fmt
    if out is not None:
        check_fake_out(out, x)
    return fmt


def check_dequantize_call(
    q: torch.Tensor, sf: torch.Tensor, group_size: int, dtype: torch.dtype
) -> Format:
    """The same for `dequantize`."""
    check_tensor("q", q, VALUE_TYPES)
    check_tensor("sf", sf, SCALE_DTYPES)
    if dtype not in INPUT_DTYPES:
        raise TypeError(f"dtype: expected one of {INPUT_DTYPES}, got {dtype!r}")
    if q.device != sf.device:
        raise ValueError(f"sf: expected the device of q, {q.device}, got {sf.device}")
    check_matrices("q", q, MAX_COLUMNS)
    fmt = check_scales_of(sf, q, group_size)
    flat_batch("sf", sf.shape, sf.stride(), 1 if fmt.blocked else 2)
    if fmt.blocked and sf.shape[-1] > 1 and sf.stride(-1) != 1:
        raise ValueError(f"sf: expected the bytes of blocks to be contiguous, got {sf.stride()=}")
    return fmt


def check_rows(
    rows: Rows | None, index: torch.Tensor | None, x: torch.Tensor, input_name: str
) -> tuple[tuple[int, ...], int]:
    """Check which rows are asked for against the input, without a look at their counts.

    Returns:
        The batch shape of the results, and their rows.
    """
    *batch_shape, mn = x.shape[:-1]
    if index is not None:
        check_tensor("index", index, (torch.int32,))
        if x.ndim != 2:
            raise ValueError(
                f"{input_name}: expected 2 dimensions (T, k) with an index, got {tuple(x.shape)}"
            )
        if index.ndim not in (1, 2):
            raise ValueError(f"index: expected 1 or 2 dimensions, got shape {tuple(index.shape)}")
        check_operand("index", index, x, input_name)
        *batch_shape, mn = index.shape
        if mn > MAX_SIZE:
            raise ValueError(f"index: expected up to {MAX_SIZE} rows, got {mn}")
    if rows is None:
        return tuple(batch_shape), mn
    if not isinstance(rows, tuple(KINDS.values())):
        kinds = ", ".join(kind.__name__ for kind in KINDS.values())
        raise TypeError(f"rows: expected None or one of {kinds}, got {type(rows).__name__}")
    name = f"rows.{rows.data_name}"
    check_tensor(name, rows.data, (torch.int32,))
    shape = (*batch_shape, mn)
    if len(shape) != len(rows.dimensions):
        argument, t, last = (input_name, x, ("k",)) if index is None else ("index", index, ())
        expected = ", ".join((*rows.dimensions, *last))
        raise ValueError(
            f"{argument}: expected shape ({expected}) for rows={type(rows).__name__}, "
            f"got {tuple(t.shape)}"
        )
    length = None if isinstance(rows, PrefixSum) else shape[0]
    if rows.data.ndim != 1 or (length is not None and rows.data.shape[0] != length):
        expected = "(G,), one for each group" if length is None else f"({length},)"
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(rows.data.shape)}")
    check_operand(name, rows.data, x, input_name)
    if isinstance(rows, PrefixSum):
        alignment = rows.alignment
        if not isinstance(alignment, int) or isinstance(alignment, bool):
            raise TypeError(f"rows.alignment: expected an int, got {alignment!r}")
        if not 0 < alignment <= MAX_SIZE:
            raise ValueError(f"rows.alignment: expected 1 to {MAX_SIZE}, got {alignment}")
    return tuple(batch_shape), mn


def check_counts(rows: Rows | None, index: torch.Tensor | None, tokens: int, mn: int) -> None:
    """Read what tensors say of rows, and check it. Waits for their device.

    Args:
        tokens: rows of x, which `index` points to.
        mn: rows of the result.
    """
    if index is not None:
        _check_range("index", index, -1, tokens - 1)
    if isinstance(rows, Masked):
        _check_range("rows.masked_m", rows.masked_m, 0, mn)
    if isinstance(rows, PrefixSum):
        _check_range("rows.ends", rows.ends, 0, mn)
        start = 0
        for group, end in enumerate(rows.ends.tolist()):
            if end < start:
                raise ValueError(
                    f"rows.ends: expected group {group} to end at its start {start} or later, "
                    f"got {end}"
                )
            start = align(end, rows.alignment)


def _check_range(name: str, t: torch.Tensor, lowest: int, highest: int) -> None:
    outside = ((t < lowest) | (t > highest)).nonzero().tolist()
    if outside:
        at = tuple(outside[0]) if t.ndim > 1 else outside[0][0]
        raise ValueError(f"{name}: expected {lowest} to {highest}, got {t[at].item()} at {at}")


def _check_values_out(
    q: torch.Tensor, batch_shape: tuple[int, ...], mn: int, k: int, exact: bool
) -> None:
    """Check shape and strides of a caller's `q`.

    Args:
        exact: whether it may have no more rows than `mn`.
    """
    shape = tuple(q.shape)
    if (
        q.ndim != len(batch_shape) + 2
        or (*shape[:-2], shape[-1]) != (*batch_shape, k)
        or q.shape[-2] < mn
        or (exact and q.shape[-2] != mn)
    ):
        rows = mn if exact else f"{mn} or more"
        expected = ", ".join(map(str, (*batch_shape, rows, k)))
        raise ValueError(f"out q: expected shape ({expected}), got {shape}")
    if q.shape[-2] > MAX_SIZE:
        raise ValueError(f"out q: expected up to {MAX_SIZE} rows, got {q.shape[-2]}")
    check_rows_apart("out q", q)


def _check_scales_out(
    sf: torch.Tensor, fmt: Format, batch_shape: tuple[int, ...], mn: int, k: int
) -> None:
    """Check shape and strides of a caller's `sf`."""
    shape = fmt.scale_shape(batch_shape, mn, k)
    strides = fmt.scale_strides(batch_shape, mn, k)
    if tuple(sf.shape) != shape:
        raise ValueError(f"out sf: expected shape {shape}, got {tuple(sf.shape)}")
    if sf.numel() and any(
        size > 1 and actual != stride
        for size, actual, stride in zip(shape, sf.stride(), strides, strict=True)
    ):
        raise ValueError(f"out sf: expected strides {strides}, got {sf.stride()}")


def check_fake_out(out: torch.Tensor, x: torch.Tensor) -> None:
    """Check a caller's result of `fake_quantize` against the input."""
    check_written("out", out, x.dtype, x, "x")
    if out.shape != x.shape:
        raise ValueError(f"out: expected shape {tuple(x.shape)}, got {tuple(out.shape)}")
    check_rows_apart("out", out)


def check_scales_of(sf: torch.Tensor, q: torch.Tensor, group_size: int) -> Format:
    """Check scales against the values that they belong to, and find their format."""
    if sf.dtype is torch.int32:
        scale_format = "ue8m0"
    elif sf.dtype is torch.float32:
        scale_format = "float32"
    else:
        scale_format = UE8M0_ROW_MAJOR if sf.ndim >= q.ndim else UE8M0_BLOCKED
    fmt = make_format(group_size, scale_format, False, q.dtype)
    *batch_shape, mn, k = q.shape
    expected = fmt.scale_shape(batch_shape, mn, k)
    if tuple(sf.shape) != expected:
        raise ValueError(
            f"sf: expected {expected}, the {scale_format} scales of q {tuple(q.shape)} for "
            f"group_size={group_size}, got shape {tuple(sf.shape)}"
        )
    return fmt
