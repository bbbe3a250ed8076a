"""Quantize rows in groups: load, reduce, scale, quantize, store.

A thread holds 16 neighbours of a row in registers, from its load to its store, and as many of
each of some rows that follow each other. Eight threads hold a group of 128 and find its amax in
three shuffles; all of them know its scale, and one writes it. `layouts` draws who holds what. No
shared memory, no barrier.

Rows and groups past the input are quantized as if they were there and held nothing: values 0 and
scales 0. That is how all padding gets defined, by the same stores. A word of packed scales has a
byte for each group of a tile, so groups past the row own one; a float32 column they do not have.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, const_expr
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from cute_quant.formats import LOAD_BYTES, SCALE_ROW_ALIGNMENT, STORE_BYTES, Format
from cute_quant.kernels import layouts, numerics
from cute_quant.kernels.launch import MAX_GRID_Y


class Quantize:
    """Compile-time choices.

    Args:
        dtype: of the elements of x.
        fmt: of the results.
        rows_per_thread: rows whose loads are in flight at once, up to the lanes of a group; the
            scales of that many rows are written at once too.
        tall: whether there are more rows than one dimension of a grid counts.
        pdl: programmatic dependent launch: CTAs start while the kernel before still runs, wait for
            its end before they touch memory, and let those of the next start as early, which have
            to wait too.
    """

    def __init__(
        self,
        dtype: type[cutlass.Numeric],
        fmt: Format,
        rows_per_thread: int = 1,
        tall: bool = False,
        pdl: bool = True,
    ):
        self.dtype = dtype
        self.fmt = fmt
        self.rows_per_thread = rows_per_thread
        self.rows_per_cta = layouts.WARPS_PER_CTA * rows_per_thread
        self.tall = tall
        self.pdl = pdl
        self.lanes_per_group = fmt.group_size // layouts.VALUES_PER_THREAD
        groups_per_tile = layouts.COLUMNS_PER_WARP // fmt.group_size
        self.scale_columns_per_tile = groups_per_tile // fmt.groups_per_column

    def signature(self) -> tuple:
        """Stand-ins for the arguments: which sizes vary, and what alignment may be relied on."""
        mn, q_rows, columns = (cute.sym_int32() for _ in range(3))
        k = cute.sym_int32(divisibility=self.fmt.group_size)
        x_stride, q_stride = (cute.sym_int32(divisibility=layouts.VALUES_PER_THREAD) for _ in "xq")
        return (
            make_fake_tensor(self.dtype, (mn, k), stride=(x_stride, 1), assumed_align=LOAD_BYTES),
            make_fake_tensor(
                cutlass.Float8E4M3FN, (q_rows, k), stride=(q_stride, 1), assumed_align=STORE_BYTES
            ),
            make_fake_tensor(
                Int32 if self.fmt.packed else Float32,
                (mn, columns),
                stride=(cute.sym_int64(), cute.sym_int64()),
            ),
            Int32(0),
            Int32(0) if self.fmt.power_of_two else Float32(0),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,  # (mn, k)
        mQ: cute.Tensor,  # (q_rows, k), q_rows >= mn
        mS: cute.Tensor,  # (mn, columns)
        last_column_rows: Int32,  # rows of the last scale column that have storage
        floor: Int32 | Float32,  # smallest scale, an exponent where scales are powers of two
        stream: cuda.CUstream,
    ):
        mn, columns = mS.shape
        rows = cute.round_up(mn, SCALE_ROW_ALIGNMENT)
        mS = cute.make_tensor(mS.iterator, layouts.scales(rows, columns))
        op = cute.nvgpu.CopyUniversalOp()
        load, store = [
            layouts.tiled_copy(cute.make_copy_atom(op, dtype, num_bits_per_copy=8 * nbytes))
            for dtype, nbytes in ((mX.element_type, LOAD_BYTES), (mQ.element_type, STORE_BYTES))
        ]
        if const_expr(self.fmt.power_of_two):
            floor = numerics.max_multiplier(floor)
        row_tiles = cute.ceil_div(cutlass.max(rows, mQ.shape[0]), self.rows_per_cta)
        # Only the last column's padding may lack storage.
        scale_elements = Uint32(columns - 1) * Uint32(rows) + Uint32(last_column_rows)
        self.kernel(
            floor,
            mX,
            mQ,
            mS,
            scale_elements,
            layouts.row_bytes(mX),
            layouts.row_bytes(mQ),
            load,
            store,
        ).launch(
            grid=[
                cute.ceil_div(mX.shape[1], layouts.COLUMNS_PER_WARP),
                cutlass.min(row_tiles, MAX_GRID_Y),
                cute.ceil_div(row_tiles, MAX_GRID_Y),
            ],
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
        mS: cute.Tensor,  # (rows, columns), rows with padding
        scale_elements: Uint32,  # of mS that have storage, the first ones
        x_row_bytes: Uint32,
        q_row_bytes: Uint32,
        load: cute.TiledCopy,
        store: cute.TiledCopy,
    ):
        fmt = self.fmt
        if const_expr(self.pdl):
            cute.arch.griddepcontrol_launch_dependents()
        lane, warp, _ = cute.arch.thread_idx()
        tile, row_tile, z = cute.arch.block_idx()
        if const_expr(self.tall):
            row_tile += z * MAX_GRID_Y
        first_row = row_tile * self.rows_per_cta + warp * self.rows_per_thread
        column = tile * layouts.COLUMNS_PER_WARP + lane * layouts.VALUES_PER_THREAD
        in_row = column < mX.shape[1]
        load, store = load.get_slice(lane), store.get_slice(lane)

        tXrX = cute.make_rmem_tensor((layouts.VALUES_PER_THREAD, self.rows_per_thread), self.dtype)
        tXrX.fill(0.0)
        if const_expr(self.pdl):
            cute.arch.griddepcontrol_wait()
        for i in cutlass.range_constexpr(self.rows_per_thread):
            tXgX = load.partition_S(layouts.row_tile(mX, x_row_bytes, first_row + i, tile))
            if first_row + i < mX.shape[0] and in_row:
                cute.copy(load, tXgX, cute.make_tensor(tXrX[None, i].iterator, tXgX.layout))

        lane_in_group = lane % self.lanes_per_group
        scale = None
        for i in cutlass.range_constexpr(self.rows_per_thread):
            tXrXi = tXrX[None, i]
            amax = numerics.group_amax(tXrXi, self.lanes_per_group)
            if const_expr(fmt.power_of_two):
                multiplier = numerics.exact_multiplier(amax, self.dtype, floor)
                values = numerics.multiply_exact(tXrXi, multiplier)
                to_scale = numerics.ue8m0 if const_expr(fmt.packed) else numerics.power_of_two
                row_scale = to_scale(multiplier)
            else:
                row_scale = numerics.float32_scale(amax, self.dtype, floor, fmt.reciprocal)
                values = numerics.multiply(tXrXi, 1.0 / row_scale)
            tXgQ = store.partition_D(layouts.row_tile(mQ, q_row_bytes, first_row + i, tile))
            tXrQ = cute.make_rmem_tensor_like(tXgQ)
            tXrQ.store(values.load().to(mQ.element_type))
            if first_row + i < mQ.shape[0] and in_row:
                cute.copy(store, tXrQ, tXgQ)
            mine = const_expr(i == 0) or lane_in_group == i
            scale = row_scale if mine else scale

        # A lane of the group for each row: the scales of a warp leave at once.
        row = first_row + lane_in_group if const_expr(self.rows_per_thread > 1) else first_row
        group = lane // self.lanes_per_group
        scale_column = tile * self.scale_columns_per_tile + group // fmt.groups_per_column
        element = layouts.scale_element(mS, row, scale_column)
        owns_scale = lane_in_group < self.rows_per_thread and row < mS.shape[0]
        if const_expr(not fmt.packed):
            owns_scale = owns_scale and in_row
        if owns_scale and element < scale_elements:
            live = row < mX.shape[0] and in_row
            scale = scale if live else type(scale)(0)
            tSgS = layouts.scale_bytes(mS, element)
            if const_expr(fmt.packed):
                tSgS[group % fmt.groups_per_column] = scale.to(tSgS.element_type)
            else:
                cute.recast_tensor(tSgS, Float32)[0] = scale
