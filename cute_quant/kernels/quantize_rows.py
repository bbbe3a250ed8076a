"""Quantize rows whose scales depend on all of them: load, reduce, scale, quantize, store.

The story is that of `quantize`, told once more where a row is one group, or has a scale over those
of its groups: all of it has to be there first. It lies in the registers of the warps of a CTA, so x
is read once. A row that is one group may be too long for them, and is read twice.
"""

from __future__ import annotations

import functools

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, const_expr

from cute_quant.kernels import arithmetic, ptx, scatter
from cute_quant.kernels import scales as scaling
from cute_quant.kernels.config import QuantizeSpec, SiluMulBackwardSpec, SiluMulSpec
from cute_quant.kernels.copy import Segment
from cute_quant.kernels.params import Params
from cute_quant.kernels.philox import words_of
from cute_quant.kernels.problem import Problem
from cute_quant.kernels.row_domains import Row
from cute_quant.kernels.scales import GroupScale
from cute_quant.kernels.stage import Stage
from cute_quant.kernels.upper_scales import Factors
from cute_quant.kernels.whole_rows import WholeRows


class RowQuantizer(WholeRows):
    """Quantizes the rows that a prologue yields.

    Args:
        spec: compile-time choices.
        stage: quantizes what the prologue yields.
        fake: whether q takes the products of values and scales, in the dtype that the stage takes.
    """

    def __init__(
        self,
        spec: QuantizeSpec | SiluMulSpec | SiluMulBackwardSpec,
        stage: Stage,
        fake: bool = False,
    ):
        super().__init__(spec, stage)
        self.fake = fake

    def num_warps(self, num_tiles: Int32) -> Int32:
        """Return how many warps share a row; a long one has as many as can be."""
        return super().num_warps(num_tiles) if self.spec.held else self.spec.max_warps

    @cute.jit
    def quantize_tile(self, row_tile: Int32, problem: Problem):
        """Load, reduce, scale, quantize and store a row by the warps that share it."""
        row, segments = self.row_segments(row_tile, problem)
        source = problem.prologue.row(row, problem.k)  # (k,)
        if const_expr(self.scheduler.waits_late):
            ptx.wait_behind([a for segment in segments for a in source.addresses(segment)])
        scales = self.stage.scale_registers(len(segments))  # (tiles,)
        if self.may_write(row):
            if const_expr(self.spec.held):
                self.quantize_row(row, source, segments, scales, problem)
            else:
                scales.fill(self.quantize_long_row(row, source, problem).scale)
        if const_expr(problem.scales is not None):
            stored = [GroupScale(Float32(0.0), scales[i]) for i in range(len(segments))]
            self.store_scales(row, stored, segments, problem)

    @cute.jit
    def quantize_row(
        self,
        row: Row,
        source: Params,
        segments: list[Segment],
        scales: cute.Tensor,
        problem: Problem,
    ):
        """Load, reduce, scale, quantize and store a row, and keep the scales of its tiles."""
        # Registers of each of the thread's tiles: (values,).
        tXrX = [source.load(segment) for segment in segments]
        tXrV = [source.values(t) for t in tXrX]
        found, bound = self.scales(tXrV, problem)
        self.store_values(tXrV, found, bound, row, segments, problem)
        if const_expr(self.spec.fmt.row_scale and problem.scales is not None):
            self.store_row_scale(row, bound, problem)
        for i in cutlass.range_constexpr(len(segments)):
            scales[i] = found[i].scale

    @cute.jit
    def quantize_long_row(self, row: Row, source: Params, problem: Problem) -> GroupScale:
        """Quantize and store a row that is one group, in two passes, and return its scale."""
        lane, warp, _ = cute.arch.thread_idx()
        _, warps, _ = cute.arch.block_dim()
        num_parts = cute.ceil_div(self.stage.tiles(problem.k), self.tiles_per_thread)
        amax = Uint32(0)
        for part in cutlass.range(warp, num_parts, warps, unroll=1):
            tXrX = [source.load(Segment(tile, lane)) for tile in self.tiles_of_warp(part)]
            amax = self.stage.larger(amax, self.thread_amax([source.values(t) for t in tXrX]))
        scale = self.stage.scale(self.row_amax(amax), problem.scale_bound)
        for part in cutlass.range(warp, num_parts, warps, unroll=1):
            segments = [Segment(tile, lane) for tile in self.tiles_of_warp(part)]
            tXrX = [source.load(segment) for segment in segments]
            tXrV = [source.values(t) for t in tXrX]
            scales = [scale] * len(segments)
            self.store_values(tXrV, scales, problem.scale_bound, row, segments, problem)
        return scale

    def store_values(
        self,
        tXrV: list[cute.Tensor],
        scales: list[GroupScale],
        bound: Float32 | Factors,
        row: Row,
        segments: list[Segment],
        problem: Problem,
    ):
        """Quantize the thread's tiles, (values,) each, and store them."""
        target = scatter.target(row, problem, self.spec.access)
        random = problem.random_of_row(row.index)
        for segment, t, scale in zip(segments, tXrV, scales, strict=True):
            words = words_of(random, segment, t)
            tXrQ = self.stage.results(t, scale, bound, self.fake, words)
            target.store(tXrQ, segment)

    def scales(
        self, tXrV: list[cute.Tensor], problem: Problem
    ) -> tuple[list[GroupScale], Float32 | Factors]:
        """Return the scale of the lane's group in each of the thread's tiles, and their bound."""
        stage = self.stage
        if stage.whole_row:
            scale = stage.scale(self.row_amax(self.thread_amax(tXrV)), problem.scale_bound)
            return [scale] * len(tXrV), problem.scale_bound
        amaxes = [stage.group_amax(stage.thread_amax(t)) for t in tXrV]
        bound = self.row_bound(amaxes, problem)
        scales = [
            stage.refine(t, stage.scale(amax, bound), bound)
            for t, amax in zip(tXrV, amaxes, strict=True)
        ]
        return scales, bound

    def thread_amax(self, tXrV: list[cute.Tensor]) -> Uint32:
        """Return the largest magnitude of a thread's tiles, as `Stage.group_amax` takes it."""
        return functools.reduce(self.stage.larger, map(self.stage.thread_amax, tXrV))

    @cute.jit
    def row_amax(self, amax: Uint32) -> Uint32:
        """Return the largest magnitude of a row that is one group, from that of each thread."""
        amax = self.stage.group_amax(amax)
        if const_expr(self.spec.max_warps == 1):
            return amax
        self.wait_for_readers()
        maxima = self.store_warp_partial(amax)
        cute.arch.sync_threads()
        return arithmetic.thread_max(maxima.load())

    @cute.jit
    def row_bound(self, amaxes: list[Uint32], problem: Problem) -> Factors:
        """Return forms of the row's scale, from the amax of the lane's group in each tile."""
        self.wait_for_readers()
        dtype = self.stage.amax_dtype
        magnitudes = [scaling.magnitude(amax, dtype).bitcast(Uint32) for amax in amaxes]
        maxima = self.store_warp_amax(magnitudes)
        cute.arch.sync_threads()
        return self.bound_of_amax(arithmetic.thread_max(maxima.load()), problem)
