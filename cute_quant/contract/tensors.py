"""Facts and checks of single tensors, whatever they are for, and the memory of several.

Sizes may be symbolic under a tracer. A check that a symbolic size leaves open passes there, without
a guard: the operator checks the sizes of the run again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from cute_quant.contract import torch_private
from cute_quant.contract.dtypes import SCALE_ROW_ALIGNMENT, align, describe, dtype_names

MAX_SIZE = 2**31 - 1
MAX_MATRICES = 2**31 - 2**16
"""Bounds of what a kernel counts in int32, in steps of as many CTAs as a grid's y or z has."""


def known(condition: Any) -> bool:
    """Return whether a condition on sizes holds; False if only the run can tell."""
    if condition is True or condition is False:
        return condition
    return torch_private.statically_known_true(condition)


def same_sizes(actual: Sequence[int], expected: Sequence[int]) -> bool:
    """Return whether two shapes, or strides, are not known to differ."""
    return len(actual) == len(expected) and not any(
        known(a != b) for a, b in zip(actual, expected, strict=True)
    )


def flat_batch(
    name: str, shape: Sequence[int], strides: Sequence[int], inner: int = 2
) -> tuple[int, int]:
    """Return size and stride of the one dimension that all but the `inner` last ones make.

    Raises:
        ValueError: no single stride walks them.
    """
    count, stride = 1, 0
    for size, step in zip(reversed(shape[:-inner]), reversed(strides[:-inner]), strict=True):
        if known(size == 1):
            continue
        if known(count == 1):
            stride = step
        elif known(size != 0) and known(count != 0) and known(step != count * stride):
            raise ValueError(
                f"{name}: expected leading dimensions that one stride walks, got shape "
                f"{tuple(shape)}, strides {tuple(strides)}"
            )
        count = count * size
    return count, stride


def last_column_rows(sf: torch.Tensor) -> int:
    """Return the rows of the last column of MN-major `sf` that its storage holds, with padding.

    They are at least size(-2). A tensor of exactly the contract's strides that was allocated
    without the last column's padding, as vLLM does, has no more. All other columns have theirs.
    """
    mn = sf.shape[-2]
    aligned = align(mn, SCALE_ROW_ALIGNMENT)
    columns = math.prod(sf.shape[:-2]) * sf.shape[-1]
    if mn == aligned or columns == 0:
        return aligned
    # The stubs have SymInt too, unlike for sizes and strides.
    offset: int = sf.storage_offset()  # type: ignore[assignment]
    end = sf.untyped_storage().nbytes() // sf.element_size() - offset
    return min(aligned, end - (columns - 1) * aligned)


def has_dense_columns(sf: torch.Tensor) -> bool:
    """Return whether columns of MN-major scales follow each other without padding rows.

    Of columns that need none, and of a single one, this is False.
    """
    *_, mn, columns = sf.shape
    if mn % SCALE_ROW_ALIGNMENT == 0 or sf.numel() == 0:
        return False
    if columns > 1:
        return sf.stride(-1) == mn
    batch, stride = flat_batch("sf", sf.shape, sf.stride())
    return batch > 1 and stride == mn


def check_real(tensors: dict[str, torch.Tensor | None]) -> None:
    """Check that values are in memory where they seem to be, by the names of the arguments."""
    for name, t in tensors.items():
        if t is None:
            continue
        if torch_private.is_fake(t):
            raise TypeError(f"{name}: expected a tensor with memory, got {type(t).__name__}")
        if torch_private.is_functorch_wrapped(t):
            raise RuntimeError(
                f"{name}: expected a tensor outside of torch.func transforms, of which vmap is not "
                f"supported; got one inside: quantize the batch as leading dimensions"
            )
        if not (t.is_cuda or t.is_cpu):
            raise ValueError(
                f"{name}: expected a tensor on a CUDA device or the CPU, got {t.device}"
            )
        if t.is_neg():
            raise ValueError(f"{name}: expected values in memory, got a lazily negated view")
        if t.numel() and t.data_ptr() == 0:
            raise TypeError(f"{name}: expected a tensor with memory, got {type(t).__name__}")


def check_no_tangents(tensors: dict[str, torch.Tensor | None]) -> None:
    """Check that forward-mode differentiation asks for nothing of these tensors."""
    for name, t in tensors.items():
        if not isinstance(t, torch.Tensor) or t.layout is not torch.strided or t.is_nested:
            continue
        if torch_private.has_tangent(t):
            raise RuntimeError(
                f"{name}: expected a tensor without a tangent, since this is not differentiable; "
                f"got one that has one: detach it"
            )


def check_tensor(name: str, t: object, dtypes: Iterable[torch.dtype]) -> None:
    """Check type, dtype and layout of `t`."""
    if not isinstance(t, torch.Tensor) or t.dtype not in dtypes:
        raise TypeError(f"{name}: expected a tensor of {dtype_names(dtypes)}, got {describe(t)}")
    if t.is_nested or t.layout is not torch.strided:
        kind = "a nested tensor" if t.is_nested else f"layout {t.layout}"
        raise TypeError(f"{name}: expected a strided tensor, got {kind}")


def check_matrices(name: str, t: torch.Tensor, max_columns: int) -> None:
    """Check shape and strides of a tensor (..., mn, columns) to be read."""
    if t.ndim < 2:
        raise ValueError(
            f"{name}: expected 2 or more dimensions (..., mn, k), got {tuple(t.shape)}"
        )
    mn, k = t.shape[-2:]
    if known(mn > MAX_SIZE) or known(k > max_columns):
        raise ValueError(
            f"{name}: expected up to {MAX_SIZE} rows of up to {max_columns}, "
            f"got shape {tuple(t.shape)}"
        )
    if known(k > 1) and known(t.stride(-1) != 1):
        raise ValueError(f"{name}: expected rows contiguous along k, got strides {t.stride()}")
    if known(mn > 1) and known(t.stride(-2) * t.element_size() > MAX_SIZE):
        raise ValueError(
            f"{name}: expected a row stride up to {MAX_SIZE} bytes, got {t.stride(-2)} elements"
        )
    flat_batch(name, t.shape, t.stride())
    check_count(name, t.shape[:-2], 1)


def check_count(name: str, batch_shape: Iterable[int], tiles: int) -> None:
    """Check that kernels can count the matrices, and the tiles of rows in each."""
    matrices = math.prod(batch_shape)
    if known(matrices * tiles > MAX_MATRICES):
        raise ValueError(f"{name}: expected up to {MAX_MATRICES // tiles} matrices, got {matrices}")


def check_device(name: str, t: torch.Tensor, x: torch.Tensor, input_name: str) -> None:
    """Check that `t` is on the device of the input."""
    if t.device != x.device:
        raise ValueError(f"{name}: expected the device of {input_name}, {x.device}, got {t.device}")


def check_operand(name: str, t: torch.Tensor, x: torch.Tensor, input_name: str) -> None:
    """Check that a tensor to be read is contiguous and on the device of the input."""
    check_device(name, t, x, input_name)
    if known(t.numel() == 0):
        return
    expected = 1
    for size, stride in zip(reversed(t.shape), reversed(t.stride()), strict=True):
        if known(size > 1) and known(stride != expected):
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {t.stride()}")
        expected = expected * size


def check_written(
    name: str, t: torch.Tensor, dtype: torch.dtype, x: torch.Tensor, input_name: str
) -> None:
    """Check dtype and device of a tensor to be written, and that it requires no gradient."""
    check_tensor(name, t, (dtype,))
    if t.requires_grad:
        raise ValueError(f"{name}: expected a tensor that requires no gradient, got one that does")
    check_device(name, t, x, input_name)


def check_disjoint_rows(name: str, t: torch.Tensor) -> None:
    """Check that the rows of `t` (..., rows, k) are contiguous and do not overlap."""
    if known(t.numel() == 0):
        return
    batch, batch_stride = flat_batch(name, t.shape, t.stride())
    rows, k = t.shape[-2:]
    row_stride = k if known(rows <= 1) else t.stride(-2)
    bad = known(k > 1) and known(t.stride(-1) != 1)
    bad = bad or known(row_stride * t.element_size() > MAX_SIZE)
    dimensions = [(row_stride, rows), (batch_stride, batch)]
    if known(row_stride > batch_stride):
        dimensions.reverse()
    extent = k
    for stride, size in dimensions:
        if not known(size <= 1):
            bad = bad or (known(size > 1) and known(stride < extent))
            extent = extent + (size - 1) * stride
    if bad:
        raise ValueError(
            f"{name}: expected strides (..., {k} or more, 1), so that rows are contiguous, at most "
            f"{MAX_SIZE} bytes apart, and do not overlap, got {t.stride()}"
        )


class Region(NamedTuple):
    """The memory of an argument, from its first element to its last."""

    name: str
    start: int
    nbytes: int


def region(name: str, t: torch.Tensor) -> Region:
    """Return the memory of a tensor, the bytes between its rows included."""
    return Region(name, t.data_ptr(), span(t))


def check_disjoint(reads: Iterable[Region], writes: Iterable[Region]) -> None:
    """Check that no byte to be written belongs to another of the arguments."""
    others = list(reads)
    for written in writes:
        for other in others:
            overlaps = (
                written.start < other.start + other.nbytes
                and other.start < written.start + written.nbytes
            )
            if overlaps and written.nbytes and other.nbytes:
                raise ValueError(
                    f"{written.name}: expected memory of its own, got memory that overlaps "
                    f"{other.name}"
                )
        others.append(written)


def interleaved(q: torch.Tensor, sf: torch.Tensor) -> bool:
    """Return whether rows of two matrices lie in records, as far apart, and do not overlap."""
    if q.ndim != 2 or sf.ndim != 2 or not q.numel() or not sf.numel():
        return False
    step = q.stride(0) * q.element_size()
    if step != sf.stride(0) * sf.element_size():
        return False
    first, second = (q, sf) if q.data_ptr() <= sf.data_ptr() else (sf, q)
    distance = second.data_ptr() - first.data_ptr()
    sizes = (t.shape[1] * t.element_size() for t in (first, second))
    return next(sizes) <= distance <= step - next(sizes)


def joined(q: Region, sf: Region) -> Region:
    """Return the memory from the first byte of two to the last."""
    start = min(q.start, sf.start)
    return Region(q.name, start, max(q.start + q.nbytes, sf.start + sf.nbytes) - start)


def region_of_scales(name: str, sf: torch.Tensor, *, mn_major: bool) -> Region:
    """Return the memory of scales (..., mn, columns), padding rows of MN-major ones included."""
    nbytes = span(sf)
    if mn_major and nbytes:
        nbytes += (last_column_rows(sf) - sf.shape[-2]) * sf.element_size()
    return Region(name, sf.data_ptr(), nbytes)


def span(t: torch.Tensor) -> int:
    """Return the bytes from the first element of a tensor to its last."""
    if t.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size()


def storage_bytes(t: torch.Tensor) -> torch.Tensor:
    """Return a view of all bytes of a tensor's storage, padding included."""
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())
