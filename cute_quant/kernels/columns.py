"""Quantize columns in groups of rows, and rows in groups along k of the same read.

Load, reduce, scale, quantize, store. A CTA has a tile of 128 x 128 values, one group or four of
each column, in the registers of its threads. Each warp finds the largest magnitudes of its part of
every column, and shared memory takes those of all warps past one barrier. A thread for each column
then computes its scales and stores them, and past another barrier every thread has the multipliers
of its columns. Values that go to the transpose go through shared memory too.

Groups along k lie in a warp, which shares their largest magnitudes at once. Threads for each row
compute their scales beside those for each column.
"""

from __future__ import annotations

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint16, Uint32, const_expr
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from cute_quant.contract.dtypes import BYTES_PER_WORD
from cute_quant.contract.rows import DENSE
from cute_quant.kernels import block_tile, copy, encodings, layouts, row_domains
from cute_quant.kernels import scales as scaling
from cute_quant.kernels.block_tile import VECTOR_BYTES
from cute_quant.kernels.config import (
    BLOCK_TILE,
    BLOCK_WARPS,
    LANES,
    MAX_GRID_Y,
    MAX_GRID_Z,
    ColumnsSpec,
    Tile,
)
from cute_quant.kernels.copy import Segment
from cute_quant.kernels.encodings import ELEMENT_TYPES
from cute_quant.kernels.layouts import Matrix
from cute_quant.kernels.params import Params
from cute_quant.kernels.scales import GroupScale
from cute_quant.kernels.stage import Scales, Stage

WARP_ROWS = BLOCK_TILE // BLOCK_WARPS
"""Rows of a warp, all of one group along rows."""
MULTIPLIERS = VECTOR_BYTES // 4
"""Those that a thread takes from shared memory at once."""


class Problem(Params):
    """Arguments of the kernel, for a batch of matrices or one of them.

    Attributes:
        x: (batch, mn, k).
        q: (batch, mn, k), or (batch, k, mn) of the transpose.
        scales: of groups along rows, (batch, groups or words, k), or (batch, words) of blocks.
        bound: as `Stage.scale_bound` returns it.
        row_q, row_scales, row_bound: the same of groups along k; None without.
        counts: ends of groups of rows, or None.
        alignment: of the first row of such a group.
        num_rows, k: of a matrix.
        batches: matrices.
        first_batch, first_row_tile: of the launch, where a grid does not count all.
    """

    def __init__(
        self,
        x: Matrix,
        q: Matrix,
        scales: cute.Tensor,
        bound: Float32,
        row_q: Matrix | None,
        row_scales: Scales | None,
        row_bound: Float32 | None,
        counts: cute.Tensor | None,
        alignment: Int32,
        first_batch: Int32,
        first_row_tile: Int32,
    ):
        self.x = x
        self.q = q
        self.scales = scales
        self.bound = bound
        self.row_q = row_q
        self.row_scales = row_scales
        self.row_bound = row_bound
        self.counts = counts
        self.alignment = alignment
        self.num_rows = x.rows
        self.k = x.tensor.shape[2]
        self.batches = x.tensor.shape[0]
        self.first_batch = first_batch
        self.first_row_tile = first_row_tile

    def slice_batch(self, batch: Int32) -> Problem:
        """Return the problem of one matrix of a batch."""
        scales = self.scales[(batch, *[None] * (cute.rank(self.scales) - 1))]
        row_q, row_scales = self.row_q, self.row_scales
        if const_expr(row_q is not None):
            last = batch == self.batches - 1
            row_q, row_scales = row_q[batch], row_scales.slice_batch(batch, last)
        return self.replace(
            x=self.x[batch], q=self.q[batch], scales=scales, row_q=row_q, row_scales=row_scales
        )


class Columns:
    """Entry point: x to values and scales of groups along rows, and maybe of groups along k."""

    def __init__(self, spec: ColumnsSpec):
        self.spec = spec
        self.fmt = spec.fmt
        self.values = spec.values_per_thread
        self.rows = layouts.rows_of_block_thread(self.values)
        self.lanes = BLOCK_TILE // self.values
        self.groups = BLOCK_TILE // spec.fmt.group_size
        self.dtype = ELEMENT_TYPES[spec.dtype]
        tile = Tile(values_per_thread=self.values)
        self.stage = Stage(self.dtype, spec.fmt, tile)
        self.row_stage = None
        if spec.row_fmt is not None:
            self.row_stage = Stage(self.dtype, spec.row_fmt, tile)
        self.counted = spec.kind != DENSE

    def signature(self) -> tuple:
        """Return stand-ins for the arguments, with the sizes that vary and the alignment."""
        spec, fmt, row_fmt = self.spec, self.fmt, self.spec.row_fmt
        batch = cute.sym_int32()
        mn = cute.sym_int32(
            divisibility=VECTOR_BYTES if spec.transposed and not spec.q_access.ragged else 1
        )
        k = cute.sym_int32(divisibility=1 if spec.access.ragged else self.values)
        shape, scales = (batch, mn, k), (batch, cute.sym_int32(), k)
        if fmt.blocked:
            scales = (batch, cute.sym_int32())
        row_q = row_scales = counts = None
        row_floor = Int32(0)
        if row_fmt is not None:
            row_q = copy.fake_matrix(
                encodings.value_type_of(row_fmt), shape, spec.access.store_bytes
            )
            columns = (cute.sym_int32(),) if row_fmt.blocked else (mn, cute.sym_int32())
            row_scales = _fake_scales(encodings.scale_type_of(row_fmt), (batch, *columns), 1)
            row_floor = Int32(0) if row_fmt.power_of_two else Float32(0)
        if self.counted:
            counts = make_fake_tensor(Int32, (cute.sym_int32(),), stride=(1,))
        return (
            copy.fake_matrix(self.dtype, shape, spec.access.load_bytes),
            copy.fake_matrix(
                encodings.value_type_of(fmt),
                (batch, k, mn) if spec.transposed else shape,
                spec.q_access.store_bytes,
            ),
            _fake_scales(encodings.scale_type_of(fmt), scales, BYTES_PER_WORD),
            row_q,
            row_scales,
            counts,
            Int32(0),
            Int32(0),
            Int32(0) if fmt.power_of_two else Float32(0),
            row_floor,
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,  # (batch, mn, k)
        mQ: cute.Tensor,  # (batch, mn, k) or (batch, k, mn)
        mS: cute.Tensor,  # (batch, groups or words, k), or (batch, bytes) of blocks
        mRowQ: cute.Tensor | None,  # (batch, mn, k)
        mRowS: cute.Tensor | None,  # as the format has it
        mCounts: cute.Tensor | None,  # (groups,)
        alignment: Int32,
        missing_rows: Int32,
        floor: Int32 | Float32,
        row_floor: Int32 | Float32,
        stream: cuda.CUstream,
    ):
        """Launch the kernel, on batches of matrices."""
        batches, mn, k = mX.shape
        scales, row_q, row_scales, row_bound, padded_k = mS, None, None, None, k
        if const_expr(self.fmt.blocked):
            words = cute.make_layout(
                (batches, Int32(mS.shape[1]) // BYTES_PER_WORD),
                stride=(Int64(mS.stride[0]) // BYTES_PER_WORD, 1),
            )
            scales = cute.make_tensor(cute.recast_ptr(mS.iterator, dtype=Uint32), words)
        if const_expr(self.row_stage is not None):
            row_q, row_bound = Matrix(mRowQ), self.row_stage.scale_bound(row_floor)
            row_scales = self.row_stage.scales(mRowS, mn, k, missing_rows)
            fmt = self.spec.row_fmt
            # Padding of scales past the last column has CTAs too.
            padded_k = cute.round_up(k, fmt.group_size * fmt.groups_per_unit)
        row_tiles = cute.ceil_div(mn, BLOCK_TILE)
        for first_batch in range(0, batches, MAX_GRID_Z):
            for first_row_tile in range(0, row_tiles, MAX_GRID_Y):
                problem = Problem(
                    Matrix(mX),
                    Matrix(mQ),
                    scales,
                    self.stage.scale_bound(floor),
                    row_q,
                    row_scales,
                    row_bound,
                    mCounts,
                    alignment,
                    first_batch,
                    first_row_tile,
                )
                self.kernel(problem).launch(
                    grid=[
                        cute.ceil_div(padded_k, BLOCK_TILE),
                        cutlass.min(row_tiles - first_row_tile, MAX_GRID_Y),
                        cutlass.min(batches - first_batch, MAX_GRID_Z),
                    ],
                    block=[LANES, BLOCK_WARPS, 1],
                    stream=stream,
                    use_pdl=self.spec.pdl,
                )

    @cute.kernel
    def kernel(self, problem: Problem):
        """Quantize the columns, and the rows, of a tile."""
        if const_expr(self.spec.pdl):
            cute.arch.griddepcontrol_launch_dependents()
        lane, warp, _ = cute.arch.thread_idx()
        column_tile, row_tile, batch = cute.arch.block_idx()
        problem = problem.slice_batch(problem.first_batch + batch)
        row_tile = problem.first_row_tile + row_tile
        place = layouts.threads_of_column_tile(self.values)((lane, warp))
        first_row, column_lane = place
        segment = block_tile.segment(self.values, column_lane, column_tile)
        rows = block_tile.rows_of(row_tile, first_row, self.rows)
        gX = [problem.x.row(row) for row in rows]  # (k,) each

        # What comes before needs no memory, and overlaps with the end of the kernel before.
        if const_expr(self.spec.pdl):
            cute.arch.griddepcontrol_wait()
        end = self.end_of_rows(row_tile, problem)
        exist = [row < end for row in rows]
        tXrX = [encodings.zeros(self.values, self.dtype) for _ in rows]  # (values,) each
        for i in cutlass.range_constexpr(self.rows):
            copy.load(gX[i], segment, exist[i], tXrX[i], self.spec.access)

        amaxes, ends = self.share_column_amaxes(tXrX, column_lane, end)
        row_amaxes = None
        if const_expr(self.row_stage is not None):
            row_amaxes = self.share_row_amaxes(tXrX, place)
        cute.arch.barrier()
        multipliers = self.shared_columns(Float32, self.groups)
        tile = row_tile, column_tile
        if warp * LANES < BLOCK_TILE:
            self.scale_column(amaxes, multipliers, ends, warp * LANES + lane, tile, problem)
        elif const_expr(self.row_stage is not None):
            self.scale_row(row_amaxes, ends, warp * LANES + lane - BLOCK_TILE, tile, problem)
        cute.arch.barrier()
        if const_expr(self.row_stage is not None):
            self.quantize_rows(tXrX, row_amaxes, rows, place, segment, problem)
        self.quantize_columns(tXrX, exist, rows, multipliers, place, segment, tile, problem)

    @cute.jit
    def end_of_rows(self, row_tile: Int32, problem: Problem) -> Uint32:
        """Return the row past the last that exists in the group along rows that a warp is in."""
        end = problem.num_rows
        if const_expr(self.counted):
            first = block_tile.rows_of(row_tile, self.group_of_warp() * self.fmt.group_size, 1)[0]
            end = row_domains.end_of_rows_from(problem.counts, problem.alignment, end, first)
        return end

    def group_of_warp(self) -> Int32:
        """Return the group along rows, of the tile's, that a warp is in."""
        _, warp, _ = cute.arch.thread_idx()
        _, group = layouts.blocks_of_tile(self.fmt.group_size)(warp * WARP_ROWS)
        return group

    @cute.jit
    def share_column_amaxes(
        self, tXrX: list[cute.Tensor], column_lane: Int32, end: Uint32
    ) -> tuple[cute.Tensor, cute.Tensor | None]:
        """Share the largest magnitudes of columns in each warp, and the ends of groups' rows."""
        lane, warp, _ = cute.arch.thread_idx()
        amaxes = scaling.column_amaxes(tXrX)
        larger = scaling.larger(self.dtype)
        # Lanes with other rows of the same columns.
        for i in cutlass.range_constexpr((LANES // self.lanes).bit_length() - 1):
            for j in cutlass.range_constexpr(len(amaxes)):
                other = cute.arch.shuffle_sync_bfly(amaxes[j], offset=8 << i)
                amaxes[j] = larger(amaxes[j], other)

        kind = Uint32 if const_expr(self.dtype is Float32) else Uint16
        shared = self.shared_columns(kind, BLOCK_WARPS)
        first_row, _ = layouts.threads_of_column_tile(self.values)((lane, 0))
        if first_row == 0:
            copy_columns(cute.recast_tensor(in_registers(amaxes), kind), shared, warp, column_lane)
        ends = None
        if const_expr(self.counted):
            memory = cute.arch.alloc_smem(Uint32, self.groups, alignment=VECTOR_BYTES)
            ends = cute.make_tensor(memory, self.groups)
            first_in_group, _ = layouts.blocks_of_tile(self.fmt.group_size)(warp * WARP_ROWS)
            if first_in_group == 0 and lane == 0:
                ends[self.group_of_warp()] = end
        return shared, ends

    @cute.jit
    def share_row_amaxes(self, tXrX: list[cute.Tensor], place: tuple[Int32, Int32]) -> cute.Tensor:
        """Share the largest magnitudes of rows in their groups along k, as `Stage.scale` has it."""
        stage, (first_row, column_lane) = self.row_stage, place
        layout = layouts.row_scales_of_tile(stage.fmt.group_size)
        memory = cute.arch.alloc_smem(Uint32, cute.size(layout), alignment=VECTOR_BYTES)
        shared = cute.make_tensor(memory, layout)
        amaxes = [self.row_amax(tXrV) for tXrV in tXrX]
        lane_of_group, group = layouts.lanes(stage.lanes_per_group)(column_lane)
        if lane_of_group == 0:
            cute.autovec_copy(in_registers(amaxes), self.rows_of_thread(shared, first_row, group))
        return shared

    def rows_of_thread(self, shared: cute.Tensor, first_row: Int32, group: Int32) -> cute.Tensor:
        """Return what a thread's rows have in `share_row_amaxes`, (rows,)."""
        place = cute.assume(shared.layout((first_row, group)), divby=self.rows)
        return cute.make_tensor(shared.iterator + place, self.rows)

    def shared_columns(self, dtype: type[cutlass.Numeric], rows: int) -> cute.Tensor:
        """Return shared memory for a number of each column in each of some rows."""
        vector = VECTOR_BYTES * 8 // dtype.width
        layout = layouts.vectors_of_column_tile(self.values, vector, rows)
        memory = cute.arch.alloc_smem(dtype, BLOCK_TILE * rows, alignment=VECTOR_BYTES)
        return cute.make_tensor(memory, layout)

    @cute.jit
    def scale_column(
        self,
        amaxes: cute.Tensor,
        multipliers: cute.Tensor,
        ends: cute.Tensor | None,
        column: Int32,
        tile: tuple[Int32, Int32],
        problem: Problem,
    ):
        """Compute and store the scales of a column in a tile, and share its multipliers."""
        row_tile, column_tile = tile
        stored = []
        for group in cutlass.range_constexpr(self.groups):
            amax = self.column_amax(amaxes, group, column)
            scale = self.stage.scale(amax, problem.bound)
            multipliers[group, column] = scale.multiplier
            first = block_tile.rows_of(row_tile, group * self.fmt.group_size, 1)[0]
            end = problem.num_rows
            if const_expr(self.counted):
                end = ends[group]
            stored.append(scale.scale if first < end else type(scale.scale)(0))
        self.store_scales(stored, row_tile, column_tile * BLOCK_TILE + column, problem)

    @cute.jit
    def scale_row(
        self,
        amaxes: cute.Tensor,
        ends: cute.Tensor | None,
        row: Int32,
        tile: tuple[Int32, Int32],
        problem: Problem,
    ):
        """Compute and store the scales of a row in a tile; its multipliers replace the amaxes."""
        row_tile, column_tile = tile
        groups = BLOCK_TILE // self.spec.row_fmt.group_size
        row_index = block_tile.rows_of(row_tile, row, 1)[0]
        end = problem.num_rows
        if const_expr(self.counted):
            _, group_of_row = layouts.blocks_of_tile(self.fmt.group_size)(row)
            end = ends[group_of_row]
        for i in cutlass.range_constexpr(groups):
            scale = self.row_stage.scale(amaxes[row, i], problem.row_bound)
            amaxes[row, i] = scale.multiplier.bitcast(Uint32)
            self.row_stage.store_scale_of_row(
                problem.row_scales,
                scale.scale,
                row_index,
                row_index < end,
                column_tile * groups + i,
                problem.k,
            )

    def column_amax(self, amaxes: cute.Tensor, group: int, column: Int32) -> Uint32:
        """Return the largest magnitude of a column in a group, as `group_scale` takes it."""
        warps = BLOCK_WARPS // self.groups
        amax = Uint32(amaxes[group * warps, column])
        for i in range(1, warps):
            amax = cutlass.max(amax, Uint32(amaxes[group * warps + i, column]))
        if self.dtype is not Float32:
            amax = scaling.amax_of_half(Uint16(amax), self.dtype)
        return amax

    @cute.jit
    def store_scales(self, stored: list, row_tile: Int32, column: Int32, problem: Problem):
        """Store the scales of a column's groups in a tile, bytes as one word."""
        if const_expr(self.fmt.byte_scales):
            # Above the byte of NaN there are bits too.
            word = stored[0] & 0xFF
            for i in cutlass.range_constexpr(1, len(stored)):
                word = word | (stored[i] & 0xFF) << 8 * i
            self.store_word(word, row_tile, column, problem)
        else:
            for i in cutlass.range_constexpr(len(stored)):
                row = row_tile * self.groups + i
                if column < problem.k and row < problem.scales.shape[0]:
                    problem.scales[row, column] = stored[i]

    @cute.jit
    def store_word(self, word: Uint32, row_tile: Int32, column: Int32, problem: Problem):
        """Store the scales of four groups of a column; blocks have words for columns of padding."""
        if const_expr(self.fmt.blocked):
            columns = cute.round_up(problem.k, self.fmt.block_rows)
            words = Int32((problem.num_rows + (BLOCK_TILE - 1)) // BLOCK_TILE)
            layout = layouts.scales(self.fmt, Int32(columns), words * self.groups)
            _, byte = layout((column, row_tile * self.groups))
            if column < columns:
                word = word if column < problem.k else Uint32(0)
                problem.scales[Int32(layouts.unsigned(byte) // BYTES_PER_WORD)] = word
        elif column < problem.k:
            problem.scales[row_tile, column] = Int32(word)

    @cute.jit
    def quantize_columns(
        self,
        tXrX: list[cute.Tensor],
        exist: list[Boolean],
        rows: list[Uint32],
        multipliers: cute.Tensor,
        place: tuple[Int32, Int32],
        segment: Segment,
        tile: tuple[Int32, Int32],
        problem: Problem,
    ):
        """Quantize and store a thread's values by the multipliers of its columns."""
        _, column_lane = place
        row_tile, column_tile = tile
        tXrM = cute.make_rmem_tensor(self.values, Float32)
        copy_columns(multipliers, tXrM, self.group_of_warp(), column_lane)
        q_dtype, power_of_two = encodings.value_type_of(self.fmt), self.fmt.power_of_two
        if const_expr(self.spec.transposed):
            masks = row_masks(exist) if const_expr(self.counted) else None

            def encode(i: int) -> cute.Tensor:
                # A pair of columns at a time: all products would take too many registers.
                tXrV = cute.make_rmem_tensor(self.rows, Float32)  # along rows
                for j in cutlass.range_constexpr(self.rows):
                    pair = encodings.multiply_columns(
                        pair_of(tXrX[j], i), pair_of(tXrM, i), power_of_two
                    )
                    tXrV[j] = pair[i % 2]
                tXrQ = encodings.encode(tXrV, q_dtype)
                if const_expr(masks is not None):
                    # Zeros under the multiplier NaN are NaN.
                    encodings.clear_bytes(masks, tXrQ)
                return tXrQ

            block_tile.store_transposed(
                encode,
                place,
                (column_tile, row_tile),
                problem.q,
                layouts.unsigned(problem.k),
                self.values,
                1,
                self.spec.q_access,
            )
        else:
            for i in cutlass.range_constexpr(self.rows):
                products = encodings.multiply_columns(tXrX[i], tXrM, power_of_two)
                tXrQ = encodings.encode(products, q_dtype)
                if const_expr(self.counted):
                    encodings.clear_unless(exist[i], tXrQ)
                in_bounds = rows[i] < problem.num_rows
                gQ = problem.q.row(rows[i])
                copy.store(tXrQ, gQ, segment, in_bounds, self.spec.q_access)

    @cute.jit
    def quantize_rows(
        self,
        tXrX: list[cute.Tensor],
        multipliers: cute.Tensor,
        rows: list[Uint32],
        place: tuple[Int32, Int32],
        segment: Segment,
        problem: Problem,
    ):
        """Quantize and store a thread's values by the multipliers of its rows."""
        stage, (first_row, column_lane) = self.row_stage, place
        _, group = layouts.lanes(stage.lanes_per_group)(column_lane)
        tXrM = cute.make_rmem_tensor(self.rows, Uint32)
        cute.autovec_copy(self.rows_of_thread(multipliers, first_row, group), tXrM)
        for i in cutlass.range_constexpr(self.rows):
            tXrQ = stage.encode(tXrX[i], GroupScale(tXrM[i].bitcast(Float32), None))
            gQ = problem.row_q.row(rows[i])
            copy.store(tXrQ, gQ, segment, rows[i] < problem.num_rows, self.spec.access)

    def row_amax(self, tXrX: cute.Tensor) -> Uint32:
        """Return the largest magnitude of a group along k, as `Stage.scale` takes it."""
        stage = self.row_stage
        amax = stage.thread_amax(tXrX)
        lanes = min(stage.lanes_per_group, 8)
        if stage.lanes_per_group > lanes and self.lanes < LANES:
            # The other eight lanes along columns, past those along rows.
            amax = stage.larger(amax, cute.arch.shuffle_sync_bfly(amax, offset=LANES // 2))
        elif stage.lanes_per_group > lanes:
            lanes = stage.lanes_per_group
        return scaling.group_amax(amax, stage.amax_dtype, lanes)


def pair_of(tXrV: cute.Tensor, i: int) -> cute.Tensor:
    """Return the two values of a thread, in one register if they are halves, that i is of."""
    return cute.make_tensor(tXrV.iterator + i // 2 * 2, 2)


def in_registers(values: list[Uint32]) -> cute.Tensor:
    """Return numbers as registers that follow each other."""
    registers = cute.make_rmem_tensor(len(values), Uint32)
    for i, value in enumerate(values):
        registers[i] = value
    return registers


def row_masks(exist: list[Boolean]) -> list[Uint32]:
    """Return masks of the bytes of a thread's rows in a column, 0 in those that do not exist."""
    masks = []
    for first in range(0, len(exist), BYTES_PER_WORD):
        mask = Uint32(0)
        for j in range(BYTES_PER_WORD):
            mask = mask | cutlass.select_(exist[first + j], Uint32(0xFF << 8 * j), Uint32(0))
        masks.append(mask)
    return masks


@cute.jit
def copy_columns(source: cute.Tensor, target: cute.Tensor, row: Int32, column_lane: Int32):
    """Copy a thread's columns, (values,), to or from a row of `Columns.shared_columns`."""
    to_shared = const_expr(cute.rank(target) > 1)
    shared, registers = (target, source) if to_shared else (source, target)
    vector, vectors, _ = shared.shape[1]
    for i in cutlass.range_constexpr(vectors):
        place = shared.layout((row, (0, i, column_lane)))
        start = shared.iterator + cute.assume(place, divby=vector)
        part = cute.make_tensor(start, vector)
        mine = cute.make_tensor(registers.iterator + i * vector, vector)
        if const_expr(to_shared):
            cute.autovec_copy(mine, part)
        else:
            cute.autovec_copy(part, mine)


def _fake_scales(dtype: type[cutlass.Numeric], shape: tuple, nbytes: int) -> cute.Tensor:
    """Return a stand-in for scales of any strides, which lie at multiples of `nbytes`."""
    strides = tuple(cute.sym_int64() for _ in shape)
    align = max(nbytes, dtype.width // 8)
    return make_fake_tensor(dtype, shape, stride=strides, assumed_align=align)
