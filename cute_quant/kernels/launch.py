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

from cute_quant.formats import ceil_div
from cute_quant.kernels import layouts

TWO_ROWS_FROM = 30_000
"""Elements an SM."""

MAX_GRID_Y = 65535


def shape(rows: int, k: int, multiprocessors: int) -> tuple[int, bool]:
    """Rows a thread, and whether the grid takes two dimensions to count them."""
    rows_per_thread = 2 if rows * k >= TWO_ROWS_FROM * multiprocessors else 1
    row_tiles = ceil_div(rows, layouts.WARPS_PER_CTA * rows_per_thread)
    return rows_per_thread, row_tiles > MAX_GRID_Y
