"""What a tensor is checked for whatever it is for, and the memory of several tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from cute_quant.contract.formats import flat_batch

MAX_SIZE = 2**31 - 1
MAX_COLUMNS = 2**20
MAX_MATRICES = 2**31 - 2**16
"""What a kernel counts with 32 bits and a sign, in steps of as many CTAs as a grid's y or z has."""


def check_real(tensors: dict[str, torch.Tensor | None]) -> None:
    """Check that values are in memory where they seem to be, by the names of the arguments."""
    for name, t in tensors.items():
        if t is None:
            continue
        if isinstance(t, FakeTensor):
            raise TypeError(f"{name}: expected a tensor with memory, got {type(t).__name__}")
        if not (t.is_cuda or t.is_cpu):
            raise ValueError(
                f"{name}: expected a tensor on a CUDA device or the CPU, got {t.device}"
            )
        if t.is_neg():
            raise ValueError(f"{name}: expected values in memory, got a lazily negated view")


def check_tensor(name: str, t: object, dtypes: Iterable[torch.dtype]) -> None:
    """Check the type, dtype and layout of `t`."""
    if not isinstance(t, torch.Tensor) or t.dtype not in dtypes:
        raise TypeError(f"{name}: expected a tensor of {_names(dtypes)}, got {_kind(t)}")
    if t.is_nested or t.layout is not torch.strided:
        kind = "a nested tensor" if t.is_nested else f"layout {t.layout}"
        raise TypeError(f"{name}: expected a strided tensor, got {kind}")


def in_dual_level() -> bool:
    """Whether tensors may have tangents at all, which is quicker to see."""
    return forward_ad._current_level >= 0


def check_no_tangents(tensors: dict[str, torch.Tensor | None]) -> None:
    """Check that forward-mode differentiation wants nothing of these, by the names of the
    arguments."""
    for name, t in tensors.items():
        plain = isinstance(t, torch.Tensor) and t.layout is torch.strided and not t.is_nested
        if plain and forward_ad.unpack_dual(t).tangent is not None:
            raise RuntimeError(
                f"{name}: expected a tensor without a tangent, since this is not differentiable; "
                f"got one that has one: detach it"
            )


def check_matrices(name: str, t: torch.Tensor, max_columns: int) -> None:
    """Check shape and strides of a tensor (..., mn, columns) to be read."""
    if t.ndim < 2:
        raise ValueError(
            f"{name}: expected 2 or more dimensions (..., mn, k), got {tuple(t.shape)}"
        )
    mn, k = t.shape[-2:]
    if mn > MAX_SIZE or k > max_columns:
        raise ValueError(
            f"{name}: expected up to {MAX_SIZE} rows of up to {max_columns}, "
            f"got shape {tuple(t.shape)}"
        )
    if k > 1 and t.stride(-1) != 1:
        raise ValueError(
            f"{name}: expected neighbours in a row to be contiguous, got strides {t.stride()}"
        )
    if mn > 1 and t.stride(-2) * t.element_size() > MAX_SIZE:
        raise ValueError(
            f"{name}: expected a row stride up to {MAX_SIZE} bytes, got {t.stride(-2)} elements"
        )
    flat_batch(name, t.shape, t.stride())
    check_count(name, t.shape[:-2], 1)


def check_count(name: str, batch_shape: Iterable[int], tiles: int) -> None:
    """Check that kernels can count the matrices, and the tiles of rows that each has, and go on by
    as many as there are CTAs."""
    matrices = math.prod(batch_shape)
    if matrices * tiles > MAX_MATRICES:
        raise ValueError(f"{name}: expected up to {MAX_MATRICES // tiles} matrices, got {matrices}")


def check_device(name: str, t: torch.Tensor, x: torch.Tensor, input_name: str) -> None:
    """Check that `t` is where the input is."""
    if t.device != x.device:
        raise ValueError(f"{name}: expected the device of {input_name}, {x.device}, got {t.device}")


def check_operand(name: str, t: torch.Tensor, x: torch.Tensor, input_name: str) -> None:
    """Check a tensor to be read that has to be contiguous and where the input is."""
    check_device(name, t, x, input_name)
    if not t.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {t.stride()}")


def check_written(
    name: str, t: torch.Tensor, dtype: torch.dtype, x: torch.Tensor, input_name: str
) -> None:
    """Check a tensor to be written: its dtype, its device, and that no gradient is wanted."""
    check_tensor(name, t, (dtype,))
    if t.requires_grad:
        raise ValueError(f"{name}: expected a tensor that requires no gradient, got one that does")
    check_device(name, t, x, input_name)


def check_rows_apart(name: str, t: torch.Tensor) -> None:
    """Check that the rows of `t` (..., rows, k) are contiguous and do not overlap."""
    if t.numel() == 0:
        return
    batch, batch_stride = flat_batch(name, t.shape, t.stride())
    rows, k = t.shape[-2:]
    row_stride = t.stride(-2) if rows > 1 else k
    good = (k == 1 or t.stride(-1) == 1) and row_stride * t.element_size() <= MAX_SIZE
    dimensions = ((row_stride, rows), (batch_stride, batch))
    extent = k
    for stride, size in dimensions if row_stride <= batch_stride else dimensions[::-1]:
        if size > 1:
            good = good and stride >= extent
            extent = extent + (size - 1) * stride
    if not good:
        raise ValueError(
            f"{name}: expected strides (..., {k} or more, 1), so that rows are contiguous, at most "
            f"{MAX_SIZE} bytes apart, and do not overlap, got {t.stride()}"
        )


Region = tuple[str, int, int]
"""Memory of an argument: its name, address and bytes."""


def region(name: str, t: torch.Tensor) -> Region:
    """The memory of a tensor, whose bytes between rows count."""
    return name, t.data_ptr(), span(t)


def check_disjoint(reads: list[Region], writes: list[Region]) -> None:
    """Check that no byte to be written belongs to another of the tensors."""
    others = list(reads)
    for name, start, nbytes in writes:
        for other, other_start, other_bytes in others:
            overlaps = start < other_start + other_bytes and other_start < start + nbytes
            if overlaps and nbytes and other_bytes:
                raise ValueError(
                    f"{name}: expected memory of its own, got memory that overlaps {other}"
                )
        others.append((name, start, nbytes))


def span(t: torch.Tensor) -> int:
    """Bytes from the first element of a tensor to its last."""
    if t.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return " or ".join(map(_name, dtypes))


def _kind(value: object) -> str:
    return _name(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__
