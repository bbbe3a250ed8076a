"""The largest magnitude of each matrix of a batch, in one pass over memory.

Every CTA stores the largest magnitude of its part. There is no atomic maximum: the result needs no
memory that is cleared before, and a second, tiny launch over the parts is the same kernel. The
parts are float32, whatever x is, and the last launch has one CTA for each matrix.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint32, const_expr
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from cute_quant.kernels import copy, encodings
from cute_quant.kernels import scales as scaling
from cute_quant.kernels.arithmetic import FLOAT32_INFINITY, FLOAT32_NAN
from cute_quant.kernels.config import (
    AMAX_WARPS,
    DEFAULT_TILE,
    LANES,
    MAX_GRID_Z,
    Access,
    AmaxSpec,
)
from cute_quant.kernels.copy import Segment
from cute_quant.kernels.encodings import ELEMENT_TYPES
from cute_quant.kernels.layouts import Matrix
from cute_quant.kernels.params import Params

VALUES = DEFAULT_TILE.values_per_thread


class Problem(Params):
    """Arguments of the kernel, for a batch of matrices or one of them.

    Attributes:
        x: (batch, rows, k).
        parts: (batch, CTAs), the largest magnitude of each CTA's part of a matrix.
        column_warps, row_warps: warps of a CTA along N and along M, ``AMAX_WARPS`` in all.
        num_row_tiles: tiles of `row_warps` rows.
        num_column_tiles: tiles of a row, each the columns that a warp has in flight at once.
    """

    def __init__(self, x: Matrix, parts: cute.Tensor, column_warps: Int32, columns: int):
        self.x = x
        self.parts = parts
        self.column_warps = column_warps
        self.row_warps = AMAX_WARPS // column_warps
        # Signed, for the loop over them: there are at most 2^31 - 1 rows.
        rows_per_tile = Uint32(self.row_warps)
        self.num_row_tiles = Int32((x.rows + (rows_per_tile - 1)) // rows_per_tile)
        self.num_column_tiles = cute.ceil_div(x.tensor.shape[2], columns)

    def slice_batch(self, batch: Int32) -> "Problem":
        """Return the problem of one matrix of a batch."""
        return self.replace(x=self.x[batch], parts=self.parts[batch, None])


class Amax:
    """Entry point: a batch of matrices to the largest magnitudes of their parts."""

    def __init__(self, spec: AmaxSpec):
        self.dtype = ELEMENT_TYPES[spec.dtype]
        # A row may end anywhere: of contiguous memory there is one, and its end costs nothing.
        self.access = Access(load_bytes=spec.load_bytes, ragged=True)
        self.tiles = spec.tiles
        self.pdl = spec.pdl

    def signature(self) -> tuple:
        """Return stand-ins for the arguments, with the sizes that vary and the alignment."""
        batch = cute.sym_int32()
        parts = (batch, cute.sym_int32())
        return (
            copy.fake_matrix(
                self.dtype, (batch, cute.sym_int32(), cute.sym_int32()), self.access.load_bytes
            ),
            make_fake_tensor(Float32, parts, stride=(cute.sym_int64(), 1)),
            Int32(0),
            Int32(0),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,  # (batch, rows, k)
        mParts: cute.Tensor,  # (batch, column CTAs * row CTAs)
        column_warps: Int32,
        column_ctas: Int32,
        stream: cuda.CUstream,
    ):
        """Launch the kernel with as many CTAs for each matrix as there are parts."""
        problem = Problem(Matrix(mX), mParts, column_warps, LANES * VALUES * self.tiles)
        self.kernel(problem).launch(
            grid=[
                column_ctas,
                mParts.shape[1] // column_ctas,
                cutlass.min(mX.shape[0], MAX_GRID_Z),
            ],
            block=[LANES, column_warps, problem.row_warps],
            # The product counts.
            max_number_threads=[LANES, AMAX_WARPS, 1],
            stream=stream,
            use_pdl=self.pdl,
        )

    @cute.kernel
    def kernel(self, problem: Problem):
        """Find the largest magnitude of the CTA's part of each matrix that it takes."""
        if const_expr(self.pdl):
            cute.arch.griddepcontrol_launch_dependents()
        _, _, z = cute.arch.block_idx()
        _, _, depth = cute.arch.grid_dim()
        memory = cute.arch.alloc_smem(Uint32, AMAX_WARPS, alignment=16)
        warp_amaxes = cute.make_tensor(memory, cute.make_layout(AMAX_WARPS))
        if const_expr(self.pdl):
            cute.arch.griddepcontrol_wait()
        for batch in range(z, problem.x.tensor.shape[0], depth):
            self.reduce_part(problem.slice_batch(batch), warp_amaxes)

    @cute.jit
    def reduce_part(self, problem: Problem, warp_amaxes: cute.Tensor):
        """Store the largest magnitude of the CTA's part of a matrix."""
        lane, column_warp, slot = cute.arch.thread_idx()
        column_warps, row_warps = problem.column_warps, problem.row_warps
        warp = slot * column_warps + column_warp
        column_cta, row_cta, _ = cute.arch.block_idx()
        column_ctas, row_ctas, _ = cute.arch.grid_dim()

        amax = Uint32(0)
        for row_tile in range(row_cta, problem.num_row_tiles, row_ctas):
            row = Uint32(row_tile) * Uint32(row_warps) + Uint32(slot)
            exists = row < problem.x.rows
            gX = problem.x.row(row)  # (k,)
            first = column_cta * column_warps + column_warp
            for tile in range(first, problem.num_column_tiles, column_ctas * column_warps):
                amax = self.larger(amax, self.load_amax(gX, lane, tile, exists))

        amax = self.warp_amax(amax)
        if lane == 0:
            warp_amaxes[warp] = amax
        cute.arch.barrier()
        if warp == 0:
            amax = Uint32(0)
            if lane < AMAX_WARPS:
                amax = Uint32(warp_amaxes[lane])
            amax = cute.arch.warp_reduction(amax, cutlass.max, threads_in_group=AMAX_WARPS)
            if amax > Uint32(FLOAT32_INFINITY):
                amax = Uint32(FLOAT32_NAN)
            if lane == 0:
                problem.parts[row_cta * column_ctas + column_cta] = amax.bitcast(Float32)
        # The next matrix has the same shared memory.
        cute.arch.barrier()

    @cute.jit
    def load_amax(self, gX: cute.Tensor, lane: Int32, tile: Int32, exists: Boolean) -> Uint32:
        """Load a thread's segments of a row, and return their largest magnitude.

        It is one as `scales.thread_amax` returns it. All loads are issued before the first is used.
        """
        loaded = []
        for i in cutlass.range_constexpr(self.tiles):
            tXrX = encodings.zeros(VALUES, self.dtype)  # (values,)
            copy.load(gX, Segment(tile * self.tiles + i, lane), exists, tXrX, self.access)
            loaded.append(tXrX)
        amax = scaling.thread_amax(loaded[0])
        for i in cutlass.range_constexpr(1, self.tiles):
            amax = self.larger(amax, scaling.thread_amax(loaded[i]))
        return amax

    def larger(self, a: Uint32, b: Uint32) -> Uint32:
        """Return the larger of two of `scales.thread_amax`."""
        return scaling.larger(self.dtype)(a, b)

    def warp_amax(self, amax: Uint32) -> Uint32:
        """Return the largest magnitude of a warp as the bits of a float32."""
        amax = scaling.group_amax(amax, self.dtype, LANES)
        return amax & ~Uint32(scaling.BELOW_PRECISION[self.dtype])
