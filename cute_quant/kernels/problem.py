"""Arguments of the kernels that quantize rows, as entry points take them and as kernels do."""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, const_expr

from cute_quant.kernels.layouts import Matrix
from cute_quant.kernels.params import Params
from cute_quant.kernels.philox import Random, RngState
from cute_quant.kernels.stage import Scales
from cute_quant.kernels.upper_scales import Factors, UpperScale


class Operands(NamedTuple):
    """Arguments that all kernels which quantize rows have after x, in their order.

    Attributes:
        mQ: (q_rows, k) or (batch, q_rows, k), or k / 2 bytes of two values; q_rows >= mn.
        mS: as the format has it; None where only values are wanted.
        mUpper: the scale over e4m3 scales, (1,), (batch,) or (groups,), or, where each row has its
            own, their memory, (mn,) or (batch, mn); None without.
        mCounts: what the row domain reads: (experts,), (groups,) or (mn,).
        mIndex: row of x of each row of the result, (mn,) or (batch, mn); or rows of the result of
            each row of x, (tokens, places), numbered through all matrices.
        mRng: seed and offset of random numbers, (2,), None where values are rounded to nearest.
        missing_rows: padding rows of the last MN-major scale column without storage.
        alignment: of the first row of a group in a prefix sum.
        row_ctas: CTAs that share the rows of all experts.
        floor: smallest scale, an exponent where scales are powers of two.
    """

    mQ: cute.Tensor
    mS: cute.Tensor | None
    mUpper: cute.Tensor | None
    mCounts: cute.Tensor | None
    mIndex: cute.Tensor | None
    mRng: cute.Tensor | None
    missing_rows: Int32
    alignment: Int32
    row_ctas: Int32
    floor: Int32 | Float32


class Problem(Params):
    """Arguments of a kernel, for a batch of matrices or one of them.

    Attributes:
        prologue: yields the values that are quantized.
        q: (q_rows, columns) or (batch, q_rows, columns).
        values_per_column: values in an element of q.
        scales: None where only values are wanted.
        scale_bound: as `Stage.scale_bound` returns it, or the scale over those of groups.
        row_scales: where each row's scale goes, (mn,) or (batch, mn), or None.
        num_rows: the first rows exist.
        num_q_rows: rows of q to be written, those that do not exist as 0.
        num_row_tiles: tiles of rows of a matrix, or of x where rows are scattered.
        counts, index, alignment: as of `Operands`.
        dedicated_tiles: the first tiles of each expert, which have CTAs to themselves.
        rng: where random numbers come from, or None.
    """

    static = ("values_per_column",)

    def __init__(
        self,
        *,
        prologue: Params,
        q: Matrix,
        values_per_column: int,
        scales: Scales | None,
        scale_bound: Float32 | UpperScale,
        row_scales: cute.Tensor | None,
        num_rows: Uint32,
        num_q_rows: Uint32,
        num_row_tiles: Int32,
        dedicated_tiles: Int32,
        counts: cute.Tensor | None,
        index: cute.Tensor | None,
        alignment: Int32,
        rng: RngState | None,
    ):
        self.scale_bound = scale_bound
        self.prologue = prologue
        self.q = q
        self.values_per_column = values_per_column
        self.row_scales = row_scales
        self.scales = scales
        self.num_rows = num_rows
        self.num_q_rows = num_q_rows
        self.num_row_tiles = num_row_tiles
        self.dedicated_tiles = dedicated_tiles
        self.counts = counts
        self.index = index
        self.alignment = alignment
        self.rng = rng

    @property
    def k(self) -> Int32:
        """Return the columns of the result."""
        return self.q.tensor.shape[-1] * self.values_per_column

    @property
    def batches(self) -> Int32:
        """Return the matrices of a batch."""
        return self.q.tensor.shape[0]

    def load_bound(self, group: Int32 | None = None) -> Float32 | Factors:
        """Return what `Stage.scale` takes; the scale over those of groups is read.

        Args:
            group: of the row, where each group of rows has its own; None else.
        """
        bound = self.scale_bound
        if not isinstance(bound, UpperScale):
            return bound
        return bound.load() if group is None else bound.load_of_group(group)

    def random_of_row(self, row: Uint32) -> Random | None:
        """Return random numbers for a row of the result, None where none are wanted."""
        return None if self.rng is None else self.rng.of_row(row)

    def slice_batch(self, batch: Int32) -> Problem:
        """Return the problem of one matrix of a batch."""
        index, gathered, bound = self.index, self.index is not None, self.scale_bound
        rng = self.rng
        if const_expr(isinstance(bound, UpperScale)):
            bound = bound.slice_batch(batch)
        if const_expr(rng is not None):
            rng = rng.slice_batch(batch)
        result = self.slice_result(batch)
        if const_expr(gathered):
            index = index[batch, None]
        prologue = self.prologue.slice_batch(batch, gathered)
        return result.replace(prologue=prologue, scale_bound=bound, index=index, rng=rng)

    def slice_result(self, batch: Int32) -> Problem:
        """Return a problem whose results are one matrix of a batch, and whose input is all."""
        scales, row_scales = self.scales, self.row_scales
        if const_expr(row_scales is not None):
            row_scales = row_scales[batch, None]
        if const_expr(scales is not None):
            scales = scales.slice_batch(batch, batch == self.batches - 1)
        return self.replace(q=self.q[batch], scales=scales, row_scales=row_scales)

    def slice_expert(self, expert: Int32, count: Int32) -> Problem:
        """Return the problem of an expert that has `count` rows."""
        scales = self.scales.slice_rows(count)
        rows = {"num_rows": Uint32(count), "num_q_rows": Uint32(count)}
        return self.replace(scales=scales, **rows).slice_batch(expert)
