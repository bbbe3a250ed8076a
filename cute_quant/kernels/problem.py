"""Arguments of the kernels that quantize rows, as entry points take them and as kernels do."""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, const_expr

from cute_quant.kernels.layouts import Matrix
from cute_quant.kernels.params import Params
from cute_quant.kernels.stage import Scales


class Operands(NamedTuple):
    """Arguments that all kernels which quantize rows have after x, in their order.

    Attributes:
        mQ: (q_rows, k) or (batch, q_rows, k), q_rows >= mn.
        mS: as the format has it; None where only values are wanted.
        mCounts: what the row domain reads: (experts,), (groups,) or (mn,).
        mIndex: row of x of each row of the result, (mn,) or (batch, mn).
        missing_rows: padding rows of the last MN-major scale column without storage.
        alignment: of the first row of a group in a prefix sum.
        row_ctas: CTAs that share the rows of all experts.
        floor: smallest scale, an exponent where scales are powers of two.
    """

    mQ: cute.Tensor
    mS: cute.Tensor | None
    mCounts: cute.Tensor | None
    mIndex: cute.Tensor | None
    missing_rows: Int32
    alignment: Int32
    row_ctas: Int32
    floor: Int32 | Float32


class Problem(Params):
    """Arguments of a kernel, for a batch of matrices or one of them.

    Attributes:
        prologue: yields the values that are quantized.
        q: (q_rows, k) or (batch, q_rows, k).
        scales: None where only values are wanted.
        scale_bound: as `Stage.scale_bound` returns it.
        num_rows: the first rows exist.
        num_q_rows: rows of q to be written, those that do not exist as 0.
        num_row_tiles: tiles of rows of a matrix.
        counts, index, alignment: as of `Operands`.
        dedicated_tiles: the first tiles of each expert, which have CTAs to themselves.
    """

    def __init__(
        self,
        *,
        prologue: Params,
        q: Matrix,
        scales: Scales | None,
        scale_bound: Float32,
        num_rows: Uint32,
        num_q_rows: Uint32,
        num_row_tiles: Int32,
        dedicated_tiles: Int32,
        counts: cute.Tensor | None,
        index: cute.Tensor | None,
        alignment: Int32,
    ):
        self.scale_bound = scale_bound
        self.prologue = prologue
        self.q = q
        self.scales = scales
        self.num_rows = num_rows
        self.num_q_rows = num_q_rows
        self.num_row_tiles = num_row_tiles
        self.dedicated_tiles = dedicated_tiles
        self.counts = counts
        self.index = index
        self.alignment = alignment

    @property
    def k(self) -> Int32:
        """Return the columns of q."""
        return self.q.tensor.shape[-1]

    @property
    def batches(self) -> Int32:
        """Return the matrices of a batch."""
        return self.q.tensor.shape[0]

    def slice_batch(self, batch: Int32) -> Problem:
        """Return the problem of one matrix of a batch."""
        scales, index, gathered = self.scales, self.index, self.index is not None
        if const_expr(scales is not None):
            scales = scales.slice_batch(batch, batch == self.batches - 1)
        if const_expr(gathered):
            index = index[batch, None]
        prologue = self.prologue.slice_batch(batch, gathered)
        return self.replace(prologue=prologue, q=self.q[batch], scales=scales, index=index)

    def slice_expert(self, expert: Int32, count: Int32) -> Problem:
        """Return the problem of an expert that has `count` rows."""
        scales = self.scales.slice_rows(count)
        rows = {"num_rows": Uint32(count), "num_q_rows": Uint32(count)}
        return self.replace(scales=scales, **rows).slice_batch(expert)
