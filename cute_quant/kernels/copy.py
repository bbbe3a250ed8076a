"""Copies between memory and the registers of a thread, as wide as alignment allows."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr
from cutlass.cute.runtime import make_fake_tensor

from cute_quant.formats import LOAD_BYTES, STORE_BYTES
from cute_quant.kernels import layouts


@dataclass(frozen=True)
class Access:
    """Compile-time choices: what addresses allow.

    Attributes:
        load_bytes: at once, a power of two from the size of an element to 32: what every row of
            the input starts at a multiple of.
        store_bytes: the same for the output, up to 16, or 32 if its elements are x's.
        ragged: whether a row may end within a thread's values.
    """

    load_bytes: int = LOAD_BYTES
    store_bytes: int = STORE_BYTES
    ragged: bool = False


WIDEST = Access()


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
    tXrX: cute.Tensor,  # (16,), kept where there is nothing to load
    access: cutlass.Constexpr[Access],
):
    """A lane's values of a tile of a row."""
    column = first_column(tile, lane)
    tXgX = partition(gRow, tile, lane, access.load_bytes)
    if const_expr(not access.ragged):
        if live and column < cute.size(gRow):
            cute.copy(atom(gRow, access.load_bytes), tXgX, like(tXrX, tXgX))
    elif live and column + layouts.VALUES_PER_THREAD <= cute.size(gRow):
        cute.copy(atom(gRow, access.load_bytes), tXgX, like(tXrX, tXgX))
    elif live:
        for i in cutlass.range_constexpr(layouts.VALUES_PER_THREAD):
            if column + i < cute.size(gRow):
                tXrX[i] = gRow[column + i]


@cute.jit
def store(
    tXrX: cute.Tensor,  # (16,)
    gRow: cute.Tensor,  # (k,)
    tile: Int32,
    lane: Int32,
    live: Boolean,
    access: cutlass.Constexpr[Access],
):
    """A lane's values to a tile of a row."""
    column = first_column(tile, lane)
    tXgX = partition(gRow, tile, lane, access.store_bytes)
    if const_expr(not access.ragged):
        if live and column < cute.size(gRow):
            cute.copy(atom(gRow, access.store_bytes), like(tXrX, tXgX), tXgX)
    elif live and column + layouts.VALUES_PER_THREAD <= cute.size(gRow):
        cute.copy(atom(gRow, access.store_bytes), like(tXrX, tXgX), tXgX)
    elif live:
        for i in cutlass.range_constexpr(layouts.VALUES_PER_THREAD):
            if column + i < cute.size(gRow):
                gRow[column + i] = tXrX[i]


def first_column(tile: Int32, lane: Int32) -> Int32:
    """Of a lane's values."""
    return tile * layouts.COLUMNS_PER_WARP + lane * layouts.VALUES_PER_THREAD


def atom(m: cute.Tensor, nbytes: int) -> cute.CopyAtom:
    op = cute.nvgpu.CopyUniversalOp()
    return cute.make_copy_atom(op, m.element_type, num_bits_per_copy=8 * nbytes)


def partition(gRow: cute.Tensor, tile: Int32, lane: Int32, nbytes: int) -> cute.Tensor:
    """A lane's part of a tile of a row, to be copied by `nbytes` at once."""
    gX = cute.local_tile(gRow, (layouts.COLUMNS_PER_WARP,), (tile,))
    return layouts.tiled_copy(atom(gRow, nbytes)).get_slice(lane).partition_S(gX)


def like(tXrX: cute.Tensor, tXgX: cute.Tensor) -> cute.Tensor:
    """Registers in the order of a partition, whose values are neighbours too."""
    return cute.make_tensor(tXrX.iterator, tXgX.layout)
