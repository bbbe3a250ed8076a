"""Multiply quantized values by their scales: load, widen, multiply, store.

The thread-value layout is that of `quantize`: a thread holds 16 values of a row, contiguous along
k, and reads the scale that they share.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint8, Uint32, const_expr
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

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
from cute_quant.kernels.upper_scales import UpperScale

TILE = DEFAULT_TILE


class Problem(Params):
    """Arguments of the kernel, for a batch of matrices or one of them.

    Attributes:
        q: (batch, mn, k), or k / 2 bytes of two values.
        scales: (batch, mn, groups).
        upper: the scale over those of groups, or those of rows, (batch, mn); None without.
        y: (batch, mn, k).
        num_rows: of each matrix.
        num_row_tiles: tiles of these rows.
    """

    def __init__(
        self,
        q: Matrix,
        scales: cute.Tensor,
        upper: UpperScale | cute.Tensor | None,
        y: Matrix,
    ):
        self.q = q
        self.scales = scales
        self.upper = upper
        self.y = y
        self.num_rows = q.rows
        self.num_row_tiles = Int32((self.num_rows + (TILE.rows - 1)) // TILE.rows)

    def slice_batch(self, batch: Int32) -> "Problem":
        """Return the problem of one matrix of a batch."""
        scales, upper = self.scales[batch, None, None], self.upper
        if const_expr(isinstance(upper, UpperScale)):
            upper = upper.slice_batch(batch)
        elif const_expr(upper is not None):
            upper = upper[batch, None]
        return self.replace(q=self.q[batch], scales=scales, upper=upper, y=self.y[batch])


class Dequantize:
    """Entry point: values and scales to their products."""

    def __init__(self, spec: DequantizeSpec):
        self.fmt = spec.fmt
        self.dtype = ELEMENT_TYPES[spec.dtype]
        self.access = spec.access
        self.upper = spec.upper
        self.pdl = spec.pdl

    def signature(self) -> tuple:
        """Return stand-ins for the arguments, with the sizes that vary and the alignment."""
        fmt, access = self.fmt, self.access
        batch, mn = cute.sym_int32(), cute.sym_int32()
        q_dtype = encodings.value_type_of(fmt)
        divisor = 1 if access.ragged else TILE.values_per_thread
        k = columns = cute.sym_int32(divisibility=divisor)
        if fmt.value_type.per_byte > 1:
            columns = cute.sym_int32(divisibility=max(1, divisor // fmt.value_type.per_byte))
        upper = None
        if self.upper is not None:
            shape = (batch, mn) if fmt.row_scale else (batch,)
            strides = tuple(cute.sym_int64() for _ in shape)
            upper = make_fake_tensor(Float32, shape, stride=strides)
        scales = (batch, cute.sym_int32()) if fmt.blocked else (batch, mn, cute.sym_int32())
        scale_strides = tuple(cute.sym_int64() for _ in scales)
        return (
            copy.fake_matrix(q_dtype, (batch, mn, columns), access.load_bytes),
            make_fake_tensor(encodings.scale_type_of(fmt), scales, stride=scale_strides),
            upper,
            copy.fake_matrix(self.dtype, (batch, mn, k), access.store_bytes),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        mQ: cute.Tensor,  # (batch, mn, k), or bytes of two
        mS: cute.Tensor,  # (batch, mn, columns), or (batch, bytes) in blocks
        mUpper: cute.Tensor | None,  # (batch,), or (batch, mn) with a scale for each row
        mY: cute.Tensor,  # (batch, mn, k)
        stream: cuda.CUstream,
    ):
        """Launch the kernel, on batches of matrices."""
        batches, mn, k = mY.shape
        if const_expr(self.fmt.blocked):
            groups = cute.ceil_div(k, self.fmt.group_size)
            layout = layouts.batch_of_blocks(mS.layout, mn, groups, self.fmt.block_rows)
            mS = cute.make_tensor(mS.iterator, layout)
        if const_expr(self.fmt.packed):
            layout = layouts.bytes_of_words(mS.layout)
            mS = cute.make_tensor(cute.recast_ptr(mS.iterator, dtype=Uint8), layout)
        elif const_expr(self.fmt.byte_scales):
            mS = cute.recast_tensor(mS, Uint8)
        upper = mUpper
        if const_expr(self.upper is not None and not self.fmt.row_scale):
            upper = UpperScale(mUpper, Float32(0.0), self.upper)
        problem = Problem(Matrix(mQ), mS, upper, Matrix(mY))
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

        columns = TILE.values_per_thread // self.fmt.value_type.per_byte
        tXrQ = encodings.zeros(columns, gQ.element_type)  # (values,), or bytes of two
        copy.load(gQ, segment, exists, tXrQ, self.access)
        scale = Float32(0.0)
        tXcX = copy.column_coordinates(cute.size(gY), segment, TILE.values_per_thread)
        if exists and tXcX[0] < cute.size(gY):
            scale = self.load_scale(problem.scales, Int32(row), segment)
            if const_expr(self.upper is not None):
                row_scales = self.fmt.row_scale
                upper = problem.upper[row] if row_scales else problem.upper.load_decode_scale()
                scale = scale * upper
        decoded = encodings.decode(tXrQ, self.fmt)  # (values,)
        tXrY = encodings.encode(encodings.multiply(decoded, scale), self.dtype)  # (values,)
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
        if const_expr(self.fmt.byte_scales):
            return scaling.float32_of_scale(Uint32(scale), self.fmt)
        return scale
