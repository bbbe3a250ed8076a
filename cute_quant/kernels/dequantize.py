"""Multiply quantized values by their scales: load, widen, multiply, store.

The thread-value layout is that of `quantize`: a thread holds 16 values of a row, contiguous along
k, and reads the scale that they share.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint8, Uint32, const_expr
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from cute_quant.contract.dtypes import BLOCK_ROWS
from cute_quant.contract.format_choices import WHOLE_ROW
from cute_quant.kernels import copy, encodings, layouts
from cute_quant.kernels import scales as scaling
from cute_quant.kernels.config import (
    DEFAULT_TILE,
    LANES,
    MAX_GRID_Y,
    MAX_GRID_Z,
    DequantizeSpec,
)
from cute_quant.kernels.copy import Segment
from cute_quant.kernels.encodings import ELEMENT_TYPES
from cute_quant.kernels.layouts import Matrix
from cute_quant.kernels.params import Params

TILE = DEFAULT_TILE


class Problem(Params):
    """Arguments of the kernel, for a batch of matrices or one of them.

    Attributes:
        q: (batch, mn, k).
        scales: (batch, mn, groups).
        y: (batch, mn, k).
        num_rows: of each matrix.
        num_row_tiles: tiles of these rows.
    """

    def __init__(self, q: Matrix, scales: cute.Tensor, y: Matrix):
        self.q = q
        self.scales = scales
        self.y = y
        self.num_rows = q.rows
        self.num_row_tiles = Int32((self.num_rows + (TILE.rows - 1)) // TILE.rows)

    def slice_batch(self, batch: Int32) -> "Problem":
        """Return the problem of one matrix of a batch."""
        scales = self.scales[batch, None, None]
        return self.replace(q=self.q[batch], scales=scales, y=self.y[batch])


class Dequantize:
    """Entry point: values and scales to their products."""

    def __init__(self, spec: DequantizeSpec):
        self.fmt = spec.fmt
        self.dtype = ELEMENT_TYPES[spec.dtype]
        self.access = spec.access
        self.pdl = spec.pdl

    def signature(self) -> tuple:
        """Return stand-ins for the arguments, with the sizes that vary and the alignment."""
        fmt, access = self.fmt, self.access
        batch, mn = cute.sym_int32(), cute.sym_int32()
        k = cute.sym_int32(divisibility=1 if access.ragged else TILE.values_per_thread)
        scales = (batch, cute.sym_int32()) if fmt.blocked else (batch, mn, cute.sym_int32())
        strides = tuple(cute.sym_int64() for _ in scales)
        return (
            copy.fake_matrix(encodings.value_type_of(fmt), (batch, mn, k), access.load_bytes),
            make_fake_tensor(encodings.scale_type_of(fmt), scales, stride=strides),
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
        """Launch the kernel, on batches of matrices."""
        batches, mn, k = mQ.shape
        if const_expr(self.fmt.blocked):
            groups = cute.ceil_div(k, self.fmt.group_size)
            layout = layouts.batch_of_blocks(mS.layout, cute.round_up(mn, BLOCK_ROWS), groups)
            mS = cute.make_tensor(mS.iterator, layout)
        if const_expr(self.fmt.packed):
            layout = layouts.bytes_of_words(mS.layout)
            mS = cute.make_tensor(cute.recast_ptr(mS.iterator, dtype=Uint8), layout)
        elif const_expr(self.fmt.ue8m0):
            mS = cute.recast_tensor(mS, Uint8)
        problem = Problem(Matrix(mQ), mS, Matrix(mY))
        self.kernel(problem).launch(
            grid=[
                cute.ceil_div(k, TILE.columns),
                cutlass.min(problem.num_row_tiles, MAX_GRID_Y),
                cutlass.min(batches, MAX_GRID_Z),
            ],
            block=[LANES, TILE.rows, 1],
            stream=stream,
            use_pdl=self.pdl,
        )

    @cute.kernel
    def kernel(self, problem: Problem):
        """Dequantize the tiles of rows that the CTA takes."""
        if const_expr(self.pdl):
            cute.arch.griddepcontrol_launch_dependents()
        _, first, z = cute.arch.block_idx()
        _, num_row_ctas, depth = cute.arch.grid_dim()
        if const_expr(self.pdl):
            cute.arch.griddepcontrol_wait()
        for batch in range(z, problem.q.tensor.shape[0], depth):
            for row_tile in range(first, problem.num_row_tiles, num_row_ctas):
                self.dequantize_tile(row_tile, problem.slice_batch(batch))

    @cute.jit
    def dequantize_tile(self, row_tile: Int32, problem: Problem):
        """Load, widen, multiply and store a warp's part of a row."""
        lane, warp, _ = cute.arch.thread_idx()
        column_tile, _, _ = cute.arch.block_idx()
        segment, row = Segment(column_tile, lane), Uint32(row_tile) * TILE.rows + warp
        exists = row < problem.num_rows
        gQ, gY = problem.q.row(row), problem.y.row(row)  # (k,) each

        tXrQ = encodings.zeros(TILE.values_per_thread, gQ.element_type)  # (values,)
        copy.load(gQ, segment, exists, tXrQ, self.access)
        scale = Float32(0.0)
        tXcX = copy.column_coordinates(cute.size(gQ), segment, TILE.values_per_thread)
        if exists and tXcX[0] < cute.size(gQ):
            scale = self.load_scale(problem.scales, Int32(row), segment)
        tXrY = encodings.encode(encodings.multiply(tXrQ, scale), self.dtype)  # (values,)
        copy.store(tXrY, gY, segment, exists, self.access)

    @cute.jit
    def load_scale(self, mS: cute.Tensor, row: Int32, segment: Segment) -> Float32:
        """Load the scale of a thread's values as float32."""
        size = self.fmt.group_size
        if const_expr(size == WHOLE_ROW):
            scale = mS[row, 0]
        else:
            _, group = layouts.lanes(TILE.lanes_per_group(size))(segment.lane)
            groups = layouts.groups_by_tile(mS.layout, TILE.groups(size))
            scale = mS[row, groups((group, segment.tile))]
        if const_expr(self.fmt.ue8m0):
            return scaling.float32_of_ue8m0(Uint32(scale))
        return scale
