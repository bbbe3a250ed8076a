"""Copies between rows in memory and the registers of a thread, as wide as alignment allows."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64, const_expr
from cutlass.cute.runtime import make_fake_tensor

from cute_quant.kernels import layouts
from cute_quant.kernels.config import LANES, Access

HINTS = {
    "no_allocate": {"l1c_evict_priority": cute.nvgpu.CacheEvictionPriority.NO_ALLOCATE},
    "streaming": {"load_cache_mode": cute.nvgpu.LoadCacheMode.STREAMING},
    "prefetch_256": {"l2_prefetch_size": cute.nvgpu.L2PrefetchSize.SIZE_256B},
}
"""Arguments of a copy atom for each of `config.LOAD_HINTS`."""


class Segment(NamedTuple):
    """The part of a row that a thread holds: a lane's values in a warp's tile of the row.

    A tile has ``LANES * values`` columns. Lane i holds the `values` contiguous ones from column
    ``(tile * LANES + i) * values`` on.

    Attributes:
        tile: index of the warp's tile in the row.
        lane: index of the thread in its warp.
    """

    tile: Int32
    lane: Int32


def fake_matrix(dtype: type[cutlass.Numeric], shape: tuple, nbytes: int) -> cute.Tensor:
    """Return a stand-in for a tensor (..., rows, k), to compile a kernel with.

    Args:
        dtype: CuTe's type of the elements.
        shape: (..., rows, k), sizes that vary as ``cute.sym_int32()``.
        nbytes: alignment of the first element, and of the strides of all dimensions but k, which
            is contiguous.
    """
    elements = nbytes // (dtype.width // 8)
    strides = (
        *(cute.sym_int64(divisibility=elements) for _ in shape[:-2]),
        cute.sym_int32(divisibility=elements),
        1,
    )
    return make_fake_tensor(dtype, shape, stride=strides, assumed_align=nbytes)


def fake_strided(dtype: type[cutlass.Numeric], shape: tuple, nbytes: int) -> cute.Tensor:
    """Return a stand-in for a tensor of any strides, aligned to `nbytes`."""
    strides = tuple(cute.sym_int64() for _ in shape)
    align = max(nbytes, dtype.width // 8)
    return make_fake_tensor(dtype, shape, stride=strides, assumed_align=align)


@cute.jit
def load(
    gRow: cute.Tensor,  # (k,)
    segment: Segment,
    row_predicate: Boolean,
    tXrX: cute.Tensor,  # (values,)
    access: cutlass.Constexpr[Access],
):
    """Load a thread's segment of a row to registers.

    Registers past the end of the row keep what they hold, and all do where the predicate is false.

    Args:
        gRow: (k,), contiguous, aligned to ``access.load_bytes``.
        segment: of the thread.
        row_predicate: whether the row is in bounds.
        tXrX: (values,), registers of the type of the row.
        access: width and cache hint of the loads.
    """
    atom = load_atom(gRow.element_type, cute.size(tXrX), access)
    tXgX = partition(gRow, segment, atom, cute.size(tXrX))
    tXcX = partition(cute.make_identity_tensor(cute.size(gRow)), segment, atom, cute.size(tXrX))
    tXrX = cute.make_tensor(tXrX.iterator, tXgX.layout)
    copy_in_bounds(atom, tXgX, tXrX, tXcX, cute.size(gRow), row_predicate, access.ragged)


def address(gRow: cute.Tensor, segment: Segment, values: int, access: Access) -> Int64:
    """Return where a thread's segment of a row, (k,), begins in memory."""
    atom = load_atom(gRow.element_type, values, access)
    return Int64(partition(gRow, segment, atom, values).iterator.toint())


@cute.jit
def store(
    tXrX: cute.Tensor,  # (values,)
    gRow: cute.Tensor,  # (k,)
    segment: Segment,
    row_predicate: Boolean,
    access: cutlass.Constexpr[Access],
):
    """Store registers to a thread's segment of a row.

    Nothing is stored past the end of the row, or where the predicate is false.

    Args:
        tXrX: (values,), registers of the type of the row.
        gRow: (k,), contiguous, aligned to ``access.store_bytes``.
        segment: of the thread.
        row_predicate: whether the row is in bounds.
        access: width of the stores.
    """
    atom = store_atom(gRow.element_type, cute.size(tXrX), access.store_bytes)
    tXgX = partition(gRow, segment, atom, cute.size(tXrX))
    tXcX = partition(cute.make_identity_tensor(cute.size(gRow)), segment, atom, cute.size(tXrX))
    tXrX = cute.make_tensor(tXrX.iterator, tXgX.layout)
    copy_in_bounds(atom, tXrX, tXgX, tXcX, cute.size(gRow), row_predicate, access.ragged)


@cute.jit
def copy_in_bounds(
    atom: cute.CopyAtom,
    src: cute.Tensor,  # (values,)
    dst: cute.Tensor,  # (values,)
    tXcX: cute.Tensor,  # (values,) column of each value
    columns: Int32,
    row_predicate: Boolean,
    ragged: cutlass.Constexpr[bool],
):
    """Copy as one vector, or value by value where the row ends within it.

    A row that does not end within a vector holds all of it or nothing.
    """
    deciding = cute.size(src) - 1 if const_expr(ragged) else 0
    if row_predicate and tXcX[deciding] < columns:
        cute.copy(atom, src, dst)
    elif const_expr(ragged) and row_predicate:
        for i in cutlass.range_constexpr(cute.size(src)):
            if tXcX[i] < columns:
                dst[i] = src[i]


def partition(
    t: cute.Tensor,  # (k,)
    segment: Segment,
    atom: cute.CopyAtom,
    values: int,
) -> cute.Tensor:
    """Return a thread's segment of a row, or of the coordinates of one, (values,)."""
    tile = cute.local_tile(t, (LANES * values,), (segment.tile,))
    return layouts.tiled_copy(atom, values).get_slice(segment.lane).partition_S(tile)


def column_coordinates(k: Int32, segment: Segment, values: int) -> cute.Tensor:
    """Return the columns of a thread's values, (values,)."""
    atom = store_atom(cutlass.Uint8, values, 1)
    return partition(cute.make_identity_tensor(k), segment, atom, values)


def tile_coordinates(k: Int32, tile: Int32, columns: int) -> cute.Tensor:
    """Return the columns of a tile of a row, (columns,)."""
    return cute.local_tile(cute.make_identity_tensor(k), (columns,), (tile,))


def load_atom(dtype: type[cutlass.Numeric], values: int, access: Access) -> cute.CopyAtom:
    """Return the copy of a thread's values from memory, with the hint of the access."""
    if access.load_hint is None:
        return store_atom(dtype, values, access.load_bytes)
    op, hint = cute.nvgpu.CopyG2ROp(), HINTS[access.load_hint]
    bits = bits_per_copy(dtype, values, access.load_bytes)
    return cute.make_copy_atom(op, dtype, num_bits_per_copy=bits, **hint)


def store_atom(dtype: type[cutlass.Numeric], values: int, nbytes: int) -> cute.CopyAtom:
    """Return the copy of a thread's values, `nbytes` at once."""
    bits = bits_per_copy(dtype, values, nbytes)
    return cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), dtype, num_bits_per_copy=bits)


def bits_per_copy(dtype: type[cutlass.Numeric], values: int, nbytes: int) -> int:
    """Return the bits of `nbytes`, or of all values if they are fewer."""
    return min(8 * nbytes, values * dtype.width)
