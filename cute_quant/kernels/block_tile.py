"""A CTA's tile of 128 x 128 values in the registers of its threads: places, and the transpose.

Kernels of square blocks and of groups along rows have such tiles. A thread holds values of some
rows that follow each other, and stores quantized ones in its columns through shared memory.
"""

from __future__ import annotations

from collections.abc import Callable

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint8, Uint32

from cute_quant.kernels import copy, layouts
from cute_quant.kernels.config import BLOCK_TILE, Access
from cute_quant.kernels.copy import Segment
from cute_quant.kernels.layouts import Matrix

VECTOR_BYTES = 16
"""Bytes of q that a thread takes from shared memory at once."""


def segment(values: int, column_lane: Int32, column_tile: Int32) -> Segment:
    """Return the segment of a row of all tiles that a lane of a tile's row has."""
    lane, tile = layouts.segments_of_block_tile(values)((column_lane, column_tile))
    return Segment(tile, lane)


def rows_of(tile: Int32, first: Int32, count: int) -> list[Uint32]:
    """Return the indices of rows of a tile that follow each other."""
    first = Uint32(tile) * BLOCK_TILE + layouts.unsigned(first)
    return [first + i for i in range(count)]


@cute.jit
def store_transposed(
    encode: cutlass.Constexpr[Callable[[int], cute.Tensor]],
    place: tuple[Int32, Int32],
    tile: tuple[Int32, Int32],
    q: Matrix,
    num_rows: Uint32,
    values: cutlass.Constexpr[int],
    per_byte: cutlass.Constexpr[int],
    access: cutlass.Constexpr[Access],
    memory: cute.Pointer,
):
    """Store a tile in the rows of its transpose.

    Args:
        encode: returns the quantized values of the thread's rows in one of its columns.
        place: the thread's first row, and its lane along columns, in the tile.
        tile: indices of the tile of q along rows and columns of q.
        q: the transpose.
        num_rows: its rows.
        values: columns of a thread.
        per_byte: quantized values in a byte.
        access: to q.
        memory: shared, as `transposed_memory` returns it.
    """
    first_row, column_lane = place
    row_tile, column_tile = tile
    rows, vector = layouts.rows_of_block_thread(values), VECTOR_BYTES * per_byte
    layout = layouts.transposed_tile(values, per_byte)
    for i in cutlass.range_constexpr(values):
        tXrQ = cute.recast_tensor(encode(i), Uint8)
        byte = layout((column_lane * values + i, first_row))
        copy_vector(tXrQ, bytes_at(memory, byte, rows // per_byte))
    cute.arch.barrier()

    thread_lane, warp, _ = cute.arch.thread_idx()
    vectors = layouts.vectors_of_transposed_tile(vector)
    for i in cutlass.range_constexpr(cute.size(vectors.shape[2])):
        row, column = vectors((thread_lane, warp, i))
        row_index = rows_of(row_tile, row, 1)[0]
        gQ = q.row(row_index)
        tXrQ = cute.make_rmem_tensor(VECTOR_BYTES, gQ.element_type)
        byte = layout((row, column * vector))
        copy_vector(bytes_at(memory, byte, VECTOR_BYTES), cute.recast_tensor(tXrQ, Uint8))
        to = segment(vector, column, column_tile)
        copy.store(tXrQ, gQ, to, row_index < num_rows, access)


def transposed_memory(per_byte: int) -> cute.Pointer:
    """Return shared memory for the quantized values of a tile."""
    return cute.arch.alloc_smem(Uint8, BLOCK_TILE * BLOCK_TILE // per_byte, alignment=128)


def bytes_at(memory: cute.Pointer, byte: Int32, nbytes: int) -> cute.Tensor:
    """Return as many bytes of shared memory from a multiple of their number on."""
    return cute.make_tensor(memory + cute.assume(byte, divby=nbytes), nbytes)


def copy_vector(source: cute.Tensor, target: cute.Tensor):
    """Copy bytes, (bytes,), as one vector."""
    op = cute.nvgpu.CopyUniversalOp()
    atom = cute.make_copy_atom(op, Uint8, num_bits_per_copy=8 * cute.size(source))
    cute.copy(atom, source, target)
