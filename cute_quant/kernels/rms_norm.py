"""RMSNorm of rows, quantized in the same registers: load, add, reduce, normalize, quantize, store.

A row lies in the registers of the warps of a CTA, so memory is passed over once: a warp has a tile
of its columns, or several, ``warps`` tiles apart. Each warp sums the squares of its values and
leaves the sum in shared memory; behind the one barrier all of them add up the sums. With a
residual, x + residual is what gets normalized, and is written.
"""

from __future__ import annotations

import functools

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint32, const_expr
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from cute_quant.kernels import copy, numerics
from cute_quant.kernels.config import LANES, RmsNormSpec
from cute_quant.kernels.layouts import Matrix
from cute_quant.kernels.scheduler import Results, RowKernel
from cute_quant.kernels.stage import Stage
from cute_quant.kernels.types import ELEMENT_TYPES


class RmsNorm(RowKernel):
    """What is quantized is ``r * rsqrt(mean(r^2) + eps) * (weight + offset)``."""

    def __init__(self, spec: RmsNormSpec):
        dtype = ELEMENT_TYPES[spec.dtype]
        super().__init__(spec, Stage(dtype if spec.unfused else Float32, spec.fmt, spec.tile))
        self.weight_dtype = ELEMENT_TYPES[spec.weight_dtype]

    def signature(self) -> tuple:
        """Stand-ins for the arguments: which sizes vary, and what alignment may be relied on."""
        spec = self.spec
        nbytes = spec.access.load_bytes
        batch, mn, q_rows = self.batch(), cute.sym_int32(), cute.sym_int32()
        tokens = cute.sym_int32() if spec.domain.gathered else mn
        leading = () if spec.domain.gathered else batch
        k = cute.sym_int32(divisibility=self.divisibility)

        def matrix(there: bool = True) -> cute.Tensor | None:
            return copy.fake_matrix(self.dtype, (*leading, tokens, k), nbytes) if there else None

        dtype = ELEMENT_TYPES[spec.fmt.dtype]
        mQ = copy.fake_matrix(dtype, (*batch, q_rows, k), spec.access.store_bytes)
        aligned = max(nbytes, self.weight_dtype.width // 8)
        mWeight = make_fake_tensor(self.weight_dtype, (k,), stride=(1,), assumed_align=aligned)
        others = matrix(spec.residual), matrix(spec.residual), matrix(spec.normalized)
        numbers = Float32(0), Float32(0)
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        return matrix(), mQ, *self.stand_ins(batch, mn), *numbers, mWeight, *others, stream

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,  # (mn, k), (batch, mn, k), or (tokens, k) with an index
        mQ: cute.Tensor,
        mS: cute.Tensor,
        mCounts: cute.Tensor | None,
        mIndex: cute.Tensor | None,
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
        """See `RowKernel.launch` for what comes between x and the weight."""
        matrices = [
            Matrix(m) if const_expr(m is not None) else None
            for m in (mX, mResidual, mSum, mNormalized)
        ]
        reciprocal = Float32(1.0) / Float32(mQ.shape[-1])
        inputs = *matrices, mWeight, eps, offset, reciprocal
        numbers = missing_rows, alignment, row_ctas, floor
        self.launch(inputs, mQ, mS, mCounts, mIndex, *numbers, stream)

    def columns(self, k: Int32) -> tuple:
        """One CTA for all columns, its threads, and the bounds of these that the compiler may rely
        on."""
        warps = cute.ceil_div(self.stage.tiles(k), self.spec.tiles_per_thread)
        rows = self.stage.tile.rows
        bounds = {"max_number_threads": [LANES, self.spec.max_warps, rows]}
        return 1, [LANES, warps, rows], bounds

    @cute.jit
    def quantize_rows(
        self,
        row_tile: Int32,
        inputs: tuple,
        results: Results,
        mCounts: cute.Tensor | None,
        mIndex: cute.Tensor | None,
        alignment: Int32,
        limit: Uint32 | Float32,
    ):
        """A row of a tile of rows, by the warps that share it."""
        x, residual, total, normalized, mWeight, eps, offset, reciprocal = inputs
        spec, stage = self.spec, self.stage
        lane, warp, slot = cute.arch.thread_idx()
        _, warps, _ = cute.arch.block_dim()
        number = Uint32(row_tile) * stage.tile.rows + slot
        domain = results.live_rows, mCounts, mIndex, alignment
        live, sources = self.select([number], x.rows, *domain)
        live, source = live[0], sources[0]
        written = number < results.q_rows
        k = results.q.tensor.shape[1]
        row = results.q.row(number)
        tiles = [warp + i * warps for i in range(spec.tiles_per_thread)]

        raw = [self.load(x.row(source, k), tile, lane, live) for tile in tiles]
        # With all rows of x, unless they alone fill the registers.
        early = spec.tiles_per_thread <= 2
        if const_expr(early):
            weights = [self.load(mWeight, tile, lane, live) for tile in tiles]
        if const_expr(spec.residual):
            others = [self.load(residual.row(number, k), tile, lane, live) for tile in tiles]
        values = [numerics.widen(t).load() for t in raw]
        if const_expr(spec.residual):
            others = [numerics.widen(t).load() for t in others]
            values = [a + b for a, b in zip(values, others, strict=True)]
            for tile, value in zip(tiles, values, strict=True):
                self.store(value, total.row(number, k), tile, lane, live)
            values = [self.rounded(value) for value in values]

        # What the factor of the row does not change is done before it is known. Rounding keeps
        # order: the largest product is that of the largest, whatever they are multiplied by.
        squares = values[0] * values[0]
        for value in values[1:]:
            squares = cute.math.fma(value, value, squares)
        square = numerics.sum_of_lanes(numerics.sum_of(squares))
        if const_expr(not early):
            weights = [self.load(mWeight, tile, lane, live) for tile in tiles]
        offset = zero_unless(live, offset)
        weights = [numerics.widen(weight).load() + offset for weight in weights]
        products = [value * weight for value, weight in zip(values, weights, strict=True)]
        amaxes = [numerics.amax(numerics.registers(product)) for product in products]
        if const_expr(stage.whole_row):
            amaxes = [functools.reduce(cutlass.max, amaxes)]
        amaxes = [numerics.group_amax(amax, Float32, stage.lanes_per_group) for amax in amaxes]

        if const_expr(spec.domain.batched):
            cute.arch.sync_threads()  # all have read what the row before left
        sums = self.leave(square, warp, warps, lane, slot)
        if const_expr(stage.whole_row):
            maxima = self.leave(amaxes[0], warp, warps, lane, slot)
        cute.arch.sync_threads()
        square = numerics.sum_of(sums.load())
        if const_expr(stage.whole_row):
            amaxes = [numerics.max_of_all(maxima.load())] * len(tiles)

        factor = zero_unless(live, numerics.reciprocal_root(square * reciprocal + eps))
        amaxes = [self.rounded(amax.bitcast(Float32) * factor) for amax in amaxes]
        scales = [stage.scale(amax.bitcast(Uint32), limit) for amax in amaxes]
        for tile, product, scale in zip(tiles, products, scales, strict=True):
            value = self.rounded(product * factor)
            if const_expr(spec.normalized):
                self.store(value, normalized.row(number, k), tile, lane, live)
            tXrQ = stage.values(numerics.registers(value.to(stage.dtype)), scale)
            copy.store(tXrQ, row, tile, lane, written, spec.access)
        last = stage.tiles(k)
        for i in cutlass.range_constexpr(1 if stage.whole_row else len(tiles)):
            takes_part = warp == 0 if const_expr(stage.whole_row) else tiles[i] < last
            self.store_scale(results, scales[i], number, live, tiles[i], lane, takes_part)

    @cute.jit
    def store_scale(
        self,
        results: Results,
        scale: Uint32 | Float32,
        number: Uint32,
        live: Boolean,
        tile: Int32,
        lane: Int32,
        takes_part: Boolean,  # the warp
    ):
        if takes_part:
            self.stage.store_scales(
                results.scales,
                [scale],
                [number],
                results.live_rows,
                tile,
                lane,
                results.q.tensor.shape[1],
                [live] if const_expr(self.spec.domain.selects) else None,
                results.scale_rows,
            )

    def rounded(self, value: cute.TensorSSA | Float32) -> cute.TensorSSA | Float32:
        """float32 rounded to x's dtype, if that is what is asked for."""
        if not self.spec.unfused:
            return value
        if isinstance(value, Float32):
            return value.to(self.dtype).to(Float32)
        return numerics.rounded(value, self.dtype)

    @cute.jit
    def load(self, row: cute.Tensor, tile: Int32, lane: Int32, live: Boolean) -> cute.Tensor:
        """A lane's values of a tile, zeros where there are none."""
        tXrX = copy.zeros(self.stage.tile.values_per_thread, row.element_type)
        # A weight may have wider elements than x.
        nbytes = max(self.spec.access.load_bytes, row.element_type.width // 8)
        access = self.spec.access._replace(load_bytes=nbytes)
        copy.load(row, tile, lane, live, tXrX, access)
        return tXrX

    @cute.jit
    def store(
        self, values: cute.TensorSSA, row: cute.Tensor, tile: Int32, lane: Int32, live: Boolean
    ):
        """float32 values in x's dtype to a row beside x."""
        access = self.spec.access._replace(store_bytes=self.spec.access.load_bytes)
        copy.store(numerics.registers(values.to(self.dtype)), row, tile, lane, live, access)

    @cute.jit
    def leave(
        self, value: Float32 | Uint32, warp: Int32, warps: Int32, lane: Int32, slot: Int32
    ) -> cute.Tensor:
        """Shared memory for what each warp of a row has, (max_warps,), 0 where there is none; the
        warp's own is in it, that of all others behind a barrier."""
        size = self.spec.max_warps
        memory = cute.arch.alloc_smem(type(value), size * self.stage.tile.rows, alignment=16)
        shared = cute.make_tensor(memory + slot * size, cute.make_layout(size))
        if lane == 0:
            shared[warp] = value
        if warp == 0 and warps <= lane and lane < size:
            shared[lane] = type(value)(0)
        return shared


def zero_unless(live: Boolean, value: Float32) -> Float32:
    """What does not exist becomes 0, not the -0.0 or NaN that 0 times a number may be."""
    return cutlass.select_(live, value, Float32(0.0))
