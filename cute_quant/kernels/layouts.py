"""Every layout of the package, as CuTe layout algebra.

A thread holds ``VALUES_PER_THREAD`` neighbours of a row (32 bytes of bf16 or fp16), so a group of
128 is an octet of lanes and a warp holds 512 columns of a row: four groups, whose four scale
bytes make one packed word. A CTA stacks ``WARPS_PER_CTA`` warps, each with a row, or with some
neighbouring rows, of its own.

    columns        0 .. 127      128 .. 255     256 .. 383     384 .. 511
    row 0    lane  0 ..   7      8 ..  15      16 ..  23      24 ..  31      warp 0
    row 1    lane  0 ..   7      8 ..  15      16 ..  23      24 ..  31      warp 1
    row 2    lane  0 ..   7      8 ..  15      16 ..  23      24 ..  31      warp 2
    row 3    lane  0 ..   7      8 ..  15      16 ..  23      24 ..  31      warp 3

A row's offset in memory is computed first, with 64 bits; within the row a tiled copy, lanes times
values, says who holds what.

These functions build layouts where a kernel is traced, or in any other MLIR context.
"""

import cutlass.cute as cute
from cutlass import Int32, Int64, Uint8, Uint32, Uint64

from cute_quant.formats import BYTES_PER_WORD, LOAD_BYTES

BYTES_PER_VALUE = 2
VALUES_PER_THREAD = LOAD_BYTES // BYTES_PER_VALUE
LANES = 32
WARPS_PER_CTA = 4
COLUMNS_PER_WARP = LANES * VALUES_PER_THREAD


def tiled_copy(atom: cute.CopyAtom) -> cute.TiledCopy:
    """A warp's copy of its part of a row: lane -> ``32 : 16``, value -> ``16 : 1``."""
    return cute.make_tiled_copy_tv(
        atom, cute.make_layout(LANES), cute.make_layout(VALUES_PER_THREAD)
    )


def row_bytes(m: cute.Tensor) -> Uint32:
    """Bytes from a row of `m` to the next."""
    return Uint32(m.stride[0] * (m.element_type.width // 8))


def row_tile(m: cute.Tensor, bytes_per_row: Uint32, row: Int32, tile: Int32) -> cute.Tensor:
    """Tile number `tile` of a row of `m`, (512,).

    The row's offset is one product of 32-bit numbers to 64 bits, where a layout would multiply
    64-bit numbers or overflow 32. `bytes_per_row` is an argument of its own, so that it can be
    computed once, before a launch.
    """
    offset = Int64(Uint64(Uint32(row)) * Uint64(bytes_per_row))
    offset = cute.assume(offset, divby=m.iterator.alignment)
    start = cute.recast_ptr(m.iterator, dtype=Uint8) + offset
    mRow = cute.make_tensor(
        cute.recast_ptr(start, dtype=m.element_type), cute.make_layout(m.shape[1])
    )
    return cute.local_tile(mRow, (COLUMNS_PER_WARP,), (tile,))


def scales(rows: Int32 | int, columns: Int32 | int) -> cute.Layout:
    """(row, column) -> element of MN-major scales: ``(rows, columns) : (1, rows)``.

    `rows` counts the padding. An element is a float32, or a word of four UE8M0 bytes.
    """
    return cute.make_layout((rows, columns), stride=(1, rows))


def scale_element(m: cute.Tensor, row: Int32, column: Int32) -> Uint32:
    """Index into MN-major scales, as `scales` has it.

    With 32 bits: no device's memory holds a matrix with as many groups as these count.
    """
    return Uint32(column) * Uint32(m.stride[1]) + Uint32(row)


def scale_bytes(m: cute.Tensor, element: Uint32) -> cute.Tensor:
    """The bytes of one element of MN-major scales, (4,)."""
    start = cute.recast_ptr(m.iterator + Int64(Uint64(element)), dtype=Uint8)
    return cute.make_tensor(start, cute.make_layout(BYTES_PER_WORD))
