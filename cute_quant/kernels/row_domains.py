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

NOWHERE = 2**32 - 1
"""The row of a place that is none."""


class Places(NamedTuple):
    """Rows of the result that a row of x is scattered to, each lane of a warp having one.

    Attributes:
        row: of its matrix, or ``NOWHERE``.
        matrix: of the results of masked experts, None where there is one.
    """

    row: Uint32
    matrix: Int32 | None


class Row(NamedTuple):
    """A row of the results, or of x where rows are scattered.

    Attributes:
        index: of the row in its matrix.
        exists: whether there is such a row in the input; if not, it is quantized as zeros.
        source: index of the row in x.
        in_bounds: whether q has the row, and it is to be written.
        group: that it belongs to, of a prefix sum or an index; -1 of none, and where nobody asks.
        places: where it goes if rows are scattered.
    """

    index: Uint32
    exists: Boolean
    source: Uint32
    in_bounds: Boolean
    group: Int32
    places: Places | None = None


@cute.jit
def select_rows(
    problem: Problem, domain: cutlass.Constexpr[Domain], indices: list[Uint32]
) -> list[Row]:
    """Return the rows of these indices; asked by whole warps."""
    if const_expr(domain.scattered):
        return [select_token(problem, domain, index) for index in indices]
    num_rows, sources = problem.num_rows, indices
    exist = [index < num_rows for index in indices]
    groups = [Int32(-1)] * len(indices)
    if const_expr(domain.prefix_sum and domain.grouped):
        groups = groups_of(problem.counts, problem.alignment, num_rows, indices)
        exist = [group >= 0 for group in groups]
    elif const_expr(domain.prefix_sum):
        exist = in_a_group(problem.counts, problem.alignment, num_rows, indices)
    if const_expr(domain.indexed):
        groups = [index_of(problem.counts, index, num_rows) for index in indices]
        exist = [group >= 0 for group in groups]
    if const_expr(domain.gathered):
        tokens = problem.prologue.x.rows
        sources = [gather(problem.index, index, num_rows) for index in indices]
        exist = [here and row < tokens for here, row in zip(exist, sources, strict=True)]
    in_bounds = [index < problem.num_q_rows for index in indices]
    if const_expr(domain.keeps_gaps):
        # Rows past the last are no gaps.
        written = [e or i >= num_rows for e, i in zip(exist, indices, strict=True)]
        in_bounds = [b and w for b, w in zip(in_bounds, written, strict=True)]
    return [
        Row(indices[i], exist[i], sources[i], in_bounds[i], groups[i]) for i in range(len(indices))
    ]


def select_token(problem: Problem, domain: Domain, index: Uint32) -> Row:
    """Return a row of x, with its places."""
    exists = index < problem.prologue.x.rows
    places = places_of_token(problem, domain, index)
    return Row(index, exists, index, exists, Int32(-1), places)


@cute.jit
def places_of_token(problem: Problem, domain: cutlass.Constexpr[Domain], token: Uint32) -> Places:
    """Return the places of a row of x; asked by whole warps."""
    lane, rows = cute.arch.lane_idx(), problem.num_rows
    place = Int32(-1)
    if token < problem.prologue.x.rows and lane < problem.index.shape[1]:
        place = problem.index[Int32(token), lane]
    # As unsigned, -1 lies past the last row.
    matrix, row = None, Uint32(place)
    exists = row < rows
    if const_expr(domain.masked):
        row = Uint32(cutlass.max(place, Int32(0)))
        matrix = Int32(row // rows)
        row = row - Uint32(matrix) * rows
        exists = place >= 0 and row < Uint32(read_count(problem, matrix))
    elif const_expr(domain.prefix_sum):
        exists = places_in_groups(problem, row)
    elif const_expr(domain.indexed):
        exists = index_of(problem.counts, row, rows) >= 0
    return Places(row if exists else Uint32(NOWHERE), matrix)


@cute.jit
def places_in_groups(problem: Problem, row: Uint32) -> Boolean:
    """Return whether the row that a lane holds exists; of lanes past the places anything."""
    lane, found = cute.arch.lane_idx(), Boolean(False)
    for base in range(0, problem.counts.shape[0], LANES):
        start, end = span_of(problem.counts, problem.alignment, problem.num_rows, base + lane)
        for i in range(problem.index.shape[1]):
            place = cute.arch.shuffle_sync(row, i)
            inside = cute.arch.vote_any_sync(start <= place and place < end)
            found = found or (inside and lane == i)
    return found


def read_count(problem: Problem, expert: Int32) -> Int32:
    """Return the rows of an expert, 0 of one past the last."""
    return clamp_count(problem, load_count(problem, expert))


@cute.jit
def load_count(problem: Problem, expert: Int32) -> Int32:
    """Load the count of an expert as it is given, 0 of one past the last."""
    count = Int32(0)
    if expert < problem.counts.shape[0]:
        count = problem.counts[expert]
    return count


def clamp_count(problem: Problem, count: Int32) -> Int32:
    """Return the rows that an expert with such a count has."""
    return Int32(clamp(count, problem.num_rows))


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
    found = Uint32(0)
    for base in range(0, mEnds.shape[0], LANES):
        start, end = span_of(mEnds, alignment, mn, base + cute.arch.lane_idx())
        for i in cutlass.range_constexpr(len(indices)):
            if start <= indices[i] and indices[i] < end:
                found = found | Uint32(1 << i)
    return [cute.arch.vote_any_sync((found & Uint32(1 << i)) != 0) for i in range(len(indices))]


@cute.jit
def in_a_group_of_window(
    mEnds: cute.Tensor,  # (groups,)
    alignment: Int32,
    mn: Uint32,
    first: Uint32,
) -> Uint32:
    """Return a bit for each of the 32 rows from `first` on: whether it exists."""
    alive = Uint32(0)
    for base in range(0, mEnds.shape[0], LANES):
        start, end = span_of(mEnds, alignment, mn, base + cute.arch.lane_idx())
        low = cutlass.max(start, first) - first
        high = cutlass.max(cutlass.min(end, first + LANES), first) - first
        if low < high:
            alive = alive | (Uint32(2**32 - 1) >> (LANES - (high - low))) << low
    for i in cutlass.range_constexpr(LANES.bit_length() - 1):
        alive = alive | cute.arch.shuffle_sync_bfly(alive, offset=1 << i)
    return alive


@cute.jit
def in_a_group_of_lane(
    mEnds: cute.Tensor,  # (groups,)
    alignment: Int32,
    mn: Uint32,
    rows: list,
) -> list:
    """Return the same as `in_a_group` for rows of each lane's own."""
    found, start = Uint32(0), Uint32(0)
    for group in range(mEnds.shape[0]):
        end = clamp(mEnds[group], mn)
        for i in cutlass.range_constexpr(len(rows)):
            if start <= rows[i] and rows[i] < end:
                found = found | Uint32(1 << i)
        start = next_multiple(end, alignment)
    return [(found & Uint32(1 << i)) != 0 for i in range(len(rows))]


@cute.jit
def end_of_rows_from(
    mEnds: cute.Tensor,  # (groups,)
    alignment: Int32,
    mn: Uint32,
    first: Uint32,
) -> Uint32:
    """Return the end of the rows that exist from a row on, 0 if that one does not.

    The row is one that a group may start at, the same for all lanes of a warp, which look at a
    group each. The end is that of rows up to the next such row.
    """
    last = Uint32(0)
    for base in range(0, mEnds.shape[0], LANES):
        start, end = span_of(mEnds, alignment, mn, base + cute.arch.lane_idx())
        if start <= first and first < end:
            last = cutlass.max(last, end)
    return cute.arch.warp_reduction(last, cutlass.max)


@cute.jit
def groups_of(
    mEnds: cute.Tensor,  # (groups,)
    alignment: Int32,
    mn: Uint32,
    indices: list,
) -> list:
    """Return the group of each of some rows, the first where there are several, -1 of none."""
    groups = [Int32(-1)] * len(indices)
    for base in range(0, mEnds.shape[0], LANES):
        start, end = span_of(mEnds, alignment, mn, base + cute.arch.lane_idx())
        for i in cutlass.range_constexpr(len(indices)):
            lanes = Uint32(cute.arch.vote_ballot_sync(start <= indices[i] and indices[i] < end))
            # The zeros below the lowest bit are the number of the first lane.
            first = Int32(cute.arch.popc(~lanes & (lanes - 1)))
            found = lanes != 0 and groups[i] < 0
            groups[i] = base + first if found else groups[i]
    return groups


@cute.jit
def span_of(mEnds: cute.Tensor, alignment: Int32, mn: Uint32, group: Int32) -> tuple:
    """Return the first row of a group and the row past its last, 0 and 0 if there is none."""
    start, end = Uint32(0), Uint32(0)
    if group < mEnds.shape[0]:
        end = clamp(mEnds[group], mn)
        if group > 0:
            start = next_multiple(clamp(mEnds[group - 1], mn), alignment)
    return start, end


@cute.jit
def index_of(mIndices: cute.Tensor, row: Uint32, mn: Uint32) -> Int32:
    """Return the index that a row carries, -1 past the last row."""
    index = Int32(-1)
    if row < mn:
        index = mIndices[Int32(row)]
    return index


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
