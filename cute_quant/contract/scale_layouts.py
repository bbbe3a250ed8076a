"""Where the scale of a row and a group lies: one description for torch, CuTe, checks and drawings.

It is a layout in CuTe's algebra: shape and strides of two coordinates, the row and the group, each
of which may be split into modes, the fastest first. With A = align(mn, 4), g groups and p words in
a row, the layouts of one matrix in the strides of the contract are:

    row_major          ((mn), (g))      : ((g), (1))
    mn_major           ((A), (g))       : ((1), (A))
    row_major_packed   ((mn), (4, p))   : ((4p), (1, 4))
    mn_major_packed    ((A), (4, p))    : ((4), (1, 4A))
    128x4              ((32, 4, rows / 128), (4, groups / 4)) : ((16, 4, 128 groups), (1, 512))
    8x4                ((8, rows / 8), (4, groups / 4))       : ((4, 8 groups), (1, 32))

Strides count scales: bytes where scales have one byte, packed or not, else float32. The functions
here take ints, and numbers of CuTe DSL where kernels call them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from cute_quant.contract.dtypes import BLOCK_GROUPS, BLOCK_LANES, BYTES_PER_WORD
from cute_quant.contract.formats import Format

Modes = tuple[tuple[Any, ...], tuple[Any, ...]]
"""Numbers of the modes of the row and of those of the group, the fastest mode first."""


class ScaleLayout(NamedTuple):
    """A layout (row, group) -> place of the scale in a matrix.

    Attributes:
        shape: sizes of the modes.
        strides: of the modes, in scales.
    """

    shape: Modes
    strides: Modes

    @property
    def sizes(self) -> tuple[int, int]:
        """Return the rows and the groups that it places."""
        rows, groups = map(math.prod, self.shape)
        return rows, groups

    def offset(self, row: int, group: int) -> int:
        """Return the place of a scale, in scales from the first.

        Raises:
            ValueError: there is no such row or group.
        """
        place = 0
        for name, index, size, shape, strides in zip(
            ("row", "group"), (row, group), self.sizes, *self, strict=True
        ):
            if not 0 <= index < size:
                raise ValueError(f"{name}: expected 0 to {size - 1}, got {index}")
            for extent, stride in zip(shape, strides, strict=True):
                index, part = divmod(index, extent)
                place += part * stride
        return place

    def __str__(self) -> str:
        """Return the layout in CuTe's notation."""
        shape, strides = (", ".join(map(_text, modes)) for modes in self)
        return f"({shape}) : ({strides})"


def _text(mode: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, mode))})"


def strided(
    rows: Any, columns: Any, row_stride: Any, column_stride: Any, byte_stride: Any = None
) -> ScaleLayout:
    """Return the layout of a matrix of scales, or of words of four.

    Args:
        rows: of the matrix.
        columns: of the matrix.
        row_stride: from a row to the next.
        column_stride: from a column to the next.
        byte_stride: from a byte of a word to the next; None where columns are no words.
    """
    if byte_stride is None:
        return ScaleLayout(((rows,), (columns,)), ((row_stride,), (column_stride,)))
    shape = (rows,), (BYTES_PER_WORD, columns)
    return ScaleLayout(shape, ((row_stride,), (byte_stride, column_stride)))


def blocks(rows: Any, groups: Any, block_rows: int) -> ScaleLayout:
    """Return the layout of scales in blocks of some rows and 4 groups, along a row first.

    Args:
        rows: a multiple of those of a block.
        groups: a multiple of 4.
        block_rows: rows of a block. Those that are 32 apart follow each other in memory.
    """
    lanes = min(BLOCK_LANES, block_rows)
    interleaved = block_rows // lanes
    modes = [(lanes, interleaved * BLOCK_GROUPS)]
    if interleaved > 1:
        modes.append((interleaved, BLOCK_GROUPS))
    modes.append((rows // block_rows, block_rows * groups))
    sizes, strides = zip(*modes, strict=True)
    group_sizes = BLOCK_GROUPS, groups // BLOCK_GROUPS
    return ScaleLayout((sizes, group_sizes), (strides, (1, block_rows * BLOCK_GROUPS)))


def in_memory(
    fmt: Format, rows: Any, columns: Any, row_stride: Any, column_stride: Any
) -> ScaleLayout:
    """Return the layout of scales that lie in a tensor (rows, columns) of some strides.

    Args:
        fmt: the format of the scales, whose layout has no blocks.
        rows: of the tensor.
        columns: of the tensor.
        row_stride: of the tensor, in its elements.
        column_stride: of the tensor, in its elements.
    """
    per_element = fmt.groups_per_column
    byte_stride = 1 if fmt.packed else None
    return strided(
        rows, columns, row_stride * per_element, column_stride * per_element, byte_stride
    )


def scale_layout(fmt: Format, mn: int, k: int) -> ScaleLayout:
    """Return the layout of the scales of (mn, k) values in a format's own strides.

    Rows and groups of padding have places too.
    """
    rows, columns = fmt.scale_rows(mn), fmt.columns(k)
    if fmt.blocked:
        return blocks(rows, columns, fmt.block_rows)
    row_stride, column_stride = (1, rows) if fmt.mn_major else (columns, 1)
    return in_memory(fmt, rows, columns, row_stride, column_stride)
