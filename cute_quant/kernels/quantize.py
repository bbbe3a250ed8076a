"""Quantize rows in groups: load, reduce, scale, quantize, store.

A thread holds 16 values of a row, contiguous along k, in registers from its load to its store, and
as many of each of its other rows. Eight threads hold a group of 128 and find its amax in three
shuffles; all of them know its scale, and one writes it. `layouts` draws the thread-value layout.
`quantize_rows` has the kernel where scales depend on whole rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint32, const_expr
from cutlass.cute.runtime import make_fake_stream

from cute_quant.kernels import copy, encodings, layouts, ptx, scatter
from cute_quant.kernels.config import LANES, QuantizeSpec, SiluMulBackwardSpec, SiluMulSpec
from cute_quant.kernels.copy import Segment
from cute_quant.kernels.encodings import ELEMENT_TYPES
from cute_quant.kernels.layouts import Matrix
from cute_quant.kernels.params import Params
from cute_quant.kernels.philox import words_of
from cute_quant.kernels.problem import Operands, Problem
from cute_quant.kernels.quantize_rows import RowQuantizer
from cute_quant.kernels.row_domains import Row, select_rows
from cute_quant.kernels.scales import GroupScale
from cute_quant.kernels.scatter import Target, Targets
from cute_quant.kernels.scheduler import Scheduler
from cute_quant.kernels.stage import Origin, Rows, Scales, Stage
from cute_quant.kernels.upper_scales import Factors


class GroupQuantizer:
    """Quantizes what a prologue yields; its warps tile rows and columns independently.

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
        self.spec = spec
        self.stage = stage
        self.fake = fake
        self.scheduler = Scheduler(spec, stage)

    def launch(self, prologue: Params, operands: Operands, stream: cuda.CUstream):
        """Launch the kernel: as many CTAs along M and N as the scheduler has."""
        stage, tile = self.stage, self.stage.tile
        problem = self.scheduler.problem(prologue, operands)
        columns = tile.column_warps * tile.tiles_per_thread
        num_column_ctas = cute.ceil_div(stage.tiles(problem.k), columns)
        self.kernel(problem).launch(
            grid=self.scheduler.grid(problem, operands, num_column_ctas),
            block=[LANES, *layouts.warps(tile).shape],
            min_blocks_per_mp=int(tile.low_latency),
            stream=stream,
            use_pdl=self.spec.pdl,
        )

    @cute.kernel
    def kernel(self, problem: Problem):
        """Quantize the tiles of rows that the CTA takes."""
        self.scheduler.for_each_tile(problem, self.quantize_tile)

    @cute.jit
    def quantize_tile(self, row_tile: Int32, problem: Problem):
        """Load, reduce, scale, quantize and store a warp's part of a tile of rows."""
        stage, k = self.stage, problem.k
        segments, row_indices = self.thread_tile(row_tile)
        rows = select_rows(problem, self.spec.domain, row_indices)
        inputs = [problem.prologue.row(row, k) for row in rows]
        targets = [scatter.target(row, problem, self.spec.access) for row in rows]
        if const_expr(self.scheduler.waits_late):
            ptx.wait_behind([a for row in inputs for s in segments for a in row.addresses(s)])

        scales = stage.scale_registers(len(segments) * len(rows))  # (rows of each tile,)
        if stage.may_write(rows[0].in_bounds):
            self.quantize_rows(rows, inputs, targets, segments, scales, problem)
        if const_expr(problem.scales is not None):
            self.store_scales(rows, scales, segments, problem)

    @cute.jit
    def quantize_rows(
        self,
        rows: list[Row],
        inputs: list[Params],
        targets: list[Target | Targets],
        segments: list[Segment],
        scales: cute.Tensor,
        problem: Problem,
    ):
        """Load, reduce, scale, quantize and store the thread's tiles, and keep their scales."""
        stage, bounds = self.stage, self.load_bounds(rows, problem)
        randoms = [problem.random_of_row(row.index) for row in rows]
        # (values,) of each tile and row
        tXrX = [[row.load(segment) for row in inputs] for segment in segments]
        for j in cutlass.range_constexpr(len(segments)):
            for i in cutlass.range_constexpr(len(rows)):
                tXrV = inputs[i].values(tXrX[j][i])  # (values,)
                amax = stage.group_amax(stage.thread_amax(tXrV))
                scale = stage.refine(tXrV, stage.scale(amax, bounds[i]), bounds[i])
                words = words_of(randoms[i], segments[j], tXrV)
                # (values,), bytes of two
                tXrQ = stage.results(tXrV, scale, bounds[i], self.fake, words)
                targets[i].store(tXrQ, segments[j])
                scales[j * len(rows) + i] = scale.scale

    def load_bounds(self, rows: list[Row], problem: Problem) -> list[Float32 | Factors]:
        """Return what the scales of each row are bounded by, or lie under."""
        if self.spec.domain.grouped:
            return [problem.load_bound(row.group) for row in rows]
        return [problem.load_bound()] * len(rows)

    def thread_tile(self, row_tile: Int32) -> tuple[list[Segment], list[Uint32]]:
        """Return the thread's segments of its warp's tiles, and the indices of its rows."""
        tile = self.stage.tile
        lane, *warp = cute.arch.thread_idx()
        column_cta, _ = self.scheduler.cta_coordinates()
        row, column_tile = layouts.warps(tile)(tuple(warp))
        column_tile = column_cta * tile.column_warps + Int32(layouts.unsigned(column_tile))
        first_row = Uint32(row_tile) * tile.rows + layouts.unsigned(row)
        thread_value = layouts.thread_value(tile, self.spec.fmt.group_size)
        rows = [thread_value((0, (0, i)))[0] for i in range(tile.rows_per_thread)]
        tiles = layouts.tiles_of_thread(tile)
        segments = [Segment(tiles((i, column_tile)), lane) for i in range(tile.tiles_per_thread)]
        return segments, [first_row + row for row in rows]

    def store_scales(
        self,
        rows: list[Row],
        scales: cute.Tensor,  # (rows of each tile,)
        segments: list[Segment],
        problem: Problem,
    ):
        """Store the scales of the thread's tiles."""
        exist = None
        if self.spec.domain.selects:
            exist = [row.exists for row in rows]
        scale_rows = Rows([row.index for row in rows], problem.num_rows, exist)
        for i, segment in enumerate(segments):
            row_scales = [
                GroupScale(Float32(0.0), scales[i * len(rows) + j]) for j in range(len(rows))
            ]
            memory = self.scales_of_tile(segment, problem)
            origin = Origin(segments[0], i)
            if self.spec.domain.scattered:
                for row, scale in zip(rows, row_scales, strict=True):
                    self.scheduler.scatter.store_scale(
                        memory, row.places, scale, segment, problem, origin
                    )
                continue
            self.stage.store_scales(memory, scale_rows, row_scales, segment, problem.k, origin)

    @cute.jit
    def scales_of_tile(self, segment: Segment, problem: Problem) -> Scales:
        """Return where the scales of a warp's tile go: nowhere if it is past all columns."""
        stage, scales = self.stage, problem.scales
        tiles = stage.tile.column_warps * stage.tile.tiles_per_thread
        if const_expr(tiles > 1 and not stage.tiles_have_units):
            written_rows = scales.written_rows
            if const_expr(written_rows is None):
                written_rows = scales.rows
            written_rows = written_rows if segment.tile < stage.tiles(problem.k) else Uint32(0)
            scales = scales.replace(written_rows=written_rows)
        return scales


def quantizer(
    spec: QuantizeSpec | SiluMulSpec | SiluMulBackwardSpec, stage: Stage, fake: bool = False
) -> GroupQuantizer | RowQuantizer:
    """Return the kernel for a format: where scales depend on whole rows, a CTA has all of one."""
    return (RowQuantizer if spec.fmt.by_row else GroupQuantizer)(spec, stage, fake)


@dataclass(eq=False)
class Input(Params):
    """The prologue of values that are quantized as they are.

    Attributes:
        x: (mn, k) or (batch, mn, k), or (tokens, k) with an index.
    """

    static = ("spec",)

    x: Matrix
    spec: QuantizeSpec

    def slice_batch(self, batch: Int32, gathered: bool) -> Input:
        """Return the prologue of one matrix of a batch; gathered rows come from one x."""
        return self if gathered else self.replace(x=self.x[batch])

    def row(self, row: Row, k: Int32 | None) -> InputRow:
        """Return the row of x, (k,), that is a row of the result; None takes all of it."""
        return InputRow(self.x.row(row.source, k), row.exists, self.spec)


@dataclass(eq=False)
class InputRow(Params):
    """A row of x, (k,)."""

    static = ("spec",)

    gX: cute.Tensor
    predicate: Boolean
    spec: QuantizeSpec

    def load(self, segment: Segment) -> cute.Tensor:
        """Load a thread's segment, (values,), zeros where there is nothing."""
        tXrX = encodings.zeros(self.spec.tile.values_per_thread, self.gX.element_type)
        copy.load(self.gX, segment, self.predicate, tXrX, self.spec.access)
        return tXrX

    def addresses(self, segment: Segment) -> list[Int64]:
        """Return where a thread's segment lies."""
        spec = self.spec
        return [copy.address(self.gX, segment, spec.tile.values_per_thread, spec.access)]

    def values(self, tXrX: cute.Tensor) -> cute.Tensor:
        """Return the values to be quantized, (values,)."""
        return tXrX


class Quantize:
    """Entry point: x to values and scales, or to their products in x's dtype."""

    def __init__(self, spec: QuantizeSpec):
        self.spec = spec
        self.dtype = ELEMENT_TYPES[spec.dtype]
        self.stage = Stage(self.dtype, spec.fmt, spec.tile, spec.domain.keeps_gaps)
        self.quantizer = quantizer(spec, self.stage, spec.fake)

    def signature(self) -> tuple:
        """Return stand-ins for the arguments, with the sizes that vary and the alignment."""
        spec, scheduler = self.spec, self.quantizer.scheduler
        sizes = scheduler.symbolic_sizes()
        shape = (*sizes.x_batch, sizes.tokens, sizes.k)
        mX = copy.fake_matrix(self.dtype, shape, spec.access.load_bytes)
        q_dtype = self.dtype if spec.fake else encodings.value_type_of(spec.fmt)
        operands = scheduler.fake_operands(sizes, q_dtype)
        if spec.fake:
            operands = operands._replace(mS=None)
            if spec.fmt.row_scale:
                operands = operands._replace(mUpper=None)
        return mX, *operands, make_fake_stream(use_tvm_ffi_env_stream=True)

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,  # (mn, k), (batch, mn, k), or (tokens, k) with an index
        mQ: cute.Tensor,
        mS: cute.Tensor | None,
        mUpper: cute.Tensor | None,
        mCounts: cute.Tensor | None,
        mIndex: cute.Tensor | None,
        mRng: cute.Tensor | None,
        missing_rows: Int32,
        alignment: Int32,
        row_ctas: Int32,
        floor: Int32 | Float32,
        stream: cuda.CUstream,
    ):
        """Launch. `Operands` describes what comes after x."""
        operands = Operands(
            mQ, mS, mUpper, mCounts, mIndex, mRng, missing_rows, alignment, row_ctas, floor
        )
        self.quantizer.launch(Input(Matrix(mX), self.spec), operands, stream)
