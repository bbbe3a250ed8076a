"""RMSNorm of rows, quantized in the same registers: load, add, reduce, normalize, quantize, store.

A row lies in the registers of the warps of a CTA, so memory is passed over once. A warp has a tile
of the row's columns, or several, ``warps`` tiles apart. Each warp sums the squares of its values
and stores this partial sum in shared memory; behind the one barrier all warps add up the partial
sums. With a residual, x + residual is what gets normalized, and is written.
"""

from __future__ import annotations

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint32, const_expr
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from cute_quant.contract.prologues import FUSED, rounds_row, rounds_sum
from cute_quant.kernels import arithmetic, copy, encodings, scatter
from cute_quant.kernels import scales as scaling
from cute_quant.kernels.config import RmsNormSpec
from cute_quant.kernels.copy import Segment
from cute_quant.kernels.encodings import ELEMENT_TYPES, registers
from cute_quant.kernels.layouts import Matrix
from cute_quant.kernels.params import Params
from cute_quant.kernels.problem import Operands, Problem
from cute_quant.kernels.row_domains import Row
from cute_quant.kernels.scales import GroupScale
from cute_quant.kernels.stage import Stage
from cute_quant.kernels.upper_scales import Factors
from cute_quant.kernels.whole_rows import WholeRows

EARLY_WEIGHTS = 2
"""Tiles of a thread up to which it loads the weights with the row; more fill its registers."""


@dataclass(eq=False, kw_only=True)
class NormInput(Params):
    """Tensors and numbers of RMSNorm, besides the quantized values.

    Attributes:
        x: (mn, k) or (batch, mn, k), or (tokens, k) with an index.
        residual: to be added to x, or None.
        residual_out: takes x + residual, or None; may be the residual.
        normalized: takes what gets quantized, or None.
        weight: (k,).
        eps: added to the mean of squares.
        offset: added to the weight.
        reciprocal: of k.
    """

    x: Matrix
    residual: Matrix | None
    residual_out: Matrix | None
    normalized: Matrix | None
    weight: cute.Tensor
    eps: Float32
    offset: Float32
    reciprocal: Float32

    def slice_batch(self, batch: Int32, gathered: bool) -> NormInput:
        """Return the prologue of one matrix of a batch; gathered rows come from one x."""
        if gathered:
            return self
        matrices = ("x", "residual", "residual_out", "normalized")
        present = {name: getattr(self, name) for name in matrices}
        return self.replace(**{name: m and m[batch] for name, m in present.items()})


class RmsNorm(WholeRows):
    """Entry point: x to values and scales of ``r * rsqrt(mean(r^2) + eps) * (weight + offset)``."""

    def __init__(self, spec: RmsNormSpec):
        self.dtype = ELEMENT_TYPES[spec.dtype]
        self.weight_dtype = ELEMENT_TYPES[spec.weight_dtype]
        dtype = self.dtype if spec.rounding != FUSED else Float32
        super().__init__(spec, Stage(dtype, spec.fmt, spec.tile, spec.domain.keeps_gaps))
        self.rounds_row = rounds_row(spec.rounding, spec.weight_dtype)

    def signature(self) -> tuple:
        """Return stand-ins for the arguments, with the sizes that vary and the alignment."""
        spec, sizes = self.spec, self.scheduler.symbolic_sizes()
        nbytes = spec.access.load_bytes

        def matrix(present: bool = True) -> cute.Tensor | None:
            shape = (*sizes.x_batch, sizes.tokens, sizes.k)
            return copy.fake_matrix(self.dtype, shape, nbytes) if present else None

        operands = self.scheduler.fake_operands(sizes, encodings.value_type_of(spec.fmt))
        aligned = max(nbytes, self.weight_dtype.width // 8)
        mWeight = make_fake_tensor(
            self.weight_dtype, (sizes.k,), stride=(1,), assumed_align=aligned
        )
        others = matrix(spec.residual), matrix(spec.residual), matrix(spec.normalized)
        parameters = Float32(0), Float32(0)
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        return matrix(), *operands, *parameters, mWeight, *others, stream

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,  # (mn, k), (batch, mn, k), or (tokens, k) with an index
        mQ: cute.Tensor,
        mS: cute.Tensor,
        mUpper: cute.Tensor | None,
        mCounts: cute.Tensor | None,
        mIndex: cute.Tensor | None,
        mRng: cute.Tensor | None,
        missing_rows: Int32,
        alignment: Int32,
        row_ctas: Int32,
        floor: Int32 | Float32,
        eps: Float32,
        offset: Float32,
        mWeight: cute.Tensor,  # (k,)
        mResidual: cute.Tensor | None,  # as x, to be added
        mSum: cute.Tensor | None,  # as x, for x + residual; may be the residual itself
        mNormalized: cute.Tensor | None,  # as x, for what gets quantized
        stream: cuda.CUstream,
    ):
        """Launch. `Operands` and `NormInput` describe what comes after x."""
        operands = Operands(
            mQ, mS, mUpper, mCounts, mIndex, mRng, missing_rows, alignment, row_ctas, floor
        )
        inputs = NormInput(
            x=Matrix(mX),
            residual=matrix_or_none(mResidual),
            residual_out=matrix_or_none(mSum),
            normalized=matrix_or_none(mNormalized),
            weight=mWeight,
            eps=eps,
            offset=offset,
            reciprocal=Float32(1.0) / Float32(mX.shape[-1]),
        )
        self.launch(inputs, operands, stream)

    @cute.jit
    def quantize_tile(self, row_tile: Int32, problem: Problem):
        """Load, add, reduce, normalize, quantize and store a row by the warps that share it."""
        stage, inputs, k = self.stage, problem.prologue, problem.k
        row, segments = self.row_segments(row_tile, problem)
        gX = inputs.x.row(row.source, k)  # (k,)
        scales = stage.scale_registers(len(segments))  # (tiles,)
        if self.may_write(row):
            self.quantize_row(row, gX, segments, scales, problem)
        stored = [GroupScale(Float32(0.0), scales[i]) for i in range(len(segments))]
        self.store_scales(row, stored, segments, problem)

    @cute.jit
    def quantize_row(
        self,
        row: Row,
        gX: cute.Tensor,  # (k,)
        segments: list[Segment],
        stored: cute.Tensor,  # (tiles,)
        problem: Problem,
    ):
        """Load, add, reduce, normalize, quantize and store a row; keep the scales of its tiles."""
        spec, stage, inputs = self.spec, self.stage, problem.prologue
        # Columns are compared with the k of q everywhere: that of other tensors, though the same,
        # would be compared anew and take up to 22 registers of a thread with 4 tiles.
        gW = cute.make_tensor(inputs.weight.iterator, cute.make_layout(problem.k))
        # Registers of each of the thread's tiles: (values,).
        tXrX = [self.load(gX, segment, row) for segment in segments]
        early = len(segments) <= EARLY_WEIGHTS
        if const_expr(early):
            tXrW = [self.load(gW, segment, row) for segment in segments]
        if const_expr(spec.residual):
            values = self.add_residual(tXrX, problem, row, segments)
        else:
            values = [encodings.widen(t).load() for t in tXrX]

        # All that does not depend on the row's factor is done before the barrier. Rounding is
        # monotonic: the largest product is that of the largest, whatever the factor. That does not
        # hold where the row is rounded before it is multiplied with the weights.
        square = warp_sum_of_squares(values)
        if const_expr(not early):
            tXrW = [self.load(gW, segment, row) for segment in segments]
        offset = zero_unless(row.exists, inputs.offset)
        weights = [encodings.widen_and_add(t, offset).load() for t in tXrW]
        if const_expr(self.rounds_row):
            square = self.sum_over_warps(square)
        else:
            products = [value * weight for value, weight in zip(values, weights, strict=True)]
            square, row_amax, amaxes = self.reduce_over_warps(square, self.group_amaxes(products))
        factor = arithmetic.rsqrt(square * inputs.reciprocal + inputs.eps)
        factor = zero_unless(row.exists, factor)
        if const_expr(self.rounds_row):
            rounded = [encodings.round_to(value * factor, self.dtype) for value in values]
            products = [self.round(r * w) for r, w in zip(rounded, weights, strict=True)]
            row_amax, amaxes = self.amax_over_warps(self.group_amaxes(products))

        target = scatter.target(row, problem, spec.access)
        bound = problem.load_bound(row.group if spec.domain.grouped else None)
        if const_expr(spec.fmt.row_scale):
            largest = self.normalized(row_amax.bitcast(Float32), factor)
            bound = self.bound_of_amax(largest.bitcast(Uint32), problem)
            self.store_row_scale(row, bound, problem)
        scales = []
        for segment, product, amax in zip(segments, products, amaxes, strict=True):
            value = self.normalized(product, factor)
            tXrV = registers(value.to(stage.dtype))
            scale = stage.refine(tXrV, self.normalized_scale(amax, factor, bound), bound)
            scales.append(scale)
            if const_expr(spec.normalized):
                gN = inputs.normalized.row(row.index, problem.k)
                self.store(value, gN, segment, row)
            tXrQ = stage.encode(tXrV, scale)
            target.store(tXrQ, segment)
        for i in cutlass.range_constexpr(len(segments)):
            stored[i] = scales[i].scale

    @property
    def tiles_per_thread(self) -> int:
        """Return how many tiles of a row each thread has a part of."""
        return self.spec.tiles_per_thread

    def tiles_of_warp(self, warp: Int32) -> list[Int32]:
        """Return a warp's tiles of its row, as many apart as the row has warps."""
        _, warps, _ = cute.arch.block_dim()
        return [warp + i * warps for i in range(self.tiles_per_thread)]

    @cute.jit
    def add_residual(
        self, tXrX: list[cute.Tensor], problem: Problem, row: Row, segments: list[Segment]
    ) -> list[cute.TensorSSA]:
        """Return x + residual, and store the sum."""
        spec, inputs, k = self.spec, problem.prologue, problem.k
        gR, gSum = inputs.residual.row(row.index, k), inputs.residual_out.row(row.index, k)
        tXrR = [self.load(gR, segment, row) for segment in segments]
        values = [encodings.widen(t).load() for t in tXrX]
        residuals = [encodings.widen(t).load() for t in tXrR]
        sums = [a + b for a, b in zip(values, residuals, strict=True)]
        for segment, value in zip(segments, sums, strict=True):
            self.store(value, gSum, segment, row)
        return [self.round(v) for v in sums] if rounds_sum(spec.rounding) else sums

    def group_amaxes(self, products: list[cute.TensorSSA]) -> list[Uint32]:
        """Return the amax of the lane's group in each tile, or of its values if a row is one."""
        amaxes = [scaling.thread_amax(registers(product)) for product in products]
        if self.stage.whole_row:
            return amaxes
        lanes = self.stage.lanes_per_group
        return [scaling.group_amax(amax, Float32, lanes) for amax in amaxes]

    @cute.jit
    def sum_over_warps(self, square: Float32) -> Float32:
        """Return the sum of squares of the row."""
        self.wait_for_readers()
        squares = self.store_warp_partial(square)
        cute.arch.sync_threads()
        return arithmetic.thread_sum(squares.load())

    @cute.jit
    def amax_over_warps(self, amaxes: list[Uint32]) -> tuple:
        """Return the amax of the row, where it is asked for, and those of the lane's groups."""
        largest = amaxes[0]
        if const_expr(self.needs_row_amax):
            maxima = self.store_warp_amax(amaxes)
            cute.arch.sync_threads()
            largest = arithmetic.thread_max(maxima.load())
        if const_expr(self.stage.whole_row):
            amaxes = [largest] * self.tiles_per_thread
        return largest, amaxes

    @property
    def needs_row_amax(self) -> bool:
        """Return whether a row is one group, or has a scale of its own."""
        return self.stage.whole_row or self.spec.fmt.row_scale

    @cute.jit
    def reduce_over_warps(self, square: Float32, amaxes: list[Uint32]) -> tuple:
        """Return the sum of squares of the row, its amax, and those of the lane's groups.

        The amax is that of the row where it is one group, or has a scale of its own.
        """
        self.wait_for_readers()
        squares = self.store_warp_partial(square)
        if const_expr(self.needs_row_amax):
            maxima = self.store_warp_amax(amaxes)
        cute.arch.sync_threads()
        square, row_amax = arithmetic.thread_sum(squares.load()), amaxes[0]
        if const_expr(self.needs_row_amax):
            row_amax = arithmetic.thread_max(maxima.load())
        if const_expr(self.stage.whole_row):
            amaxes = [row_amax] * self.tiles_per_thread
        return square, row_amax, amaxes

    def normalized_scale(
        self, amax: Uint32, factor: Float32, bound: Float32 | Factors
    ) -> GroupScale:
        """Return the scale of a group, given the amax of its products."""
        amax = self.normalized(amax.bitcast(Float32), factor)
        return scaling.group_scale(amax.bitcast(Uint32), self.stage.dtype, bound, self.spec.fmt)

    def normalized(
        self, product: cute.TensorSSA | Float32, factor: Float32
    ) -> cute.TensorSSA | Float32:
        """Return a product with a weight times the row's factor, if that is not in it already."""
        return product if self.rounds_row else self.round(product * factor)

    def round(self, value: cute.TensorSSA | Float32) -> cute.TensorSSA | Float32:
        """Return float32 rounded to x's dtype, unless all is fused."""
        if self.spec.rounding == FUSED:
            return value
        if isinstance(value, Float32):
            return value.to(self.dtype).to(Float32)
        return encodings.round_to(value, self.dtype)

    @cute.jit
    def load(self, gX: cute.Tensor, segment: Segment, row: Row) -> cute.Tensor:
        """Load a thread's segment, (values,), zeros where there is nothing."""
        tXrX = encodings.zeros(self.stage.tile.values_per_thread, gX.element_type)
        # A weight may have wider elements than x.
        nbytes = max(self.spec.access.load_bytes, gX.element_type.width // 8)
        access = self.spec.access._replace(load_bytes=nbytes)
        copy.load(gX, segment, row.exists, tXrX, access)
        return tXrX

    @cute.jit
    def store(self, values: cute.TensorSSA, gY: cute.Tensor, segment: Segment, row: Row):
        """Store float32 values in x's dtype to a row beside x."""
        access = self.spec.access._replace(store_bytes=self.spec.access.load_bytes)
        copy.store(registers(values.to(self.dtype)), gY, segment, row.exists, access)


def matrix_or_none(m: cute.Tensor | None) -> Matrix | None:
    """Return a tensor that the kernel may not have as a `Matrix`."""
    return None if m is None else Matrix(m)


def warp_sum_of_squares(values: list[cute.TensorSSA]) -> Float32:
    """Return the sum of squares over the tiles of a warp, in each of its lanes."""
    if len(values) == 1:
        # The first sum of `thread_sum`, fused.
        values = arithmetic.halves(values[0])[::-1]
    squares = values[0] * values[0]
    for value in values[1:]:
        squares = arithmetic.fma(value, value, squares)
    return arithmetic.warp_sum(arithmetic.thread_sum(squares))


def zero_unless(predicate: Boolean, value: Float32) -> Float32:
    """Return 0 for a row that does not exist, not the -0.0 or NaN of a product with 0."""
    return cutlass.select_(predicate, value, Float32(0.0))
