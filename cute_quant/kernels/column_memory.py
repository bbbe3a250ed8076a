"""Shared memory of the kernels of groups along rows: what warps tell each other of a tile."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint16, Uint32, const_expr

from cute_quant.contract.rows import DENSE
from cute_quant.kernels import block_tile, layouts
from cute_quant.kernels.block_tile import VECTOR_BYTES
from cute_quant.kernels.config import BLOCK_TILE, BLOCK_WARPS, ColumnsSpec


class Shared(NamedTuple):
    """Shared memory of a CTA, for one tile after the other.

    Attributes:
        amaxes: of columns in each warp, (warp, column).
        ends: of the rows of each group along rows, (group,), or None.
        of_rows: largest magnitudes of rows, then their multipliers, (row, group along k), or None.
        multipliers: of columns, (group along rows, column).
        transposed: for values in the order of the transpose, or None.
    """

    amaxes: cute.Tensor
    ends: cute.Tensor | None
    of_rows: cute.Tensor | None
    multipliers: cute.Tensor
    transposed: cute.Pointer | None


def allocate(spec: ColumnsSpec, dtype: type[cutlass.Numeric]) -> Shared:
    """Allocate shared memory for a tile of values of a type."""
    ends = of_rows = transposed = None
    values, groups = spec.values_per_thread, BLOCK_TILE // spec.fmt.group_size
    amaxes = shared_columns(values, Uint32 if dtype is Float32 else Uint16, BLOCK_WARPS)
    if spec.kind != DENSE:
        memory = cute.arch.alloc_smem(Uint32, groups, alignment=VECTOR_BYTES)
        ends = cute.make_tensor(memory, groups)
    if spec.row_fmt is not None:
        layout = layouts.row_scales_of_tile(spec.row_fmt.group_size)
        memory = cute.arch.alloc_smem(Uint32, cute.size(layout), alignment=VECTOR_BYTES)
        of_rows = cute.make_tensor(memory, layout)
    multipliers = shared_columns(values, Float32, groups)
    if spec.transposed:
        transposed = block_tile.transposed_memory(1)
    return Shared(amaxes, ends, of_rows, multipliers, transposed)


def shared_columns(values: int, dtype: type[cutlass.Numeric], rows: int) -> cute.Tensor:
    """Return shared memory for a number of each column, `values` a thread, in each of some rows."""
    vector = VECTOR_BYTES * 8 // dtype.width
    layout = layouts.vectors_of_column_tile(values, vector, rows)
    memory = cute.arch.alloc_smem(dtype, BLOCK_TILE * rows, alignment=VECTOR_BYTES)
    return cute.make_tensor(memory, layout)


def rows_of_thread(of_rows: cute.Tensor, first_row: Int32, group: Int32, rows: int) -> cute.Tensor:
    """Return what a thread's rows have in `Shared.of_rows`, (rows,)."""
    place = cute.assume(of_rows.layout((first_row, group)), divby=rows)
    return cute.make_tensor(of_rows.iterator + place, rows)


def in_registers(values: list[Uint32]) -> cute.Tensor:
    """Return numbers as registers that follow each other."""
    registers = cute.make_rmem_tensor(len(values), Uint32)
    for i, value in enumerate(values):
        registers[i] = value
    return registers


@cute.jit
def copy_columns(source: cute.Tensor, target: cute.Tensor, row: Int32, column_lane: Int32):
    """Copy a thread's columns, (values,), to or from a row of `shared_columns`."""
    to_shared = const_expr(cute.rank(target) > 1)
    shared, registers = (target, source) if to_shared else (source, target)
    vector, vectors, _ = shared.shape[1]
    for i in cutlass.range_constexpr(vectors):
        place = shared.layout((row, (0, i, column_lane)))
        start = shared.iterator + cute.assume(place, divby=vector)
        part = cute.make_tensor(start, vector)
        mine = cute.make_tensor(registers.iterator + i * vector, vector)
        if const_expr(to_shared):
            cute.autovec_copy(mine, part)
        else:
            cute.autovec_copy(part, mine)
