"""Which rows of a result exist, and which row of x each of them is: device functions.

What `contract.rows` describes, read where a kernel runs. Nothing here trusts what it reads:
counts are clamped, and an index that names no row of x makes a row that does not exist.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Uint32, const_expr

from cute_quant.kernels.config import LANES, Domain
from cute_quant.kernels.problem import Problem


class Row(NamedTuple):
    """A row of the results.

    Attributes:
        index: of the row in its matrix.
        exists: whether there is such a row in the input; if not, it is quantized as zeros.
        source: index of the row in x.
        in_bounds: whether q has the row, and it is to be written.
    """

    index: Uint32
    exists: Boolean
    source: Uint32
    in_bounds: Boolean


@cute.jit
def select_rows(
    problem: Problem, domain: cutlass.Constexpr[Domain], indices: list[Uint32]
) -> list[Row]:
    """Return the rows of these indices; asked by whole warps."""
    num_rows, sources = problem.num_rows, indices
    exist = [index < num_rows for index in indices]
    if const_expr(domain.prefix_sum):
        exist = in_a_group(problem.counts, problem.alignment, num_rows, indices)
    if const_expr(domain.indexed):
        exist = [has_index(problem.counts, index, num_rows) for index in indices]
    if const_expr(domain.gathered):
        tokens = problem.prologue.x.rows
        sources = [gather(problem.index, index, num_rows) for index in indices]
        exist = [here and row < tokens for here, row in zip(exist, sources, strict=True)]
    return [
        Row(indices[i], exist[i], sources[i], indices[i] < problem.num_q_rows)
        for i in range(len(indices))
    ]


@cute.jit
def in_a_group(
    mEnds: cute.Tensor,  # (groups,)
    alignment: Int32,
    mn: Uint32,
    indices: list,
) -> list:
    """Return for each of some rows whether ``start <= row < end`` for a group.

    The lanes of a warp look at a group each, for all of its rows.
    """
    lane = cute.arch.lane_idx()
    groups = mEnds.shape[0]
    found = Uint32(0)
    for base in range(0, groups, LANES):
        group = base + lane
        start, end = Uint32(0), Uint32(0)
        if group < groups:
            end = clamp(mEnds[group], mn)
            if group > 0:
                start = next_multiple(clamp(mEnds[group - 1], mn), alignment)
        for i in cutlass.range_constexpr(len(indices)):
            if start <= indices[i] and indices[i] < end:
                found = found | Uint32(1 << i)
    return [cute.arch.vote_any_sync((found & Uint32(1 << i)) != 0) for i in range(len(indices))]


@cute.jit
def has_index(mIndices: cute.Tensor, row: Uint32, mn: Uint32) -> Boolean:
    """Return whether a row belongs to an expert."""
    index = Int32(-1)
    if row < mn:
        index = mIndices[Int32(row)]
    return index >= 0


@cute.jit
def gather(mIndex: cute.Tensor, row: Uint32, mn: Uint32) -> Uint32:
    """Return the row of x that is a row of the result; past the last where there is none."""
    index = Int32(-1)
    if row < mn:
        index = mIndex[Int32(row)]
    return Uint32(index)


@cute.jit
def clamp(count: Int32, limit: Uint32) -> Uint32:
    """Return a count as unsigned, from 0 to `limit`."""
    return cutlass.min(Uint32(cutlass.max(count, Int32(0))), limit)


@cute.jit
def next_multiple(row: Uint32, alignment: Int32) -> Uint32:
    """Return `row` rounded up to a multiple of `alignment`, both below 2^31."""
    step = Uint32(alignment)
    return (row + step - 1) // step * step
