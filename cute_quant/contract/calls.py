"""One call of a quantizer: its tensors, its format and its rows."""

from __future__ import annotations

from typing import NamedTuple

import torch

from cute_quant.contract.formats import Format
from cute_quant.contract.prologues import Prologue
from cute_quant.contract.rows import Indexed, Masked, PrefixSum, Rows
from cute_quant.contract.tensors import has_dense_columns
from cute_quant.contract.upper_scales import UpperScale


class ResultShape(NamedTuple):
    """Leading dimensions, rows and columns of the values of a call."""

    batch_shape: tuple[int, ...]
    mn: int
    k: int

    def values(self, fmt: Format) -> tuple[int, ...]:
        """Return the shape of q, whose bytes may hold two columns each."""
        return (*self.batch_shape, self.mn, Format.value_columns(fmt, self.k))


class Call(NamedTuple):
    """A call of ``cute_quant.quantize``, or of a fused operation that ends in it.

    Attributes:
        x: the input, (..., mn, k), or (T, k) with an index; (..., 2 k) for SiLU.
        fmt: what the result looks like.
        q, sf: the caller's memory for values and scales, None to allocate it.
        rows: which rows exist; None for all of them.
        index: row of x for each row of the result, None for its own.
        prologue: the operation before the quantizer, with its tensors.
        upper: the scale over e4m3 scales, None for formats without one or with one for each row.
        row_scales: the caller's memory for the decode scales of rows, None to allocate it or
            without any.
        rng_state: seed and offset of the random numbers that values are rounded with, None to round
            to nearest.
        scatter: rows of the result for each row of x, (T, places), None for its own.
        num_rows: rows of a matrix of the result of a scatter; None for those of `q`, or of the
            indices of ``Indexed`` rows.
    """

    x: torch.Tensor
    fmt: Format
    q: torch.Tensor | None = None
    sf: torch.Tensor | None = None
    rows: Rows | None = None
    index: torch.Tensor | None = None  # type: ignore[assignment]  # hides tuple.index
    prologue: Prologue | None = None
    upper: UpperScale | None = None
    row_scales: torch.Tensor | None = None
    rng_state: torch.Tensor | None = None
    scatter: torch.Tensor | None = None
    num_rows: int | None = None

    @property
    def upper_of_groups(self) -> bool:
        """Return whether each group of rows stacked along M has an upper scale of its own."""
        return (
            self.upper is not None
            and isinstance(self.rows, PrefixSum | Indexed)
            and self.upper.tensor.ndim == 1
            and self.upper.tensor.shape[0] != 1
        )

    @property
    def strided_scales(self) -> bool:
        """Return whether rows of scales may lie apart, as in records of values and scales."""
        fmt, sf = self.fmt, self.sf
        if self.scatter is None or sf is None or isinstance(self.rows, Masked):
            return False
        row_major = not (fmt.mn_major or fmt.blocked)
        return row_major and sf.ndim == 2 and bool(sf.stride(0) != sf.shape[1])

    @property
    def dense_scales(self) -> bool:
        """Return whether the caller's MN-major scales have columns without padding rows."""
        return self.sf is not None and self.fmt.mn_major and has_dense_columns(self.sf)

    @property
    def input_name(self) -> str:
        """Return the name of the argument that `x` was given as."""
        return "x" if self.prologue is None else self.prologue.input_name

    @property
    def is_plain(self) -> bool:
        """Return whether all rows of x are quantized, in their order, without a prologue."""
        parts = self.rows, self.index, self.scatter, self.prologue, self.row_scales, self.rng_state
        return all(part is None for part in parts)

    @property
    def row_map(self) -> torch.Tensor | None:
        """Return the tensor that takes rows of x to rows of the result, or these to those."""
        return self.index if self.scatter is None else self.scatter

    @property
    def tensors(self) -> dict[str, torch.Tensor | None]:
        """Return all tensors by the names of their arguments."""
        tensors = {
            self.input_name: self.x,
            "out q": self.q,
            "out sf": self.sf,
            "index": self.index,
            "scatter": self.scatter,
        }
        if self.rows is not None:
            tensors[f"rows.{self.rows.data_name}"] = self.rows.data
        if self.upper is not None:
            tensors[self.upper.kind] = self.upper.tensor
        if self.row_scales is not None:
            tensors["out row scales"] = self.row_scales
        if self.rng_state is not None:
            tensors["rng_state"] = self.rng_state
        return tensors if self.prologue is None else tensors | self.prologue.tensors

    @property
    def result_shape(self) -> ResultShape:
        """Return the shape of the values, without a look at what is wrong with the call.

        Raises:
            ValueError: nothing says how many rows the result of a scatter has.
        """
        leading: tuple[int, ...] = self.x.shape[:-1] if self.index is None else self.index.shape
        if self.scatter is not None:
            leading = self._scattered_shape
        k = self.x.shape[-1]
        if self.prologue is not None:
            k = self.prologue.columns(k)
        return ResultShape(tuple(leading[:-1]), leading[-1], k)

    @property
    def _scattered_shape(self) -> tuple[int, ...]:
        """Return the leading dimensions and the rows of the result of a scatter."""
        num_rows = self.num_rows
        if num_rows is None and self.q is not None:
            num_rows = self.q.shape[-2]
        elif num_rows is None and isinstance(self.rows, Indexed):
            num_rows = self.rows.m_indices.shape[0]
        if num_rows is None:
            raise ValueError(
                "num_rows: expected the rows of the result for a scatter without a q in `out`, "
                "got None"
            )
        if isinstance(self.rows, Masked):
            return self.rows.masked_m.shape[0], num_rows
        return (num_rows,)
