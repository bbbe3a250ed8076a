"""Kernels whose CTAs have whole rows, in registers, so that memory is passed over once.

A warp has a tile of the row's columns, or several. Warps that share a row exchange partial results
in shared memory, behind a barrier.
"""

from __future__ import annotations

import functools

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint32, const_expr

from cute_quant.kernels import layouts
from cute_quant.kernels import scales as scaling
from cute_quant.kernels.arithmetic import FLOAT32_NAN
from cute_quant.kernels.config import LANES, QuantizerSpec
from cute_quant.kernels.copy import Segment
from cute_quant.kernels.params import Params
from cute_quant.kernels.problem import Operands, Problem
from cute_quant.kernels.row_domains import Row, select_rows
from cute_quant.kernels.scales import GroupScale
from cute_quant.kernels.scheduler import Scheduler
from cute_quant.kernels.stage import Origin, Rows, Stage
from cute_quant.kernels.upper_scales import Factors, factors_of_amax


class WholeRows:
    """Common part of such kernels.

    Args:
        spec: compile-time choices.
        stage: quantizes the values of a row.
    """

    def __init__(self, spec: QuantizerSpec, stage: Stage):
        self.spec = spec
        self.stage = stage
        self.scheduler = Scheduler(spec, stage)

    @property
    def tiles_per_thread(self) -> int:
        """Return how many tiles of a row each thread has a part of."""
        return self.stage.tile.tiles_per_thread

    def launch(self, prologue: Params, operands: Operands, stream: cuda.CUstream):
        """Launch the kernel: as many warps for a row as its tiles need."""
        problem = self.scheduler.problem(prologue, operands)
        warps = self.num_warps(self.stage.tiles(problem.k))
        self.kernel(problem).launch(
            grid=self.scheduler.grid(problem, operands, 1),
            block=[LANES, warps, self.stage.tile.rows],
            max_number_threads=[LANES, self.spec.max_warps, self.stage.tile.rows],
            min_blocks_per_mp=int(self.stage.tile.low_latency),
            stream=stream,
            use_pdl=self.spec.pdl,
        )

    def num_warps(self, num_tiles: Int32) -> Int32:
        """Return how many warps share a row of so many tiles."""
        return cute.ceil_div(num_tiles, self.tiles_per_thread)

    @cute.kernel
    def kernel(self, problem: Problem):
        """Quantize the tiles of rows that the CTA takes."""
        self.scheduler.for_each_tile(problem, self.quantize_tile)

    def may_write(self, row: Row) -> Boolean | bool:
        """Return whether a row has more to store than the padding of scales.

        All warps of a barrier have the same row where it is the only one of the CTA.
        """
        alone = self.stage.tile.rows == 1
        return self.stage.may_write(row.in_bounds) if alone else True

    def row_segments(self, row_tile: Int32, problem: Problem) -> tuple[Row, list[Segment]]:
        """Return the warp's row, and the thread's segment of each of its tiles."""
        lane, warp, slot = cute.arch.thread_idx()
        first_row = Uint32(row_tile) * self.stage.tile.rows + slot
        (row,) = select_rows(problem, self.spec.domain, [first_row])
        return row, [Segment(tile, lane) for tile in self.tiles_of_warp(warp)]

    def tiles_of_warp(self, warp: Int32) -> list[Int32]:
        """Return a warp's tiles of its row, one after the other."""
        tiles = layouts.tiles_of_thread(self.stage.tile)
        return [tiles((i, warp)) for i in range(self.tiles_per_thread)]

    def wait_for_readers(self):
        """Wait for all threads to have read the partial results of the row before."""
        if const_expr(self.spec.domain.repeats):
            cute.arch.sync_threads()

    @cute.jit
    def store_warp_partial(self, value: Float32 | Uint32) -> cute.Tensor:
        """Store a warp's partial result in shared memory.

        Returns:
            The results of all warps of the row, (max_warps,), 0 of those that the launch does not
            have. They are complete behind a barrier.
        """
        lane, warp, slot = cute.arch.thread_idx()
        _, warps, _ = cute.arch.block_dim()
        size = self.spec.max_warps
        memory = cute.arch.alloc_smem(type(value), size * self.stage.tile.rows, alignment=16)
        shared = cute.make_tensor(memory + slot * size, cute.make_layout(size))
        # Lane 0 stores the result, the others as many zeros as there are missing warps.
        place = lane * warps + warp
        if place < size:
            shared[place] = value if lane == 0 else type(value)(0)
        return shared

    def store_warp_amax(self, amaxes: list[Uint32]) -> cute.Tensor:
        """Store a warp's largest float32 magnitude, as `store_warp_partial` does."""
        amax = functools.reduce(cutlass.max, amaxes)
        return self.store_warp_partial(scaling.group_amax(amax, Float32, LANES))

    def bound_of_amax(self, amax: Uint32, problem: Problem) -> Factors:
        """Return forms of the scale of a row with this largest magnitude."""
        return factors_of_amax(amax.bitcast(Float32), problem.scale_bound)

    @cute.jit
    def store_scales(
        self, row: Row, scales: list[GroupScale], segments: list[Segment], problem: Problem
    ):
        """Store the scales of the thread's tiles, or the one of a row that is one group."""
        stage, k = self.stage, problem.k
        exist = [row.exists] if const_expr(self.spec.domain.selects) else None
        rows = Rows([row.index], problem.num_rows, exist)
        _, warp, _ = cute.arch.thread_idx()
        for i in cutlass.range_constexpr(1 if stage.whole_row else len(segments)):
            origin = Origin(segments[0], i)
            takes_part = True
            if const_expr(not stage.tiles_have_units):
                takes_part = warp == 0
                if const_expr(not stage.whole_row):
                    takes_part = stage.has_tile(segments[i].tile, k)
            if takes_part:
                if const_expr(row.places is not None):
                    self.scheduler.scatter.store_scale(
                        problem.scales, row.places, scales[i], segments[i], problem, origin
                    )
                else:
                    self.stage.store_scales(
                        problem.scales, rows, [scales[i]], segments[i], k, origin
                    )

    @cute.jit
    def store_row_scale(self, row: Row, upper: Factors, problem: Problem):
        """Store the decode scale of a row, 0 for one that does not exist."""
        lane, warp, _ = cute.arch.thread_idx()
        written = row.index < problem.num_rows
        if const_expr(self.stage.keeps_gaps):
            written = row.exists
        if const_expr(row.places is not None):
            if warp == 0:
                scale = with_one_nan(upper.decode)
                self.scheduler.scatter.store_row_scale(row.places, scale, problem)
        elif lane == 0 and warp == 0 and written:
            scale = with_one_nan(upper.decode)
            problem.row_scales[Int32(row.index)] = scale if row.exists else Float32(0.0)


@cute.jit
def with_one_nan(scale: Float32) -> Float32:
    """Return a scale whose NaN, if it is one, is that of the contract."""
    return scale if scale == scale else Uint32(FLOAT32_NAN).bitcast(Float32)
