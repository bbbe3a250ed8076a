"""Quantize rows in groups: load, reduce, scale, quantize, store.

A thread holds 16 neighbours of a row in registers, from its load to its store, and as many of
each of some rows that follow each other. Eight threads hold a group of 128 and find its amax in
three shuffles; all of them know its scale, and one writes it. `layouts` draws who holds what.
Where a whole row is the group, a warp goes over it twice.
"""

from __future__ import annotations

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint32, const_expr
from cutlass.cute.runtime import make_fake_stream

from cute_quant.kernels import copy, layouts, numerics
from cute_quant.kernels.config import LANES, QuantizeSpec
from cute_quant.kernels.layouts import Matrix
from cute_quant.kernels.scheduler import Results, RowKernel
from cute_quant.kernels.stage import Stage
from cute_quant.kernels.types import ELEMENT_TYPES


class ColumnTiles(RowKernel):
    """Warps that go their ways: each has a tile of the columns of its rows, or whole rows.

    A subclass says in `load` what of a row a lane holds, and in `values` what it makes of that.
    """

    def columns(self, k: Int32) -> tuple:
        """CTAs beside each other, threads of a CTA, and further limits of the launch."""
        tile = self.stage.tile
        block = [LANES, *layouts.warps(tile).shape]
        if const_expr(self.stage.whole_row):
            return 1, block, {}
        return cute.ceil_div(self.stage.tiles(k), tile.column_warps), block, {}

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
        """A warp's rows of a tile of rows, and its tile of their columns."""
        stage = self.stage
        lane, *warp = cute.arch.thread_idx()
        column_cta, _ = self.place()
        row, tile = layouts.warps(stage.tile)(tuple(warp))
        tile = column_cta * stage.tile.column_warps + Int32(layouts.unsigned(tile))
        count = stage.tile.rows_per_thread
        first_row = Uint32(row_tile) * stage.tile.rows + layouts.unsigned(row)
        numbers = [first_row + i for i in range(count)]
        tokens = inputs[0].rows
        domain = results.live_rows, mCounts, mIndex, alignment
        live, sources = self.select(numbers, tokens, *domain)
        k = results.q.tensor.shape[1]
        sources = [
            self.source(inputs, of, number, here, k)
            for of, number, here in zip(sources, numbers, live, strict=True)
        ]
        rows = [results.q.row(number) for number in numbers]
        written = [number < results.q_rows for number in numbers]
        scales = []
        if const_expr(stage.whole_row):
            scales = [
                self.quantize_row(inputs, sources[0], live[0], rows[0], written[0], lane, limit)
            ]
        else:
            raw = [self.load(sources[i], tile, lane, live[i]) for i in range(count)]
            for i in cutlass.range_constexpr(count):
                tXrX = self.values(inputs, sources[i], raw[i])
                scale = stage.scale(stage.group_amax(numerics.amax(tXrX)), limit)
                self.store(tXrX, scale, rows[i], tile, lane, written[i])
                scales.append(scale)
        if const_expr(results.scales is not None):
            scale_rows = results.scale_rows
            if const_expr(stage.tile.column_warps > 1):
                # Some warps of the last CTA may be past all columns of scales.
                if const_expr(scale_rows is None):
                    scale_rows = results.scales.rows
                scale_rows = scale_rows if tile < stage.tiles(k) else Uint32(0)
            stage.store_scales(
                results.scales,
                scales,
                numbers,
                results.live_rows,
                tile,
                lane,
                k,
                live if const_expr(self.spec.domain.selects) else None,
                scale_rows,
            )

    @cute.jit
    def quantize_row(
        self,
        inputs: tuple,
        source: tuple,
        live: Boolean,
        row: cute.Tensor,
        written: Boolean,
        lane: Int32,
        limit: Uint32 | Float32,
    ):
        """All of a row, by one warp; returns its scale."""
        stage = self.stage
        tiles = cute.ceil_div(cute.size(row), stage.tile.columns)
        amax = Uint32(0)
        for i in range(tiles):
            tXrX = self.values(inputs, source, self.load(source, i, lane, live))
            amax = numerics.max_of(stage.dtype)(amax, numerics.amax(tXrX))
        scale = stage.scale(stage.group_amax(amax), limit)
        for i in range(tiles):
            tXrX = self.values(inputs, source, self.load(source, i, lane, live))
            self.store(tXrX, scale, row, i, lane, written)
        return scale

    @cute.jit
    def store(
        self,
        tXrX: cute.Tensor,
        scale: Uint32 | Float32,
        row: cute.Tensor,
        tile: Int32,
        lane: Int32,
        written: Boolean,
    ):
        """A lane's values over their scale to a tile of a row of the result."""
        copy.store(self.stage.values(tXrX, scale), row, tile, lane, written, self.spec.access)


class Quantize(ColumnTiles):
    """What a lane loads is what it quantizes."""

    def __init__(self, spec: QuantizeSpec):
        super().__init__(spec, Stage(ELEMENT_TYPES[spec.dtype], spec.fmt, spec.tile))

    def signature(self) -> tuple:
        """Stand-ins for the arguments: which sizes vary, and what alignment may be relied on."""
        spec = self.spec
        batch, mn, q_rows = self.batch(), cute.sym_int32(), cute.sym_int32()
        tokens = cute.sym_int32() if spec.domain.gathered else mn
        k = cute.sym_int32(divisibility=self.divisibility)
        leading = () if spec.domain.gathered else batch
        dtype = self.dtype if spec.fake else ELEMENT_TYPES[spec.fmt.dtype]
        mX = copy.fake_matrix(self.dtype, (*leading, tokens, k), spec.access.load_bytes)
        mQ = copy.fake_matrix(dtype, (*batch, q_rows, k), spec.access.store_bytes)
        mS, *others = self.stand_ins(batch, mn)
        scales = None if spec.fake else mS
        return mX, mQ, scales, *others, make_fake_stream(use_tvm_ffi_env_stream=True)

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,  # (mn, k), (batch, mn, k), or (tokens, k) with an index
        mQ: cute.Tensor,
        mS: cute.Tensor | None,
        mCounts: cute.Tensor | None,
        mIndex: cute.Tensor | None,
        missing_rows: Int32,
        alignment: Int32,
        row_ctas: Int32,
        floor: Int32 | Float32,
        stream: cuda.CUstream,
    ):
        """See `RowKernel.launch` for what comes after x."""
        numbers = missing_rows, alignment, row_ctas, floor
        self.launch((Matrix(mX),), mQ, mS, mCounts, mIndex, *numbers, stream)

    def source(
        self, inputs: tuple, row: Uint32, number: Uint32, live: Boolean, k: Int32
    ) -> cute.Tensor:
        """What `load` reads of a row of x, row `number` of the result."""
        return inputs[0].row(row, k)

    def load(self, source: cute.Tensor, tile: Int32, lane: Int32, live: Boolean) -> cute.Tensor:
        """What a lane loads, zeros where there is nothing."""
        tXrX = copy.zeros(self.stage.tile.values_per_thread, self.dtype)
        copy.load(source, tile, lane, live, tXrX, self.spec.access)
        return tXrX

    def values(self, inputs: tuple, source: cute.Tensor, raw: cute.Tensor) -> cute.Tensor:
        """What is quantized, (values,)."""
        return raw

    @cute.jit
    def store(
        self,
        tXrX: cute.Tensor,
        scale: Uint32 | Float32,
        row: cute.Tensor,
        tile: Int32,
        lane: Int32,
        written: Boolean,
    ):
        tXrQ = self.stage.values(tXrX, scale)
        if const_expr(self.spec.fake):
            products = numerics.multiply(tXrQ, numerics.float32_of(scale, self.spec.fmt))
            tXrQ = numerics.round_to(products, self.dtype)
        copy.store(tXrQ, row, tile, lane, written, self.spec.access)
