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

A group of another size takes as many lanes as hold it, a whole row all of them. A row's offset in
memory is computed first, with 64 bits; within the row a tiled copy, lanes times values, says who
holds what.

These functions build layouts where a kernel is traced, or in any other MLIR context.
"""

import cutlass.cute as cute
from cutlass import Int32, Int64, Uint8, Uint32, Uint64

from cute_quant.formats import BLOCK_GROUPS, BLOCK_ROWS, BYTES_PER_WORD, WHOLE_ROW

VALUES_PER_THREAD = 16
LANES = 32
WARPS_PER_CTA = 4
COLUMNS_PER_WARP = LANES * VALUES_PER_THREAD

BLOCK_LANES = 32
"""Rows of a block of scales that are 16 bytes apart; the block's other rows lie in between."""


def lanes_per_group(group_size: int) -> int:
    """Neighbouring lanes that hold a group."""
    return LANES if group_size == WHOLE_ROW else group_size // VALUES_PER_THREAD


def tiled_copy(atom: cute.CopyAtom) -> cute.TiledCopy:
    """A warp's copy of its part of a row: lane -> ``32 : 16``, value -> ``16 : 1``."""
    return cute.make_tiled_copy_tv(
        atom, cute.make_layout(LANES), cute.make_layout(VALUES_PER_THREAD)
    )


def unsigned(size: Int32 | int) -> Uint32:
    """A size as a number of its own: sizes and strides of tensors count as signed in what is
    computed from them, and 2^31 rows, or one past them, are not."""
    return Uint32(Int64(size))


def row_bytes(m: cute.Tensor) -> Uint32:
    """Bytes from a row of `m` (..., rows, k) to the next."""
    return unsigned(m.stride[-2]) * (m.element_type.width // 8)


def row(m: cute.Tensor, bytes_per_row: Uint32, number: Int32) -> cute.Tensor:
    """A row of `m`, (k,).

    Its offset is one product of 32-bit numbers to 64 bits, where a layout would multiply 64-bit
    numbers or overflow 32. `bytes_per_row` is an argument of its own, so that it can be computed
    once, before a launch.
    """
    offset = Int64(Uint64(Uint32(number)) * Uint64(bytes_per_row))
    offset = cute.assume(offset, divby=m.iterator.alignment)
    start = cute.recast_ptr(m.iterator, dtype=Uint8) + offset
    return cute.make_tensor(
        cute.recast_ptr(start, dtype=m.element_type), cute.make_layout(m.shape[1])
    )


def scales_by_column(rows: Int32 | int, columns: Int32 | int) -> cute.Layout:
    """(row, column) -> element of MN-major scales: ``(rows, columns) : (1, rows)``.

    `rows` counts the padding. An element is a float32, or a word of four UE8M0 bytes.
    """
    return cute.make_layout((rows, columns), stride=(1, rows))


def scales_by_row(rows: Int32 | int, groups: Int32 | int) -> cute.Layout:
    """(row, group) -> element of row-major scales: ``(rows, groups) : (groups, 1)``."""
    return cute.make_layout((rows, groups), stride=(_wide(groups), 1))


def scales_by_block(rows: Int32 | int, groups: Int32 | int) -> cute.Layout:
    """(row, group) -> byte of scales in blocks of 128 rows and 4 groups.

    ``((32, 4, rows / 128), (4, groups / 4)) : ((16, 4, 128 groups), (1, 512))``
    """
    block = BLOCK_ROWS * BLOCK_GROUPS
    interleaved = BLOCK_ROWS // BLOCK_LANES
    return cute.make_layout(
        (
            (BLOCK_LANES, interleaved, rows // BLOCK_ROWS),
            (BLOCK_GROUPS, groups // BLOCK_GROUPS),
        ),
        stride=(
            (interleaved * BLOCK_GROUPS, BLOCK_GROUPS, BLOCK_ROWS * _wide(groups)),
            (1, block),
        ),
    )


def scale_element(rows: Uint32, row: Uint32, column: Int32) -> Uint32:
    """Index into MN-major scales of so many rows, as `scales_by_column` has it.

    With 32 bits, which hold all indices into one matrix: `checks` sees to it.
    """
    return Uint32(column) * rows + row


def scale_bytes(m: cute.Tensor, element: Uint32) -> cute.Tensor:
    """The bytes of one element of MN-major scales, (4,)."""
    start = cute.recast_ptr(m.iterator + Int64(Uint64(element)), dtype=Uint8)
    return cute.make_tensor(start, cute.make_layout(BYTES_PER_WORD))


def _wide(size: Int32 | int) -> Int64 | int:
    """A stride whose multiples exceed 32 bits; a static size stays static."""
    return size if isinstance(size, int) else Int64(size)
