"""Quantize columns in groups of rows, and rows in groups along k of the same read.

Load, reduce, scale, quantize, store. A CTA has a tile of 128 x 128 values, one group or four of
each column, in the registers of its threads. Each warp finds the largest magnitudes of its part of
every column, and shared memory takes those of all warps past one barrier. A thread for each column
then computes its scales and stores them, and past another barrier every thread has the multipliers
of its columns. Values that go to the transpose go through shared memory too.

Groups along k lie in a warp, which shares their largest magnitudes at once. Threads for each row
compute their scales beside those for each column.

The values are those of a prologue, see `column_prologues`. Of gradients a CTA may have two tiles,
which it quantizes one after the other.
"""

from __future__ import annotations

from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint16, Uint32, const_expr
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from cute_quant.contract.dtypes import BYTES_PER_WORD
from cute_quant.contract.format_choices import MAX_COLUMNS
from cute_quant.contract.rows import DENSE
from cute_quant.kernels import (
    block_tile,
    column_memory,
    column_prologues,
    copy,
    encodings,
    grids,
    layouts,
    row_domains,
)
from cute_quant.kernels import scales as scaling
from cute_quant.kernels.block_tile import VECTOR_BYTES
from cute_quant.kernels.column_memory import Shared, copy_columns, in_registers, rows_of_thread
from cute_quant.kernels.column_prologues import Pairs, copy_vectors
from cute_quant.kernels.config import (
    BLOCK_TILE,
    BLOCK_WARPS,
    LANES,
    ColumnsSpec,
    Tile,
)
from cute_quant.kernels.copy import Segment
from cute_quant.kernels.layouts import Matrix
from cute_quant.kernels.params import Params
from cute_quant.kernels.philox import Random, RngState, word_of, words_of
from cute_quant.kernels.row_domains import Row
from cute_quant.kernels.silu_mul import Activation
from cute_quant.kernels.stage import Scales, Stage

WARP_ROWS = BLOCK_TILE // BLOCK_WARPS
"""Rows of a warp, all of one group along rows."""
LARGEST_CARVEOUT = 100
"""Percent of an SM's memory that is shared; else the compiler asks the driver of the machine."""
NO_TILE = 2 * MAX_COLUMNS // BLOCK_TILE
"""Index of a tile past all columns, of which nothing is stored."""


class Problem(Params):
    """Arguments of the kernel, for a batch of matrices or one of them.

    Attributes:
        prologue: yields the values, (batch, mn, k), that are quantized.
        q: (batch, mn, k), or (batch, k, mn) of the transpose.
        scales: of groups along rows, (batch, groups or words, k), or (batch, words) of blocks.
        bound: as `Stage.scale_bound` returns it.
        row_q, row_scales, row_bound: the same of groups along k; None without.
        counts: ends of groups of rows, or None.
        rng: random numbers that values are rounded by, or None.
        alignment: of the first row of such a group.
        num_rows, k: of a matrix.
        batches: matrices.
        first_batch, first_row_tile: as `grids.launch` sets them.
    """

    def __init__(
        self,
        prologue: Params,
        batches: Int32,
        num_rows: Uint32,
        k: Int32,
        q: Matrix,
        scales: cute.Tensor,
        bound: Float32,
        row_q: Matrix | None,
        row_scales: Scales | None,
        row_bound: Float32 | None,
        counts: cute.Tensor | None,
        rng: RngState | None,
        alignment: Int32,
    ):
        self.prologue = prologue
        self.q = q
        self.scales = scales
        self.bound = bound
        self.row_q = row_q
        self.row_scales = row_scales
        self.row_bound = row_bound
        self.counts = counts
        self.rng = rng
        self.alignment = alignment
        self.num_rows = num_rows
        self.k = k
        self.batches = batches
        self.first_batch = self.first_row_tile = Int32(0)

    def slice_batch(self, batch: Int32) -> Problem:
        """Return the problem of one matrix of a batch."""
        scales = self.scales[(batch, *[None] * (cute.rank(self.scales) - 1))]
        row_q, row_scales = self.row_q, self.row_scales
        if const_expr(row_q is not None):
            last = batch == self.batches - 1
            row_q, row_scales = row_q[batch], row_scales.slice_batch(batch, last)
        return self.replace(
            prologue=self.prologue.slice_batch(batch, False),
            q=self.q[batch],
            scales=scales,
            row_q=row_q,
            row_scales=row_scales,
            rng=None if self.rng is None else self.rng.slice_batch(batch),
        )

    def randoms(self, rows: list[Uint32]) -> list[Random | None]:
        """Return the random words of groups along k in each of some rows, None without any."""
        if self.rng is None:
            return [None] * len(rows)
        random = self.rng.of_row(rows[0])
        return [random._replace(row=row) for row in rows]


class Part(NamedTuple):
    """The part of a CTA's tile that a thread has.

    Attributes:
        place: its first row, and its lane along columns, in the tile.
        rows: indices of its rows in the matrix.
        exist: whether each of them exists.
        end: the row past the last that exists in the group along rows that its warp is in.
    """

    place: tuple[Int32, Int32]
    rows: list[Uint32]
    exist: list[Boolean]
    end: Uint32


class Columns:
    """Entry point: x to values and scales of groups along rows, and maybe of groups along k."""

    def __init__(self, spec: ColumnsSpec):
        self.spec = spec
        self.gated = spec.gated
        self.fmt = spec.fmt
        self.values = spec.values_per_thread
        self.rows = layouts.rows_of_block_thread(self.values)
        self.lanes = BLOCK_TILE // self.values
        self.groups = BLOCK_TILE // spec.fmt.group_size
        self.dtype = column_prologues.value_dtype(spec)
        self.pairs = Pairs(spec)
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
            row_scales = copy.fake_strided(encodings.scale_type_of(row_fmt), (batch, *columns), 1)
            row_floor = Int32(0) if row_fmt.power_of_two else Float32(0)
        if self.counted:
            counts = make_fake_tensor(Int32, (cute.sym_int32(),), stride=(1,))
        x, weight, grad = column_prologues.fake_inputs(spec, shape)
        return (
            x,
            copy.fake_matrix(
                encodings.value_type_of(fmt),
                (batch, k, mn) if spec.transposed else shape,
                spec.q_access.store_bytes,
            ),
            copy.fake_strided(encodings.scale_type_of(fmt), scales, BYTES_PER_WORD),
            row_q,
            row_scales,
            counts,
            make_fake_tensor(Int64, (2,), stride=(1,)) if spec.stochastic else None,
            weight,
            grad,
            Int32(0),
            Int32(0),
            Int32(0) if fmt.power_of_two else Float32(0),
            row_floor,
            Float32(0),
            Float32(0),
            Float32(0),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,  # (batch, mn, k), or gates and ups (batch, mn, 2 k)
        mQ: cute.Tensor,  # (batch, mn, k) or (batch, k, mn)
        mS: cute.Tensor,  # (batch, groups or words, k), or (batch, bytes) of blocks
        mRowQ: cute.Tensor | None,  # (batch, mn, k)
        mRowS: cute.Tensor | None,  # as the format has it
        mCounts: cute.Tensor | None,  # (groups,)
        mRng: cute.Tensor | None,  # (2,)
        mWeight: cute.Tensor | None,  # (batch, mn), the factors of rows
        mGrad: cute.Tensor | None,  # (batch, mn, k / 2), of the products of gates and ups
        alignment: Int32,
        missing_rows: Int32,
        floor: Int32 | Float32,
        row_floor: Int32 | Float32,
        limit: Float32,
        alpha: Float32,
        beta: Float32,
        stream: cuda.CUstream,
    ):
        """Launch the kernel, on batches of matrices; `Activation` describes the last numbers."""
        batches, mn, k = mX.shape
        if const_expr(self.gated is not None and not self.gated.backward):
            k = k // 2
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
        column_tiles, row_tiles = cute.ceil_div(padded_k, BLOCK_TILE), cute.ceil_div(mn, BLOCK_TILE)
        if const_expr(self.paired):
            column_tiles = column_tiles - k // (2 * BLOCK_TILE)
        activation = Activation(limit, alpha, beta)
        problem = Problem(
            column_prologues.prologue(self.spec, Matrix(mX), mWeight, mGrad, activation),
            batches,
            Matrix(mX).rows,
            k,
            Matrix(mQ),
            scales,
            self.stage.scale_bound(floor),
            row_q,
            row_scales,
            row_bound,
            mCounts,
            None if const_expr(mRng is None) else RngState(mRng),
            alignment,
        )
        options = {"stream": stream, "use_pdl": self.spec.pdl, **self.residence}
        tiles = column_tiles, row_tiles, batches
        grids.launch(self.kernel, problem, tiles, BLOCK_WARPS, options)

    @property
    def residence(self) -> dict[str, int]:
        """Return options of a launch that have an SM hold two CTAs, where registers suffice."""
        if self.gated is None and not self.spec.stochastic:
            return {}  # as many as fit
        if self.gated is not None and self.gated.backward and self.spec.stochastic:
            return {}  # whose registers would spill
        return {"min_blocks_per_mp": 2, "preferred_smem_carveout": LARGEST_CARVEOUT}

    @cute.kernel
    def kernel(self, problem: Problem):
        """Quantize the columns, and the rows, of a tile, or of one of gates and one of ups."""
        if const_expr(self.spec.pdl):
            cute.arch.griddepcontrol_launch_dependents()
        lane, warp, _ = cute.arch.thread_idx()
        column_tile, row_tile, batch = cute.arch.block_idx()
        problem = problem.slice_batch(problem.first_batch + batch)
        row_tile = problem.first_row_tile + row_tile
        place = layouts.threads_of_column_tile(self.values)((lane, warp))
        rows = block_tile.rows_of(row_tile, place[0], self.rows)

        # What comes before needs no memory, and overlaps with the end of the kernel before.
        if const_expr(self.spec.pdl):
            cute.arch.griddepcontrol_wait()
        end = self.end_of_rows(row_tile, problem)
        part = Part(place, rows, [row < end for row in rows], end)
        if const_expr(self.paired):
            self.quantize_pair(part, row_tile, column_tile, problem)
        else:
            segment = self.segment(part, column_tile)
            inputs = self.inputs(part, problem)
            loaded = [row.load(segment) for row in inputs]
            tXrX = [row.values(t) for row, t in zip(inputs, loaded, strict=True)]
            shared = column_memory.allocate(self.spec, self.dtype)
            self.quantize_tile(tXrX, part, (row_tile, column_tile), shared, problem)

    @property
    def paired(self) -> bool:
        """Return whether a CTA has a tile of gates and one of ups."""
        return self.gated is not None and self.gated.paired

    def segment(self, part: Part, column_tile: Int32) -> Segment:
        """Return a thread's segment of its rows in a tile."""
        _, column_lane = part.place
        return block_tile.segment(self.values, column_lane, column_tile)

    def inputs(self, part: Part, problem: Problem) -> list[Params]:
        """Return the rows that a thread's values come from."""
        # Rows of x are taken whole: their length is the tensor's own.
        k = None if const_expr(self.gated is None) else problem.k
        return [
            problem.prologue.row(Row(row, exists, row, exists, Int32(-1)), k)
            for row, exists in zip(part.rows, part.exist, strict=True)
        ]

    @cute.jit
    def quantize_pair(self, part: Part, row_tile: Int32, column_tile: Int32, problem: Problem):
        """Compute the gradients of a tile of gates and of its ups, and quantize these after those.

        The ups wait in shared memory, see `Pairs`.
        """
        waiting = self.pairs.waiting_values()
        shared = column_memory.allocate(self.spec, self.dtype)
        segment = self.segment(part, column_tile)
        tXrX = self.pairs.compute(self.inputs(part, problem), segment, waiting)
        tiles = problem.k // (2 * BLOCK_TILE)
        # Past all gates there is the padding of scales past all ups.
        tile = cutlass.select_(column_tile < tiles, column_tile, Int32(NO_TILE))
        self.quantize_tile(tXrX, part, (row_tile, tile), shared, problem)
        # The ups go through the same shared memory.
        cute.arch.barrier()
        for i in cutlass.range_constexpr(self.rows):
            copy_vectors(waiting[i], tXrX[i])
        self.quantize_tile(tXrX, part, (row_tile, column_tile + tiles), shared, problem)

    @cute.jit
    def quantize_tile(
        self,
        tXrX: list[cute.Tensor],  # (values,) of each row
        part: Part,
        tile: tuple[Int32, Int32],
        shared: Shared,
        problem: Problem,
    ):
        """Reduce, scale, quantize and store a tile of values."""
        lane, warp, _ = cute.arch.thread_idx()
        self.share_column_amaxes(tXrX, part, shared)
        if const_expr(self.row_stage is not None):
            self.share_row_amaxes(tXrX, part.place, shared.of_rows)
        cute.arch.barrier()
        if warp * LANES < BLOCK_TILE:
            self.scale_column(warp * LANES + lane, tile, shared, problem)
        elif const_expr(self.row_stage is not None):
            self.scale_row(warp * LANES + lane - BLOCK_TILE, tile, shared, problem)
        cute.arch.barrier()
        randoms = problem.randoms(part.rows)
        segment = self.segment(part, tile[1])
        if const_expr(self.row_stage is not None):
            self.quantize_rows(tXrX, shared.of_rows, randoms, part, segment, problem)
        self.quantize_columns(tXrX, shared, randoms, part, segment, tile, problem)

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
    def share_column_amaxes(self, tXrX: list[cute.Tensor], part: Part, shared: Shared):
        """Share the largest magnitudes of columns in each warp, and the ends of groups' rows."""
        lane, warp, _ = cute.arch.thread_idx()
        _, column_lane = part.place
        amaxes = scaling.column_amaxes(tXrX)
        larger = scaling.larger(self.dtype)
        # Lanes with other rows of the same columns.
        for i in cutlass.range_constexpr((LANES // self.lanes).bit_length() - 1):
            for j in cutlass.range_constexpr(len(amaxes)):
                other = cute.arch.shuffle_sync_bfly(
                    amaxes[j], offset=layouts.HALF_WARP_COLUMNS << i
                )
                amaxes[j] = larger(amaxes[j], other)

        first_row, _ = layouts.threads_of_column_tile(self.values)((lane, 0))
        if first_row == 0:
            registers = cute.recast_tensor(in_registers(amaxes), shared.amaxes.element_type)
            copy_columns(registers, shared.amaxes, warp, column_lane)
        if const_expr(self.counted):
            first_in_group, _ = layouts.blocks_of_tile(self.fmt.group_size)(warp * WARP_ROWS)
            if first_in_group == 0 and lane == 0:
                shared.ends[self.group_of_warp()] = part.end

    @cute.jit
    def share_row_amaxes(
        self, tXrX: list[cute.Tensor], place: tuple[Int32, Int32], of_rows: cute.Tensor
    ):
        """Share the largest magnitudes of rows in their groups along k, as `Stage.scale` has it."""
        stage, (first_row, column_lane) = self.row_stage, place
        amaxes = [self.row_amax(tXrV) for tXrV in tXrX]
        lane_of_group, group = layouts.lanes(stage.lanes_per_group)(column_lane)
        if lane_of_group == 0:
            registers = in_registers(amaxes)
            cute.autovec_copy(registers, rows_of_thread(of_rows, first_row, group, self.rows))

    @cute.jit
    def scale_column(
        self, column: Int32, tile: tuple[Int32, Int32], shared: Shared, problem: Problem
    ):
        """Compute and store the scales of a column in a tile, and share its multipliers."""
        row_tile, column_tile = tile
        stored = []
        for group in cutlass.range_constexpr(self.groups):
            amax = self.column_amax(shared.amaxes, group, column)
            scale = self.stage.scale(amax, problem.bound)
            shared.multipliers[group, column] = scale.multiplier
            first = block_tile.rows_of(row_tile, group * self.fmt.group_size, 1)[0]
            end = problem.num_rows
            if const_expr(self.counted):
                end = shared.ends[group]
            stored.append(scale.scale if first < end else type(scale.scale)(0))
        self.store_scales(stored, row_tile, column_tile * BLOCK_TILE + column, problem)

    @cute.jit
    def scale_row(self, row: Int32, tile: tuple[Int32, Int32], shared: Shared, problem: Problem):
        """Compute and store the scales of a row in a tile; its multipliers replace the amaxes."""
        row_tile, column_tile = tile
        groups = BLOCK_TILE // self.spec.row_fmt.group_size
        row_index = block_tile.rows_of(row_tile, row, 1)[0]
        end = problem.num_rows
        if const_expr(self.counted):
            _, group_of_row = layouts.blocks_of_tile(self.fmt.group_size)(row)
            end = shared.ends[group_of_row]
        for i in cutlass.range_constexpr(groups):
            scale = self.row_stage.scale(shared.of_rows[row, i], problem.row_bound)
            shared.of_rows[row, i] = scale.multiplier.bitcast(Uint32)
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
        shared: Shared,
        randoms: list[Random | None],
        part: Part,
        segment: Segment,
        tile: tuple[Int32, Int32],
        problem: Problem,
    ):
        """Quantize and store a thread's values by the multipliers of its columns."""
        _, column_lane = part.place
        row_tile, column_tile = tile
        tXrM = cute.make_rmem_tensor(self.values, Float32)
        copy_columns(shared.multipliers, tXrM, self.group_of_warp(), column_lane)
        q_dtype, power_of_two = encodings.value_type_of(self.fmt), self.fmt.power_of_two
        drawn = None  # of each row, a word for two values
        if const_expr(self.spec.stochastic):
            drawn = [random.of_columns.pairs(segment, self.values) for random in randoms]
        if const_expr(self.spec.transposed):
            masks = byte_masks(part.exist) if const_expr(self.counted) else None

            def encode(i: int) -> cute.Tensor:
                # A pair of columns at a time: all products would take too many registers.
                tXrV = cute.make_rmem_tensor(self.rows, Float32)  # along rows
                for j in cutlass.range_constexpr(self.rows):
                    pair = encodings.multiply_columns(
                        pair_of(tXrX[j], i), pair_of(tXrM, i), power_of_two
                    )
                    tXrV[j] = pair[i % 2]
                if const_expr(drawn is None):
                    tXrQ = encodings.encode(tXrV, q_dtype)
                else:
                    of_column = [word_of(of_row, i) for of_row in drawn]
                    number = tXrM[i] == tXrM[i]
                    tXrQ = encodings.encode_stochastically(tXrV, of_column, q_dtype, number)
                if const_expr(masks is not None):
                    # Zeros under the multiplier NaN are NaN.
                    encodings.clear_bytes(masks, tXrQ)
                return tXrQ

            block_tile.store_transposed(
                encode,
                part.place,
                (column_tile, row_tile),
                problem.q,
                layouts.unsigned(problem.k),
                self.values,
                1,
                self.spec.q_access,
                shared.transposed,
            )
        else:
            nans = None
            if const_expr(drawn is not None):
                nans = byte_masks([tXrM[i] != tXrM[i] for i in range(self.values)])
            for i in cutlass.range_constexpr(self.rows):
                products = encodings.multiply_columns(tXrX[i], tXrM, power_of_two)
                if const_expr(drawn is None):
                    tXrQ = encodings.encode(products, q_dtype)
                else:
                    words = [word_of(drawn[i], j) for j in range(self.values)]
                    tXrQ = encodings.encode_stochastically(products, words, q_dtype, Boolean(True))
                    encodings.put_nans(nans, tXrQ)
                if const_expr(self.counted):
                    encodings.clear_unless(part.exist[i], tXrQ)
                in_bounds = part.rows[i] < problem.num_rows
                gQ = problem.q.row(part.rows[i])
                copy.store(tXrQ, gQ, segment, in_bounds, self.spec.q_access)

    @cute.jit
    def quantize_rows(
        self,
        tXrX: list[cute.Tensor],
        multipliers: cute.Tensor,
        randoms: list[Random | None],
        part: Part,
        segment: Segment,
        problem: Problem,
    ):
        """Quantize and store a thread's values by the multipliers of its rows."""
        stage, (first_row, column_lane) = self.row_stage, part.place
        _, group = layouts.lanes(stage.lanes_per_group)(column_lane)
        tXrM = cute.make_rmem_tensor(self.rows, Uint32)
        cute.autovec_copy(rows_of_thread(multipliers, first_row, group, self.rows), tXrM)
        for i in cutlass.range_constexpr(self.rows):
            scale = scaling.scale_of_multiplier(tXrM[i].bitcast(Float32), stage.fmt)
            tXrQ = stage.encode(tXrX[i], scale, words_of(randoms[i], segment, tXrX[i]))
            gQ = problem.row_q.row(part.rows[i])
            in_bounds = part.rows[i] < problem.num_rows
            copy.store(tXrQ, gQ, segment, in_bounds, self.spec.access)

    def row_amax(self, tXrX: cute.Tensor) -> Uint32:
        """Return the largest magnitude of a group along k, as `Stage.scale` takes it."""
        stage = self.row_stage
        amax = stage.thread_amax(tXrX)
        lanes = min(stage.lanes_per_group, layouts.HALF_WARP_COLUMNS)
        if stage.lanes_per_group > lanes and self.lanes < LANES:
            # Those of the other half warp, past the lanes along rows.
            amax = stage.larger(amax, cute.arch.shuffle_sync_bfly(amax, offset=LANES // 2))
        elif stage.lanes_per_group > lanes:
            lanes = stage.lanes_per_group
        return scaling.group_amax(amax, stage.amax_dtype, lanes)


def pair_of(tXrV: cute.Tensor, i: int) -> cute.Tensor:
    """Return the two values of a thread, in one register if they are halves, that i is of."""
    return cute.make_tensor(tXrV.iterator + i // 2 * 2, 2)


def byte_masks(hold: list[Boolean]) -> list[Uint32]:
    """Return masks of the bytes of words, 0 in those whose predicate does not hold."""
    masks = []
    for first in range(0, len(hold), BYTES_PER_WORD):
        mask = Uint32(0)
        for j in range(BYTES_PER_WORD):
            mask = mask | cutlass.select_(hold[first + j], Uint32(0xFF << 8 * j), Uint32(0))
        masks.append(mask)
    return masks
