"""Checks of calls. Each failure names the argument, what was expected and what came.

No tensor is read, which ``contents`` does. Sizes may be symbolic: see ``tensors``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cute_quant.contract.calls import Call, ResultShape
from cute_quant.contract.dtypes import INPUT_DTYPES, ceil_div, describe, dtype_name
from cute_quant.contract.format_choices import IEEE, MAX_COLUMNS
from cute_quant.contract.formats import Format
from cute_quant.contract.prologues import MAX_NORM_COLUMNS, RmsNorm, SiluMul, SiluMulBackward
from cute_quant.contract.rows import (
    KINDS,
    Indexed,
    Masked,
    PrefixSum,
    PrefixSumWithGaps,
    Rows,
)
from cute_quant.contract.tensors import (
    MAX_SIZE,
    check_count,
    check_device,
    check_disjoint_rows,
    check_matrices,
    check_operand,
    check_real,
    check_tensor,
    check_written,
    flat_batch,
    known,
    same_sizes,
)
from cute_quant.contract.upper_scales import DECODE, UpperScale
from cute_quant.contract.upper_scales import KINDS as UPPER_KINDS

MIN_TILE_ROWS = 4
"""Least rows of a CTA's tile, except of those that hold whole rows: the tiles of masked experts are
counted with it. Calls are refused alike on CPU and GPU, so it belongs to the contract, and
`heuristics` keeps it."""
MAX_PLACES = 32
"""Places of a row that is scattered: as many as a warp has lanes, each of which reads one."""
MAX_SCATTERED_ROWS = 2**30
"""Rows of x that are scattered: their tiles are counted together with those of the result."""
MAX_SCALES = 2**32 - 1
"""MN-major scales of a matrix, which kernels index with 32 bits."""
MAX_SCALE_BYTES = 2**31 - 1
"""Scales of a matrix in 128x4 blocks, one dimension of a tensor to a kernel."""


def check_call(call: Call) -> ResultShape:
    """Check everything that the tensors of a call say of themselves, real or fake.

    Returns:
        The shape of the result.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    x, fmt, name = call.x, call.fmt, call.input_name
    check_format(fmt)
    check_tensor(name, x, INPUT_DTYPES)
    prologue = call.prologue
    check_matrices(name, x, MAX_COLUMNS if prologue is None else prologue.max_columns)
    _check_rows(call)
    shape = call.result_shape
    # The tiles of all experts are counted together.
    whole_rows = isinstance(prologue, RmsNorm) or fmt.by_row
    tile_rows = 1 if whole_rows else MIN_TILE_ROWS
    tiles = ceil_div(shape.mn, tile_rows) if isinstance(call.rows, Masked) else 1
    counted = name if call.index is None else "index"
    check_count(counted, shape.batch_shape, 1 if known(tiles < 1) else tiles)
    if isinstance(prologue, SiluMul):
        of_rows = (*shape.batch_shape, shape.mn) if call.scatter is None else x.shape[:-1]
        check_silu_mul(prologue, x, tuple(of_rows))
    elif isinstance(prologue, SiluMulBackward):
        if call.index is not None:
            raise ValueError("index: expected None for gradients, which lie as gates and ups do")
        if call.scatter is not None:
            raise ValueError("scatter: expected None for gradients, which lie as gates and ups do")
        check_silu_mul_backward(prologue, x)
    elif isinstance(prologue, RmsNorm):
        every_row = call.scatter is not None or (call.rows is None and call.index is None)
        _check_rms_norm(prologue, x, every_row=every_row)
    check_number_of_scales(name, fmt, shape)
    check_whole_bytes(name, fmt, shape.k)
    check_upper_scale(call.upper, fmt, upper_scale_shapes(fmt, shape.batch_shape, call), x, name)
    _check_row_scales(call, shape)
    check_rng_state(call.rng_state, fmt, x, name)
    if call.q is not None:
        check_written("out q", call.q, fmt.values, x, name)
        exact = isinstance(call.rows, Masked) or call.scatter is not None
        check_values_out(call.q, fmt, shape, exact=exact)
    if call.sf is not None:
        check_written("out sf", call.sf, fmt.sf_dtype, x, name)
        if call.strided_scales:
            check_disjoint_rows("out sf", call.sf)
            check_scales_out("out sf", call.sf, fmt.scale_shape(*shape), call.sf.stride())
        else:
            check_call_scales(call.sf, fmt, shape)
    return shape


def check_real_call(call: Call) -> ResultShape:
    """Check a call that is about to run, so on tensors with memory."""
    shape = check_call(call)
    check_real(call.tensors)
    return shape


def check_kinds(call: Call) -> None:
    """Check what the schema of an operator cannot name: types, and that x has rows."""
    check_format(call.fmt)
    tensors = {"out q": call.q, "out sf": call.sf, "index": call.index, "scatter": call.scatter}
    tensors["rng_state"] = call.rng_state
    for name, t in tensors.items():
        if t is not None and not isinstance(t, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor or None, got {describe(t)}")
    check_row_kind(call.rows)
    if call.x.ndim < 2:
        raise ValueError(
            f"{call.input_name}: expected 2 or more dimensions (..., mn, k), "
            f"got {tuple(call.x.shape)}"
        )


def check_row_kind(rows: Rows | None) -> None:
    """Check the type of a row domain, and of its alignment."""
    if rows is None:
        return
    if not isinstance(rows, tuple(KINDS.values())):
        kinds = ", ".join(kind.__name__ for kind in KINDS.values())
        raise TypeError(f"rows: expected None or one of {kinds}, got {describe(rows)}")
    if not isinstance(rows.alignment, int) or isinstance(rows.alignment, bool):
        raise TypeError(f"rows.alignment: expected an int, got {describe(rows.alignment)}")


def check_format(fmt: object, name: str = "fmt") -> None:
    """Check that an argument is a Format."""
    if isinstance(fmt, Format):
        return
    hint = ""
    if isinstance(fmt, torch.Tensor):
        hint = ": other tensors are keywords, and gates and ups are one tensor (..., mn, 2 k)"
    elif isinstance(fmt, str):
        hint = ": Format.parse reads text"
    raise TypeError(
        f"{name}: expected a Format, such as cute_quant.DEEP_GEMM, got {describe(fmt)}{hint}"
    )


def check_number_of_scales(name: str, fmt: Format, shape: ResultShape) -> None:
    """Check that kernels can index the scales of a matrix."""
    count = fmt.scale_rows(shape.mn) * fmt.columns(shape.k)
    most = MAX_SCALES if fmt.mn_major else MAX_SCALE_BYTES if fmt.blocked else None
    if most is not None and known(count > most):
        raise ValueError(
            f"{name}: expected up to {most} scales in a matrix, got {shape.mn} rows of "
            f"{fmt.columns(shape.k)}"
        )


def check_whole_bytes(name: str, fmt: Format, k: int) -> None:
    """Check that the values of a row fill their bytes."""
    per_byte = fmt.value_type.per_byte
    if per_byte > 1 and known(k % per_byte != 0):
        raise ValueError(
            f"{name}: expected a multiple of {per_byte} columns in the result, whose "
            f"{dtype_name(fmt.values)} values share bytes, got {k}"
        )


def check_upper_scale(
    upper: UpperScale | None,
    fmt: Format,
    shapes: Sequence[tuple[int, ...]],
    x: torch.Tensor,
    input_name: str,
) -> None:
    """Check the upper scale of a call.

    Args:
        upper: as the call gives it.
        fmt: the format of the call.
        shapes: that it may have; none where the call takes no upper scale.
        x: the input, which says the device.
        input_name: the name of its argument.
    """
    if upper is None:
        if shapes:
            raise ValueError(
                f"{UPPER_KINDS[0]}: expected one of {', '.join(UPPER_KINDS)} for {fmt}, whose "
                f"{dtype_name(fmt.scale_dtype)} scales have one above them, got none"
            )
        return
    if not shapes:
        reason = "each row has its own" if fmt.row_scale else "no scale lies above those of groups"
        raise ValueError(f"{upper.kind}: expected None for {fmt}, where {reason}, got a tensor")
    t = upper.tensor
    check_tensor(upper.kind, t, (torch.float32,))
    if not any(same_sizes(t.shape, shape) for shape in shapes):
        expected = " or ".join(map(str, dict.fromkeys(shapes)))
        raise ValueError(f"{upper.kind}: expected shape {expected}, got {tuple(t.shape)}")
    check_operand(upper.kind, t, x, input_name)


def upper_scale_shapes(
    fmt: Format, batch_shape: tuple[int, ...], call: Call | None = None
) -> list[tuple[int, ...]]:
    """Return the shapes of an upper scale that is given.

    It is one number, or one for each matrix, or for each group of rows that are stacked along M.
    """
    if not fmt.upper_scale or fmt.row_scale:
        return []
    shapes = [(), (1,), batch_shape]
    if call is not None and call.scatter is not None:
        # A row is quantized once, wherever it goes.
        return [(), (1,)]
    if call is not None and call.upper is not None and call.upper.tensor.ndim == 1:
        if isinstance(call.rows, PrefixSum):
            shapes.append(tuple(call.rows.ends.shape))
        elif isinstance(call.rows, Indexed):
            shapes.append(tuple(call.upper.tensor.shape))
    return shapes


def _check_row_scales(call: Call, shape: ResultShape) -> None:
    """Check what a format with a scale for each row needs."""
    t, name = call.row_scales, "out row scales"
    if not call.fmt.row_scale:
        if t is not None:
            raise ValueError(f"{name}: expected None for {call.fmt}, got a tensor")
        return
    if known(shape.k > MAX_NORM_COLUMNS):
        raise ValueError(
            f"{call.input_name}: expected up to {MAX_NORM_COLUMNS} columns in the result of a "
            f"format with row_scale, whose rows lie in registers, got {shape.k}"
        )
    if t is None:
        return
    check_written(name, t, torch.float32, call.x, call.input_name)
    expected = (*shape.batch_shape, shape.mn)
    if not same_sizes(t.shape, expected):
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(t.shape)}")
    check_operand(name, t, call.x, call.input_name)


def check_rng_state(t: torch.Tensor | None, fmt: Format, x: torch.Tensor, input_name: str) -> None:
    """Check the state of random numbers, and that the format's values may be rounded with them."""
    if t is None:
        return
    check_tensor("rng_state", t, (torch.int64,))
    if not same_sizes(t.shape, (2,)):
        raise ValueError(f"rng_state: expected shape (2,), seed and offset, got {tuple(t.shape)}")
    check_operand("rng_state", t, x, input_name)
    if fmt.numerics != IEEE or fmt.four_over_six:
        raise ValueError(
            f"rng_state: expected None for {fmt}, of which only numerics={IEEE!r} without "
            f"four_over_six is rounded stochastically, got a tensor"
        )


def _check_gate_up(gate_up: torch.Tensor) -> None:
    if known(gate_up.shape[-1] % 2 != 0):
        raise ValueError(
            "gate_up: expected an even number of columns, as many gates as ups, "
            f"got shape {tuple(gate_up.shape)}"
        )


def check_silu_mul_backward(prologue: SiluMulBackward, gate_up: torch.Tensor) -> None:
    """Check the gradient of products against gates and ups, which were checked."""
    _check_gate_up(gate_up)
    grad = prologue.grad
    check_tensor("grad", grad, (gate_up.dtype,))
    check_device("grad", grad, gate_up, "gate_up")
    expected = (*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    if not same_sizes(grad.shape, expected):
        raise ValueError(
            f"grad: expected shape {expected}, a column for each gate of gate_up, "
            f"got {tuple(grad.shape)}"
        )
    check_matrices("grad", grad, MAX_COLUMNS)


def check_silu_mul(prologue: SiluMul, gate_up: torch.Tensor, of_rows: tuple[int, ...]) -> None:
    """Check the factors of rows, which are as many as `of_rows`, against gates and ups."""
    _check_gate_up(gate_up)
    weight = prologue.weight
    if weight is not None:
        check_tensor("weight", weight, (torch.float32,))
        if not same_sizes(weight.shape, of_rows):
            raise ValueError(
                f"weight: expected shape {of_rows}, one for each row that is quantized, "
                f"got {tuple(weight.shape)}"
            )
        check_operand("weight", weight, gate_up, "gate_up")


def _check_rms_norm(prologue: RmsNorm, x: torch.Tensor, *, every_row: bool) -> None:
    """Check the tensors of `prologue` against the input.

    Args:
        prologue: its tensors, of which the weight is always there.
        x: the input, which was checked.
        every_row: whether the rows of the result are all those of x in their order.
    """
    weight = prologue.weight
    check_tensor("weight", weight, dict.fromkeys((x.dtype, torch.float32)))
    if not same_sizes(weight.shape, (x.shape[-1],)):
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
                f"got {describe(t)}"
            )
        # What is only read may be a parameter.
        if t is prologue.residual:
            check_tensor(name, t, (x.dtype,))
            check_device(name, t, x, "x")
        else:
            check_written(name, t, x.dtype, x, "x")
        _check_like_x(name, t, x)


def _check_like_x(name: str, t: torch.Tensor, x: torch.Tensor) -> None:
    if not same_sizes(t.shape, x.shape):
        raise ValueError(f"{name}: expected shape {tuple(x.shape)}, got {tuple(t.shape)}")
    check_disjoint_rows(name, t)


def check_fake_quantize(call: Call, out: torch.Tensor | None) -> None:
    """Check a call of ``fake_quantize``.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    check_call(call)
    if out is not None:
        check_written("out", out, call.x.dtype, call.x, "x")
        _check_like_x("out", out, call.x)


def check_dequantize(
    q: torch.Tensor,
    sf: torch.Tensor,
    fmt: Format,
    dtype: torch.dtype,
    upper: UpperScale | None = None,
) -> ResultShape:
    """Check a call of ``dequantize``.

    Returns:
        The shape of the result.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    check_format(fmt)
    check_tensor("q", q, (fmt.values,))
    check_tensor("sf", sf, (fmt.sf_dtype,))
    if not isinstance(dtype, torch.dtype) or dtype not in INPUT_DTYPES:
        raise TypeError(f"dtype: expected one of {INPUT_DTYPES}, got {describe(dtype)}")
    if q.device != sf.device:
        raise ValueError(f"sf: expected the device of q, {q.device}, got {sf.device}")
    check_matrices("q", q, fmt.value_columns(MAX_COLUMNS))
    *batch_shape, mn, columns = q.shape
    k = columns * fmt.value_type.per_byte
    shape = ResultShape(tuple(batch_shape), mn, k)
    check_scales_read(sf, fmt, shape)
    if fmt.row_scale and (upper is None or upper.kind != DECODE):
        got = "None" if upper is None else upper.kind
        raise ValueError(
            f"{DECODE}: expected the scales of rows that quantize returned for {fmt}, got {got}"
        )
    shapes = upper_scale_shapes(fmt, tuple(batch_shape))
    if fmt.row_scale:
        shapes = [(*batch_shape, mn)]
    check_upper_scale(upper, fmt, shapes, q, "q")
    return shape


def check_scales_read(sf: torch.Tensor, fmt: Format, shape: ResultShape) -> None:
    """Check shape and strides of the scales of values of a shape.

    Raises:
        ValueError: one of them is wrong.
    """
    expected = fmt.scale_shape(*shape)
    if not same_sizes(sf.shape, expected):
        values = (*shape.batch_shape, shape.mn, shape.k)
        raise ValueError(
            f"sf: expected shape {expected}, the {dtype_name(fmt.scale_dtype)} scales of values "
            f"{values} in layout {fmt.scale_layout} for groups of {fmt.group_size}, "
            f"got {tuple(sf.shape)}"
        )
    flat_batch("sf", sf.shape, sf.stride(), fmt.scale_dims)
    if fmt.blocked and known(sf.shape[-1] > 1) and known(sf.stride(-1) != 1):
        raise ValueError(
            f"sf: expected the bytes of blocks to be contiguous, got strides {sf.stride()}"
        )


def check_values_shape(shape: object) -> ResultShape:
    """Return the shape of values, (..., mn, k), by its parts.

    Raises:
        TypeError, ValueError: it is no such shape.
    """
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"shape: expected ints (..., mn, k), got {describe(shape)}")
    for size in shape:
        if not isinstance(size, (int, torch.SymInt)) or isinstance(size, bool):
            raise TypeError(f"shape: expected ints (..., mn, k), got {describe(size)} among them")
    negative = any(known(size < 0) for size in shape)
    large = any(known(size > MAX_SIZE) for size in shape)
    if len(shape) < 2 or negative or large or known(shape[-1] > MAX_COLUMNS):
        raise ValueError(
            f"shape: expected (..., mn, k), each from 0 to {MAX_SIZE}, with k up to {MAX_COLUMNS}, "
            f"got {tuple(shape)}"
        )
    *batch_shape, mn, k = shape
    return ResultShape(tuple(batch_shape), mn, k)


def _check_rows(call: Call) -> None:
    """Check row domain and index against the input, without a look at what they hold."""
    x, index, rows, input_name = call.x, call.index, call.rows, call.input_name
    if call.scatter is not None:
        _check_scatter(call, call.scatter)
        shape = call.result_shape
        check_row_domain(rows, x, input_name, (*shape.batch_shape, shape.mn), "the result")
        return
    if call.num_rows is not None:
        raise ValueError(f"num_rows: expected None without a scatter, got {call.num_rows!r}")
    if index is not None:
        check_tensor("index", index, (torch.int32,))
        if x.ndim != 2:
            raise ValueError(
                f"{input_name}: expected 2 dimensions (T, k) with an index, got {tuple(x.shape)}"
            )
        if index.ndim not in (1, 2):
            raise ValueError(f"index: expected 1 or 2 dimensions, got shape {tuple(index.shape)}")
        check_operand("index", index, x, input_name)
        if isinstance(rows, PrefixSumWithGaps):
            raise ValueError(
                f"index: expected None for rows={type(rows).__name__}, got {describe(index)}"
            )
        if known(index.shape[-1] > MAX_SIZE):
            raise ValueError(f"index: expected up to {MAX_SIZE} rows, got {index.shape[-1]}")
    if index is None:
        check_row_domain(rows, x, input_name, tuple(x.shape[:-1]), input_name, x.shape[-1])
    else:
        check_row_domain(rows, x, input_name, tuple(index.shape), "index")


def _check_scatter(call: Call, scatter: torch.Tensor) -> None:
    """Check the places that rows are scattered to, without a look at what they hold."""
    x, rows, num_rows = call.x, call.rows, call.num_rows
    check_tensor("scatter", scatter, (torch.int32,))
    if call.index is not None:
        raise ValueError("index: expected None with a scatter, got a tensor")
    if x.ndim != 2:
        raise ValueError(
            f"{call.input_name}: expected 2 dimensions (T, k) with a scatter, got {tuple(x.shape)}"
        )
    if known(x.shape[0] > MAX_SCATTERED_ROWS):
        raise ValueError(
            f"{call.input_name}: expected up to {MAX_SCATTERED_ROWS} rows with a scatter, got "
            f"{x.shape[0]}"
        )
    if scatter.ndim != 2 or known(scatter.shape[0] != x.shape[0]):
        raise ValueError(
            f"scatter: expected shape ({x.shape[0]}, places), the places of each row of "
            f"{call.input_name}, got {tuple(scatter.shape)}"
        )
    if known(scatter.shape[1] > MAX_PLACES):
        raise ValueError(
            f"scatter: expected up to {MAX_PLACES} places for each row, got {scatter.shape[1]}"
        )
    check_operand("scatter", scatter, x, call.input_name)
    if num_rows is not None:
        if isinstance(num_rows, bool) or not isinstance(num_rows, (int, torch.SymInt)):
            raise TypeError(f"num_rows: expected an int or None, got {describe(num_rows)}")
        if known(num_rows < 0) or known(num_rows > MAX_SIZE):
            raise ValueError(f"num_rows: expected 0 to {MAX_SIZE}, got {num_rows}")
    check_row_kind(rows)
    if rows is not None:
        check_tensor(f"rows.{rows.data_name}", rows.data, (torch.int32,))
        if rows.data.ndim != 1:
            raise ValueError(
                f"rows.{rows.data_name}: expected 1 dimension, got {tuple(rows.data.shape)}"
            )
    if call.q is not None:
        check_tensor("out q", call.q, (call.fmt.values,))
        if call.q.ndim < 2:
            raise ValueError(
                f"out q: expected 2 or more dimensions (..., rows, k), got {tuple(call.q.shape)}"
            )


def check_row_domain(
    rows: Rows | None,
    x: torch.Tensor,
    input_name: str,
    shape: tuple[int, ...],
    shape_name: str,
    k: int | None = None,
) -> None:
    """Check a row domain, without a look at what it holds.

    Args:
        rows: the row domain.
        x: the input, which says the device.
        input_name: the name of its argument.
        shape: of the rows, without columns.
        shape_name: the argument that has the shape.
        k: columns of that argument, None where it has none.
    """
    check_row_kind(rows)
    if rows is None:
        return
    name = f"rows.{rows.data_name}"
    check_tensor(name, rows.data, (torch.int32,))
    if len(shape) != len(rows.dimensions):
        last, columns = ((), ()) if k is None else (("k",), (k,))
        expected = ", ".join((*rows.dimensions, *last))
        raise ValueError(
            f"{shape_name}: expected shape ({expected}) for rows={type(rows).__name__}, "
            f"got {(*shape, *columns)}"
        )
    length = None if isinstance(rows, PrefixSum) else shape[0]
    if rows.data.ndim != 1 or (length is not None and not same_sizes(rows.data.shape, (length,))):
        expected = "(G,), one for each group" if length is None else f"({length},)"
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(rows.data.shape)}")
    check_operand(name, rows.data, x, input_name)
    if not 0 < rows.alignment <= MAX_SIZE:
        raise ValueError(f"rows.alignment: expected 1 to {MAX_SIZE}, got {rows.alignment}")


def check_values_out(
    q: torch.Tensor, fmt: Format, shape: ResultShape, *, exact: bool, name: str = "out q"
) -> None:
    """Check shape and strides of a caller's `q`.

    Args:
        q: (..., rows, k), or bytes of two values, strided.
        fmt: the format of the result.
        shape: of the result.
        exact: whether it may have no more rows than the result.
        name: of the argument.
    """
    columns = fmt.value_columns(shape.k)
    expected: Sequence[int] = (*shape.batch_shape, columns)
    good = q.ndim == len(expected) + 1 and same_sizes((*q.shape[:-2], q.shape[-1]), expected)
    good = good and not known(q.shape[-2] < shape.mn)
    if not good or (exact and known(q.shape[-2] != shape.mn)):
        rows = shape.mn if exact else f"{shape.mn} or more"
        words = ", ".join(map(str, (*shape.batch_shape, rows, columns)))
        raise ValueError(f"{name}: expected shape ({words}), got {tuple(q.shape)}")
    if known(q.shape[-2] > MAX_SIZE):
        raise ValueError(f"{name}: expected up to {MAX_SIZE} rows, got {q.shape[-2]}")
    check_disjoint_rows(name, q)


def check_call_scales(sf: torch.Tensor, fmt: Format, shape: ResultShape) -> None:
    """Check shape and strides of a caller's scales, whose columns may have no padding rows."""
    strides = [fmt.scale_strides(*shape)]
    if fmt.mn_major:
        strides.append(dense_column_strides(fmt, shape))
    check_scales_out("out sf", sf, fmt.scale_shape(*shape), *strides)


def dense_column_strides(fmt: Format, shape: ResultShape) -> tuple[int, ...]:
    """Return the strides of MN-major scales whose columns have no padding rows."""
    mn, columns = shape.mn, fmt.columns(shape.k)
    matrix, strides = mn * columns, [mn, 1]
    for size in reversed(shape.batch_shape):
        strides.append(matrix)
        matrix = matrix * size
    return tuple(reversed(strides))


def check_scales_out(
    name: str, sf: torch.Tensor, shape: Sequence[int], *allowed: Sequence[int]
) -> None:
    """Check shape and strides of a caller's memory for scales; `allowed` are strides."""
    if not same_sizes(sf.shape, shape):
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(sf.shape)}")
    if known(sf.numel() == 0):
        return
    for strides in allowed:
        sizes = zip(shape, sf.stride(), strides, strict=True)
        if not any(known(size > 1) and known(actual != stride) for size, actual, stride in sizes):
            return
    expected = " or ".join(map(str, dict.fromkeys(map(tuple, allowed))))
    raise ValueError(f"{name}: expected strides {expected}, got {sf.stride()}")
