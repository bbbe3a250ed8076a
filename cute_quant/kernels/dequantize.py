"""Multiply quantized values by their scales: load, widen, multiply, store.

The layout is that of `quantize`: a thread holds 16 neighbours of a row, and reads the scale that
they share.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, Uint32, const_expr
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from cute_quant.formats import BLOCK_GROUPS, BLOCK_ROWS, WHOLE_ROW, Format
from cute_quant.kernels import copy, layouts, numerics
from cute_quant.kernels.copy import Access
from cute_quant.kernels.launch import MAX_GRID_Y, MAX_GRID_Z
from cute_quant.kernels.types import ELEMENT_TYPES


class Dequantize:
    """Compile-time choices: the format of values and scales, the element type of the result, and
    what the addresses allow. Launched as a programmatic dependent, as `Quantize` is."""

    def __init__(self, fmt: Format, dtype: type[cutlass.Numeric], access: Access):
        self.fmt = fmt
        self.dtype = dtype
        self.access = access
        self.lanes_per_group = layouts.lanes_per_group(fmt.group_size)

    def signature(self) -> tuple:
        """Stand-ins for the arguments: which sizes vary, and what alignment may be relied on."""
        fmt, access = self.fmt, self.access
        batch, mn = cute.sym_int32(), cute.sym_int32()
        k = cute.sym_int32(divisibility=1 if access.ragged else layouts.VALUES_PER_THREAD)
        scales = (batch, cute.sym_int32()) if fmt.blocked else (batch, mn, cute.sym_int32())
        return (
            copy.fake_matrix(ELEMENT_TYPES[fmt.dtype], (batch, mn, k), access.load_bytes),
            make_fake_tensor(
                ELEMENT_TYPES[fmt.scale_dtype],
                scales,
                stride=tuple(cute.sym_int64() for _ in scales),
            ),
            copy.fake_matrix(self.dtype, (batch, mn, k), access.store_bytes),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        mQ: cute.Tensor,  # (batch, mn, k)
        mS: cute.Tensor,  # (batch, mn, columns), or (batch, bytes) in blocks
        mY: cute.Tensor,  # (batch, mn, k)
        stream: cuda.CUstream,
    ):
        batches, mn, k = mQ.shape
        if const_expr(self.fmt.ue8m0 and not self.fmt.packed):
            mS = cute.recast_tensor(mS, Uint8)
        if const_expr(self.fmt.blocked):
            groups = cute.ceil_div(k, self.fmt.group_size)
            blocks = layouts.scales_by_block(
                cute.round_up(mn, BLOCK_ROWS), cute.round_up(groups, BLOCK_GROUPS)
            )
            layout = cute.make_layout(
                (batches, *blocks.shape), stride=(Int64(mS.stride[0]), *blocks.stride)
            )
            mS = cute.make_tensor(mS.iterator, layout)
        rows = layouts.unsigned(mn)
        row_tiles = Int32((rows + (layouts.WARPS_PER_CTA - 1)) // layouts.WARPS_PER_CTA)
        self.kernel(
            mQ, mS, mY, layouts.row_bytes(mQ), layouts.row_bytes(mY), rows, row_tiles
        ).launch(
            grid=[
                cute.ceil_div(k, layouts.COLUMNS_PER_WARP),
                cutlass.min(row_tiles, MAX_GRID_Y),
                cutlass.min(batches, MAX_GRID_Z),
            ],
            block=[layouts.LANES, layouts.WARPS_PER_CTA, 1],
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self,
        mQ: cute.Tensor,
        mS: cute.Tensor,  # (batch, mn, columns), also in blocks
        mY: cute.Tensor,
        q_row_bytes: Uint32,
        y_row_bytes: Uint32,
        mn: Uint32,
        row_tiles: Int32,
    ):
        cute.arch.griddepcontrol_launch_dependents()
        lane, warp, _ = cute.arch.thread_idx()
        tile, y, z = cute.arch.block_idx()
        _, ctas, depth = cute.arch.grid_dim()
        cute.arch.griddepcontrol_wait()
        for batch in range(z, mQ.shape[0], depth):
            for row_tile in range(y, row_tiles, ctas):
                row = Uint32(row_tile) * layouts.WARPS_PER_CTA + warp
                live = row < mn
                gQ = layouts.row(mQ[batch, None, None], q_row_bytes, row)
                gY = layouts.row(mY[batch, None, None], y_row_bytes, row)
                tXrQ = cute.make_rmem_tensor(layouts.VALUES_PER_THREAD, mQ.element_type)
                cute.recast_tensor(tXrQ, Uint32).fill(0)
                copy.load(gQ, tile, lane, live, tXrQ, self.access)
                scale = Float32(0.0)
                if live and copy.first_column(tile, lane) < mQ.shape[2]:
                    scale = self.read_scale(mS[batch, None, None], Int32(row), tile, lane)
                values = numerics.multiply(tXrQ, scale)
                tXrY = numerics.round_to(values, self.dtype)
                copy.store(tXrY, gY, tile, lane, live, self.access)

    @cute.jit
    def read_scale(self, mS: cute.Tensor, row: Int32, tile: Int32, lane: Int32) -> Float32:
        """The scale of a lane's values, as float32."""
        fmt = self.fmt
        group = Int32(0)
        if const_expr(fmt.group_size != WHOLE_ROW):
            group = (tile * layouts.LANES + lane) // self.lanes_per_group
        if const_expr(fmt.packed):
            word = Uint32(mS[row, group // fmt.groups_per_column])
            return numerics.float32_of_ue8m0(word >> Uint32(group % fmt.groups_per_column * 8))
        if const_expr(fmt.ue8m0):
            return numerics.float32_of_ue8m0(Uint32(mS[row, group]))
        return mS[row, group]
