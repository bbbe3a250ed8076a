"""Square blocks of weights that share a scale: which formats have them, their scales, and checks.

A block is ``fmt.group_size`` rows and as many columns of w (..., N, K), short at both ends. Its
scale is stored once where scales are float32, and where they are bytes once for each of its rows:
in the layout that ``quantize`` gives a matrix of N rows, which is what a GEMM reads of either
operand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cute_quant.contract.calls import ResultShape
from cute_quant.contract.checks import (
    check_format,
    check_number_of_scales,
    check_scales_out,
    check_upper_scale,
    check_values_out,
    check_whole_bytes,
    upper_scale_shapes,
)
from cute_quant.contract.dtypes import (
    BLOCK_SIZES,
    INPUT_DTYPES,
    SOURCE_BLOCK,
    SOURCE_DTYPE,
    ceil_div,
    describe,
)
from cute_quant.contract.format_choices import MAX_COLUMNS
from cute_quant.contract.formats import Format
from cute_quant.contract.tensors import (
    MAX_SIZE,
    check_count,
    check_device,
    check_matrices,
    check_tensor,
    check_written,
    flat_batch,
    known,
    same_sizes,
)
from cute_quant.contract.upper_scales import UpperScale


def check_block_format(fmt: object) -> None:
    """Check that a format has scales of blocks.

    Raises:
        TypeError: it is no Format.
        ValueError: blocks have no such scales.
    """
    check_format(fmt)
    assert isinstance(fmt, Format)
    if fmt.upper_scale:
        raise ValueError(
            f"fmt: expected UE8M0 or float32 scales, got {fmt.text}, under whose e4m3 scales "
            f"weights are quantized in groups: use quantize"
        )
    if fmt.bounds_amax or fmt.divides:
        raise ValueError(
            f"fmt: expected numerics 'ieee' or 'deepgemm' for blocks, got {fmt.text}, which no "
            f"library has for weights"
        )
    if fmt.group_size not in BLOCK_SIZES:
        sizes = " or ".join(f"{size} x {size}" for size in BLOCK_SIZES)
        raise ValueError(f"fmt: expected a group_size for blocks of {sizes}, got {fmt.text}")


def check_requantized_format(fmt: object) -> None:
    """Check that the weights of a checkpoint can be quantized anew in a format.

    Raises:
        TypeError: it is no Format.
        ValueError: they cannot.
    """
    check_format(fmt)
    assert isinstance(fmt, Format)
    if not quantized_by_row(fmt):
        check_block_format(fmt)
    elif fmt.row_scale or fmt.whole_row:
        raise ValueError(f"fmt: expected groups of rows, none over whole rows, got {fmt}")


def stored_once(fmt: Format) -> bool:
    """Return whether the scale of a block is stored once, and not for each of its rows."""
    return not fmt.byte_scales


def scale_shape(fmt: Format, batch_shape: Sequence[int], n: int, k: int) -> tuple[int, ...]:
    """Return the shape of the scales of the blocks of weights (..., n, k)."""
    if not stored_once(fmt):
        return Format.scale_shape(fmt, batch_shape, n, k)
    return block_counts(tuple(batch_shape), n, k, fmt.group_size)


def scale_strides(fmt: Format, batch_shape: Sequence[int], n: int, k: int) -> tuple[int, ...]:
    """Return the strides of the scales of the blocks of weights (..., n, k), in elements."""
    if not stored_once(fmt):
        return Format.scale_strides(fmt, batch_shape, n, k)
    strides = [1]
    for size in reversed(scale_shape(fmt, batch_shape, n, k)[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))


def empty_scales(
    fmt: Format, shape: ResultShape, device: torch.device | str | None
) -> torch.Tensor:
    """Return uninitialized scales of blocks, in storage that holds all padding."""
    if not stored_once(fmt):
        return fmt.empty_scales(*shape, device)
    return torch.empty(scale_shape(fmt, *shape), dtype=torch.float32, device=device)


def is_transposed(w: torch.Tensor) -> bool:
    """Return whether weights are contiguous along n and not along k."""
    return w.shape[-1] > 1 and w.stride(-1) != 1


def check_quantize_blocks(
    w: torch.Tensor,
    fmt: Format,
    q: torch.Tensor | None = None,
    sf: torch.Tensor | None = None,
) -> ResultShape:
    """Check a call of ``quantize_blocks``.

    Returns:
        The shape of the result.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    check_block_format(fmt)
    check_tensor("w", w, INPUT_DTYPES)
    _check_weights("w", w)
    shape = ResultShape(tuple(w.shape[:-2]), *w.shape[-2:])
    _check_result("w", w, fmt, shape, q, sf, blocks=True)
    return shape


def check_dequantize_blocks(
    q: torch.Tensor, sf: torch.Tensor, fmt: Format, dtype: torch.dtype
) -> ResultShape:
    """Check a call of ``dequantize_blocks`` for float32 scales.

    Returns:
        The shape of the result.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    check_block_format(fmt)
    check_tensor("q", q, (fmt.values,))
    if not isinstance(dtype, torch.dtype) or dtype not in INPUT_DTYPES:
        raise TypeError(f"dtype: expected one of {INPUT_DTYPES}, got {describe(dtype)}")
    check_matrices("q", q, fmt.value_columns(MAX_COLUMNS))
    *batch_shape, n, columns = q.shape
    shape = ResultShape(tuple(batch_shape), n, columns * fmt.value_type.per_byte)
    _check_block_scales("sf", sf, "q", q, shape, (fmt.group_size,))
    return shape


def check_requantize_blocks(
    w8: torch.Tensor,
    w_sf: torch.Tensor,
    fmt: Format,
    upper: UpperScale | None = None,
    q: torch.Tensor | None = None,
    sf: torch.Tensor | None = None,
) -> ResultShape:
    """Check a call of ``requantize_blocks``.

    Returns:
        The shape of the result.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    check_requantized_format(fmt)
    check_tensor("w8", w8, (SOURCE_DTYPE,))
    if quantized_by_row(fmt):
        check_matrices("w8", w8, MAX_COLUMNS)
    else:
        _check_weights("w8", w8)
    *batch_shape, n, k = w8.shape
    shape = ResultShape(tuple(batch_shape), n, k)
    _check_block_scales("w_sf", w_sf, "w8", w8, shape, BLOCK_SIZES)
    check_upper_scale(upper, fmt, upper_scale_shapes(fmt, tuple(batch_shape)), w8, "w8")
    _check_result("w8", w8, fmt, shape, q, sf, blocks=not quantized_by_row(fmt))
    return shape


def quantized_by_row(fmt: Format) -> bool:
    """Return whether weights are requantized in groups of rows, as those of FP4 are."""
    return fmt.value_type.per_byte > 1


def block_size(w8: torch.Tensor, w_sf: torch.Tensor) -> int:
    """Return the size of the blocks that have these scales; both fit only what is one block."""
    *batch_shape, n, k = w8.shape
    fits_most = tuple(w_sf.shape) == block_counts(tuple(batch_shape), n, k, SOURCE_BLOCK)
    return SOURCE_BLOCK if fits_most else min(BLOCK_SIZES)


def block_counts(batch_shape: tuple[int, ...], n: int, k: int, size: int) -> tuple[int, ...]:
    """Return how many blocks weights (..., n, k) have."""
    return (*batch_shape, ceil_div(n, size), ceil_div(k, size))


def _check_weights(name: str, w: torch.Tensor) -> None:
    """Check shape and strides of weights (..., n, k)."""
    if w.ndim < 2:
        raise ValueError(f"{name}: expected 2 or more dimensions (..., N, K), got {tuple(w.shape)}")
    n, k = w.shape[-2:]
    if known(n > MAX_SIZE) or known(k > MAX_COLUMNS):
        raise ValueError(
            f"{name}: expected up to {MAX_SIZE} rows of up to {MAX_COLUMNS}, got shape "
            f"{tuple(w.shape)}"
        )
    along_k, along_n = w.stride(-1), w.stride(-2)
    if known(k > 1) and known(along_k != 1) and known(n > 1) and known(along_n != 1):
        raise ValueError(
            f"{name}: expected weights contiguous along k or n, got strides {w.stride()}"
        )
    transposed = known(k > 1) and known(along_k != 1)
    size, stride = (k, along_k) if transposed else (n, along_n)
    if known(size > 1) and known(stride * w.element_size() > MAX_SIZE):
        raise ValueError(
            f"{name}: expected rows, or columns, up to {MAX_SIZE} bytes apart, got strides "
            f"{w.stride()}"
        )
    flat_batch(name, w.shape, w.stride())
    check_count(name, w.shape[:-2], 1)


def _check_block_scales(
    name: str,
    sf: torch.Tensor,
    values_name: str,
    q: torch.Tensor,
    shape: ResultShape,
    sizes: tuple[int, ...],
) -> None:
    """Check float32 scales of blocks of one of these sizes, which are read with values `q`."""
    check_tensor(name, sf, (torch.float32,))
    check_device(name, sf, q, values_name)
    expected = {size: block_counts(*shape, size) for size in sizes}
    if not any(same_sizes(sf.shape, blocks) for blocks in expected.values()):
        shapes = " or ".join(
            f"{blocks}, a scale for each block of {size} x {size} of {values_name},"
            for size, blocks in expected.items()
        )
        raise ValueError(f"{name}: expected shape {shapes} got {tuple(sf.shape)}")
    flat_batch(name, sf.shape, sf.stride())


def _check_result(
    name: str,
    w: torch.Tensor,
    fmt: Format,
    shape: ResultShape,
    q: torch.Tensor | None,
    sf: torch.Tensor | None,
    *,
    blocks: bool,
) -> None:
    """Check that kernels can count the scales, and the caller's memory for the result.

    Scales are of square `blocks`, or of groups of rows.
    """
    once = blocks and stored_once(fmt)
    if not once:
        check_number_of_scales(name, fmt, shape)
    check_whole_bytes(name, fmt, shape.k)
    if q is not None:
        check_written("out q", q, fmt.values, w, name)
        check_values_out(q, fmt, shape, exact=True)
    if sf is not None:
        check_written("out sf", sf, fmt.sf_dtype, w, name)
        if once:
            check_scales_out("out sf", sf, scale_shape(fmt, *shape), scale_strides(fmt, *shape))
        else:
            check_scales_out("out sf", sf, fmt.scale_shape(*shape), fmt.scale_strides(*shape))
