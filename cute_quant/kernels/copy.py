"""Copies between memory and the registers of a thread, as wide as alignment allows."""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr
from cutlass.cute.runtime import make_fake_tensor

from cute_quant.kernels import layouts
from cute_quant.specs import LANES, Access


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
            cute.copy(atom(gRow, values, access.load_bytes), tXgX, like(tXrX, tXgX))
    elif live and column + values <= cute.size(gRow):
        cute.copy(atom(gRow, values, access.load_bytes), tXgX, like(tXrX, tXgX))
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


def atom(m: cute.Tensor, values: int, nbytes: int) -> cute.CopyAtom:
    """A copy of so many bytes at once, or of all values if they are fewer."""
    op = cute.nvgpu.CopyUniversalOp()
    bits = min(8 * nbytes, values * m.element_type.width)
    return cute.make_copy_atom(op, m.element_type, num_bits_per_copy=bits)


def partition(gRow: cute.Tensor, tile: Int32, lane: Int32, values: int, nbytes: int) -> cute.Tensor:
    """A lane's part of a tile of a row, to be copied by `nbytes` at once."""
    gX = cute.local_tile(gRow, (LANES * values,), (tile,))
    return layouts.tiled_copy(atom(gRow, values, nbytes), values).get_slice(lane).partition_S(gX)


def like(tXrX: cute.Tensor, tXgX: cute.Tensor) -> cute.Tensor:
    """Registers in the order of a partition, whose values are neighbours too."""
    return cute.make_tensor(tXrX.iterator, tXgX.layout)
