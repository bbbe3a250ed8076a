"""Every layout of the package, as CuTe layout algebra.

By default a thread holds 16 neighbours of a row (32 bytes of bf16 or fp16), so a group of 128 is an
octet of lanes and a warp holds 512 columns of a row: four groups, whose four scale bytes make one
packed word. A CTA stacks four warps, each with a row, or with some neighbouring rows, of its own.
`specs.Tile` has these numbers.

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

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Int32, Int64, Uint8, Uint32, Uint64

from cute_quant.contract.formats import BLOCK_GROUPS, BLOCK_ROWS, BYTES_PER_WORD
from cute_quant.kernels.config import DOWN, LANES, Tile
from cute_quant.kernels.params import Params

BLOCK_LANES = 32
"""Rows of a block of scales that are 16 bytes apart; the block's other rows lie in between."""


def tiled_copy(atom: cute.CopyAtom, values_per_thread: int) -> cute.TiledCopy:
    """A warp's copy of its part of a row: lane -> ``32 : values``, value -> ``values : 1``."""
    return cute.make_tiled_copy_tv(
        atom, cute.make_layout(LANES), cute.make_layout(values_per_thread)
    )


def warps(tile: Tile) -> cute.Layout:
    """Warp of a CTA -> (its first row, its tile of columns) among those of the CTA.

    ``(row_warps, column_warps) : (rows_per_thread@0, 1@1)``, in the order of the tile. A mode of
    one warp has stride 0: its index is not asked for.
    """
    modes = [(tile.row_warps, tile.rows_per_thread * cute.E(0)), (tile.column_warps, cute.E(1))]
    if tile.warp_order != DOWN:
        modes.reverse()
    shape, stride = zip(*modes, strict=True)
    stride = tuple(0 * step if size == 1 else step for size, step in modes)
    return cute.make_layout(shape, stride=stride)


def place_in_group(lane: Int32 | int, lanes_per_group: int) -> tuple:
    """Which of its group's lanes a lane is, and which of the warp's groups that is."""
    return lane % lanes_per_group, lane // lanes_per_group


def scale_unit(
    tile: Int32 | int, group: Int32 | int, groups_per_tile: int, groups_per_column: int
) -> tuple:
    """Column and byte of the MN-major scale of a warp's group: a tile has some columns to itself,
    or its share of one."""
    if groups_per_tile % groups_per_column == 0:
        column = tile * (groups_per_tile // groups_per_column) + group // groups_per_column
        return column, group % groups_per_column
    tiles_per_column = groups_per_column // groups_per_tile
    return tile // tiles_per_column, tile % tiles_per_column * groups_per_tile + group


class Matrix(Params):
    """A tensor (..., rows, columns), rows contiguous, as an argument of a kernel.

    Attributes:
        tensor: the tensor.
        row_bytes: from a row to the next. An argument of its own, so that it is computed once,
            before a launch.
    """

    def __init__(self, tensor: cute.Tensor, row_bytes: Uint32 | None = None):
        self.tensor = tensor
        self.row_bytes = row_bytes
        if row_bytes is None:
            self.row_bytes = unsigned(tensor.stride[-2]) * (tensor.element_type.width // 8)

    @property
    def rows(self) -> Uint32:
        return unsigned(self.tensor.shape[-2])

    def __getitem__(self, batch: Int32) -> Matrix:
        """One of a batch."""
        return Matrix(self.tensor[batch, None, None], self.row_bytes)

    def row(
        self, number: Int32 | Uint32, columns: Int32 | None = None, first: Int32 | int = 0
    ) -> cute.Tensor:
        """A row, (columns,), all of it by default; rows start and `first` lies at a multiple of the
        alignment of the tensor.

        Its offset is one product of 32-bit numbers to 64 bits, where a layout would multiply
        64-bit numbers or overflow 32.
        """
        m = self.tensor
        offset = Int64(Uint64(Uint32(number)) * Uint64(self.row_bytes))
        if not isinstance(first, int) or first:
            offset = offset + Int64(first) * (m.element_type.width // 8)
        offset = cute.assume(offset, divby=m.iterator.alignment)
        start = cute.recast_ptr(m.iterator, dtype=Uint8) + offset
        return cute.make_tensor(
            cute.recast_ptr(start, dtype=m.element_type),
            cute.make_layout(m.shape[1] if columns is None else columns),
        )


def unsigned(size: Int32 | int) -> Uint32:
    """A size as a number of its own: sizes and strides of tensors, and what a layout gives, count
    as signed in what is computed from them, and 2^31 rows, or one past them, are not."""
    return Uint32(Int64(size))


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
