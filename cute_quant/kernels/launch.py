"""How a launch depends on the size of the input, by measurement.

On an H100 (132 SMs), k = 2048 and 7168, time over that of the streaming ceiling, both as
programmatic dependents of the launch before:

    elements     one row a thread    two rows a thread
     0.5 M       1.20                1.20
     1.8 M       1.04                1.13
     3.7 M       1.03                1.06
     4.2 M       1.10                0.97
     7.3 M       1.04                0.99
    16.8 M       1.02                1.00

A thread of one row waits for its only load while it has nothing else to do, and a GPU that is full
of such threads holds 32768 elements an SM. Two rows a thread use as many registers as a full GPU
has, and put twice as much in flight.
"""

from typing import NamedTuple

import torch

from cute_quant.formats import LOAD_BYTES, WHOLE_ROW, Format, ceil_div
from cute_quant.kernels.layouts import (
    COLUMNS_PER_WARP,
    VALUES_PER_THREAD,
    WARPS_PER_CTA,
    lanes_per_group,
)

TWO_ROWS_FROM = 30_000
"""Elements an SM."""

MAX_GRID_Y = 65535
MAX_GRID_Z = 65535

RESIDENT_CTAS = 16
"""Of an SM, which the CTAs that walk the experts of a batch should at least be."""


class Shape(NamedTuple):
    """What a launch looks like.

    Attributes:
        rows_per_thread: whose loads are in flight at once.
        tall: whether rows are too many for one dimension of a grid.
        row_ctas: CTAs that share the rows of all experts, where these are masked.
    """

    rows_per_thread: int
    tall: bool
    row_ctas: int


def shape(matrices: int, rows: int, k: int, fmt: Format, masked: bool, sms: int) -> Shape:
    """The launch for so many matrices of so many rows, on a GPU of so many multiprocessors."""
    whole_row = fmt.group_size == WHOLE_ROW
    fits_two = lanes_per_group(fmt.group_size) > 1 and k % (2 * VALUES_PER_THREAD) == 0
    large = matrices * rows * k >= TWO_ROWS_FROM * sms
    rows_per_thread = 2 if large and fits_two and not whole_row and not masked else 1
    row_tiles = ceil_div(fmt.scale_rows(rows), WARPS_PER_CTA * rows_per_thread)
    tiles = 1 if whole_row else ceil_div(k, COLUMNS_PER_WARP)
    slots = min(ceil_div(RESIDENT_CTAS * sms, tiles * max(matrices, 1)), row_tiles)
    row_ctas = min(matrices * slots, MAX_GRID_Y)
    return Shape(rows_per_thread, row_tiles > MAX_GRID_Y, row_ctas)


def store_bytes(dtype: torch.dtype) -> int:
    """What a thread stores at once of results of a dtype."""
    return min(VALUES_PER_THREAD * dtype.itemsize, LOAD_BYTES)
