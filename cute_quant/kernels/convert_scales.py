"""Convert scales from one layout to another: load, re-encode, store.

A thread has four groups of a row, and of four rows where the result has these side by side: what it
stores is a word or a vector of 16 bytes. Both sides are addressed by layouts (batch, row, group).
"""

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint8, Uint32, const_expr
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from cute_quant.contract.dtypes import (
    BYTES_PER_WORD,
    FLOAT32_MANTISSA_BITS,
    NOT_A_POWER_OF_TWO,
    SCALE_ROW_ALIGNMENT,
    SMALLEST_UE8M0,
    UE8M0_NAN,
)
from cute_quant.contract.formats import Format
from cute_quant.contract.rows import DENSE, Indexed, Masked, PrefixSum
from cute_quant.kernels import encodings, layouts, row_domains
from cute_quant.kernels import scales as scaling
from cute_quant.kernels.config import CONVERT_WARPS, LANES, MAX_GRID_Z, ConvertSpec
from cute_quant.kernels.copy import fake_strided, store_atom
from cute_quant.kernels.params import Params
from cute_quant.kernels.stage import round_up

GROUPS = BYTES_PER_WORD
"""Groups of a thread, whose bytes make a word."""


@dataclass(eq=False, kw_only=True)
class Problem(Params):
    """Arguments of the kernel.

    Attributes:
        source, result: (batch, rows, groups), bytes, or float32 as their bits.
        counts: what the row domain reads; None where all rows exist.
        num_rows, num_groups: of a matrix.
        stored_rows: of a matrix of the result, padding included.
        missing_rows: padding rows of the last MN-major column without storage.
        alignment: of the first row of a group in a prefix sum.
        zero: bits of the float32 that the byte 0 becomes.
        first_batch: of the launch, where a grid does not count all.
    """

    source: cute.Tensor
    result: cute.Tensor
    counts: cute.Tensor | None
    num_rows: Uint32
    num_groups: Int32
    stored_rows: Uint32
    missing_rows: Uint32
    alignment: Int32
    zero: Uint32
    first_batch: Int32


class ConvertScales:
    """Entry point: scales in one layout to the same scales in another."""

    def __init__(self, spec: ConvertSpec):
        self.source = spec.source
        self.result = spec.result
        self.kind = spec.kind
        self.load_bytes = spec.load_bytes
        self.store_bytes = spec.store_bytes
        self.pdl = spec.pdl

    def signature(self) -> tuple:
        """Return stand-ins for the arguments, with the sizes that vary and the alignment."""
        batch = cute.sym_int32()
        counts = None
        if self.kind != DENSE:
            counts = make_fake_tensor(Int32, (cute.sym_int32(),), stride=(1,))
        return (
            fake_scales(self.source, batch, self.load_bytes),
            fake_scales(self.result, batch, self.store_bytes),
            counts,
            *[Int32(0)] * 5,
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        mS: cute.Tensor,  # (batch, mn, columns), or (batch, bytes) in blocks
        mR: cute.Tensor,  # the same
        mCounts: cute.Tensor | None,
        mn: Int32,
        groups: Int32,
        missing_rows: Int32,
        alignment: Int32,
        zero: Int32,
        stream: cuda.CUstream,
    ):
        """Launch the kernel, on batches of matrices."""
        batches = mS.shape[0]
        source = scale_tensor(self.source, mS, mn, groups)
        result = scale_tensor(self.result, mR, mn, groups)
        stored_rows = Uint32(mn)
        if const_expr(self.result.mn_major):
            stored_rows = round_up(stored_rows, SCALE_ROW_ALIGNMENT)
        elif const_expr(self.result.blocked):
            stored_rows = round_up(stored_rows, self.result.block_rows)
        tile_rows, tile_quads = layouts.conversion_tile(self.result)
        for first_batch in range(0, batches, MAX_GRID_Z):
            problem = Problem(
                source=source,
                result=result,
                counts=mCounts,
                num_rows=Uint32(mn),
                num_groups=groups,
                stored_rows=stored_rows,
                missing_rows=Uint32(missing_rows),
                alignment=alignment,
                zero=Uint32(zero),
                first_batch=first_batch,
            )
            self.kernel(problem).launch(
                grid=[
                    Int32((stored_rows + (tile_rows - 1)) // tile_rows),
                    cute.ceil_div(groups, GROUPS * tile_quads),
                    cutlass.min(batches - first_batch, MAX_GRID_Z),
                ],
                block=[LANES, CONVERT_WARPS, 1],
                stream=stream,
                use_pdl=self.pdl,
            )

    @cute.kernel
    def kernel(self, problem: Problem):
        """Convert four groups of a thread's rows."""
        if const_expr(self.pdl):
            cute.arch.griddepcontrol_launch_dependents()
        lane, warp, _ = cute.arch.thread_idx()
        row_tile, quad_tile, batch = cute.arch.block_idx()
        batch = problem.first_batch + batch
        tile_rows, tile_quads = layouts.conversion_tile(self.result)
        threads = layouts.conversion_threads(self.result)
        coordinates = [threads((lane, warp, i)) for i in range(cute.size(threads.shape[2]))]
        rows = [Uint32(row_tile) * tile_rows + Uint32(row) for row, _ in coordinates]
        group = (quad_tile * tile_quads + coordinates[0][1]) * GROUPS

        # What comes before needs no memory, and overlaps with the end of the kernel before.
        if const_expr(self.pdl):
            cute.arch.griddepcontrol_wait()
        exist = self.rows_that_exist(problem, batch, rows)
        loaded = [
            self.load(problem, batch, row, group, here)
            for row, here in zip(rows, exist, strict=True)
        ]
        if group < problem.num_groups:
            if const_expr(self.result.byte_scales):
                words = [self.word(scales) for scales in loaded]
                self.store_words(problem, batch, rows, group, words)
            else:
                floats = [
                    self.floats(problem, scales, here)
                    for scales, here in zip(loaded, exist, strict=True)
                ]
                self.store_floats(problem, batch, rows, group, floats)

    @cute.jit
    def rows_that_exist(self, problem: Problem, batch: Int32, rows: list) -> list:
        """Return whether there are such rows; the scales of others are 0."""
        num_rows = problem.num_rows
        if const_expr(self.kind == Masked.kind):
            num_rows = row_domains.clamp(problem.counts[batch], num_rows)
        exist = [row < num_rows for row in rows]
        if const_expr(self.kind == Indexed.kind):
            groups = [row_domains.index_of(problem.counts, row, num_rows) for row in rows]
            exist = [group >= 0 for group in groups]
        elif const_expr(self.kind == PrefixSum.kind):
            exist = row_domains.in_a_group_of_lane(
                problem.counts, problem.alignment, num_rows, rows
            )
        return exist

    @cute.jit
    def load(
        self, problem: Problem, batch: Int32, row: Uint32, group: Int32, exists: Boolean
    ) -> list:
        """Load the scales of four groups: a word of bytes, or four float32 as their bits.

        Those past the last group are 0, and all are in a row that does not exist.
        """
        mS, num_groups = problem.source, problem.num_groups
        itemsize = mS.element_type.width // 8
        loaded = encodings.zeros(GROUPS * itemsize // BYTES_PER_WORD, Uint32)
        exists = exists and group < num_groups
        if const_expr(self.load_bytes == GROUPS * itemsize):
            if exists:
                start = address(mS, (batch, Int64(row), group), self.load_bytes)
                vector = cute.make_tensor(cute.recast_ptr(start, dtype=Uint32), loaded.layout)
                cute.copy(store_atom(Uint32, cute.size(loaded), self.load_bytes), vector, loaded)
            if const_expr(itemsize == 1):
                # The padding of the source may hold anything.
                padding = cutlass.max(group + GROUPS - num_groups, 0)
                shift = Uint32(cutlass.min(padding, GROUPS - 1)) * 8
                loaded[0] = loaded[0] & (Uint32(0xFFFFFFFF) >> shift)
        else:
            for j in cutlass.range_constexpr(GROUPS):
                if exists and group + j < num_groups:
                    scale = Uint32(mS[batch, Int64(row), group + j])
                    if const_expr(itemsize == 1):
                        loaded[0] = loaded[0] | scale << 8 * j
                    else:
                        loaded[j] = scale
        return [loaded[i] for i in range(cute.size(loaded))]

    def word(self, scales: list) -> Uint32:
        """Return loaded scales as a word of four bytes."""
        if self.source.byte_scales:
            return scales[0]
        word = exponent(scales[0])
        for j in range(1, GROUPS):
            word = word | exponent(scales[j]) << 8 * j
        return word

    def floats(self, problem: Problem, scales: list, exists: Boolean) -> list:
        """Return loaded scales as the bits of four float32."""
        if not self.source.byte_scales:
            return scales
        bytes_ = [scales[0] >> 8 * j & Uint32(0xFF) for j in range(GROUPS)]
        return [float32_bits(byte, problem.zero, exists) for byte in bytes_]

    @cute.jit
    def store_words(self, problem: Problem, batch: Int32, rows: list, group: Int32, words: list):
        """Store a word of each row; those of several rows are contiguous."""
        mR, num_groups = problem.result, problem.num_groups
        nbytes = self.store_bytes
        start = address(mR, (batch, Int64(rows[0]), group), nbytes)
        last = group + GROUPS >= num_groups
        limit = self.rows_in_storage(problem, batch, last)
        if const_expr(len(rows) > 1 or nbytes == BYTES_PER_WORD or self.result.packed):
            store_vector(start, words, [row < limit for row in rows], nbytes)
        elif rows[0] < limit:
            for j in cutlass.range_constexpr(GROUPS):
                if group + j < num_groups:
                    mR[batch, Int64(rows[0]), group + j] = (words[0] >> 8 * j).to(Uint8)

    @cute.jit
    def store_floats(self, problem: Problem, batch: Int32, rows: list, group: Int32, floats: list):
        """Store four float32 of each row: vectors along M, or along N in row-major layouts."""
        mR, num_groups = problem.result, problem.num_groups
        nbytes = self.store_bytes
        if const_expr(self.result.mn_major):
            for j in cutlass.range_constexpr(GROUPS):
                if group + j < num_groups:
                    limit = self.rows_in_storage(problem, batch, group + j == num_groups - 1)
                    start = address(mR, (batch, Int64(rows[0]), group + j), nbytes)
                    column = [bits[j] for bits in floats]
                    store_vector(start, column, [row < limit for row in rows], nbytes)
        else:
            limit = self.rows_in_storage(problem, batch, Boolean(False))
            start = address(mR, (batch, Int64(rows[0]), group), nbytes)
            inside = [rows[0] < limit and group + j < num_groups for j in range(GROUPS)]
            store_vector(start, floats[0], inside, nbytes)

    @cute.jit
    def rows_in_storage(self, problem: Problem, batch: Int32, last_column: Boolean) -> Uint32:
        """Return the rows of a column of the result that have storage."""
        limit = problem.stored_rows
        if last_column and batch == problem.result.shape[0] - 1:
            limit = limit - problem.missing_rows
        return limit


@cute.jit
def exponent(bits: Uint32) -> Uint32:
    """Return the UE8M0 byte of a float32: NaN of what is no power of two, 0 of 0 and 2^-127."""
    byte = Uint32(UE8M0_NAN)
    if (bits & Uint32(NOT_A_POWER_OF_TWO)) == 0:
        byte = bits >> FLOAT32_MANTISSA_BITS
    elif bits == Uint32(SMALLEST_UE8M0):
        byte = Uint32(0)
    return byte


@cute.jit
def float32_bits(byte: Uint32, zero: Uint32, exists: Boolean) -> Uint32:
    """Return the bits of the float32 of a UE8M0 byte; `zero` of 0, and 0 of a row that is none."""
    bits = scaling.float32_of_ue8m0(byte).bitcast(Uint32)
    bits = bits if byte != 0 else zero
    return bits if exists else Uint32(0)


@cute.jit
def store_vector(start: cute.Pointer, words: list, inside: list, nbytes: cutlass.Constexpr[int]):
    """Store contiguous words: all at once where they are in storage, else one by one.

    Args:
        start: a byte pointer, aligned to `nbytes`.
        words: to store.
        inside: which of them are in storage: the first ones.
        nbytes: 16, 4 or 1 at once.
    """
    vector = nbytes == BYTES_PER_WORD * len(words)
    if const_expr(vector and len(words) > 1):
        if inside[len(words) - 1]:
            registers = cute.make_rmem_tensor(len(words), Uint32)
            for i in cutlass.range_constexpr(len(words)):
                registers[i] = words[i]
            gW = cute.make_tensor(cute.recast_ptr(start, dtype=Uint32), registers.layout)
            cute.copy(store_atom(Uint32, len(words), nbytes), registers, gW)
        else:
            store_each(start, words, inside, BYTES_PER_WORD)
    else:
        store_each(start, words, inside, min(nbytes, BYTES_PER_WORD))


@cute.jit
def store_each(start: cute.Pointer, words: list, inside: list, nbytes: cutlass.Constexpr[int]):
    """Store contiguous words one by one, or byte by byte."""
    for i in cutlass.range_constexpr(len(words)):
        if inside[i]:
            if const_expr(nbytes == BYTES_PER_WORD):
                gW = cute.make_tensor(cute.recast_ptr(start, dtype=Uint32), len(words))
                gW[i] = words[i]
            else:
                gB = cute.make_tensor(start, BYTES_PER_WORD * len(words))
                for j in cutlass.range_constexpr(BYTES_PER_WORD):
                    gB[BYTES_PER_WORD * i + j] = (words[i] >> 8 * j).to(Uint8)


def address(t: cute.Tensor, coordinate: tuple, nbytes: int) -> cute.Pointer:
    """Return a byte pointer to an element, which lies at a multiple of `nbytes`."""
    offset = Int64(t.layout(coordinate)) * (t.element_type.width // 8)
    return cute.recast_ptr(t.iterator, dtype=Uint8) + cute.assume(offset, divby=nbytes)


def scale_tensor(fmt: Format, t: cute.Tensor, mn: Int32, groups: Int32) -> cute.Tensor:
    """Return a tensor of scales as (batch, rows, groups), bytes or the bits of float32."""
    layout = layouts.batch_of_scales(fmt, t.layout, mn, groups)
    dtype = Uint8 if fmt.byte_scales else Uint32
    return cute.make_tensor(cute.recast_ptr(t.iterator, dtype=dtype), layout)


def fake_scales(fmt: Format, batch: Int32, nbytes: int) -> cute.Tensor:
    """Return a stand-in for a tensor of scales whose vectors start at multiples of `nbytes`."""
    dtype = Int32 if fmt.packed else Uint8 if fmt.byte_scales else Float32
    inner = 1 if fmt.blocked else 2
    shape = (batch, *(cute.sym_int32() for _ in range(inner)))
    return fake_strided(dtype, shape, nbytes)
