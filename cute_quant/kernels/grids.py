"""Launches on the tiles of batches of matrices, in as many grids as count them."""

from __future__ import annotations

from collections.abc import Callable

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from cute_quant.kernels.config import LANES, MAX_GRID_Y, MAX_GRID_Z
from cute_quant.kernels.params import Params


@cute.jit
def launch(
    kernel: cutlass.Constexpr[Callable],
    problem: Params,
    tiles: tuple[Int32, Int32, Int32],
    warps: cutlass.Constexpr[int],
    options: dict,
):
    """Launch a kernel whose CTAs have a tile each.

    Args:
        kernel: takes the problem, in which each grid sets `first_batch` and `first_row_tile`.
        problem: of all matrices.
        tiles: along columns and rows of a matrix, and matrices.
        warps: of a CTA.
        options: of every launch.
    """
    column_tiles, row_tiles, batches = tiles
    # A kernel with loops over what a grid does not count is 1.5 times as slow at one row.
    for first_batch in range(0, batches, MAX_GRID_Z):
        for first_row_tile in range(0, row_tiles, MAX_GRID_Y):
            part = problem.replace(first_batch=first_batch, first_row_tile=first_row_tile)
            kernel(part).launch(
                grid=[
                    column_tiles,
                    cutlass.min(row_tiles - first_row_tile, MAX_GRID_Y),
                    cutlass.min(batches - first_batch, MAX_GRID_Z),
                ],
                block=[LANES, warps, 1],
                **options,
            )
