"""Add up rows that lie in different places: load, multiply by factors, add, round, store.

A warp has a tile of columns of one record, a vector a thread. Its lanes load the places of the
record's rows, and the warp goes through those that exist, in their order, several at once. Products
and sums are rounded each, as torch does: no product is fused with a sum.
"""

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, const_expr
from cutlass.cute.runtime import make_fake_stream

from cute_quant.kernels import copy, encodings, ptx
from cute_quant.kernels.config import (
    COMBINE_CTAS,
    COMBINE_WARPS,
    LANES,
    MAX_GRID_Y,
    CombineSpec,
)
from cute_quant.kernels.copy import Segment
from cute_quant.kernels.encodings import ELEMENT_TYPES
from cute_quant.kernels.layouts import Matrix
from cute_quant.kernels.params import Params


@dataclass(eq=False)
class Problem(Params):
    """Arguments of the kernel.

    Attributes:
        rows: (rows, n).
        places: (records, choices), int32: the row of each choice, -1 for none.
        factors: (records, choices), float32: of these rows; None where they are 1.
        out: (records, n).
        first_record: of the launch, where a grid does not count all.
    """

    rows: Matrix
    places: cute.Tensor
    factors: cute.Tensor | None
    out: Matrix
    first_record: Int32


class Combine:
    """Entry point: rows, and the places of each record's, to their sums."""

    def __init__(self, spec: CombineSpec):
        self.spec = spec
        self.dtype = ELEMENT_TYPES[spec.dtype]
        self.values = spec.values_per_thread

    def signature(self) -> tuple:
        """Return stand-ins for the arguments, with the sizes that vary and the alignment."""
        spec = self.spec
        records, choices = cute.sym_int32(), cute.sym_int32()
        n = cute.sym_int32(divisibility=1 if spec.access.ragged else self.values)
        factors = None
        if spec.weighted:
            factors = copy.fake_strided(Float32, (records, choices), Float32.width // 8)
        return (
            copy.fake_matrix(self.dtype, (cute.sym_int32(), n), spec.access.load_bytes),
            copy.fake_strided(Int32, (records, choices), Int32.width // 8),
            factors,
            copy.fake_matrix(self.dtype, (records, n), spec.access.store_bytes),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        mRows: cute.Tensor,  # (rows, n)
        mPlaces: cute.Tensor,  # (records, choices)
        mFactors: cute.Tensor | None,  # (records, choices)
        mOut: cute.Tensor,  # (records, n)
        stream: cuda.CUstream,
    ):
        """Launch the kernel, on as many records at once as a grid counts."""
        records, n = mOut.shape
        for first_record in range(0, records, MAX_GRID_Y):
            problem = Problem(Matrix(mRows), mPlaces, mFactors, Matrix(mOut), first_record)
            self.kernel(problem).launch(
                grid=[
                    cute.ceil_div(n, LANES * self.values * COMBINE_WARPS),
                    cutlass.min(records - first_record, MAX_GRID_Y),
                    1,
                ],
                block=[LANES, COMBINE_WARPS, 1],
                # Else the compiler saves registers, and has a thread wait for each row by itself.
                min_blocks_per_mp=COMBINE_CTAS,
                preferred_smem_carveout=0,
                stream=stream,
                use_pdl=self.spec.pdl,
            )

    @cute.kernel
    def kernel(self, problem: Problem):
        """Add up a record's rows in the columns of a CTA."""
        if const_expr(self.spec.pdl):
            cute.arch.griddepcontrol_launch_dependents()
        lane, warp, _ = cute.arch.thread_idx()
        column_cta, record, _ = cute.arch.block_idx()
        record = problem.first_record + record
        segment = Segment(column_cta * COMBINE_WARPS + warp, lane)
        if const_expr(self.spec.pdl):
            cute.arch.griddepcontrol_wait()
        total = encodings.zeros(self.values, Float32)
        choices = problem.places.shape[1]
        for first in range(0, choices, LANES):
            self.add_rows(problem, record, first + lane, segment, total)
        rounded = encodings.encode(total, self.dtype)
        copy.store(rounded, problem.out.row(record), segment, True, self.spec.access)

    @cute.jit
    def add_rows(
        self,
        problem: Problem,
        record: Int32,
        choice: Int32,
        segment: Segment,
        total: cute.Tensor,  # (values,)
    ):
        """Add a thread's columns of the rows of a warp's choices, of which each lane has one."""
        place, factor = Int32(-1), Float32(0.0)
        if choice < problem.places.shape[1]:
            place = problem.places[record, choice]
            if const_expr(self.spec.weighted):
                factor = problem.factors[record, choice]
        # As unsigned, -1 lies past the last row.
        left = Uint32(cute.arch.vote_ballot_sync(Uint32(place) < problem.rows.rows))
        while left != Uint32(0):
            left = self.add_some(problem, place, factor, left, segment, total)

    @cute.jit
    def add_some(
        self,
        problem: Problem,
        place: Int32,
        factor: Float32,
        left: Uint32,
        segment: Segment,
        total: cute.Tensor,  # (values,)
    ) -> Uint32:
        """Add a thread's columns of the rows of the next lanes, and return which lanes are left.

        Past the last of them its row is loaded again, and counts as zeros: without a predicate of
        its own each load is issued before the first is waited for.

        Args:
            problem: arguments of the kernel.
            place: the row of each lane.
            factor: of that row.
            left: a bit for each lane whose row exists, one at least.
            segment: of the thread.
            total: (values,), the sums so far.
        """
        lane = lowest_bit(left)
        exists, rows, factors, registers = [], [], [], []
        for _ in cutlass.range_constexpr(self.spec.in_flight):
            exists.append(left != Uint32(0))
            lane = lowest_bit(left) if left != Uint32(0) else lane
            left = left & (left - 1)
            rows.append(problem.rows.row(cute.arch.shuffle_sync(place, lane)))
            if const_expr(self.spec.weighted):
                factors.append(cute.arch.shuffle_sync(factor, lane))
            registers.append(encodings.zeros(self.values, self.dtype))
        for i in cutlass.range_constexpr(self.spec.in_flight):
            copy.load(rows[i], segment, True, registers[i], self.spec.access)
        for i in cutlass.range_constexpr(self.spec.in_flight):
            encodings.clear_unless(exists[i], registers[i])
            terms = encodings.widen(registers[i])  # (values,)
            if const_expr(self.spec.weighted):
                # Zeros times a factor that is not finite would be NaN.
                of_row = factors[i] if exists[i] else Float32(0.0)
                for j in cutlass.range_constexpr(self.values):
                    terms[j] = ptx.mul_rn(terms[j], of_row)
            # A sum that starts at 0 is never -0, so zeros leave it as it is.
            total.store(total.load() + terms.load())
        return left


def lowest_bit(bits: Uint32) -> Int32:
    """Return the index of the lowest bit that is set, of one that is."""
    return Int32(cute.arch.popc(~bits & (bits - 1)))
