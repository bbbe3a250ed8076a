"""Quantize rows in groups: load, reduce, scale, quantize, store.

A thread holds 16 neighbours of a row in registers, from its load to its store, and as many of
each of some rows that follow each other. Eight threads hold a group of 128 and find its amax in
three shuffles; all of them know its scale, and one writes it. `layouts` draws who holds what. No
shared memory, no barrier. Where a whole row is the group, a warp goes over it twice.

Rows and groups past the input are quantized as if they were there and held nothing: values 0 and
scales 0. That is how all padding gets defined, by the same stores. A word of packed scales has a
byte for each group of a tile, so groups past the row own one; a float32 column they do not have.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint8, Uint32, const_expr
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from cute_quant.formats import (
    BLOCK_GROUPS,
    BLOCK_ROWS,
    SCALE_ROW_ALIGNMENT,
    WHOLE_ROW,
    Format,
)
from cute_quant.kernels import copy, layouts, numerics, rows
from cute_quant.kernels.copy import WIDEST, Access
from cute_quant.kernels.launch import MAX_GRID_Y, MAX_GRID_Z
from cute_quant.kernels.rows import DENSE_ROWS, Domain
from cute_quant.kernels.types import ELEMENT_TYPES


class Quantize:
    """Compile-time choices.

    Args:
        dtype: of the elements of x.
        fmt: of the results.
        rows_per_thread: rows whose loads are in flight at once, up to the lanes of a group; as
            many of these write their scales at once. k has to be a multiple of what they hold.
        domain: which rows there are.
        access: what the addresses allow.
        fake: whether the result is not values and scales but their products, in x's dtype.
        pdl: programmatic dependent launch: CTAs start while the kernel before still runs, wait for
            its end before they touch memory, and let those of the next start as early, which have
            to wait too.
    """

    def __init__(
        self,
        dtype: type[cutlass.Numeric],
        fmt: Format,
        rows_per_thread: int = 1,
        domain: Domain = DENSE_ROWS,
        access: Access = WIDEST,
        fake: bool = False,
        pdl: bool = True,
    ):
        self.dtype = dtype
        self.fmt = fmt
        self.rows_per_thread = rows_per_thread
        self.rows_per_cta = layouts.WARPS_PER_CTA * rows_per_thread
        self.domain = domain
        self.access = access
        self.fake = fake
        self.pdl = pdl
        self.whole_row = fmt.group_size == WHOLE_ROW
        self.lanes_per_group = layouts.lanes_per_group(fmt.group_size)
        self.groups_per_tile = layouts.LANES // self.lanes_per_group
        self.groups_per_unit = BLOCK_GROUPS if fmt.blocked else fmt.groups_per_column
        self.result_dtype = dtype if fake else ELEMENT_TYPES[fmt.dtype]

    def signature(self) -> tuple:
        """Stand-ins for the arguments: which sizes vary, and what alignment may be relied on."""
        access, domain, fmt = self.access, self.domain, self.fmt
        batch = (cute.sym_int32(),) if domain.batched else ()
        mn, q_rows, columns, count = (cute.sym_int32() for _ in range(4))
        tokens = cute.sym_int32() if domain.gathered else mn
        divisibility = 1 if access.ragged else layouts.VALUES_PER_THREAD * self.rows_per_thread
        k = cute.sym_int32(divisibility=divisibility)

        def scales() -> cute.Tensor:
            shape = (*batch, columns) if fmt.blocked else (*batch, mn, columns)
            strides = tuple(cute.sym_int64() for _ in shape)
            return make_fake_tensor(ELEMENT_TYPES[fmt.scale_dtype], shape, stride=strides)

        def index() -> cute.Tensor:
            shape = (*batch, mn)
            return make_fake_tensor(Int32, shape, stride=(*(cute.sym_int64() for _ in batch), 1))

        return (
            copy.fake_matrix(
                self.dtype, (*(() if domain.gathered else batch), tokens, k), access.load_bytes
            ),
            copy.fake_matrix(self.result_dtype, (*batch, q_rows, k), access.store_bytes),
            None if self.fake else scales(),
            make_fake_tensor(Int32, (count,), stride=(1,)) if domain.counted else None,
            index() if domain.gathered else None,
            Int32(0),
            Int32(0),
            Int32(0),
            Int32(0) if fmt.power_of_two else Float32(0),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,  # (mn, k), (batch, mn, k), or (tokens, k) with an index
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
        fmt, domain = self.fmt, self.domain
        depth = 1
        if const_expr(domain.batched and not domain.masked):
            depth = mQ.shape[0]
        mn = layouts.unsigned(mIndex.shape[-1] if const_expr(domain.gathered) else mX.shape[-2])
        q_rows = layouts.unsigned(mQ.shape[-2])
        k = mX.shape[-1]
        groups = 1 if const_expr(self.whole_row) else cute.ceil_div(k, fmt.group_size)
        columns = cute.ceil_div(groups, fmt.groups_per_column)
        scale_rows, scale_elements = mn, Uint32(0)
        if const_expr(fmt.mn_major):
            scale_rows = _round_up(mn, SCALE_ROW_ALIGNMENT)
            scale_elements = layouts.unsigned(columns) * scale_rows - Uint32(missing_rows)
        elif const_expr(fmt.blocked):
            scale_rows = _round_up(mn, BLOCK_ROWS)
            groups = cute.round_up(groups, BLOCK_GROUPS)
        if const_expr(fmt.power_of_two):
            floor = numerics.max_multiplier(floor)

        if const_expr(self.whole_row):
            tiles = 1
        elif const_expr(self.groups_per_tile < self.groups_per_unit):
            padded = cute.round_up(groups, self.groups_per_unit)
            tiles = cute.ceil_div(padded, self.groups_per_tile)
        else:
            tiles = cute.ceil_div(k, layouts.COLUMNS_PER_WARP)
        rows_to_write = q_rows
        scale_stride = Int64(0)
        if const_expr(not self.fake):
            rows_to_write = cutlass.max(rows_to_write, scale_rows)
            if const_expr(fmt.mn_major):
                layout = layouts.scales_by_column(Int32(scale_rows), columns)
            elif const_expr(fmt.blocked):
                layout = layouts.scales_by_block(Int32(scale_rows), groups)
            else:
                layout = layouts.scales_by_row(Int32(scale_rows), groups)
            scale_stride = Int64(scale_rows) * (columns if const_expr(fmt.packed) else groups)
            start = mS.iterator
            if const_expr(fmt.ue8m0 and not fmt.packed):
                start = cute.recast_ptr(start, dtype=Uint8)
            mS = cute.make_tensor(start, layout)
        row_tiles = Int32((rows_to_write + (self.rows_per_cta - 1)) // self.rows_per_cta)
        ctas, slots = row_tiles, Int32(0)
        if const_expr(domain.masked):
            ctas = cutlass.min(row_ctas, MAX_GRID_Y)
            slots = ctas // mQ.shape[0]
        self.kernel(
            floor,
            mX,
            mQ,
            mS,
            mCounts,
            mIndex,
            layouts.row_bytes(mX),
            layouts.row_bytes(mQ),
            mn,
            q_rows,
            scale_rows,
            scale_elements,
            scale_stride,
            alignment,
            row_tiles,
            slots,
        ).launch(
            grid=[tiles, cutlass.min(ctas, MAX_GRID_Y), cutlass.min(depth, MAX_GRID_Z)],
            block=[layouts.LANES, layouts.WARPS_PER_CTA, 1],
            stream=stream,
            use_pdl=self.pdl,
        )

    @cute.kernel
    def kernel(
        self,
        floor: Uint32 | Float32,  # smallest scale, or largest multiplier
        mX: cute.Tensor,
        mQ: cute.Tensor,
        mS: cute.Tensor | None,  # (rows, columns) if MN-major, else (rows, groups), of one matrix
        mCounts: cute.Tensor | None,
        mIndex: cute.Tensor | None,
        x_row_bytes: Uint32,
        q_row_bytes: Uint32,
        mn: Uint32,
        q_rows: Uint32,
        scale_rows: Uint32,  # of a matrix, with padding
        scale_elements: Uint32,  # of the last MN-major matrix that have storage, the first ones
        scale_stride: Int64,  # elements from a matrix to the next
        alignment: Int32,
        row_tiles: Int32,
        slots: Int32,  # tiles of the rows of each expert that have CTAs to themselves
    ):
        domain = self.domain
        if const_expr(self.pdl):
            cute.arch.griddepcontrol_launch_dependents()
        tile, y, z = cute.arch.block_idx()
        _, ctas, depth = cute.arch.grid_dim()
        if const_expr(self.pdl):
            cute.arch.griddepcontrol_wait()
        common = scale_rows, mCounts, x_row_bytes, q_row_bytes, alignment, floor
        if const_expr(domain.masked):
            # The first tiles of each expert have CTAs to themselves, all share the others.
            experts = mQ.shape[0]
            batch = mX, mQ, mS, mIndex, scale_stride, scale_elements, *common, tile
            limits = mn, slots, self.rows_per_cta
            row_tile = Int32(Uint32(y) // layouts.unsigned(experts))
            expert = y - row_tile * experts
            count = Int32(0)
            if row_tile < slots:
                count = rows.read_count(mCounts, expert, mn)
            if row_tile * self.rows_per_cta < count:
                self.quantize_expert(expert, row_tile, count, *batch)
            next_tile, end = y, Int32(0)
            for chunk in range(0, experts, rows.EXPERTS_PER_CHUNK):
                lane_first, lane_end, end = rows.read_experts(mCounts, chunk, end, *limits)
                while next_tile < end:
                    expert, row_tile, count = rows.find_tile(
                        mCounts, chunk, lane_first, lane_end, next_tile, *limits
                    )
                    self.quantize_expert(expert, row_tile, count, *batch)
                    next_tile += ctas
        elif const_expr(domain.batched):
            for batch in range(z, mQ.shape[0], depth):
                elements = scale_elements if batch == mQ.shape[0] - 1 else Uint32(2**32 - 1)
                limits = mn, q_rows, scale_rows, elements
                for row_tile in range(y, row_tiles, ctas):
                    matrix = self.matrix(mX, mQ, mS, mIndex, batch, scale_stride)
                    self.quantize_rows(*matrix, *limits, *common, tile, row_tile)
        else:
            matrix = mX, mQ, mS, mIndex
            limits = mn, q_rows, scale_rows, scale_elements
            self.quantize_rows(*matrix, *limits, *common, tile, y)

    @cute.jit
    def quantize_expert(
        self,
        expert: Int32,
        row_tile: Int32,
        count: Int32,
        mX: cute.Tensor,
        mQ: cute.Tensor,
        mS: cute.Tensor,
        mIndex: cute.Tensor | None,
        scale_stride: Int64,
        scale_elements: Uint32,
        scale_rows: Uint32,
        mCounts: cute.Tensor,
        x_row_bytes: Uint32,
        q_row_bytes: Uint32,
        alignment: Int32,
        floor: Uint32 | Float32,
        tile: Int32,
    ):
        """A tile of the rows of an expert that has `count` of them."""
        matrix = self.matrix(mX, mQ, mS, mIndex, expert, scale_stride)
        written = cutlass.min(_round_up(count, SCALE_ROW_ALIGNMENT), scale_rows)
        elements = scale_elements if expert == mQ.shape[0] - 1 else Uint32(2**32 - 1)
        limits = Uint32(count), Uint32(count), written, elements
        common = scale_rows, mCounts, x_row_bytes, q_row_bytes, alignment, floor
        self.quantize_rows(*matrix, *limits, *common, tile, row_tile)

    def matrix(
        self,
        mX: cute.Tensor,
        mQ: cute.Tensor,
        mS: cute.Tensor | None,
        mIndex: cute.Tensor | None,
        batch: Int32,
        scale_stride: Int64,
    ) -> tuple:
        """One of a batch."""
        if const_expr(self.domain.gathered):
            mIndex = mIndex[batch, None]
        else:
            mX = mX[batch, None, None]
        if const_expr(not self.fake):
            mS = cute.make_tensor(mS.iterator + Int64(batch) * scale_stride, mS.layout)
        return mX, mQ[batch, None, None], mS, mIndex

    @cute.jit
    def quantize_rows(
        self,
        mX: cute.Tensor,  # (mn, k), or (tokens, k) with an index
        mQ: cute.Tensor,  # (q_rows, k)
        mS: cute.Tensor | None,
        mIndex: cute.Tensor | None,  # (mn,)
        live_rows: Uint32,  # the first ones
        q_rows: Uint32,  # to be written
        scales_written: Uint32,  # rows of them
        scale_elements: Uint32,
        scale_rows: Uint32,
        mCounts: cute.Tensor | None,
        x_row_bytes: Uint32,
        q_row_bytes: Uint32,
        alignment: Int32,
        floor: Uint32 | Float32,
        tile: Int32,
        row_tile: Int32,
    ):
        """A warp's rows of a tile of rows, and its tile of their columns."""
        fmt = self.fmt
        lane, warp, _ = cute.arch.thread_idx()
        first_row = Uint32(row_tile) * self.rows_per_cta + warp * self.rows_per_thread
        numbers = [first_row + i for i in range(self.rows_per_thread)]
        live = [number < live_rows for number in numbers]
        source = numbers
        if const_expr(self.domain.prefix_sum):
            live = rows.in_a_group(mCounts, alignment, live_rows, numbers)
        if const_expr(self.domain.indexed):
            live = [rows.has_index(mCounts, number, live_rows) for number in numbers]
        if const_expr(self.domain.gathered):
            source = [rows.gather(mIndex, number, live_rows) for number in numbers]
            tokens = layouts.unsigned(mX.shape[0])
            live = [here and of < tokens for here, of in zip(live, source, strict=True)]
        sources = [layouts.row(mX, x_row_bytes, number) for number in source]
        results = [layouts.row(mQ, q_row_bytes, number) for number in numbers]

        lane_in_group = lane % self.lanes_per_group
        scale = None
        if const_expr(self.whole_row):
            tiles = cute.ceil_div(mX.shape[1], layouts.COLUMNS_PER_WARP)
            amax = Uint32(0)
            for i in range(tiles):
                tXrX = self.load(sources[0], i, lane, live[0])
                amax = numerics.max_of(self.dtype)(amax, numerics.amax(tXrX))
            amax = numerics.group_amax(amax, self.dtype, layouts.LANES)
            scale = numerics.group_scale(amax, self.dtype, floor, fmt)
            for i in range(tiles):
                tXrX = self.load(sources[0], i, lane, live[0])
                self.store(tXrX, scale, results[0], i, lane, numbers[0] < q_rows)
        else:
            tXrX = [self.load(sources[i], tile, lane, live[i]) for i in range(len(numbers))]
            for i in cutlass.range_constexpr(self.rows_per_thread):
                amax = numerics.amax(tXrX[i])
                amax = numerics.group_amax(amax, self.dtype, self.lanes_per_group)
                row_scale = numerics.group_scale(amax, self.dtype, floor, fmt)
                self.store(tXrX[i], row_scale, results[i], tile, lane, numbers[i] < q_rows)
                mine = const_expr(i == 0) or lane_in_group == i
                scale = row_scale if mine else scale
        if const_expr(not self.fake):
            in_matrix = numbers, live, live_rows, scales_written, scale_elements, scale_rows
            self.store_scale(mS, scale, *in_matrix, tile, lane, mX.shape[1])

    @cute.jit
    def load(self, row: cute.Tensor, tile: Int32, lane: Int32, live: Boolean) -> cute.Tensor:
        """A lane's values of a tile of a row of x, zeros where there are none."""
        tXrX = cute.make_rmem_tensor(layouts.VALUES_PER_THREAD, self.dtype)
        tXrX.fill(0.0)
        copy.load(row, tile, lane, live, tXrX, self.access)
        return tXrX

    @cute.jit
    def store(
        self,
        tXrX: cute.Tensor,
        scale: Uint32 | Float32,
        row: cute.Tensor,
        tile: Int32,
        lane: Int32,
        live: Boolean,
    ):
        """Scale a lane's values, round them, and write them to a row of the result."""
        tXrQ = numerics.round_to(
            numerics.scaled(tXrX, scale, self.fmt), ELEMENT_TYPES[self.fmt.dtype]
        )
        if const_expr(self.fake):
            scale = numerics.float32_of(scale, self.fmt)
            tXrQ = numerics.round_to(numerics.multiply(tXrQ, scale), self.dtype)
        copy.store(tXrQ, row, tile, lane, live, self.access)

    @cute.jit
    def store_scale(
        self,
        mS: cute.Tensor,
        scale: Uint32 | Float32,
        numbers: list,
        live: list,
        live_rows: Uint32,
        scales_written: Uint32,
        scale_elements: Uint32,
        scale_rows: Uint32,
        tile: Int32,
        lane: Int32,
        k: Int32,
    ):
        """Write the scales of a warp's groups: of each row another lane of the group."""
        fmt = self.fmt
        row, row_live = numbers[0], live[0]
        if const_expr(self.whole_row):
            # The other groups of a word, or of a block, which have to become 0.
            group, in_group = lane, Int32(0)
            group_live, exists = lane == 0, lane < self.groups_per_unit
        else:
            in_group = lane % self.lanes_per_group
            group = lane // self.lanes_per_group
            column = copy.first_column(tile, lane)
            if const_expr(self.rows_per_thread > 1):
                # The lane's own column tells too: k is a multiple of all that these lanes hold.
                row = row + in_group
                row_live = row < live_rows
                if const_expr(self.domain.selects):
                    row_live = live[0]
                    for i in cutlass.range_constexpr(1, self.rows_per_thread):
                        row_live = live[i] if in_group == i else row_live
            group_live = column < k
            exists = in_group < self.rows_per_thread
            if const_expr(self.groups_per_unit == 1):
                exists = exists and group_live
            elif const_expr(self.groups_per_tile > self.groups_per_unit):
                unit = group // self.groups_per_unit * self.groups_per_unit
                exists = exists and copy.first_column(tile, unit * self.lanes_per_group) < k
        exists = exists and row < scales_written
        if const_expr(fmt.mn_major):
            # In units, of which a tile has some or takes its share.
            if const_expr(self.groups_per_tile % fmt.groups_per_column == 0):
                columns_per_tile = self.groups_per_tile // fmt.groups_per_column
                column = tile * columns_per_tile + group // fmt.groups_per_column
                byte = group % fmt.groups_per_column
            else:
                tiles_per_column = fmt.groups_per_column // self.groups_per_tile
                column = tile // tiles_per_column
                byte = tile % tiles_per_column * self.groups_per_tile + group
            element = layouts.scale_element(scale_rows, row, column)
            exists = exists and element < scale_elements
        if exists:
            stored = numerics.stored_scale(scale, fmt)
            stored = stored if row_live and group_live else type(stored)(0)
            if const_expr(fmt.packed):
                layouts.scale_bytes(mS, element)[byte] = stored.to(Uint8)
            elif const_expr(fmt.mn_major):
                cute.recast_tensor(layouts.scale_bytes(mS, element), Float32)[0] = stored
            else:
                group = tile * self.groups_per_tile + group
                mS[Int32(row), group] = stored.to(mS.element_type)


def _round_up(rows: Int32 | Uint32, multiple: int) -> Uint32:
    """Of up to 2^31 - 1 rows, which may make 2^31."""
    return (Uint32(rows) + (multiple - 1)) // multiple * multiple
