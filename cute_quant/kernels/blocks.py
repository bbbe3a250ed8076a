"""Quantize weights in square blocks: load, reduce, scale, quantize, store.

A CTA has a tile of 128 x 128 weights, one block or 16 of 32 x 32, in the registers of its threads.
Each warp finds the largest magnitudes of its rows in shuffles, and shared memory takes those of all
warps past one barrier. Every thread then knows the scales of the tile's blocks.

Weights that are contiguous along n are loaded as the rows of their transpose. Their quantized
values go to rows of n through shared memory.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, const_expr
from cutlass.cute.runtime import make_fake_stream

from cute_quant.contract.dtypes import INPUT_DTYPES
from cute_quant.kernels import block_tile, copy, encodings, grids, layouts
from cute_quant.kernels.block_tile import VECTOR_BYTES
from cute_quant.kernels.config import (
    BLOCK_TILE,
    BLOCK_WARPS,
    LANES,
    BlocksSpec,
    Tile,
)
from cute_quant.kernels.encodings import ELEMENT_TYPES
from cute_quant.kernels.layouts import Matrix
from cute_quant.kernels.params import Params
from cute_quant.kernels.scales import GroupScale
from cute_quant.kernels.stage import Scales, Stage


class Problem(Params):
    """Arguments of the kernel, for a batch of matrices or one of them.

    Attributes:
        w: (batch, n, k), or (batch, k, n) if the weights are transposed.
        w_scales: those of blocks of w, (batch, blocks of n, blocks of k), or None.
        q: (batch, n, k), or k / 2 bytes of two values.
        scales: where scales of rows go, or those of blocks, (batch, blocks of n, blocks of k).
        bound: as `Stage.scale_bound` returns it.
        n, k: rows and columns of a matrix.
        batches: matrices.
        first_batch, first_row_tile: as `grids.launch` sets them.
    """

    def __init__(
        self,
        w: Matrix,
        w_scales: cute.Tensor | None,
        q: Matrix,
        scales: Scales | cute.Tensor,
        bound: Float32,
        k: Int32,
    ):
        self.w = w
        self.w_scales = w_scales
        self.q = q
        self.scales = scales
        self.bound = bound
        self.n = q.rows
        self.k = k
        self.batches = q.tensor.shape[0]
        self.first_batch = self.first_row_tile = Int32(0)

    def slice_batch(self, batch: Int32) -> "Problem":
        """Return the problem of one matrix of a batch."""
        w_scales, scales = self.w_scales, self.scales
        if const_expr(w_scales is not None):
            w_scales = w_scales[batch, None, None]
        if const_expr(isinstance(scales, Scales)):
            scales = scales.slice_batch(batch, batch == self.batches - 1)
        else:
            scales = scales[batch, None, None]
        return self.replace(w=self.w[batch], w_scales=w_scales, q=self.q[batch], scales=scales)


class Blocks:
    """Entry point: weights, or e4m3 with scales of blocks, to values and scales of blocks."""

    def __init__(self, spec: BlocksSpec):
        self.spec = spec
        self.fmt = spec.fmt
        self.size = spec.fmt.group_size
        self.values = spec.values_per_thread
        self.rows = layouts.rows_of_block_thread(self.values)
        self.w_dtype = ELEMENT_TYPES[spec.dtype]
        # Weights with scales are multiplied first, and those products are quantized.
        self.scaled = spec.dtype not in INPUT_DTYPES
        self.dtype = Float32 if self.scaled else self.w_dtype
        self.stage = Stage(self.dtype, self.fmt, Tile(values_per_thread=self.values))

    def signature(self) -> tuple:
        """Return stand-ins for the arguments, with the sizes that vary and the alignment."""
        spec, fmt = self.spec, self.fmt
        batch = cute.sym_int32()
        divisor = 1 if spec.access.ragged else self.values
        q_divisor = 1 if spec.q_access.ragged else self.q_values
        per_byte = fmt.value_type.per_byte
        n = cute.sym_int32(divisibility=divisor if spec.transposed else 1)
        k = cute.sym_int32(divisibility=q_divisor if spec.transposed else divisor)
        columns = k
        if per_byte > 1:
            columns = cute.sym_int32(divisibility=max(1, q_divisor // per_byte))
        shape = (batch, k, n) if spec.transposed else (batch, n, k)
        w_scales = None
        if self.scaled:
            w_scales = copy.fake_strided(Float32, (batch, cute.sym_int32(), cute.sym_int32()), 1)
        scales = (batch, cute.sym_int32(), cute.sym_int32())
        if fmt.blocked:
            scales = (batch, cute.sym_int32())
        elif fmt.byte_scales:
            scales = (batch, n, cute.sym_int32())
        return (
            copy.fake_matrix(self.w_dtype, shape, spec.access.load_bytes),
            w_scales,
            copy.fake_matrix(
                encodings.value_type_of(fmt), (batch, n, columns), spec.q_access.store_bytes
            ),
            copy.fake_strided(encodings.scale_type_of(fmt), scales, 1),
            Int32(0),
            Int32(0) if fmt.power_of_two else Float32(0),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @property
    def q_values(self) -> int:
        """Return how many values, contiguous along k, a thread stores at once."""
        return VECTOR_BYTES * self.fmt.value_type.per_byte if self.spec.transposed else self.values

    @cute.jit
    def __call__(
        self,
        mW: cute.Tensor,  # (batch, n, k), or (batch, k, n)
        mWS: cute.Tensor | None,  # (batch, blocks of n, blocks of k)
        mQ: cute.Tensor,  # (batch, n, k), or bytes of two
        mS: cute.Tensor,  # as the format has it, or (batch, blocks of n, blocks of k)
        missing_rows: Int32,
        floor: Int32 | Float32,
        stream: cuda.CUstream,
    ):
        """Launch the kernel, on batches of matrices."""
        batches, n, columns = mQ.shape
        k = columns * self.fmt.value_type.per_byte
        scales, padded_k = mS, k
        if const_expr(self.fmt.byte_scales):
            scales = self.stage.scales(mS, n, k, missing_rows)
            unit = self.size * self.fmt.groups_per_unit
            padded_k = cute.round_up(k, unit)
        bound = self.stage.scale_bound(floor)
        problem = Problem(Matrix(mW), mWS, Matrix(mQ), scales, bound, k)
        # Padding of scales past the last column has CTAs too.
        tiles = cute.ceil_div(padded_k, BLOCK_TILE), cute.ceil_div(n, BLOCK_TILE), batches
        options = {"stream": stream, "use_pdl": self.spec.pdl}
        grids.launch(self.kernel, problem, tiles, BLOCK_WARPS, options)

    @cute.kernel
    def kernel(self, problem: Problem):
        """Quantize the blocks of a tile of weights."""
        if const_expr(self.spec.pdl):
            cute.arch.griddepcontrol_launch_dependents()
        lane, warp, _ = cute.arch.thread_idx()
        column_tile, row_tile, batch = cute.arch.block_idx()
        problem = problem.slice_batch(problem.first_batch + batch)
        row_tile = problem.first_row_tile + row_tile
        w_tile = (row_tile, column_tile)
        if const_expr(self.spec.transposed):
            w_tile = (column_tile, row_tile)
        first_row, column_lane = layouts.threads_of_block_tile(self.values)((lane, warp))
        segment = block_tile.segment(self.values, column_lane, w_tile[1])
        rows = block_tile.rows_of(w_tile[0], first_row, self.rows)
        exist = [row < problem.w.rows for row in rows]
        gW = [problem.w.row(row) for row in rows]  # (columns,) each

        # What comes before needs no memory, and overlaps with the end of the kernel before.
        if const_expr(self.spec.pdl):
            cute.arch.griddepcontrol_wait()
        tXrW = [encodings.zeros(self.values, self.w_dtype) for _ in rows]  # (values,) each
        for i in cutlass.range_constexpr(self.rows):
            copy.load(gW[i], segment, exist[i], tXrW[i], self.spec.access)
        if const_expr(self.scaled):
            blocks = layouts.blocks_of_tile(self.spec.source_block)
            _, row_block = blocks(first_row)
            _, column_block = blocks(column_lane * self.values)
            w_scale = self.load_scale(problem.w_scales, w_tile, (row_block, column_block))
            tXrW = [encodings.multiply(tXrV, w_scale) for tXrV in tXrW]

        amaxes = self.share_amaxes(tXrW, column_lane)
        _, group = layouts.lanes(self.stage.lanes_per_group)(column_lane)
        _, row_block = layouts.blocks_of_tile(self.size)(first_row)
        scale = self.scale(amaxes, (row_block, group), problem.bound)
        if const_expr(self.spec.transposed):
            self.store_transposed(tXrW, scale, (first_row, column_lane), row_tile, problem)
        else:
            gQ = [problem.q.row(row) for row in rows]
            for i in cutlass.range_constexpr(self.rows):
                tXrQ = self.stage.encode(tXrW[i], scale)
                copy.store(tXrQ, gQ[i], segment, exist[i], self.spec.q_access)
        self.store_scales(amaxes, row_tile, column_tile, problem)

    @cute.jit
    def load_scale(
        self, scales: cute.Tensor, tile: tuple[Int32, Int32], block: tuple[Int32, Int32]
    ) -> Float32:
        """Load the scale of a block of a tile of w, 0 where there is none.

        A CTA may have padding of the result alone, and a tile less blocks at both ends.
        """
        blocks = BLOCK_TILE // self.spec.source_block
        row, column = (tile[i] * blocks + block[i] for i in range(2))
        if const_expr(self.spec.transposed):
            row, column = column, row
        scale = Float32(0.0)
        if (const_expr(blocks == 1) or row < scales.shape[0]) and column < scales.shape[1]:
            scale = scales[row, column]
        return scale

    @cute.jit
    def share_amaxes(self, tXrW: list[cute.Tensor], column_lane: Int32) -> cute.Tensor:
        """Return the largest magnitudes of the parts of blocks that warps have, of all warps."""
        stage, lanes = self.stage, BLOCK_TILE // self.values
        amax = stage.thread_amax(tXrW[0])
        for i in cutlass.range_constexpr(1, self.rows):
            amax = stage.larger(amax, stage.thread_amax(tXrW[i]))
        # Lanes with other rows of the same columns, then those of the same rows.
        for i in cutlass.range_constexpr((LANES // lanes).bit_length() - 1):
            amax = stage.larger(amax, cute.arch.shuffle_sync_bfly(amax, offset=lanes << i))
        amax = stage.group_amax(amax)

        layout = layouts.amaxes_of_block_tile(self.size)
        memory = cute.arch.alloc_smem(Uint32, cute.size(layout), alignment=VECTOR_BYTES)
        amaxes = cute.make_tensor(memory, layout)
        lane_of_group, group = layouts.lanes(stage.lanes_per_group)(column_lane)
        lane, warp, _ = cute.arch.thread_idx()
        if lane_of_group == 0 and lane < lanes:
            amaxes[warp, group] = amax
        cute.arch.barrier()
        return amaxes

    @cute.jit
    def scale(self, amaxes: cute.Tensor, block: tuple[Int32, Int32], bound: Float32) -> GroupScale:
        """Return the scale of a block, by its place along rows and columns of the tile of w."""
        row_block, group = block
        warps = BLOCK_WARPS * self.size // BLOCK_TILE
        amax = Uint32(amaxes[(0, row_block), group])
        for warp in cutlass.range_constexpr(1, warps):
            amax = cutlass.max(amax, Uint32(amaxes[(warp, row_block), group]))
        return self.stage.scale(amax, bound)

    @cute.jit
    def store_transposed(
        self,
        tXrW: list[cute.Tensor],
        scale: GroupScale,
        place: tuple[Int32, Int32],
        row_tile: Int32,
        problem: Problem,
    ):
        """Quantize values that are contiguous along n, and store them contiguous along k.

        Args:
            tXrW: (values,) along n, for each of the thread's k.
            scale: of the thread's block.
            place: the thread's first k, and its lane along n, in the tile.
            row_tile: the tile along n.
            problem: of one matrix.
        """
        # FP4 is encoded from pairs of bfloat16.
        dtype = self.dtype if const_expr(self.fmt.value_type.per_byte > 1) else Float32
        if const_expr(dtype is Float32):
            tXrW = [encodings.widen(tXrV) for tXrV in tXrW]

        def encode(i: int) -> cute.Tensor:
            tXrV = cute.make_rmem_tensor(self.rows, dtype)  # along k
            for j in cutlass.range_constexpr(self.rows):
                tXrV[j] = tXrW[j][i]
            return self.stage.encode(tXrV, scale)

        column_tile, _, _ = cute.arch.block_idx()
        block_tile.store_transposed(
            encode,
            place,
            (row_tile, column_tile),
            problem.q,
            problem.n,
            self.values,
            self.fmt.value_type.per_byte,
            self.spec.q_access,
            block_tile.transposed_memory(self.fmt.value_type.per_byte),
        )

    @cute.jit
    def store_scales(
        self, amaxes: cute.Tensor, row_tile: Int32, column_tile: Int32, problem: Problem
    ):
        """Store the scales of a tile's blocks, for each of their rows where they are bytes.

        Each thread stores those of a row, and of other blocks than a thread of the same row.
        """
        lane, warp, _ = cute.arch.thread_idx()
        row, first_group = layouts.rows_of_scales()((lane, warp))
        row_in_block, row_block = layouts.blocks_of_tile(self.size)(row)
        groups = BLOCK_TILE // self.size
        for i in cutlass.range_constexpr(0, groups, LANES * BLOCK_WARPS // BLOCK_TILE):
            group = first_group + i
            if group < groups:
                block = (
                    (group, row_block) if const_expr(self.spec.transposed) else (row_block, group)
                )
                scale = self.scale(amaxes, block, problem.bound).scale
                column = column_tile * groups + group
                row_index = block_tile.rows_of(row_tile, row, 1)[0]
                if const_expr(self.fmt.byte_scales):
                    self.stage.store_scale_of_row(
                        problem.scales, scale, row_index, row_index < problem.n, column, problem.k
                    )
                elif row_in_block == 0 and (
                    row_index < problem.n and column < cute.ceil_div(problem.k, self.size)
                ):
                    problem.scales[row_tile * groups + row_block, column] = scale
