"""One call of a quantizer: its tensors, its format and its rows."""

from __future__ import annotations

from typing import NamedTuple

import torch

from cute_quant.contract.formats import Format
from cute_quant.contract.prologues import Prologue
from cute_quant.contract.rows import Indexed, PrefixSum, Rows
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
        parts = self.rows, self.index, self.prologue, self.row_scales, self.rng_state
        return all(part is None for part in parts)

    @property
    def tensors(self) -> dict[str, torch.Tensor | None]:
        """Return all tensors by the names of their arguments."""
        tensors = {
            self.input_name: self.x,
            "out q": self.q,
            "out sf": self.sf,
            "index": self.index,
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
        """Return the shape of the values, without a look at what is wrong with the call."""
        leading = self.x.shape[:-1] if self.index is None else self.index.shape
        k = self.x.shape[-1]
        if self.prologue is not None:
            k = self.prologue.columns(k)
        return ResultShape(tuple(leading[:-1]), leading[-1], k)
