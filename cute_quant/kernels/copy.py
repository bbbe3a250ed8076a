"""Copies between memory and the registers of a thread, as wide as alignment allows."""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr
from cutlass.cute.runtime import make_fake_tensor

from cute_quant.kernels import layouts
from cute_quant.kernels.config import LANES, Access

HINTS = {
    "no_allocate": {"l1c_evict_priority": cute.nvgpu.CacheEvictionPriority.NO_ALLOCATE},
    "streaming": {"load_cache_mode": cute.nvgpu.LoadCacheMode.STREAMING},
    "prefetch_256": {"l2_prefetch_size": cute.nvgpu.L2PrefetchSize.SIZE_256B},
}
"""What the hints of `specs.LOAD_HINTS` are to a copy."""


def fake_matrix(dtype: type[cutlass.Numeric], shape: tuple, nbytes: int) -> cute.Tensor:
    """A stand-in for an argument (..., rows, k) whose rows start at multiples of `nbytes`."""
    elements = nbytes // (dtype.width // 8)
    strides = (
        *(cute.sym_int64(divisibility=elements) for _ in shape[:-2]),
        cute.sym_int32(divisibility=elements),
        1,
    )
    return make_fake_tensor(dtype, shape, stride=strides, assumed_align=nbytes)


@cute.jit
def load(
    gRow: cute.Tensor,  # (k,)
    tile: Int32,
    lane: Int32,
    live: Boolean,
    tXrX: cute.Tensor,  # (values,), kept where there is nothing to load
    access: cutlass.Constexpr[Access],
):
    """A lane's values of a tile of a row, as many as there are registers for."""
    values = cute.size(tXrX)
    column = first_column(tile, lane, values)
    tXgX = partition(gRow, tile, lane, values, access.load_bytes)
    if const_expr(not access.ragged):
        if live and column < cute.size(gRow):
            cute.copy(load_atom(gRow, values, access), tXgX, like(tXrX, tXgX))
    elif live and column + values <= cute.size(gRow):
        cute.copy(load_atom(gRow, values, access), tXgX, like(tXrX, tXgX))
    elif live:
        for i in cutlass.range_constexpr(values):
            if column + i < cute.size(gRow):
                tXrX[i] = gRow[column + i]


@cute.jit
def store(
    tXrX: cute.Tensor,  # (values,)
    gRow: cute.Tensor,  # (k,)
    tile: Int32,
    lane: Int32,
    live: Boolean,
    access: cutlass.Constexpr[Access],
):
    """A lane's values to a tile of a row."""
    values = cute.size(tXrX)
    column = first_column(tile, lane, values)
    tXgX = partition(gRow, tile, lane, values, access.store_bytes)
    if const_expr(not access.ragged):
        if live and column < cute.size(gRow):
            cute.copy(atom(gRow, values, access.store_bytes), like(tXrX, tXgX), tXgX)
    elif live and column + values <= cute.size(gRow):
        cute.copy(atom(gRow, values, access.store_bytes), like(tXrX, tXgX), tXgX)
    elif live:
        for i in cutlass.range_constexpr(values):
            if column + i < cute.size(gRow):
                gRow[column + i] = tXrX[i]


def zeros(values: int, dtype: type[cutlass.Numeric]) -> cute.Tensor:
    """Registers of a thread."""
    tXrX = cute.make_rmem_tensor(values, dtype)
    cute.recast_tensor(tXrX, cutlass.Uint32).fill(0)
    return tXrX


def first_column(tile: Int32, lane: Int32, values: int) -> Int32:
    """Of a lane's values."""
    return tile * (LANES * values) + lane * values


def load_atom(m: cute.Tensor, values: int, access: Access) -> cute.CopyAtom:
    if access.load_hint is None:
        return atom(m, values, access.load_bytes)
    op, hint = cute.nvgpu.CopyG2ROp(), HINTS[access.load_hint]
    bits = at_once(m, values, access.load_bytes)
    return cute.make_copy_atom(op, m.element_type, num_bits_per_copy=bits, **hint)


def at_once(m: cute.Tensor, values: int, nbytes: int) -> int:
    """Bits of so many bytes, or of all values if they are fewer."""
    return min(8 * nbytes, values * m.element_type.width)


def atom(m: cute.Tensor, values: int, nbytes: int) -> cute.CopyAtom:
    op, bits = cute.nvgpu.CopyUniversalOp(), at_once(m, values, nbytes)
    return cute.make_copy_atom(op, m.element_type, num_bits_per_copy=bits)


def partition(gRow: cute.Tensor, tile: Int32, lane: Int32, values: int, nbytes: int) -> cute.Tensor:
    """A lane's part of a tile of a row, to be copied by `nbytes` at once."""
    gX = cute.local_tile(gRow, (LANES * values,), (tile,))
    return layouts.tiled_copy(atom(gRow, values, nbytes), values).get_slice(lane).partition_S(gX)


def like(tXrX: cute.Tensor, tXgX: cute.Tensor) -> cute.Tensor:
    """Registers in the order of a partition, whose values are neighbours too."""
    return cute.make_tensor(tXrX.iterator, tXgX.layout)
