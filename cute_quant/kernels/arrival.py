"""Lay out records that arrive: values in rows, and scales as a GEMM reads them. Load, store.

A record holds values and scales of a row, one after the other. A CTA has a row for each lane of a
warp. Its warps copy the values of one row after the other. Then lane i has the scales of row i:
words of neighbouring rows are stored together, which in MN-major layouts lie side by side.
"""

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint8, Uint32, const_expr
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from cute_quant.contract.dtypes import BYTES_PER_WORD, SCALE_ROW_ALIGNMENT, STORE_BYTES
from cute_quant.kernels import copy, encodings, row_domains
from cute_quant.kernels.config import ARRIVAL_WARPS, LANES, MAX_GRID_Y, Access, ArrivalSpec
from cute_quant.kernels.convert_scales import address, fake_scales, scale_tensor
from cute_quant.kernels.copy import Segment
from cute_quant.kernels.params import Params
from cute_quant.kernels.stage import round_up

VALUES = Access(STORE_BYTES, STORE_BYTES)
"""To bytes of values, of which a thread copies as many as it stores at once."""
IN_FLIGHT = 4
"""Loads of a thread that are in flight at once."""


@dataclass(eq=False, kw_only=True)
class Problem(Params):
    """Arguments of the kernel.

    Attributes:
        values: (records, bytes), uint8: values of a record come first.
        words: (records, words), the same memory.
        scale_word: the first word of a record that holds scales.
        num_words: words of scales of a row.
        sources: (batch, rows), the record of each row.
        counts: (batch,), rows that exist of masked experts; None where all do.
        q: (batch, rows, bytes).
        scales: (batch, rows, groups), bytes, or float32 as their bits.
        stored_rows: of a matrix of scales, padding included.
    """

    values: cute.Tensor
    words: cute.Tensor
    scale_word: Int32
    num_words: Int32
    sources: cute.Tensor
    counts: cute.Tensor | None
    q: cute.Tensor
    scales: cute.Tensor
    stored_rows: Uint32


class Arrival:
    """Entry point: records to values and scales in the rows that take them."""

    def __init__(self, spec: ArrivalSpec):
        self.spec = spec
        self.fmt = spec.fmt
        self.groups_per_word = BYTES_PER_WORD if spec.fmt.byte_scales else 1

    def signature(self) -> tuple:
        """Return stand-ins for the arguments, with the sizes that vary and the alignment."""
        batch, rows = cute.sym_int32(), cute.sym_int32()
        counts = None
        if self.spec.masked:
            counts = make_fake_tensor(Int32, (batch,), stride=(1,))
        return (
            copy.fake_matrix(Uint8, (cute.sym_int32(), cute.sym_int32()), STORE_BYTES),
            make_fake_tensor(Int64, (batch, rows), stride=(cute.sym_int64(), 1)),
            counts,
            copy.fake_matrix(Uint8, (batch, rows, cute.sym_int32()), STORE_BYTES),
            fake_scales(self.fmt, batch, BYTES_PER_WORD),
            Int32(0),
            Int32(0),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        mRecords: cute.Tensor,  # (records, bytes)
        mSources: cute.Tensor,  # (batch, rows)
        mCounts: cute.Tensor | None,  # (batch,)
        mQ: cute.Tensor,  # (batch, rows, bytes)
        mS: cute.Tensor,  # (batch, rows, columns), or (batch, bytes) in blocks
        groups: Int32,
        scale_start: Int32,  # in bytes of a record
        stream: cuda.CUstream,
    ):
        """Launch the kernel."""
        batches, rows = mSources.shape
        records, nbytes = mRecords.shape
        stored_rows = Uint32(rows)
        if const_expr(self.fmt.mn_major):
            stored_rows = round_up(stored_rows, SCALE_ROW_ALIGNMENT)
        elif const_expr(self.fmt.blocked):
            stored_rows = round_up(stored_rows, self.fmt.block_rows)
        words = cute.make_layout(
            (records, nbytes // BYTES_PER_WORD), stride=(mRecords.stride[0] // BYTES_PER_WORD, 1)
        )
        problem = Problem(
            values=mRecords,
            words=cute.make_tensor(cute.recast_ptr(mRecords.iterator, dtype=Uint32), words),
            scale_word=scale_start // BYTES_PER_WORD,
            num_words=cute.ceil_div(groups, self.groups_per_word),
            sources=mSources,
            counts=mCounts,
            q=mQ,
            scales=scale_tensor(self.fmt, mS, rows, groups),
            stored_rows=stored_rows,
        )
        self.kernel(problem).launch(
            grid=[
                Int32((stored_rows + (LANES - 1)) // LANES),
                cutlass.min(batches, MAX_GRID_Y),
                1,
            ],
            block=[LANES, ARRIVAL_WARPS, 1],
            stream=stream,
            use_pdl=self.spec.pdl,
        )

    @cute.kernel
    def kernel(self, problem: Problem):
        """Lay out the records of a CTA's rows, in each matrix that it takes."""
        if const_expr(self.spec.pdl):
            cute.arch.griddepcontrol_launch_dependents()
            cute.arch.griddepcontrol_wait()
        row_tile, first_batch, _ = cute.arch.block_idx()
        _, step, _ = cute.arch.grid_dim()
        for batch in range(first_batch, problem.q.shape[0], step):
            self.lay_out(problem, batch, row_tile * LANES)

    @cute.jit
    def lay_out(self, problem: Problem, batch: Int32, first_row: Int32):
        """Copy values of rows, a warp those of one after the other, and scales, a lane each."""
        lane, warp, _ = cute.arch.thread_idx()
        num_rows, limit = Uint32(problem.q.shape[1]), problem.stored_rows
        if const_expr(self.spec.masked):
            num_rows = row_domains.clamp(problem.counts[batch], num_rows)
            limit = cutlass.min(round_up(num_rows, SCALE_ROW_ALIGNMENT), limit)
        row, source = Uint32(first_row + lane), Int32(-1)
        if row < num_rows:
            source = Int32(problem.sources[batch, Int64(row)])
        rows_of_warp = LANES // ARRIVAL_WARPS
        for i in range(rows_of_warp):
            place = warp * rows_of_warp + i
            of_row = cute.arch.shuffle_sync(source, place)
            if of_row >= 0:
                self.copy_values(problem, batch, first_row + place, of_row)
        for word in range(warp, problem.num_words, ARRIVAL_WARPS):
            if row < limit:
                bits = Uint32(0)
                if source >= 0:
                    bits = Uint32(problem.words[Int64(source), problem.scale_word + word])
                coordinate = (batch, Int64(row), word * self.groups_per_word)
                start = address(problem.scales, coordinate, BYTES_PER_WORD)
                gW = cute.make_tensor(cute.recast_ptr(start, dtype=Uint32), 1)
                gW[0] = bits

    @cute.jit
    def copy_values(self, problem: Problem, batch: Int32, row: Int32, source: Int32):
        """Copy the values of a row by a warp."""
        lane, _, _ = cute.arch.thread_idx()
        nbytes = problem.q.shape[2]
        gV = row_of(problem.values, Int64(source), nbytes)
        gQ = row_of(problem.q[batch, None, None], Int64(row), nbytes)
        tiles = cute.ceil_div(nbytes, LANES * STORE_BYTES)
        for tile in range(0, tiles, IN_FLIGHT):
            segments = [Segment(tile + i, lane) for i in range(IN_FLIGHT)]
            registers = [encodings.zeros(STORE_BYTES, Uint8) for _ in segments]
            for i in cutlass.range_constexpr(IN_FLIGHT):
                copy.load(gV, segments[i], True, registers[i], VALUES)
            for i in cutlass.range_constexpr(IN_FLIGHT):
                copy.store(registers[i], gQ, segments[i], True, VALUES)


def row_of(m: cute.Tensor, row: Int64, columns: Int32) -> cute.Tensor:
    """Return the first columns of a row of a matrix."""
    start = m.iterator + cute.assume(row * m.stride[0], divby=STORE_BYTES)
    return cute.make_tensor(start, cute.make_layout(columns))
