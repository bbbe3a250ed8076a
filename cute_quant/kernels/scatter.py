"""Rows that are written to several places: the stores of a row, and zeros where no row exists.

A row of x is read and quantized once. Lane i of a warp holds its place i, so that all places cost
one load: values go to each of them in turn, and scales to as many at once as a group has lanes.
Tiles of x are followed by windows of 32 rows of the result. They write what no row of x does, so
that no byte is written twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint32, const_expr

from cute_quant.kernels import copy, encodings, layouts
from cute_quant.kernels.config import LANES, Access, QuantizerSpec
from cute_quant.kernels.copy import Segment
from cute_quant.kernels.params import Params
from cute_quant.kernels.problem import Problem
from cute_quant.kernels.row_domains import (
    NOWHERE,
    Places,
    Row,
    in_a_group_of_window,
    index_of,
    read_count,
)
from cute_quant.kernels.scales import GroupScale
from cute_quant.kernels.stage import Origin, Rows, Scales, Stage


@dataclass(eq=False)
class Target(Params):
    """The row of q, (k,), that takes a row's values."""

    static = ("access",)

    gQ: cute.Tensor
    predicate: Boolean
    access: Access

    def store(self, tXrQ: cute.Tensor, segment: Segment):
        """Store a thread's segment of values."""
        copy.store(tXrQ, self.gQ, segment, self.predicate, self.access)


class Targets(Params):
    """The rows of q that take a row's values."""

    static = ("access",)

    def __init__(self, q: layouts.Matrix, places: Places, count: Int32, access: Access):
        self.q = q
        self.row = places.row
        self.matrix = places.matrix
        self.count = count
        self.access = access

    @cute.jit
    def store(self, tXrQ: cute.Tensor, segment: Segment):
        """Store a thread's segment of values to each of them."""
        for i in range(self.count):
            row = cute.arch.shuffle_sync(self.row, i)
            q = self.q
            if const_expr(self.matrix is not None):
                q = q[cute.arch.shuffle_sync(self.matrix, i)]
            copy.store(tXrQ, q.row(row), segment, row != Uint32(NOWHERE), self.access)


def target(row: Row, problem: Problem, access: Access) -> Target | Targets:
    """Return what takes the values of a row."""
    if row.places is None:
        return Target(problem.q.row(row.index), row.in_bounds, access)
    return Targets(problem.q, row.places, problem.index.shape[1], access)


class Scatter:
    """Stores scales to places, and zeros to rows that do not exist.

    Args:
        spec: compile-time choices.
        stage: that quantizes the rows.
    """

    def __init__(self, spec: QuantizerSpec, stage: Stage):
        self.spec = spec
        self.domain = spec.domain
        self.stage = stage

    @cute.jit
    def store_scale(
        self,
        scales: Scales,
        places: Places,
        scale: GroupScale,
        segment: Segment,
        problem: Problem,
        origin: Origin,
    ):
        """Store the scale of a lane's group: each lane of the group to another place."""
        lanes = 1 if const_expr(self.stage.whole_row) else self.stage.lanes_per_group
        lane, _ = layouts.lanes(lanes)(segment.lane)
        for first in range(0, problem.index.shape[1], lanes):
            row = cute.arch.shuffle_sync(places.row, first + lane)
            memory = scales
            if const_expr(places.matrix is not None):
                matrix = cute.arch.shuffle_sync(places.matrix, first + lane)
                memory = scales.slice_batch(matrix, matrix == problem.batches - 1)
            rows = Rows([row], problem.num_rows, [Boolean(True)], of_lanes=True)
            self.stage.store_scales(memory, rows, [scale], segment, problem.k, origin)

    @cute.jit
    def store_row_scale(self, places: Places, scale: Float32, problem: Problem):
        """Store the decode scale of a row, each lane to its own place."""
        if places.row != Uint32(NOWHERE):
            if const_expr(places.matrix is not None):
                problem.row_scales[places.matrix, Int32(places.row)] = scale
            else:
                problem.row_scales[Int32(places.row)] = scale

    def num_windows(self, problem: Problem) -> Int32:
        """Return how many windows hold rows of the result, or of scales, that may not exist."""
        if self.domain.masked:
            return problem.batches
        windows = Int32((problem.scales.rows + (LANES - 1)) // LANES)
        return windows if self.clears_rows else windows - self.first_window(problem)

    @property
    def clears_rows(self) -> bool:
        """Return whether there are rows of a matrix that do not exist and are written."""
        return self.domain.counted and not self.domain.keeps_gaps

    def first_window(self, problem: Problem) -> Int32:
        """Return the first window with rows of scales past the last row, if no other is cleared."""
        return Int32(problem.num_rows // LANES)

    @cute.jit
    def clear_window(self, problem: Problem, window: Int32):
        """Write zeros to the rows of a window that do not exist.

        Of a masked expert these are the padding rows of its scales. A window has all columns: the
        warps of a CTA share the tiles of a row.
        """
        rows, first = problem, Uint32(window) * LANES
        if const_expr(self.domain.masked):
            count = read_count(problem, window)
            rows, first = problem.slice_result(window), Uint32(count)
            missing = rows_before(first, problem.scales.rows_to_write(count))
        elif const_expr(not self.clears_rows):
            first = Uint32(self.first_window(problem) + window) * LANES
            alive = rows_before(first, problem.num_rows)
            missing = ~alive & rows_before(first, problem.scales.rows)
        elif const_expr(self.domain.prefix_sum):
            alive = in_a_group_of_window(problem.counts, problem.alignment, problem.num_rows, first)
            missing = ~alive & rows_before(first, problem.scales.rows)
        else:
            row = first + cute.arch.lane_idx()
            exists = index_of(problem.counts, row, problem.num_rows) >= 0
            alive = Uint32(cute.arch.vote_ballot_sync(exists))
            missing = ~alive & rows_before(first, problem.scales.rows)
        if missing != Uint32(0):
            for i in range(LANES):
                if (missing >> Uint32(i)) & Uint32(1) != Uint32(0):
                    self.clear_row(rows, first + Uint32(i))

    @cute.jit
    def clear_row(self, problem: Problem, row: Uint32):
        """Write zeros to a row of scales, and of q unless rows are masked."""
        stage, domain = self.stage, self.domain
        lane, y, z = cute.arch.thread_idx()
        _, height, depth = cute.arch.block_dim()
        values = stage.tile.values_per_thread // problem.values_per_column
        zero = Uint32(0) if const_expr(self.spec.fmt.byte_scales) else Float32(0.0)
        tXrQ = encodings.zeros(values, problem.q.tensor.element_type)
        for tile in range(y + height * z, stage.tiles(problem.k), height * depth):
            segment = Segment(tile, lane)
            if const_expr(not self.domain.masked):
                gQ = problem.q.row(row)
                copy.store(tXrQ, gQ, segment, row < problem.num_rows, self.spec.access)
            if tile == 0 or const_expr(not self.stage.whole_row):
                rows = Rows([row], problem.num_rows, [Boolean(False)])
                scales = [GroupScale(Float32(0.0), zero)]
                self.stage.store_scales(problem.scales, rows, scales, segment, problem.k)
        if const_expr(problem.row_scales is not None and not domain.masked):
            clear_row_scale(problem, row)


@cute.jit
def clear_row_scale(problem: Problem, row: Uint32):
    """Write 0 as the decode scale of a row, by one thread of a CTA."""
    lane, y, z = cute.arch.thread_idx()
    if lane == 0 and y == 0 and z == 0 and row < problem.num_rows:
        problem.row_scales[Int32(row)] = Float32(0.0)


def rows_before(first: Uint32, end: Uint32) -> Uint32:
    """Return a bit for each of 32 rows from `first` on: whether it lies before `end`."""
    return Uint32(cute.arch.vote_ballot_sync(first + cute.arch.lane_idx() < end))
