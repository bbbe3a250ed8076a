"""Quantize rows in groups: load, reduce, scale, quantize, store.

One thread holds 16 neighbours of a row in registers, from its one load to its one store. Eight
threads hold a group of 128 and find its amax in three shuffles; the first of them writes the
scale. `layouts` draws who holds what. No shared memory, no barrier.

Rows and groups past the input are quantized as if they were there and held nothing: values 0 and
scales 0. That is how all padding gets defined, by the same stores.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint8, const_expr
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from cute_quant.formats import LOAD_BYTES, STORE_BYTES, Format
from cute_quant.kernels import layouts, numerics

MAX_GRID_Y = 65535


class Quantize:
    """Compile-time choices: the input's element type and the format of the results."""

    def __init__(self, dtype: type[cutlass.Numeric], fmt: Format):
        self.dtype = dtype
        self.fmt = fmt
        self.threads_per_group = fmt.group_size // layouts.VALUES_PER_THREAD

    def signature(self) -> tuple:
        """Stand-ins for the arguments: which sizes vary, and what alignment may be relied on."""
        mn, q_rows, columns = (cute.sym_int32() for _ in range(3))
        k = cute.sym_int32(divisibility=self.fmt.group_size)
        x_stride, q_stride = (cute.sym_int64(divisibility=layouts.VALUES_PER_THREAD) for _ in "xq")
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
        row_tiles, column_tiles = cute.ceil_div(
            (cutlass.max(rows, mQ.shape[0]), mX.shape[1]), layouts.TILE
        )
        self.kernel(mX, mQ, mS, last_column_rows, floor, load, store).launch(
            grid=[
                column_tiles,
                cutlass.min(row_tiles, MAX_GRID_Y),
                cute.ceil_div(row_tiles, MAX_GRID_Y),
            ],
            block=[layouts.THREADS_PER_CTA, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        mX: cute.Tensor,
        mQ: cute.Tensor,
        mS: cute.Tensor,  # (rows, groups), rows with padding
        last_column_rows: Int32,
        floor: Int32 | Float32,
        load: cute.TiledCopy,
        store: cute.TiledCopy,
    ):
        thread, _, _ = cute.arch.thread_idx()
        x, y, z = cute.arch.block_idx()
        tile = (y + z * MAX_GRID_Y, x)
        gX, gQ = [cute.local_tile(m, layouts.TILE, tile) for m in (mX, mQ)]
        cX = cute.local_tile(cute.make_identity_tensor(mX.shape), layouts.TILE, tile)
        tXgX = load.get_slice(thread).partition_S(gX)
        tXgQ = store.get_slice(thread).partition_D(gQ)
        row, column = load.get_slice(thread).partition_S(cX)[0]
        group = column // self.fmt.group_size
        in_row = column < mX.shape[1]
        live = row < mX.shape[0] and in_row

        tXrX = cute.make_rmem_tensor_like(tXgX)
        tXrX.fill(0.0)
        if live:
            cute.copy(load, tXgX, tXrX)

        amax = numerics.group_amax(tXrX, self.threads_per_group)

        if const_expr(self.fmt.power_of_two):
            exponent = numerics.ue8m0_exponent(amax, floor)
            multiplier = numerics.exact_reciprocal(exponent)
            scale = exponent if const_expr(self.fmt.packed) else numerics.power_of_two(exponent)
        else:
            scale = numerics.float32_scale(amax, floor, self.fmt.reciprocal)
            multiplier = 1.0 / scale

        groups = cute.size(mS, mode=[1])
        rows = last_column_rows if group + self.fmt.groups_per_column >= groups else mS.shape[0]
        if thread % self.threads_per_group == 0 and row < rows and group < groups:
            mS[row, group] = (scale if live else type(scale)(0)).to(mS.element_type)

        values = numerics.widen(tXrX).load() * multiplier
        tXrQ = cute.make_rmem_tensor_like(tXgQ)
        tXrQ.store(values.to(mQ.element_type))
        if row < mQ.shape[0] and in_row:
            cute.copy(store, tXrQ, tXgQ)
