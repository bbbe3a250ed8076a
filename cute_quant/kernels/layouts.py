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

These functions build layouts where a kernel is traced, or in any other MLIR context.
"""

import cutlass.cute as cute
from cutlass import Int32, Int64

from cute_quant.formats import BYTES_PER_WORD, LOAD_BYTES, SCALE_ROW_ALIGNMENT

BYTES_PER_VALUE = 2
VALUES_PER_THREAD = LOAD_BYTES // BYTES_PER_VALUE
ROWS_PER_CTA = SCALE_ROW_ALIGNMENT
THREADS_PER_ROW = 32
THREADS_PER_CTA = ROWS_PER_CTA * THREADS_PER_ROW
TILE = (ROWS_PER_CTA, THREADS_PER_ROW * VALUES_PER_THREAD)


def tiled_copy(atom: cute.CopyAtom) -> cute.TiledCopy:
    """A copy of the CTA's tile, each thread its 16 neighbours.

    (row, lane) -> thread ``(4, 32) : (32, 1)`` and (row, column) -> value ``(1, 16) : (16, 1)``.
    """
    return cute.make_tiled_copy_tv(
        atom,
        cute.make_ordered_layout((ROWS_PER_CTA, THREADS_PER_ROW), order=(1, 0)),
        cute.make_ordered_layout((1, VALUES_PER_THREAD), order=(1, 0)),
    )


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
