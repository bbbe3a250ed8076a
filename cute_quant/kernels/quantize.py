"""Quantize rows in groups: load, reduce, scale, quantize, store.

One thread holds 16 neighbours of a row in registers, from its one load to its one store. Eight
threads hold a group of 128 and find its amax in three shuffles; the first of them writes the
scale. `layouts` draws who holds what. No shared memory, no barrier.

Rows and groups past the input are quantized as if they were there and held nothing: values 0 and
scales 0. That is how all padding gets defined, by the same stores. A word of packed scales has a
byte for each group of a tile, so groups past the row own one; a float32 column they do not have.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint8, Uint32, const_expr
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from cute_quant.formats import LOAD_BYTES, STORE_BYTES, Format
from cute_quant.kernels import layouts, numerics

MAX_GRID_Y = 65535


class Quantize:
    """Compile-time choices: the input's element type, the format of the results, and `pdl`,
    programmatic dependent launch: CTAs start while the kernel before still runs, wait for its end
    before they touch memory, and let those of the next start as early, which have to wait too."""

    def __init__(self, dtype: type[cutlass.Numeric], fmt: Format, pdl: bool = True):
        self.dtype = dtype
        self.fmt = fmt
        self.pdl = pdl
        self.threads_per_group = fmt.group_size // layouts.VALUES_PER_THREAD
        self.groups_per_tile = layouts.COLUMNS_PER_CTA // fmt.group_size
        self.columns_per_tile = self.groups_per_tile // fmt.groups_per_column

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
        rows = cute.round_up(mn, layouts.ROWS_PER_CTA)
        if const_expr(self.fmt.packed):
            bytes_ = cute.recast_ptr(mS.iterator, dtype=Uint8)
            mS = cute.make_tensor(bytes_, layouts.packed_scales(rows, columns))
        else:
            mS = cute.make_tensor(mS.iterator, layouts.float32_scales(rows, columns))
        op = cute.nvgpu.CopyUniversalOp()
        load, store = [
            layouts.tiled_copy(cute.make_copy_atom(op, dtype, num_bits_per_copy=8 * nbytes))
            for dtype, nbytes in ((mX.element_type, LOAD_BYTES), (mQ.element_type, STORE_BYTES))
        ]
        if const_expr(self.fmt.power_of_two):
            floor = numerics.max_multiplier(floor)
        row_tiles = cute.ceil_div(cutlass.max(rows, mQ.shape[0]), layouts.ROWS_PER_CTA)
        full_columns = columns if last_column_rows == rows else columns - 1
        self.kernel(full_columns, last_column_rows, floor, mX, mQ, mS, load, store).launch(
            grid=[
                cute.ceil_div(mX.shape[1], layouts.COLUMNS_PER_CTA),
                cutlass.min(row_tiles, MAX_GRID_Y),
                cute.ceil_div(row_tiles, MAX_GRID_Y),
            ],
            block=[layouts.THREADS_PER_CTA, 1, 1],
            stream=stream,
            use_pdl=self.pdl,
        )

    @cute.kernel
    def kernel(
        self,
        full_columns: Int32,  # scale columns whose padding rows all have storage
        last_column_rows: Int32,
        floor: Uint32 | Float32,  # smallest scale, or largest multiplier
        mX: cute.Tensor,
        mQ: cute.Tensor,
        mS: cute.Tensor,  # (rows, groups), rows with padding
        load: cute.TiledCopy,
        store: cute.TiledCopy,
    ):
        fmt = self.fmt
        if const_expr(self.pdl):
            cute.arch.griddepcontrol_launch_dependents()
        thread, _, _ = cute.arch.thread_idx()
        tile, y, z = cute.arch.block_idx()
        warp, lane = thread // layouts.LANES, thread % layouts.LANES
        row = (y + z * MAX_GRID_Y) * layouts.ROWS_PER_CTA + warp
        tXgX = load.get_slice(lane).partition_S(layouts.row_tile(mX, row, tile))
        tXgQ = store.get_slice(lane).partition_D(layouts.row_tile(mQ, row, tile))
        column = tile * layouts.COLUMNS_PER_CTA + lane * layouts.VALUES_PER_THREAD
        in_row = column < mX.shape[1]
        live = row < mX.shape[0] and in_row

        tXrX = cute.make_rmem_tensor_like(tXgX)
        tXrX.fill(0.0)
        if const_expr(self.pdl):
            cute.arch.griddepcontrol_wait()
        if live:
            cute.copy(load, tXgX, tXrX)

        amax = numerics.group_amax(tXrX, self.threads_per_group)

        if const_expr(fmt.power_of_two):
            multiplier = numerics.exact_multiplier(amax, self.dtype, floor)
            values = numerics.multiply_exact(tXrX, multiplier)
            to_scale = numerics.ue8m0 if const_expr(fmt.packed) else numerics.power_of_two
            scale = to_scale(multiplier)
        else:
            scale = numerics.float32_scale(amax, self.dtype, floor, fmt.reciprocal)
            values = numerics.multiply(tXrX, 1.0 / scale)

        tXrQ = cute.make_rmem_tensor_like(tXgQ)
        tXrQ.store(values.load().to(mQ.element_type))
        if row < mQ.shape[0] and in_row:
            cute.copy(store, tXrQ, tXgQ)

        group = lane // self.threads_per_group
        gS = cute.local_tile(mS[row, None], (self.groups_per_tile,), (tile,))
        scale_column = tile * self.columns_per_tile + group // fmt.groups_per_column
        rows = mS.shape[0] if scale_column < full_columns else last_column_rows
        owns_scale = lane % self.threads_per_group == 0 and row < rows
        if const_expr(not fmt.packed):
            owns_scale = owns_scale and in_row
        if owns_scale:
            gS[group] = (scale if live else type(scale)(0)).to(mS.element_type)
