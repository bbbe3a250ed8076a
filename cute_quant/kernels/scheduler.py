"""What all kernels that quantize rows share: which rows there are, and who takes them.

A kernel's own first step, and its story, stand in a subclass: `quantize_rows`, for a tile of rows.
"""

from __future__ import annotations

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, const_expr
from cutlass.cute.runtime import make_fake_tensor

from cute_quant.contract.formats import SCALE_ROW_ALIGNMENT, Format
from cute_quant.kernels import row_domains
from cute_quant.kernels.config import DOWN, Spec
from cute_quant.kernels.heuristics import MAX_GRID_Y, MAX_GRID_Z
from cute_quant.kernels.layouts import Matrix, unsigned
from cute_quant.kernels.params import Params
from cute_quant.kernels.stage import Scales, Stage, round_up
from cute_quant.kernels.types import ELEMENT_TYPES


class Results(Params):
    """What a kernel writes, of a batch or of one matrix, and which rows of it.

    Attributes:
        q: (q_rows, k), or (batch, q_rows, k).
        scales: None where only values are wanted.
        live_rows: the first ones exist.
        q_rows, scale_rows: to be written, those that do not exist as 0; of scales, None for all.
    """

    def __init__(
        self,
        q: Matrix,
        scales: Scales | None,
        live_rows: Uint32,
        q_rows: Uint32,
        scale_rows: Uint32 | None = None,
    ):
        self.q = q
        self.scales = scales
        self.live_rows = live_rows
        self.q_rows = q_rows
        self.scale_rows = scale_rows

    def of(self, batch: Int32) -> Results:
        """One matrix of a batch."""
        scales = self.scales
        if const_expr(scales is not None):
            scales = scales.of(batch, batch == self.q.tensor.shape[0] - 1)
        return Results(self.q[batch], scales, self.live_rows, self.q_rows, self.scale_rows)

    def below(self, count: Int32) -> Results:
        """Of an expert with so many rows."""
        padded = cutlass.min(round_up(count, SCALE_ROW_ALIGNMENT), self.scales.rows)
        return Results(self.q, self.scales, Uint32(count), Uint32(count), padded)


class RowKernel:
    """Compile-time choices: those of the spec, and the stage that quantizes."""

    def __init__(self, spec: Spec, stage: Stage):
        self.spec = spec
        self.stage = stage
        self.dtype = ELEMENT_TYPES[spec.dtype]

    @property
    def divisibility(self) -> int:
        """Of k."""
        tile = self.stage.tile
        return 1 if self.spec.access.ragged else tile.values_per_thread * tile.rows_per_thread

    def place(self) -> tuple:
        """Which of the CTAs beside each other, and which of those below each other."""
        x, y, _ = cute.arch.block_idx()
        return (y, x) if const_expr(self.stage.tile.cta_order == DOWN) else (x, y)

    def batch(self) -> tuple:
        """Leading dimensions of the results, symbolic."""
        return (cute.sym_int32(),) if self.spec.domain.batched else ()

    def stand_ins(self, batch: tuple, mn: Int32) -> tuple:
        """Stand-ins for the operands that all these kernels have, from the scales on."""
        domain = self.spec.domain
        index = counts = None
        if domain.counted:
            counts = make_fake_tensor(Int32, (cute.sym_int32(),), stride=(1,))
        if domain.gathered:
            strides = *(cute.sym_int64() for _ in batch), 1
            index = make_fake_tensor(Int32, (*batch, mn), stride=strides)
        fmt: Format = self.spec.fmt
        columns = (cute.sym_int32(),) if fmt.blocked else (mn, cute.sym_int32())
        strides = tuple(cute.sym_int64() for _ in (*batch, *columns))
        scales = make_fake_tensor(
            ELEMENT_TYPES[fmt.scale_dtype], (*batch, *columns), stride=strides
        )
        floor = Int32(0) if fmt.power_of_two else Float32(0)
        return scales, counts, index, Int32(0), Int32(0), Int32(0), floor

    @cute.jit
    def launch(
        self,
        inputs: tuple,  # the kernel's own, a matrix first
        mQ: cute.Tensor,  # (q_rows, k) or (batch, q_rows, k), q_rows >= mn
        mS: cute.Tensor | None,  # as the format has it
        mCounts: cute.Tensor | None,  # what the domain reads: (experts,), (groups,) or (mn,)
        mIndex: cute.Tensor | None,  # (mn,) or (batch, mn)
        missing_rows: Int32,  # padding rows of the last MN-major scale column without storage
        alignment: Int32,  # of the first row of a group in a prefix sum
        row_ctas: Int32,  # how many CTAs share the rows of experts
        floor: Int32 | Float32,  # smallest scale, an exponent where scales are powers of two
        stream: cuda.CUstream,
    ):
        domain, stage = self.spec.domain, self.stage
        q = Matrix(mQ)
        k = mQ.shape[-1]
        mn = inputs[0].rows
        if const_expr(domain.gathered):
            mn = unsigned(mIndex.shape[-1])
        q_rows, scales = q.rows, None
        rows_to_write = q_rows
        if const_expr(mS is not None):
            scales = stage.scales(mS, mn, k, missing_rows)
            rows_to_write = cutlass.max(rows_to_write, scales.rows)
        row_tiles = Int32((rows_to_write + (stage.tile.rows - 1)) // stage.tile.rows)
        depth, slots, ctas = 1, Int32(0), row_tiles
        if const_expr(domain.masked):
            ctas = cutlass.min(row_ctas, MAX_GRID_Y)
            slots = ctas // mQ.shape[0]
        elif const_expr(domain.batched):
            depth = mQ.shape[0]
        columns, block, bounds = self.columns(k)
        grid = [columns, cutlass.min(ctas, MAX_GRID_Y)]
        if const_expr(stage.tile.cta_order == DOWN):
            grid = [ctas, columns]
        self.kernel(
            stage.limit(floor),
            inputs,
            Results(q, scales, mn, q_rows),
            mCounts,
            mIndex,
            alignment,
            row_tiles,
            slots,
        ).launch(
            grid=[*grid, cutlass.min(depth, MAX_GRID_Z)],
            block=block,
            **bounds,
            stream=stream,
            use_pdl=self.spec.pdl,
        )

    @cute.kernel
    def kernel(
        self,
        limit: Uint32 | Float32,  # as `Stage.limit` has it
        inputs: tuple,
        results: Results,
        mCounts: cute.Tensor | None,
        mIndex: cute.Tensor | None,
        alignment: Int32,
        row_tiles: Int32,
        slots: Int32,  # tiles of the rows of each expert that have CTAs to themselves
    ):
        domain = self.spec.domain
        if const_expr(self.spec.pdl):
            cute.arch.griddepcontrol_launch_dependents()
        _, y = self.place()
        _, _, z = cute.arch.block_idx()
        *across, depth = cute.arch.grid_dim()
        ctas = across[0 if self.stage.tile.cta_order == DOWN else 1]
        if const_expr(self.spec.pdl):
            cute.arch.griddepcontrol_wait()
        common = mCounts, mIndex, alignment, limit
        if const_expr(domain.masked):
            # The first tiles of each expert have CTAs to themselves, all share the others.
            experts = results.q.tensor.shape[0]
            limits = results.live_rows, slots, self.stage.tile.rows
            row_tile = Int32(Uint32(y) // unsigned(experts))
            expert = y - row_tile * experts
            count = Int32(0)
            if row_tile < slots:
                count = row_domains.read_count(mCounts, expert, results.live_rows)
            if row_tile * self.stage.tile.rows < count:
                self.quantize_expert(expert, row_tile, count, inputs, results, *common)
            next_tile, end = y, Int32(0)
            for chunk in range(0, experts, row_domains.EXPERTS_PER_CHUNK):
                lane_first, lane_end, end = row_domains.read_experts(mCounts, chunk, end, *limits)
                while next_tile < end:
                    expert, row_tile, count = row_domains.find_tile(
                        mCounts, chunk, lane_first, lane_end, next_tile, *limits
                    )
                    self.quantize_expert(expert, row_tile, count, inputs, results, *common)
                    next_tile += ctas
        elif const_expr(domain.batched):
            for batch in range(z, results.q.tensor.shape[0], depth):
                for row_tile in range(y, row_tiles, ctas):
                    self.quantize_matrix(batch, row_tile, inputs, results, *common)
        else:
            self.quantize_rows(y, inputs, results, *common)

    @cute.jit
    def quantize_expert(
        self,
        expert: Int32,
        row_tile: Int32,
        count: Int32,
        inputs: tuple,
        results: Results,
        mCounts: cute.Tensor,
        mIndex: cute.Tensor | None,
        alignment: Int32,
        limit: Uint32 | Float32,
    ):
        """A tile of the rows of an expert that has `count` of them."""
        common = mCounts, mIndex, alignment, limit
        self.quantize_matrix(expert, row_tile, inputs, results.below(count), *common)

    @cute.jit
    def quantize_matrix(
        self,
        batch: Int32,
        row_tile: Int32,
        inputs: tuple,
        results: Results,
        mCounts: cute.Tensor | None,
        mIndex: cute.Tensor | None,
        alignment: Int32,
        limit: Uint32 | Float32,
    ):
        """A tile of the rows of one of a batch."""
        if const_expr(self.spec.domain.gathered):
            mIndex = mIndex[batch, None]
        inputs = self.of_batch(inputs, batch)
        self.quantize_rows(row_tile, inputs, results.of(batch), mCounts, mIndex, alignment, limit)

    @cute.jit
    def select(
        self,
        numbers: list,
        tokens: Uint32,  # rows of x
        live_rows: Uint32,
        mCounts: cute.Tensor | None,
        mIndex: cute.Tensor | None,
        alignment: Int32,
    ) -> tuple:
        """Of each of some rows of the results, whether it exists, and which row of x it is."""
        domain = self.spec.domain
        live = [number < live_rows for number in numbers]
        sources = numbers
        if const_expr(domain.prefix_sum):
            live = row_domains.in_a_group(mCounts, alignment, live_rows, numbers)
        if const_expr(domain.indexed):
            live = [row_domains.has_index(mCounts, number, live_rows) for number in numbers]
        if const_expr(domain.gathered):
            sources = [row_domains.gather(mIndex, number, live_rows) for number in numbers]
            live = [here and of < tokens for here, of in zip(live, sources, strict=True)]
        return live, sources

    def of_batch(self, inputs: tuple, batch: Int32) -> tuple:
        """What of the inputs belongs to one matrix of the results."""
        if const_expr(self.spec.domain.gathered):
            return inputs
        return tuple(t[batch] if isinstance(t, Matrix) else t for t in inputs)
