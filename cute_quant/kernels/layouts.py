"""Every layout of the package, as CuTe layout algebra.

A thread holds ``VALUES_PER_THREAD`` neighbours of a row (32 bytes of bf16 or fp16), so a group of
128 is an octet of lanes and a warp holds 512 columns of one row: four groups, whose four scale
bytes make one packed word. A CTA stacks ``ROWS_PER_CTA`` warps, one row each. Four rows are also
the unit to which TMA aligns a column of scales, so the rows that pad a column fall to the CTA
that holds its last rows.

    columns          0 .. 127      128 .. 255     256 .. 383     384 .. 511
    row 0    thread  0 ..   7      8 ..  15      16 ..  23      24 ..  31      warp 0
    row 1    thread 32 ..  39     40 ..  47      48 ..  55      56 ..  63      warp 1
    row 2    thread 64 ..  71     72 ..  79      80 ..  87      88 ..  95      warp 2
    row 3    thread 96 .. 103    104 .. 111     112 .. 119     120 .. 127      warp 3

A row's offset in memory is computed first, with 64 bits; within the row a tiled copy, lanes times
values, says who holds what.

These functions build layouts where a kernel is traced, or in any other MLIR context.
"""

import cutlass.cute as cute
from cutlass import Int32, Int64, Uint8

from cute_quant.formats import BYTES_PER_WORD, LOAD_BYTES, SCALE_ROW_ALIGNMENT

BYTES_PER_VALUE = 2
VALUES_PER_THREAD = LOAD_BYTES // BYTES_PER_VALUE
ROWS_PER_CTA = SCALE_ROW_ALIGNMENT
LANES = 32
THREADS_PER_CTA = ROWS_PER_CTA * LANES
COLUMNS_PER_CTA = LANES * VALUES_PER_THREAD


def tiled_copy(atom: cute.CopyAtom) -> cute.TiledCopy:
    """A warp's copy of its part of a row: lane -> ``32 : 16``, value -> ``16 : 1``."""
    return cute.make_tiled_copy_tv(
        atom, cute.make_layout(LANES), cute.make_layout(VALUES_PER_THREAD)
    )


def row_tile(m: cute.Tensor, row: Int32, tile: Int32) -> cute.Tensor:
    """Tile number `tile` of a row of `m`, (512,).

    The row's offset is one product of 32-bit numbers to 64 bits, where a layout would multiply
    64-bit numbers or overflow 32.
    """
    row_bytes = m.stride[0] * (m.element_type.width // 8)
    offset = cute.assume(Int64(row) * row_bytes, divby=m.iterator.alignment)
    start = cute.recast_ptr(m.iterator, dtype=Uint8) + offset
    mRow = cute.make_tensor(
        cute.recast_ptr(start, dtype=m.element_type), cute.make_layout(m.shape[1])
    )
    return cute.local_tile(mRow, (COLUMNS_PER_CTA,), (tile,))


def packed_scales(rows: Int32 | int, words: Int32 | int) -> cute.Layout:
    """(row, group) -> byte of the packed UE8M0 scales: ``(rows, (4, words)) : (4, (1, 4 rows))``.

    `rows` counts the padding: it is a multiple of 4.
    """
    return cute.make_layout(
        (rows, (BYTES_PER_WORD, words)),
        stride=(BYTES_PER_WORD, (1, BYTES_PER_WORD * _wide(rows))),
    )


def float32_scales(rows: Int32 | int, groups: Int32 | int) -> cute.Layout:
    """(row, group) -> element of the MN-major float32 scales: ``(rows, groups) : (1, rows)``."""
    return cute.make_layout((rows, groups), stride=(1, _wide(rows)))


def _wide(rows: Int32 | int) -> Int64 | int:
    """A stride between columns, whose multiples exceed 32 bits; a static size stays static."""
    return rows if isinstance(rows, int) else Int64(rows)
