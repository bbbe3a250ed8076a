"""Values and scales to be checked for a reader, and what may be found."""

from __future__ import annotations

from typing import NamedTuple

import torch

from cute_quant.contract import blocks
from cute_quant.contract.calls import Call, ResultShape
from cute_quant.contract.dtypes import SOURCE_BLOCK
from cute_quant.contract.formats import Format
from cute_quant.contract.readers import DEEP_GEMM_SM90, DEEP_GEMM_SM100, Reader
from cute_quant.contract.rows import Rows
from cute_quant.contract.upper_scales import UpperScale


class Finding(NamedTuple):
    """Something that is wrong.

    Attributes:
        rule: its name: one of ``RULES``.
        text: a sentence that names the argument, what was expected and what came.
    """

    rule: str
    text: str

    def __str__(self) -> str:
        return self.text


RULES = (
    "format",
    "dtype",
    "device",
    "shape",
    "strides",
    "alignment",
    "padding",
    "swizzle",
    "powers of two",
    "nan",
    "upper scale",
    "values",
)


class Quantized(NamedTuple):
    """Values and scales to be checked.

    Attributes:
        q, sf: values and scales.
        fmt: that they are said to have.
        reader: that is to read them.
        kind: its name.
        rows: which rows exist; None for all.
        upper: the scale over e4m3 scales; None without.
        x: what was quantized, where the caller has it.
    """

    q: torch.Tensor
    sf: torch.Tensor
    fmt: Format
    reader: Reader
    kind: str
    rows: Rows | None
    upper: UpperScale | None
    x: torch.Tensor | None

    @property
    def shape(self) -> ResultShape:
        """Return the shape of the values, of 2 or more dimensions."""
        *batch, mn, columns = self.q.shape
        return ResultShape(tuple(batch), mn, columns * self.fmt.value_type.per_byte)

    @property
    def takes_blocks(self) -> bool:
        """Return whether the values may be weights with a scale for each square block."""
        return (
            self.kind in (DEEP_GEMM_SM90, DEEP_GEMM_SM100)
            and self.rows is None
            and blocks.stored_once(self.fmt)
            and self.fmt.group_size == SOURCE_BLOCK
        )

    @property
    def of_blocks(self) -> bool:
        """Return whether the scales are those of square blocks; of one row, those of groups."""
        sizes = tuple(self.sf.shape)
        return (
            self.takes_blocks
            and sizes != self.fmt.scale_shape(*self.shape)
            and sizes == blocks.scale_shape(self.fmt, *self.shape)
        )

    @property
    def upper_of_groups(self) -> bool:
        """Return whether each group of rows stacked along M has an upper scale of its own."""
        return Call(self.q, self.fmt, rows=self.rows, upper=self.upper).upper_of_groups
