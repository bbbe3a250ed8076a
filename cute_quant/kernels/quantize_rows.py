"""Quantize whole rows, each with a scale over those of its groups: load, reduce, scale, store.

The story is that of `quantize`, told once more where a row's own amax decides its scales: all of it
has to be there first. It lies in the registers of the warps of a CTA, so x is read once.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Int32, Uint32, const_expr

from cute_quant.kernels import arithmetic, scatter
from cute_quant.kernels import scales as scaling
from cute_quant.kernels.config import QuantizeSpec, SiluMulSpec
from cute_quant.kernels.problem import Problem
from cute_quant.kernels.stage import Stage
from cute_quant.kernels.whole_rows import WholeRows


class RowQuantizer(WholeRows):
    """Quantizes the rows that a prologue yields.

    Args:
        spec: compile-time choices.
        stage: quantizes what the prologue yields.
        fake: whether q takes the products of values and scales, in the dtype that the stage takes.
    """

    def __init__(self, spec: QuantizeSpec | SiluMulSpec, stage: Stage, fake: bool = False):
        super().__init__(spec, stage)
        self.fake = fake

    @cute.jit
    def quantize_tile(self, row_tile: Int32, problem: Problem):
        """Load, reduce, scale, quantize and store a row by the warps that share it."""
        stage = self.stage
        row, segments = self.row_segments(row_tile, problem)
        source = problem.prologue.row(row, problem.k)
        target = scatter.target(row, problem, self.spec.access)

        # Registers of each of the thread's tiles: (values,).
        tXrX = [source.load(segment) for segment in segments]
        tXrV = [source.values(t) for t in tXrX]
        amaxes = [stage.group_amax(stage.thread_amax(t)) for t in tXrV]
        bound = self.row_bound(amaxes, problem)
        scales = [
            stage.refine(t, stage.scale(amax, bound), bound)
            for t, amax in zip(tXrV, amaxes, strict=True)
        ]
        for segment, t, scale in zip(segments, tXrV, scales, strict=True):
            if const_expr(self.fake):
                tXrQ = stage.encode_and_decode(t, scale, bound)
            else:
                tXrQ = stage.encode(t, scale)
            target.store(tXrQ, segment)
        if const_expr(problem.scales is not None):
            self.store_scales(row, scales, segments, problem)
            self.store_row_scale(row, bound, problem)

    @cute.jit
    def row_bound(self, amaxes: list[Uint32], problem: Problem):
        """Return forms of the row's scale, from the amax of the lane's group in each tile."""
        if const_expr(self.spec.domain.repeats):
            cute.arch.sync_threads()  # all have read the partial results of the row before
        dtype = self.stage.amax_dtype
        magnitudes = [scaling.magnitude(amax, dtype).bitcast(Uint32) for amax in amaxes]
        maxima = self.store_warp_amax(magnitudes)
        cute.arch.sync_threads()
        return self.bound_of_amax(arithmetic.thread_max(maxima.load()), problem)
