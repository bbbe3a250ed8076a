"""Multiply quantized values by their scales: load, widen, multiply, store.

The thread-value layout is that of `quantize`: a thread holds values of a row, contiguous along k,
in each of its tiles, and reads the scale that they share.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint8, Uint32, const_expr
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from cute_quant.contract.format_choices import WHOLE_ROW
from cute_quant.kernels import copy, encodings, grids, layouts
from cute_quant.kernels import scales as scaling
from cute_quant.kernels.config import DequantizeSpec
from cute_quant.kernels.copy import Segment
from cute_quant.kernels.encodings import ELEMENT_TYPES
from cute_quant.kernels.layouts import Matrix
from cute_quant.kernels.params import Params
from cute_quant.kernels.upper_scales import UpperScale


class Problem(Params):
    """Arguments of the kernel, for a batch of matrices or one of them.

    Attributes:
        q: (batch, mn, k), or k / 2 bytes of two values.
        scales: (batch, mn, groups).
        upper: the scale over those of groups, or those of rows, (batch, mn); None without.
        y: (batch, mn, k).
        num_rows: of each matrix.
        first_batch, first_row_tile: as `grids.launch` sets them.
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
        self.first_batch = self.first_row_tile = Int32(0)

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
        self.tile = spec.tile
        self.access = spec.access
        self.upper = spec.upper
        self.square = spec.square
        self.pdl = spec.pdl

    def signature(self) -> tuple:
        """Return stand-ins for the arguments, with the sizes that vary and the alignment."""
        fmt, access = self.fmt, self.access
        batch, mn = cute.sym_int32(), cute.sym_int32()
        q_dtype = encodings.value_type_of(fmt)
        divisor = 1 if access.ragged else self.tile.values_per_thread
        k = columns = cute.sym_int32(divisibility=divisor)
        if fmt.value_type.per_byte > 1:
            columns = cute.sym_int32(divisibility=max(1, divisor // fmt.value_type.per_byte))
        upper = None
        if self.upper is not None:
            shape = (batch, mn) if fmt.row_scale else (batch,)
            strides = tuple(cute.sym_int64() for _ in shape)
            upper = make_fake_tensor(Float32, shape, stride=strides)
        scales = (batch, cute.sym_int32()) if fmt.blocked else (batch, mn, cute.sym_int32())
        if self.square:
            scales = (batch, cute.sym_int32(), cute.sym_int32())
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
        mS: cute.Tensor,  # (batch, mn, columns), (batch, bytes) in blocks, or of square blocks
        mUpper: cute.Tensor | None,  # (batch,), or (batch, mn) with a scale for each row
        mY: cute.Tensor,  # (batch, mn, k)
        stream: cuda.CUstream,
    ):
        """Launch the kernel, on batches of matrices."""
        batches, mn, k = mY.shape
        groups = 1 if self.fmt.whole_row else cute.ceil_div(k, self.fmt.group_size)
        if const_expr(self.square):
            layout = layouts.rows_of_square_blocks(mS.layout, self.fmt.group_size)
        else:
            layout = layouts.batch_of_scales(self.fmt, mS.layout, mn, groups)
        start = mS.iterator
        if const_expr(self.fmt.byte_scales):
            start = cute.recast_ptr(start, dtype=Uint8)
        mS = cute.make_tensor(start, layout)
        upper = mUpper
        if const_expr(self.upper is not None and not self.fmt.row_scale):
            upper = UpperScale(mUpper, Float32(0.0), self.upper)
        problem = Problem(Matrix(mQ), mS, upper, Matrix(mY))
        column_tiles = cute.ceil_div(k, self.tile.columns * self.tile.tiles_per_thread)
        tiles = column_tiles, cute.ceil_div(mn, self.tile.rows), batches
        options = {"stream": stream, "use_pdl": self.pdl}
        grids.launch(self.kernel, problem, tiles, self.tile.row_warps, options)

    @cute.kernel
    def kernel(self, problem: Problem):
        """Load, widen, multiply and store a warp's tiles of a row."""
        if const_expr(self.pdl):
            cute.arch.griddepcontrol_launch_dependents()
        lane, warp, _ = cute.arch.thread_idx()
        column_cta, row_tile, batch = cute.arch.block_idx()
        problem = problem.slice_batch(problem.first_batch + batch)
        tiles = layouts.tiles_of_thread(self.tile)
        segments = [
            Segment(tiles((i, column_cta)), lane) for i in range(self.tile.tiles_per_thread)
        ]
        row = Uint32(problem.first_row_tile + row_tile) * self.tile.rows + warp
        exists = row < problem.num_rows
        gQ, gY = problem.q.row(row), problem.y.row(row)  # (k,) each

        # What comes before needs no memory, and overlaps with the end of the kernel before.
        if const_expr(self.pdl):
            cute.arch.griddepcontrol_wait()
        upper = self.load_upper(problem, row, exists)
        scales = [self.load_scale(problem, Int32(row), segment, exists) for segment in segments]
        columns = self.tile.values_per_thread // self.fmt.value_type.per_byte
        tXrQ = [encodings.zeros(columns, gQ.element_type) for _ in segments]
        for i in cutlass.range_constexpr(len(segments)):
            copy.load(gQ, segments[i], exists, tXrQ[i], self.access)
        for i in cutlass.range_constexpr(len(segments)):
            decoded = encodings.decode(tXrQ[i], self.fmt)  # (values,)
            scale = self.float32_of_scale(scales[i], upper)
            tXrY = encodings.encode(encodings.multiply(decoded, scale), self.dtype)  # (values,)
            copy.store(tXrY, gY, segments[i], exists, self.access)

    @cute.jit
    def load_upper(self, problem: Problem, row: Uint32, exists: Boolean) -> Float32:
        """Load what the scales of a row are multiplied with."""
        upper = Float32(1.0)
        if const_expr(self.fmt.row_scale):
            if exists:
                upper = problem.upper[row]
        elif const_expr(self.upper is not None):
            upper = problem.upper.load_decode_scale()
        return upper

    @cute.jit
    def load_scale(
        self, problem: Problem, row: Int32, segment: Segment, exists: Boolean
    ) -> Uint8 | Float32:
        """Load the scale of a thread's values, 0 where there are none."""
        size, mS, k = self.fmt.group_size, problem.scales, problem.y.tensor.shape[1]
        scale = mS.element_type(0)
        tXcX = copy.column_coordinates(k, segment, self.tile.values_per_thread)
        if exists and tXcX[0] < k:
            if const_expr(size == WHOLE_ROW):
                scale = mS[row, 0]
            else:
                _, group = layouts.lanes(self.tile.lanes_per_group(size))(segment.lane)
                groups = layouts.groups_by_tile(mS.layout, self.tile.groups(size))
                scale = mS[row, groups((group, segment.tile))]
        return scale

    def float32_of_scale(self, stored: Uint8 | Float32, upper: Float32) -> Float32:
        """Return what values are multiplied with."""
        scale = stored
        if self.fmt.byte_scales:
            scale = scaling.float32_of_scale(Uint32(stored), self.fmt)
        return scale * upper if self.upper is not None else scale
