"""Multiply quantized values by their scales: load, widen, multiply, store.

The layout is that of `quantize`: a thread holds 16 neighbours of a row, and reads the scale that
they share.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, Uint32, const_expr
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from cute_quant.contract.formats import BLOCK_GROUPS, BLOCK_ROWS, WHOLE_ROW
from cute_quant.kernels import copy, layouts, numerics
from cute_quant.kernels.config import DEFAULT_TILE, LANES, DequantizeSpec
from cute_quant.kernels.heuristics import MAX_GRID_Y, MAX_GRID_Z
from cute_quant.kernels.layouts import Matrix
from cute_quant.kernels.types import ELEMENT_TYPES

VALUES = DEFAULT_TILE.values_per_thread


class Dequantize:
    """Launched as a programmatic dependent, as `Quantize` is."""

    def __init__(self, spec: DequantizeSpec):
        self.fmt = spec.fmt
        self.dtype = ELEMENT_TYPES[spec.dtype]
        self.access = spec.access
        self.lanes_per_group = DEFAULT_TILE.lanes_per_group(spec.fmt.group_size)

    def signature(self) -> tuple:
        """Stand-ins for the arguments: which sizes vary, and what alignment may be relied on."""
        fmt, access = self.fmt, self.access
        batch, mn = cute.sym_int32(), cute.sym_int32()
        k = cute.sym_int32(divisibility=1 if access.ragged else VALUES)
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
        row_tiles = Int32((rows + (DEFAULT_TILE.rows - 1)) // DEFAULT_TILE.rows)
        self.kernel(Matrix(mQ), mS, Matrix(mY), rows, row_tiles).launch(
            grid=[
                cute.ceil_div(k, DEFAULT_TILE.columns),
                cutlass.min(row_tiles, MAX_GRID_Y),
                cutlass.min(batches, MAX_GRID_Z),
            ],
            block=[LANES, DEFAULT_TILE.rows, 1],
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self,
        q: Matrix,
        mS: cute.Tensor,  # (batch, mn, columns), also in blocks
        y: Matrix,
        mn: Uint32,
        row_tiles: Int32,
    ):
        cute.arch.griddepcontrol_launch_dependents()
        lane, warp, _ = cute.arch.thread_idx()
        tile, first, z = cute.arch.block_idx()
        _, ctas, depth = cute.arch.grid_dim()
        cute.arch.griddepcontrol_wait()
        for batch in range(z, q.tensor.shape[0], depth):
            for row_tile in range(first, row_tiles, ctas):
                row = Uint32(row_tile) * DEFAULT_TILE.rows + warp
                live = row < mn
                gQ, gY = q[batch].row(row), y[batch].row(row)
                tXrQ = copy.zeros(VALUES, q.tensor.element_type)
                copy.load(gQ, tile, lane, live, tXrQ, self.access)
                scale = Float32(0.0)
                if live and copy.first_column(tile, lane, VALUES) < cute.size(gQ):
                    scale = self.read_scale(mS[batch, None, None], Int32(row), tile, lane)
                tXrY = numerics.round_to(numerics.multiply(tXrQ, scale), self.dtype)
                copy.store(tXrY, gY, tile, lane, live, self.access)

    @cute.jit
    def read_scale(self, mS: cute.Tensor, row: Int32, tile: Int32, lane: Int32) -> Float32:
        """The scale of a lane's values, as float32."""
        fmt = self.fmt
        group = Int32(0)
        if const_expr(fmt.group_size != WHOLE_ROW):
            group = (tile * LANES + lane) // self.lanes_per_group
        if const_expr(fmt.packed):
            word = Uint32(mS[row, group // fmt.groups_per_column])
            return numerics.float32_of_ue8m0(word >> Uint32(group % fmt.groups_per_column * 8))
        if const_expr(fmt.ue8m0):
            return numerics.float32_of_ue8m0(Uint32(mS[row, group]))
        return mS[row, group]
