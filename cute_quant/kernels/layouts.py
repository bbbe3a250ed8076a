"""Every layout of the package, as CuTe layout algebra.

By default a thread holds 16 values of a row, contiguous along k (32 bytes of bf16 or fp16). So a
group of 128 is held by 8 lanes, and a warp has 512 columns of a row: four groups, whose four scale
bytes make one packed word. A CTA stacks four warps, each with a row, or with some rows that follow
each other. `config.Tile` has these numbers.

    columns        0 .. 127      128 .. 255     256 .. 383     384 .. 511
    row 0    lane  0 ..   7      8 ..  15      16 ..  23      24 ..  31      warp 0
    row 1    lane  0 ..   7      8 ..  15      16 ..  23      24 ..  31      warp 1
    row 2    lane  0 ..   7      8 ..  15      16 ..  23      24 ..  31      warp 2
    row 3    lane  0 ..   7      8 ..  15      16 ..  23      24 ..  31      warp 3

A group of another size takes as many lanes as hold it, a whole row all of them. The offset of a row
in memory is computed first, with 64 bits; within the row a tiled copy has lanes and values.

These functions build layouts where a kernel is traced, or in any other MLIR context.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Float4E2M1FNx2, Int32, Int64, Uint8, Uint32, Uint64

from cute_quant.contract import scale_layouts
from cute_quant.contract.dtypes import BLOCK_GROUPS, BLOCK_LANES
from cute_quant.contract.format_choices import MAX_COLUMNS
from cute_quant.contract.formats import Format
from cute_quant.contract.scale_layouts import Modes, ScaleLayout
from cute_quant.kernels.config import (
    BLOCK_TILE,
    BLOCK_WARPS,
    CONVERT_ROWS,
    CONVERT_WARPS,
    DOWN,
    LANES,
    Tile,
)
from cute_quant.kernels.params import Params


def tiled_copy(atom: cute.CopyAtom, values_per_thread: int) -> cute.TiledCopy:
    """Return a warp's copy of its tile of a row: (lane, value) -> column, ``(32, v) : (v, 1)``.

    These are the columns of `thread_value`, whatever the groups.
    """
    return cute.make_tiled_copy_tv(
        atom, cute.make_layout(LANES), cute.make_layout(values_per_thread)
    )


def warps(tile: Tile) -> cute.Layout:
    """Return the layout warp of a CTA -> (its first row, its tile of columns), both in the CTA.

    ``(row_warps, column_warps) : (rows_per_thread@0, 1@1)``, in the order of the tile. A mode of
    one warp has stride 0: its index is not asked for.
    """
    modes = [(tile.row_warps, tile.rows_per_thread * cute.E(0)), (tile.column_warps, cute.E(1))]
    if tile.warp_order != DOWN:
        modes.reverse()
    shape, stride = zip(*modes, strict=True)
    stride = tuple(0 * step if size == 1 else step for size, step in modes)
    return cute.make_layout(shape, stride=stride)


def tiles_of_thread(tile: Tile) -> cute.Layout:
    """Return the layout (tile of a thread, place of its warp along N) -> tile of the row.

    ``(tiles, warps) : (1, tiles)``. A product that the layout makes is known not to overflow.
    """
    tiles = tile.tiles_per_thread
    return cute.make_layout((tiles, MAX_COLUMNS // tile.columns), stride=(1, tiles))


def vectors_of_row() -> cute.Layout:
    """Return the layout (vector of a row) -> (lane, tile) of the `copy.Segment` that it is.

    ``(32, tiles) : (1@0, 1@1)``
    """
    return cute.make_layout((LANES, MAX_COLUMNS // LANES), stride=(cute.E(0), cute.E(1)))


def thread_value(tile: Tile, group_size: int) -> cute.Layout:
    """Return the layout (lane, value) -> (row, column) of a warp's tile.

    ``((lanes of a group, groups), (values, rows)) : ((values@1, group_size@1), (1@1, 1@0))``
    """
    lanes, values = tile.lanes_per_group(group_size), tile.values_per_thread
    return cute.make_layout(
        ((lanes, tile.groups(group_size)), (values, tile.rows_per_thread)),
        stride=((values * cute.E(1), lanes * values * cute.E(1)), (cute.E(1), cute.E(0))),
    )


def lanes(lanes_per_group: int) -> cute.Layout:
    """Return the layout lane of a warp -> (lane of its group, group of the warp).

    ``(lanes of a group, groups) : (1@0, 1@1)``. The scale of a thread's row i is stored by lane i
    of the group, so this is also lane -> (row of the thread, group) of the scale that it stores.
    """
    shape = lanes_per_group, LANES // lanes_per_group
    return cute.make_layout(shape, stride=(cute.E(0), cute.E(1)))


def threads_of_block_tile(values: int) -> cute.Layout:
    """Return the layout (lane, warp) -> (its first row, its lane along columns) in a CTA's tile.

    ``((lanes along columns, lanes along rows), warps)``, ``((1@1, rows of a thread@0), 16@0)``. A
    warp has adjacent lanes along the tile's columns, and each thread rows that follow each other.
    """
    lanes, rows = BLOCK_TILE // values, rows_of_block_thread(values)
    return cute.make_layout(
        ((lanes, LANES // lanes), BLOCK_WARPS),
        stride=((cute.E(1), rows * cute.E(0)), BLOCK_TILE // BLOCK_WARPS * cute.E(0)),
    )


HALF_WARP_COLUMNS = 8
"""Lanes of a half warp along the columns of a tile whose columns are reduced."""


def threads_of_column_tile(values: int) -> cute.Layout:
    """Return the same layout for a tile whose columns are reduced and transposed.

    ``((8, lanes along rows, lanes along columns / 8), warps)``. Eight lanes along columns and those
    along rows have a half warp, so that its stores to `transposed_tile` go to all banks.
    """
    lanes, rows = BLOCK_TILE // values, rows_of_block_thread(values)
    return cute.make_layout(
        ((HALF_WARP_COLUMNS, LANES // lanes, lanes // HALF_WARP_COLUMNS), BLOCK_WARPS),
        stride=(
            (cute.E(1), rows * cute.E(0), HALF_WARP_COLUMNS * cute.E(1)),
            BLOCK_TILE // BLOCK_WARPS * cute.E(0),
        ),
    )


def vectors_of_column_tile(values: int, vector: int, rows: int) -> cute.Layout:
    """Return the layout (row, column of a tile) -> place in shared memory.

    ``(rows, ((vector, vectors of a thread), lanes)) : (128, ((1, lanes vector), vector))``. Lanes
    along columns have adjacent vectors, 16 bytes each, of their first columns, then of the next.
    """
    lanes = BLOCK_TILE // values
    vector = min(vector, values)
    return cute.make_layout(
        (rows, (vector, values // vector, lanes)),
        stride=(BLOCK_TILE, (1, lanes * vector, vector)),
    )


def vectors_of_threads(vector: int) -> cute.Layout:
    """Return the layout (value, lane, warp) -> place of a tile's values in shared memory.

    ``((vector, vectors of a thread), 32, warps)``: lanes have adjacent vectors.
    """
    threads = LANES * BLOCK_WARPS
    count = BLOCK_TILE * BLOCK_TILE // (threads * vector)
    return cute.make_layout(
        ((vector, count), LANES, BLOCK_WARPS),
        stride=((1, vector * threads), vector, vector * LANES),
    )


def rows_of_block_thread(values: int) -> int:
    """Return how many rows of a tile of weights a thread has `values` of."""
    return BLOCK_TILE * BLOCK_TILE // (LANES * BLOCK_WARPS * values)


def segments_of_block_tile(values: int) -> cute.Layout:
    """Return the layout (lane along columns, tile of weights) -> (lane, tile) of a `copy.Segment`.

    ``(lanes, (tiles in a warp's, warps' tiles)) : (1@0, (lanes@0, 1@1))``
    """
    lanes = BLOCK_TILE // values
    shape = lanes, (LANES // lanes, MAX_COLUMNS)
    return cute.make_layout(shape, stride=(cute.E(0), (lanes * cute.E(0), cute.E(1))))


def blocks_of_tile(size: int) -> cute.Layout:
    """Return the layout (row of a tile of weights) -> (its row in its block, its block).

    ``(size, blocks) : (1@0, 1@1)``, for columns too.
    """
    return cute.make_layout((size, BLOCK_TILE // size), stride=(cute.E(0), cute.E(1)))


def amaxes_of_block_tile(size: int) -> cute.Layout:
    """Return the layout ((warp of a block, block along rows), block along columns) -> word.

    A warp has as many rows of a tile as another, and so the largest magnitudes of as many blocks as
    lie side by side. Those of a block are contiguous.
    """
    blocks = BLOCK_TILE // size
    warps = BLOCK_WARPS // blocks
    return cute.make_layout(((warps, blocks), blocks), stride=((1, BLOCK_WARPS), warps))


def row_scales_of_tile(size: int) -> cute.Layout:
    """Return the layout (row, group along k) of a tile -> place of its scale in shared memory.

    ``(128, groups) : (1, 128)``: lanes store those of adjacent rows.
    """
    return cute.make_layout((BLOCK_TILE, BLOCK_TILE // size))


def rows_of_scales() -> cute.Layout:
    """Return the layout (lane, warp) -> (row, first group) of the scales that a thread stores.

    ``(lanes, (warps of a column, columns)) : (1@0, (lanes@0, 1@1))``
    """
    warps = BLOCK_TILE // LANES
    return cute.make_layout(
        (LANES, (warps, BLOCK_WARPS // warps)),
        stride=(cute.E(0), (LANES * cute.E(0), cute.E(1))),
    )


def transposed_tile(values: int, per_byte: int) -> cute.ComposedLayout:
    """Return the layout (row, k) -> byte of a tile of q in shared memory.

    ``S<3,4,s> o (128, (values of a byte, row bytes)) : (row bytes, (0, 1))``. Threads whose rows
    are `values` apart store to the same columns at once, and s takes the bits of rows that tell
    them apart to the banks.
    """
    row_bytes = BLOCK_TILE // per_byte
    swizzle = cute.make_swizzle(3, 4, (row_bytes * values).bit_length() - 1 - 4)
    shape, stride = (BLOCK_TILE, (per_byte, row_bytes)), (row_bytes, (0, 1))
    return cute.make_composed_layout(swizzle, 0, cute.make_layout(shape, stride=stride))


def vectors_of_transposed_tile(values: int) -> cute.Layout:
    """Return the layout (lane, warp, vector) -> (row, place in the row) of vectors along k.

    ``((vectors of a row, rows of a warp), warps, vectors of a thread)``, each vector having
    `values`.
    """
    lanes = BLOCK_TILE // values
    rows = LANES // lanes
    count = BLOCK_TILE // (rows * BLOCK_WARPS)
    return cute.make_layout(
        ((lanes, rows), BLOCK_WARPS, count),
        stride=(
            (cute.E(1), cute.E(0)),
            rows * cute.E(0),
            rows * BLOCK_WARPS * cute.E(0),
        ),
    )


class Matrix(Params):
    """A matrix (rows, columns) or a batch of them, rows contiguous, as an argument of a kernel.

    Attributes:
        tensor: (rows, columns) or (batch, rows, columns), the last stride 1.
        row_bytes: bytes from a row to the next, below 2^32. They are an argument of their own, so
            that they are computed once, before a launch.
    """

    def __init__(self, tensor: cute.Tensor, row_bytes: Uint32 | None = None):
        if tensor.element_type is Float4E2M1FNx2:
            tensor = cute.recast_tensor(tensor, Uint8)
        self.tensor = tensor
        self.row_bytes = row_bytes
        if row_bytes is None:
            self.row_bytes = unsigned(tensor.stride[-2]) * (tensor.element_type.width // 8)

    @property
    def rows(self) -> Uint32:
        """Return the rows of each matrix."""
        return unsigned(self.tensor.shape[-2])

    def __getitem__(self, batch: Int32) -> Matrix:
        """Return one matrix of a batch."""
        return Matrix(self.tensor[batch, None, None], self.row_bytes)

    def row(
        self, index: Int32 | Uint32, columns: Int32 | None = None, first: Int32 | int = 0
    ) -> cute.Tensor:
        """Return a row, (columns,), from column `first` on; all of it by default.

        Rows start, and `first` lies, at a multiple of the alignment of the tensor. The offset is
        one product of 32-bit numbers to 64 bits. This saves 3 instructions over a layout's
        ``m[index, None]``, which multiplies 64-bit numbers, or overflows 32.
        """
        m = self.tensor
        offset = Int64(Uint64(Uint32(index)) * Uint64(self.row_bytes))
        if not isinstance(first, int) or first:
            offset = offset + Int64(first) * (m.element_type.width // 8)
        offset = cute.assume(offset, divby=m.iterator.alignment)
        start = cute.recast_ptr(m.iterator, dtype=Uint8) + offset
        return cute.make_tensor(
            cute.recast_ptr(start, dtype=m.element_type),
            cute.make_layout(m.shape[1] if columns is None else columns),
        )


def unsigned(size: Int32 | int) -> Uint32:
    """Return a size or an index as unsigned.

    Sizes and strides of tensors, and what a layout returns, make all that is computed from them
    signed. 2^31 rows, or one past them, are not.
    """
    return Uint32(Int64(size))


def as_layout(described: ScaleLayout) -> cute.Layout:
    """Return a layout of scales as one of CuTe; a coordinate of one mode is a plain number."""
    return cute.make_layout(_modes(described.shape), stride=_modes(described.strides))


def scale_layout(fmt: Format, mn: int, k: int) -> cute.Layout:
    """Return the layout (row, group) -> place of a scale, counted in bytes or float32.

    It is that of `cute_quant.contract.scale_layouts`, of one matrix with its padding.

    Args:
        fmt: the format of the scales.
        mn: rows of the quantized values.
        k: columns of the quantized values.
    """
    return as_layout(scale_layouts.scale_layout(fmt, mn, k))


def scales(
    fmt: Format, rows: Int32 | int, groups: Int32 | int, row_stride: Int64 | None = None
) -> cute.Layout:
    """Return the layout (row, group) -> (byte of an element, element) of a matrix's scales.

    An element is a float32, a byte, or a word of four bytes. Its index has 32 bits but in row-major
    layouts: they hold all elements of a matrix (`checks` sees to it) and count as signed: see
    `unsigned`.

    Args:
        fmt: the format of the scales.
        rows: with padding.
        groups: with the padding of blocks.
        row_stride: of a row-major layout, by default that of contiguous rows.
    """
    element = cute.E(1)
    if fmt.blocked:
        shape, strides = scale_layouts.blocks(rows, groups, fmt.block_rows)
        elements = tuple(tuple(step * element for step in modes) for modes in strides)
        return as_layout(ScaleLayout(shape, elements))
    columns = cute.ceil_div(groups, fmt.groups_per_column)
    byte = cute.E(0) if fmt.packed else None
    if fmt.mn_major:
        return as_layout(scale_layouts.strided(rows, columns, element, rows * element, byte))
    row_stride = (_wide(columns) if row_stride is None else row_stride) * element
    return as_layout(scale_layouts.strided(rows, columns, row_stride, element, byte))


def conversion_tile(result: Format) -> tuple[int, int]:
    """Return the rows of a CTA of `convert_scales`, and its quads: four groups of a row."""
    if result.mn_major or result.blocked:
        return LANES * CONVERT_ROWS, CONVERT_WARPS
    return CONVERT_WARPS, LANES


def conversion_threads(result: Format) -> cute.Layout:
    """Return the layout (lane, warp, row of a thread) -> (row, quad) of `convert_scales`.

    Lanes are along the direction in which the result is contiguous. A thread has one row of a
    row-major result, and else four rows whose words are contiguous.
    """
    row, quad = cute.E(0), cute.E(1)
    if not (result.mn_major or result.blocked):
        return cute.make_layout((LANES, CONVERT_WARPS, 1), stride=(quad, row, 0 * row))
    step = block_lanes(result) if result.block_rows == LANES * CONVERT_ROWS else 1
    lane = 1 if step > 1 else CONVERT_ROWS
    return cute.make_layout(
        (LANES, CONVERT_WARPS, CONVERT_ROWS), stride=(lane * row, quad, step * row)
    )


def block_lanes(fmt: Format) -> int:
    """Return how many rows of a block have scales a constant distance apart."""
    return min(BLOCK_LANES, fmt.block_rows)


def groups_by_tile(scales: cute.Layout, groups_per_tile: int) -> cute.Layout:
    """Return the layout (group of a warp's tile, tile) -> coordinate of the group in `scales`.

    Such as ``(4, columns) : (1@0, 1@1)``, to (byte, column), where a tile has a packed word. The
    coordinate comes first, so that a column is multiplied with its stride once.
    """
    return cute.logical_divide(cute.make_identity_layout(scales.shape[1]), groups_per_tile)


def batch_of_scales(fmt: Format, matrices: cute.Layout, rows: Int32, groups: Int32) -> cute.Layout:
    """Return the layout (batch, row, group) -> place of a scale, in bytes or float32.

    Args:
        fmt: the format of the scales.
        matrices: of their tensor: (batch, rows, columns), or (batch, bytes) in blocks.
        rows: of a matrix, without padding.
        groups: of a row, without padding.
    """
    batches, *_, columns = matrices.shape
    batch_stride, *strides = (Int64(step) for step in matrices.stride)
    if fmt.blocked:
        rows, groups = cute.round_up(rows, fmt.block_rows), cute.round_up(groups, BLOCK_GROUPS)
        described = scale_layouts.blocks(rows, groups, fmt.block_rows)
    else:
        described = scale_layouts.in_memory(fmt, rows, columns, *strides)
        batch_stride = batch_stride * fmt.groups_per_column
    shape, strides = _modes(described.shape), _modes(described.strides)
    return cute.make_layout((batches, *shape), stride=(batch_stride, *strides))


def rows_of_square_blocks(scales: cute.Layout, size: int) -> cute.Layout:
    """Return (..., row, group) -> element for a layout (..., block of rows, group) -> element.

    ``(..., (size, blocks), groups) : (..., (0, stride), stride)``
    """
    *shape, blocks, groups = scales.shape
    *stride, block_stride, group_stride = scales.stride
    return cute.make_layout(
        (*shape, (size, blocks), groups), stride=(*stride, (0, block_stride), group_stride)
    )


def _modes(modes: Modes) -> tuple:
    """Return modes as CuTe has them: one alone is a number, not a tuple."""
    return tuple(mode[0] if len(mode) == 1 else mode for mode in modes)


def _wide(size: Int32 | int) -> Int64 | int:
    """Return a size as a stride whose multiples exceed 32 bits; a static one stays static."""
    return size if isinstance(size, int) else Int64(unsigned(size))
