"""Checks of arguments: each failure names the argument, what was expected and what came."""

from __future__ import annotations

import torch

from cute_quant.formats import INPUT_DTYPES, VALUE_DTYPE, Format

MAX_SIZE = 2**31 - 1
MAX_ROWS = 2**31 - 2**20
"""A grid covers more rows than there are, and counts them in 32 bits."""


def check_tensor(name: str, t: object, dtypes: tuple[torch.dtype, ...]) -> None:
    """Check the type, dtype and layout of `t`."""
    if not isinstance(t, torch.Tensor) or t.dtype not in dtypes:
        raise TypeError(f"{name}: expected a tensor of {_names(dtypes)}, got {_kind(t)}")
    if t.is_nested or t.layout is not torch.strided:
        kind = "a nested tensor" if t.is_nested else f"layout {t.layout}"
        raise TypeError(f"{name}: expected a strided tensor, got {kind}")


def check_input(x: torch.Tensor, fmt: Format) -> None:
    """Check what a tensor says of itself, be it real or fake."""
    check_tensor("x", x, INPUT_DTYPES)
    if x.ndim != 2:
        raise ValueError(f"x: expected 2 dimensions (mn, k), got shape {tuple(x.shape)}")
    mn, k = x.shape
    check_groups("x", x, fmt)
    if mn > MAX_ROWS or k > MAX_SIZE:
        raise ValueError(
            f"x: expected up to {MAX_ROWS} rows of up to {MAX_SIZE}, got shape {tuple(x.shape)}"
        )
    if x.stride(0) * x.element_size() > MAX_SIZE:
        raise ValueError(
            f"x: expected a row stride up to {MAX_SIZE} bytes, got {x.stride(0)} elements"
        )
    if k and x.stride(1) != 1:
        raise ValueError(f"x: expected neighbours in a row to be contiguous, got {x.stride()=}")


def check_not_negated(name: str, t: torch.Tensor) -> None:
    if t.is_neg():
        raise ValueError(f"{name}: expected values in memory, got a lazily negated view")


def check_groups(name: str, t: torch.Tensor, fmt: Format) -> None:
    """Check that the rows of `t` are whole groups."""
    k = t.shape[1]
    if k % fmt.group_size:
        raise ValueError(f"{name}: expected k to be a multiple of {fmt.group_size}, got k = {k}")


def has_aligned_rows(start: int, t: torch.Tensor, alignment: int) -> bool:
    """Whether all rows of a matrix at byte `start` begin at multiples of `alignment`."""
    row_bytes = t.stride(0) * t.element_size() if t.shape[0] > 1 else 0
    return start % alignment == 0 and row_bytes % alignment == 0


def check_rows(name: str, t: torch.Tensor, alignment: int) -> None:
    """Check that a GPU's wide loads and stores find the rows of `t` aligned."""
    if not has_aligned_rows(t.data_ptr(), t, alignment):
        raise ValueError(
            f"{name}: expected every row to start at a multiple of {alignment} bytes, got address "
            f"{t.data_ptr():#x} and a row stride of {t.stride(0)} elements of {t.element_size()} "
            "bytes"
        )


def check_values_out(q: torch.Tensor, x: torch.Tensor) -> None:
    """Check a caller's `q` against the input."""
    mn, k = x.shape
    check_tensor("out q", q, (VALUE_DTYPE,))
    _check_no_gradient("out q", q)
    if q.device != x.device:
        raise ValueError(f"out q: expected the device of x, {x.device}, got {q.device}")
    if q.ndim != 2 or q.shape[0] < mn or q.shape[1] != k:
        raise ValueError(f"out q: expected shape ({mn} or more, {k}), got {tuple(q.shape)}")
    if q.shape[0] > MAX_ROWS:
        raise ValueError(f"out q: expected up to {MAX_ROWS} rows, got {q.shape[0]}")
    overlapping = q.shape[0] > 1 and q.stride(0) < k
    if k and (q.stride(1) != 1 or overlapping or q.stride(0) > MAX_SIZE):
        raise ValueError(
            f"out q: expected strides ({k} to {MAX_SIZE}, 1), so that rows are contiguous and do "
            f"not overlap, got {q.stride()}"
        )


def check_scales_out(sf: torch.Tensor, x: torch.Tensor, fmt: Format) -> None:
    """Check a caller's `sf` against the input and the format."""
    mn, k = x.shape
    check_tensor("out sf", sf, (fmt.scale_dtype,))
    _check_no_gradient("out sf", sf)
    if sf.device != x.device:
        raise ValueError(f"out sf: expected the device of x, {x.device}, got {sf.device}")
    shape, strides = fmt.scale_shape(mn, k), fmt.scale_strides(mn)
    if tuple(sf.shape) != shape:
        raise ValueError(f"out sf: expected shape {shape}, got {tuple(sf.shape)}")
    if sf.stride(1) != strides[1] or (mn > 1 and sf.stride(0) != 1):
        raise ValueError(f"out sf: expected strides {strides}, got {sf.stride()}")


def _check_no_gradient(name: str, t: torch.Tensor) -> None:
    if t.requires_grad:
        raise ValueError(f"{name}: expected a tensor that requires no gradient, got one that does")


def check_disjoint(
    x_start: int, x_bytes: int, q_start: int, q_bytes: int, sf_start: int, sf_bytes: int
) -> None:
    """Check that no byte to be written belongs to another of the tensors."""
    x_end, q_end, sf_end = x_start + x_bytes, q_start + q_bytes, sf_start + sf_bytes
    if x_start < q_end and q_start < x_end:
        _overlap("out q", "x")
    if x_start < sf_end and sf_start < x_end:
        _overlap("out sf", "x")
    if q_start < sf_end and sf_start < q_end:
        _overlap("out sf", "out q")


def _overlap(name: str, other: str) -> None:
    raise ValueError(f"{name}: expected memory of its own, got memory that overlaps {other}")


def span(t: torch.Tensor) -> int:
    """Bytes from the first element of a matrix to its last."""
    rows, k = t.shape
    return ((rows - 1) * t.stride(0) + k) * t.element_size() if t.numel() else 0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(map(_name, dtypes))


def _kind(value: object) -> str:
    return _name(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__
