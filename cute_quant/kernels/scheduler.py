"""Which tiles of rows a CTA takes: of one matrix, of a batch of matrices, or of masked experts.

A kernel packs its arguments into a `Problem`, and processes one tile of the rows of one matrix.
`Scheduler` says how many CTAs there are, and calls it for each tile that a CTA takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint32, const_expr
from cutlass.cute.runtime import make_fake_tensor

from cute_quant.contract.dtypes import SCALE_ROW_ALIGNMENT
from cute_quant.kernels import layouts
from cute_quant.kernels.config import DENSE_ROWS, DOWN, LANES, MAX_GRID_Y, MAX_GRID_Z, Spec
from cute_quant.kernels.copy import fake_matrix
from cute_quant.kernels.encodings import scale_type_of, values_per_element
from cute_quant.kernels.layouts import Matrix
from cute_quant.kernels.params import Params
from cute_quant.kernels.philox import RngState
from cute_quant.kernels.problem import Operands, Problem
from cute_quant.kernels.row_domains import clamp_count, load_count, read_count
from cute_quant.kernels.scatter import Scatter
from cute_quant.kernels.stage import Stage
from cute_quant.kernels.upper_scales import UpperScale

EXPERTS_PER_LANE = 8
EXPERTS_PER_CHUNK = LANES * EXPERTS_PER_LANE
"""Experts whose counts a warp reads at once."""


class Sizes(NamedTuple):
    """Symbolic sizes of a kernel's arguments.

    Attributes:
        batch: leading dimensions of the results.
        x_batch: leading dimensions of x, none where an index names its rows, or they are scattered.
        mn, tokens, q_rows: rows of the results, of x, and of the tensor of values.
        k: columns.
        divisibility: of k.
    """

    batch: tuple
    x_batch: tuple
    mn: Int32
    tokens: Int32
    q_rows: Int32
    k: Int32
    divisibility: int


class Scheduler:
    """Compile-time choices: tile and row domain of the spec, and the stage that quantizes."""

    def __init__(self, spec: Spec, stage: Stage):
        self.spec = spec
        self.domain = spec.domain
        self.stage = stage
        self.tile = stage.tile
        self.scatter = Scatter(spec, stage)

    def symbolic_sizes(self) -> Sizes:
        """Return sizes for a kernel's signature."""
        tile, domain = self.tile, self.domain
        divisor = 1
        if not self.spec.access.ragged:
            divisor = tile.values_per_thread * self.stage.rows_at_once
        batch = (cute.sym_int32(),) if self.domain.batched else ()
        mn, q_rows = cute.sym_int32(), cute.sym_int32()
        if domain.scattered:
            q_rows = mn
        own_rows = domain.gathered or domain.scattered
        return Sizes(
            batch=batch,
            x_batch=() if own_rows else batch,
            mn=mn,
            tokens=cute.sym_int32() if own_rows else mn,
            q_rows=q_rows,
            k=cute.sym_int32(divisibility=divisor),
            divisibility=divisor,
        )

    def fake_operands(self, sizes: Sizes, q_dtype: type[cutlass.Numeric]) -> Operands:
        """Return stand-ins for the operands that all these kernels have."""
        fmt, domain, batch, mn = self.spec.fmt, self.domain, sizes.batch, sizes.mn
        index = counts = upper = rng = None
        if self.spec.upper is not None:
            upper = make_fake_tensor(Float32, (cute.sym_int32(),), stride=(cute.sym_int64(),))
        elif fmt.row_scale:
            strides = *(cute.sym_int64() for _ in batch), 1
            upper = make_fake_tensor(Float32, (*batch, mn), stride=strides)
        if domain.counted:
            counts = make_fake_tensor(Int32, (cute.sym_int32(),), stride=(1,))
        if domain.gathered:
            strides = *(cute.sym_int64() for _ in batch), 1
            index = make_fake_tensor(Int32, (*batch, mn), stride=strides)
        elif domain.scattered:
            index = make_fake_tensor(
                Int32, (sizes.tokens, cute.sym_int32()), stride=(cute.sym_int64(), 1)
            )
        if getattr(self.spec, "stochastic", False):
            rng = make_fake_tensor(Int64, (2,), stride=(1,))
        columns = (cute.sym_int32(),) if fmt.blocked else (mn, cute.sym_int32())
        strides = tuple(cute.sym_int64() for _ in (*batch, *columns))
        q_columns = sizes.k
        if values_per_element(q_dtype) > 1:
            divisor = max(1, sizes.divisibility // values_per_element(q_dtype))
            q_columns = cute.sym_int32(divisibility=divisor)
        return Operands(
            mQ=fake_matrix(
                q_dtype, (*batch, sizes.q_rows, q_columns), self.spec.access.store_bytes
            ),
            mS=make_fake_tensor(scale_type_of(fmt), (*batch, *columns), stride=strides),
            mUpper=upper,
            mCounts=counts,
            mIndex=index,
            mRng=rng,
            missing_rows=Int32(0),
            alignment=Int32(0),
            row_ctas=Int32(0),
            floor=Int32(0) if fmt.power_of_two else Float32(0),
        )

    def problem(self, prologue: Params, operands: Operands) -> Problem:
        """Return the problem of a launch."""
        stage, fmt, q = self.stage, self.spec.fmt, Matrix(operands.mQ)
        values_per_column = values_per_element(operands.mQ.element_type)
        bound = stage.scale_bound(operands.floor)
        if const_expr(self.spec.upper is not None):
            bound = UpperScale(operands.mUpper, operands.floor, self.spec.upper)
        mn = prologue.x.rows
        if const_expr(self.domain.gathered):
            mn = layouts.unsigned(operands.mIndex.shape[-1])
        elif const_expr(self.domain.scattered):
            mn = q.rows
        scales, rows_to_write = None, q.rows
        if const_expr(operands.mS is not None):
            k = operands.mQ.shape[-1] * values_per_column
            scales = stage.scales(
                operands.mS, mn, k, operands.missing_rows, self.spec.access.dense_scales
            )
            rows_to_write = cutlass.max(rows_to_write, scales.rows)
            if const_expr(self.spec.access.strided_scales):
                scales = scales.replace(row_stride=Int64(operands.mS.stride[0]))
        if const_expr(self.domain.scattered):
            rows_to_write = prologue.x.rows
        dedicated_tiles = Int32(0)
        if const_expr(self.walks_experts):
            dedicated_tiles = self.num_expert_ctas(operands) // operands.mQ.shape[0]
        return Problem(
            prologue=prologue,
            q=q,
            values_per_column=values_per_column,
            scales=scales,
            scale_bound=bound,
            row_scales=operands.mUpper if fmt.row_scale else None,
            num_rows=mn,
            num_q_rows=q.rows,
            num_row_tiles=Int32((rows_to_write + (self.tile.rows - 1)) // self.tile.rows),
            dedicated_tiles=dedicated_tiles,
            counts=operands.mCounts,
            index=operands.mIndex,
            rng=None if operands.mRng is None else RngState(operands.mRng),
            alignment=operands.alignment,
        )

    def num_expert_ctas(self, operands: Operands) -> Int32:
        """Return how many CTAs share the rows of all masked experts."""
        return cutlass.min(operands.row_ctas, MAX_GRID_Y)

    def grid(self, problem: Problem, operands: Operands, num_column_ctas: Int32) -> list:
        """Return the CTAs of a launch, by dimension of its grid."""
        depth, num_row_ctas = 1, problem.num_row_tiles
        if const_expr(self.domain.scattered):
            windows = self.scatter.num_windows(problem)
            num_row_ctas = num_row_ctas + cute.ceil_div(windows, num_column_ctas)
            # Without rows of x all rows of the result may exist, and nothing is to be written.
            num_row_ctas = cutlass.max(num_row_ctas, Int32(1))
        elif const_expr(self.domain.masked):
            num_row_ctas = self.num_expert_ctas(operands)
        elif const_expr(self.domain.batched):
            depth = problem.batches
        depth = cutlass.min(depth, MAX_GRID_Z)
        if const_expr(self.tile.cta_order == DOWN):
            return [num_row_ctas, num_column_ctas, depth]
        return [num_column_ctas, cutlass.min(num_row_ctas, MAX_GRID_Y), depth]

    def cta_coordinates(self) -> tuple[Int32, Int32]:
        """Return the CTA's place along the columns and along the rows."""
        x, y, _ = cute.arch.block_idx()
        return (y, x) if const_expr(self.tile.cta_order == DOWN) else (x, y)

    def num_column_ctas(self) -> Int32:
        """Return how many CTAs the grid has along the columns."""
        x, y, _ = cute.arch.grid_dim()
        return y if const_expr(self.tile.cta_order == DOWN) else x

    def num_row_ctas(self) -> Int32:
        """Return how many CTAs the grid has along the rows."""
        x, y, _ = cute.arch.grid_dim()
        return x if const_expr(self.tile.cta_order == DOWN) else y

    @cute.jit
    def for_each_tile(self, problem: Problem, process: cutlass.Constexpr[Callable]):
        """Call ``process(row_tile, problem)`` for each tile of rows that the CTA takes.

        The problem that it gets is of one matrix.
        """
        if const_expr(self.spec.pdl):
            cute.arch.griddepcontrol_launch_dependents()
        _, row_cta = self.cta_coordinates()
        _, _, z = cute.arch.block_idx()
        num_row_ctas = self.num_row_ctas()
        _, _, depth = cute.arch.grid_dim()
        # Nothing is read or written before: the kernel before may still write x, or read q.
        if const_expr(self.spec.pdl and not self.waits_late):
            cute.arch.griddepcontrol_wait()
        if const_expr(self.domain.scattered):
            self.for_each_token_tile(row_cta, num_row_ctas, problem, process)
        elif const_expr(self.domain.masked):
            self.for_each_expert_tile(row_cta, num_row_ctas, problem, process)
        elif const_expr(self.domain.batched):
            for batch in range(z, problem.batches, depth):
                for row_tile in range(row_cta, problem.num_row_tiles, num_row_ctas):
                    process(row_tile, problem.slice_batch(batch))
        else:
            process(row_cta, problem)

    @property
    def waits_late(self) -> bool:
        """Return whether a kernel computes the addresses of its loads before it waits.

        Then the input is the first thing that is read.
        """
        weighted = getattr(self.spec, "weighted", False)
        first = self.domain == DENSE_ROWS and not weighted
        return self.spec.pdl and self.tile.low_latency and first

    @property
    def walks_experts(self) -> bool:
        """Return whether CTAs share the rows of masked experts."""
        return self.domain.masked and not self.domain.scattered

    @cute.jit
    def for_each_token_tile(
        self,
        row_cta: Int32,
        num_row_ctas: Int32,
        problem: Problem,
        process: cutlass.Constexpr[Callable],
    ):
        """Call ``process(tile, problem)`` for tiles of x, and clear rows that do not exist.

        The first CTAs along the rows have tiles, the last ones windows of rows, each CTA along the
        columns others. Of a grid that is not large enough all have both.
        """
        for tile in range(row_cta, problem.num_row_tiles, num_row_ctas):
            process(tile, problem)
        column_cta, _ = self.cta_coordinates()
        num_column_ctas = self.num_column_ctas()
        first = (num_row_ctas - 1 - row_cta) * num_column_ctas + column_cta
        step = num_row_ctas * num_column_ctas
        for window in range(first, self.scatter.num_windows(problem), step):
            self.scatter.clear_window(problem, window)

    @cute.jit
    def for_each_expert_tile(
        self,
        row_cta: Int32,
        num_row_ctas: Int32,
        problem: Problem,
        process: cutlass.Constexpr[Callable],
    ):
        """Call ``process(row_tile, problem)`` for masked experts, whose counts are on the device.

        The first tiles of each expert have CTAs to themselves, which find them without a search.
        All CTAs share the other tiles, each takes adjacent ones: it searches an expert once, not
        for every tile. Their number is read beside the count of the first tile, so that nothing
        waits for memory once a CTA has no more of them.
        """
        experts = problem.batches
        row_tile = Int32(Uint32(row_cta) // layouts.unsigned(experts))
        expert = row_cta - row_tile * experts
        count = Int32(0)
        if row_tile < problem.dedicated_tiles:
            count = load_count(problem, expert)
        lane_tiles = self.shared_tiles_of_lane(problem, Int32(0))
        count = clamp_count(problem, count)
        if Uint32(row_tile * self.tile.rows) < self.num_visited_rows(problem, count):
            process(row_tile, problem.slice_expert(expert, count))
        turn = row_cta
        for chunk in range(0, experts, EXPERTS_PER_CHUNK):
            if chunk > 0:
                lane_tiles = self.shared_tiles_of_lane(problem, chunk)
            if cute.arch.vote_any_sync(lane_tiles > 0):
                lane_end = prefix_sum(lane_tiles, LANES)
                lane_first = lane_end - lane_tiles
                total = cute.arch.shuffle_sync(lane_end, LANES - 1)
                part = share(total, turn, num_row_ctas)
                next_tile, end = part.first, part.end
                # In the next chunk the next CTAs take one tile more than others.
                turn = turn - part.longer
                turn = turn + num_row_ctas if turn < 0 else turn
                tiles_left = Int32(0)
                while next_tile < end:
                    if tiles_left == 0:
                        owner = lane_where(lane_first <= next_tile and next_tile < lane_end)
                        first_tile = cute.arch.shuffle_sync(lane_first, owner)
                        expert, row_tile, count = self.find_tile(
                            problem, chunk + owner, first_tile, next_tile
                        )
                        tiles_left = self.num_tiles(problem, count) - row_tile
                    process(row_tile, problem.slice_expert(expert, count))
                    next_tile, row_tile, tiles_left = next_tile + 1, row_tile + 1, tiles_left - 1

    @cute.jit
    def shared_tiles_of_lane(self, problem: Problem, chunk: Int32) -> Int32:
        """Read the counts of the lane's experts, and return their tiles past the dedicated ones.

        Args:
            problem: that of all experts.
            chunk: the first expert of ``EXPERTS_PER_CHUNK``, of which each lane has every 32nd. So
                few experts are read at once.
        """
        first = chunk + cute.arch.lane_idx()
        counts = [load_count(problem, first + i * LANES) for i in range(EXPERTS_PER_LANE)]
        total = Int32(0)
        for count in counts:
            total += self.num_shared_tiles(problem, clamp_count(problem, count))
        return total

    @cute.jit
    def find_tile(
        self, problem: Problem, first_expert: Int32, first_tile: Int32, tile: Int32
    ) -> tuple:
        """Return the expert of a tile, its place among the expert's tiles, and the expert's count.

        Args:
            problem: that of all experts.
            first_expert: the first of the experts of a lane, of which one has the tile.
            first_tile: number of their first tile.
            tile: number of the tile.
        """
        lane = cute.arch.lane_idx()
        in_group, _ = layouts.lanes(EXPERTS_PER_LANE)(lane)
        expert = first_expert + in_group * LANES
        count = read_count(problem, expert)
        tiles = self.num_shared_tiles(problem, count)
        begin = first_tile + prefix_sum(tiles, EXPERTS_PER_LANE) - tiles
        owner = lane_where(lane < EXPERTS_PER_LANE and begin <= tile and tile < begin + tiles)
        row_tile = tile - begin + problem.dedicated_tiles
        return tuple(cute.arch.shuffle_sync(value, owner) for value in (expert, row_tile, count))

    def num_shared_tiles(self, problem: Problem, count: Int32) -> Int32:
        """Return how many tiles an expert of `count` rows has past the dedicated ones."""
        return cutlass.max(self.num_tiles(problem, count) - problem.dedicated_tiles, Int32(0))

    def num_tiles(self, problem: Problem, count: Int32) -> Int32:
        """Return how many tiles an expert of `count` rows has."""
        rows = self.num_visited_rows(problem, count)
        return Int32((rows + (self.tile.rows - 1)) // self.tile.rows)

    def num_visited_rows(self, problem: Problem, count: Int32) -> Uint32:
        """Return how many rows the tiles of an expert of `count` rows have to reach.

        Scales have padding up to the next multiple of 4, which a shorter tile may not reach by
        itself.
        """
        if self.tile.rows % SCALE_ROW_ALIGNMENT == 0:
            return Uint32(count)
        return problem.scales.rows_to_write(count)


class Share(NamedTuple):
    """A part of a number of tiles.

    Attributes:
        first, end: its first tile, and the one after its last.
        longer: how many parts have a tile more than the others.
    """

    first: Int32
    end: Int32
    longer: Int32


def share(total: Int32, i: Int32, parts: Int32) -> Share:
    """Return part `i` of so many."""
    each = Int32(layouts.unsigned(total) // layouts.unsigned(parts))
    longer = total - each * parts
    first = i * each + cutlass.min(i, longer)
    return Share(first, first + each + Int32(i < longer), longer)


@cute.jit
def prefix_sum(value: Int32, lanes: cutlass.Constexpr[int]) -> Int32:
    """Return the sum of a lane's value and those before it, in each of so many adjacent lanes."""
    lane, _ = layouts.lanes(lanes)(cute.arch.lane_idx())
    for i in cutlass.range_constexpr(lanes.bit_length() - 1):
        before = cute.arch.shuffle_sync_up(value, offset=1 << i, mask_and_clamp=0)
        value += before if lane >= 1 << i else 0
    return value


def lane_where(predicate: Boolean) -> Int32:
    """Return the one lane of a warp in which a predicate holds."""
    lanes_before = Uint32(cute.arch.vote_ballot_sync(predicate)) - 1
    return Int32(cute.arch.popc(lanes_before))
