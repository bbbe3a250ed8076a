"""Launch shapes by the size of the input, as measured.

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

from cute_quant.contract.dtypes import LOAD_BYTES, VALUE_TYPES, align, ceil_div
from cute_quant.contract.formats import Format
from cute_quant.contract.philox import VALUES_PER_CALL
from cute_quant.kernels import architectures
from cute_quant.kernels.architectures import MAX_WARPS_PER_SM
from cute_quant.kernels.config import DEFAULT_TILE, MAX_GRID_Y, ONE_ROW, Tile

TWO_ROWS = Tile(rows_per_thread=2)
TWO_ROWS_FROM = 30_000
"""Least elements for each SM of 64 warps from which a thread takes two rows. An SM of fewer warps
holds fewer elements in proportion, which is not measured."""
TWO_TILES = Tile(tiles_per_thread=2)
"""Tile of FP4 values from as many elements on: two tiles of a row have one address, where two rows
have two, and half the bytes of FP8 leave a GPU half the time for instructions."""

VECTOR_TILES = {16: Tile(values_per_thread=8, row_warps=8), 32: DEFAULT_TILE}
"""Tiles whose threads load and store 16-bit elements as one vector, by its bytes.

On an H100, whose vectors have 16 bytes, a thread of two stores beside those of the next lane, not
between them. Of gates and ups 1.00 of the ceiling at 4096 x 2048, where the default tile has 1.04
and two rows a thread 1.08, and 1.17 instead of 1.37 at one row. Of NVFP4 and back 0.94 instead of
0.98 at 4096 x 7168, and 1.14 instead of 1.27 at one row. That Ada is like Hopper, and that
Blackwell takes the default, is not measured."""
SHORT_SILU_TILE = Tile(values_per_thread=8, row_warps=1)
SILU_TILE = Tile(row_warps=1)
FEWEST_GATES, FEW_GATES = 64, 4096
"""Tiles of few gates and ups where a vector has 16 bytes, and most of them for each SM.

A CTA of one warp spreads them over all SMs. On an H100, k = 7168, time over that of the ceiling:

    rows    8 values,    8, 1 warp    16, 1 warp
            8 warps
     1      1.44         1.30         1.43
    16      1.59         1.62         1.47
    64      1.50         1.59         1.20
"""
DEQUANTIZE_TILES = {16: Tile(values_per_thread=8, tiles_per_thread=2), 32: DEFAULT_TILE}
"""Tiles of values to be multiplied by their scales, by the bytes of a vector.

On an H100, of NVFP4 and of FP8: 0.94 of the ceiling at 4096 x 7168, with one tile a thread 1.22
and 1.06, with 16 values a thread 1.02; 1.11 at one row, whatever the tile."""

MAX_WARPS = 16
"""Most warps of a CTA: with twice as many, a thread has too few registers for tile and sum."""
MAX_TILES = 4
"""Most tiles of a row that a thread of them holds."""
ROW_TILES = 2
"""Least tiles of a thread that holds part of a row which is scaled as a whole."""
FEW_ROWS_TILES = {
    16: ONE_ROW._replace(values_per_thread=8, tiles_per_thread=4),
    32: ONE_ROW._replace(tiles_per_thread=2),
}
FEW_ROWS_WARPS = 8
MANY_ROWS_TILE = ONE_ROW
"""Tiles of rows that are one group, which 8 or 16 warps hold, by the bytes of a vector.

On an H100, FP8 of k = 7168, time over that of the ceiling:

    rows     32 values a thread    32, 16 warps    16
             of vectors, 8 warps   at most
        1    1.58                  1.77            1.84
       16    1.22                  1.29            1.32
       64    1.42                  1.62            1.82
      256    1.33                  1.25            1.19
     1024    1.06                  1.03            1.03
     4096    1.02                  1.02            1.01
    16384    1.01                  1.01            1.00

Rows are few where each has an SM. Blackwell, whose vectors have 16 values, is not measured.
"""
WARPS_PER_NORM = 4
"""Least warps of a CTA where rows are so short that it can have several."""
NORM_TILES = {16: 1, 32: 2}
"""Least tiles of a thread that holds part of a row to be normalized, by the bytes of a vector.

On an H100 two tiles were slower than one at every size (k = 2048 and 7168). Blackwell is not
measured: a B200 has 226 instructions of a warp for each of its tiles before they take longer than
memory does. Kernels of one tile have 200, of two tiles 166.
"""

RESIDENT_CTAS = 8
"""CTAs for each SM that walk the experts of a batch, at least."""
EXPERT_CTAS = 2
"""CTAs for each expert and tile of columns, at least.

On an H100, k = 7168, time over that of the ceiling, by the CTAs of an expert:

    experts x rows of each     1       2       3       5       10
    32 x 8                                     1.57    1.60    2.25
    256 x 512                  1.13    1.08
"""


class Shape(NamedTuple):
    """Shape of a launch.

    Attributes:
        tile: of a CTA.
        tall: whether rows are too many for one dimension of a grid.
        row_ctas: CTAs that share the rows of all masked experts.
    """

    tile: Tile
    tall: bool
    row_ctas: int


def shape(
    matrices: int,
    rows: int,
    k: int,
    fmt: Format,
    masked: bool,
    sms: int,
    warps_per_sm: int = MAX_WARPS_PER_SM,
    tile: Tile | None = None,
) -> Shape:
    """Return the launch for a batch of (rows, k) matrices, on a GPU with `sms` multiprocessors.

    A `tile` that is given is taken, whatever the size.
    """
    if tile is None:
        tile = DEFAULT_TILE
        lanes = tile.lanes_per_group(fmt.group_size)
        fits_two = lanes > 1 and k % (2 * tile.values_per_thread) == 0
        full = sms * warps_per_sm / MAX_WARPS_PER_SM
        large = matrices * rows * k >= TWO_ROWS_FROM * full
        fp4 = fmt.value_type.per_byte > 1
        if large and not masked:
            if fp4 and k > tile.columns:
                tile = TWO_TILES
            elif fits_two and not fp4:
                tile = TWO_ROWS
    row_tiles = ceil_div(fmt.scale_rows(rows), tile.rows)
    row_ctas = expert_ctas(matrices, row_tiles, ceil_div(k, tile.columns), sms)
    return Shape(tile, row_tiles > MAX_GRID_Y, row_ctas)


def expert_ctas(matrices: int, row_tiles: int, column_tiles: int, sms: int) -> int:
    """Return how many CTAs along M share the rows of all masked experts."""
    slots = ceil_div(RESIDENT_CTAS * sms, column_tiles * max(matrices, 1))
    return min(matrices * min(max(slots, EXPERT_CTAS), row_tiles), MAX_GRID_Y)


def silu_shape(
    matrices: int, rows: int, k: int, fmt: Format, masked: bool, sms: int, arch: str
) -> Shape:
    """Return the launch for gates and ups on an architecture."""
    widest_load = architectures.named(arch).widest_load
    tile = VECTOR_TILES[widest_load]
    if widest_load == LOAD_BYTES // 2 and not masked:
        elements = matrices * rows * k
        if elements <= FEW_GATES * sms:
            tile = SHORT_SILU_TILE if elements <= FEWEST_GATES * sms else SILU_TILE
    return shape(matrices, rows, k, fmt, masked, sms, tile=tile)


def fake_shape(
    matrices: int, rows: int, k: int, fmt: Format, masked: bool, sms: int, arch: str
) -> Shape:
    """Return the launch for values that are multiplied by their scales again, and not kept.

    On an H100 threads of vectors win 4% for FP4, and lose 14% for 64 rows of FP8.
    """
    fp4 = fmt.value_type.per_byte > 1
    tile = VECTOR_TILES[architectures.named(arch).widest_load] if fp4 else DEFAULT_TILE
    return shape(matrices, rows, k, fmt, masked, sms, tile=tile)


class NormShape(NamedTuple):
    """Shape of a launch whose CTAs hold whole rows, which are never too many.

    Attributes:
        tile, tall, row_ctas: as of a `Shape`.
        tiles_per_thread: tiles of a row in the registers of a thread.
        max_warps: the most warps that share a row.
        held: whether the row lies in their registers.
    """

    tile: Tile
    tall: bool
    row_ctas: int
    tiles_per_thread: int
    max_warps: int
    held: bool = True


def row_shape(
    matrices: int, rows: int, k: int, fmt: Format, masked: bool, sms: int, arch: str
) -> NormShape:
    """Return the launch for rows that are scaled as a whole, by a warp for each two of their tiles.

    The tiles of a thread are adjacent, so that they share addresses. Where a row is one group, few
    kernels serve every k: for one warp, for few and for many rows, and for longer rows.
    """
    shape = norm_shape(matrices, rows, k, fmt, masked, sms, least_tiles=ROW_TILES)
    tiles = shape.tiles_per_thread
    if not fmt.whole_row:
        return shape._replace(tile=shape.tile._replace(tiles_per_thread=tiles))
    if shape.max_warps == 1:
        return shape._replace(tile=shape.tile._replace(tiles_per_thread=ROW_TILES))
    row_ctas = expert_ctas(matrices, fmt.scale_rows(rows), 1, sms)
    tile, max_warps, held = ONE_ROW._replace(tiles_per_thread=tiles), MAX_WARPS, tiles <= MAX_TILES
    if k <= MAX_WARPS * MANY_ROWS_TILE.columns:
        few = not masked and matrices * rows <= sms
        tile = FEW_ROWS_TILES[architectures.named(arch).widest_load] if few else MANY_ROWS_TILE
        max_warps = FEW_ROWS_WARPS if few else MAX_WARPS
    elif not held:
        tile = ONE_ROW
    return NormShape(tile, False, row_ctas, tile.tiles_per_thread, max_warps, held)


def norm_shape(
    matrices: int,
    rows: int,
    k: int,
    fmt: Format,
    masked: bool,
    sms: int,
    least_tiles: int = 1,
) -> NormShape:
    """Return the launch for rows that are normalized, by as many warps as a row has tiles.

    Several rows in a CTA were slower at every size (k = 2048 and 7168). `least_tiles` is the least
    number of tiles of a thread, `norm_tiles` of a norm.
    """
    unit = 1 if fmt.whole_row else fmt.group_size * fmt.groups_per_unit
    columns = ceil_div(align(k, unit), DEFAULT_TILE.columns)
    tiles_per_thread, max_warps = min(least_tiles, columns), MAX_WARPS
    while max_warps * tiles_per_thread < columns:
        tiles_per_thread *= 2
    while max_warps > 1 and max_warps * tiles_per_thread >= 2 * columns:
        max_warps //= 2
    tile = ONE_ROW._replace(row_warps=max(1, WARPS_PER_NORM // max_warps))
    row_tiles = ceil_div(fmt.scale_rows(rows), tile.rows)
    row_ctas = expert_ctas(matrices, row_tiles, 1, sms)
    return NormShape(tile, False, row_ctas, tiles_per_thread, max_warps)


def norm_tiles(arch: str) -> int:
    """Return the least tiles of a thread that holds part of a row to be normalized."""
    return NORM_TILES[architectures.named(arch).widest_load]


BLOCK_VALUES = 16
"""Most values of weights that a thread loads as one vector: it has registers for several."""
FP4_VALUES = 8
"""Values whose codes fill a register."""


def block_values(dtype: torch.dtype, fmt: Format, arch: str, *, transposed: bool) -> int:
    """Return the values that a thread loads at once of weights to be quantized in blocks.

    They are one vector, so that a warp loads contiguous memory, but not less than fill a register
    with results. A thread of transposed weights has 64 values in all, and packs those of its
    vectors along k: 8 vectors of 8 for FP4.
    """
    values = min(architectures.named(arch).widest_load // dtype.itemsize, BLOCK_VALUES)
    if fmt.value_type.per_byte == 1:
        return values
    return FP4_VALUES if transposed else max(values, FP4_VALUES)


def column_values(dtype: torch.dtype, arch: str, *, stochastic: bool) -> int:
    """Return the values that a thread has of a row, where groups lie along rows.

    They are one vector, or as many as share a call of the random number generator.
    """
    values = min(architectures.named(arch).widest_load // dtype.itemsize, BLOCK_VALUES)
    return max(values, VALUES_PER_CALL) if stochastic else values


def store_bytes(tile: Tile, dtype: torch.dtype) -> int:
    """Return how many bytes of results of a dtype a thread stores at once."""
    per_byte = VALUE_TYPES[dtype].per_byte if dtype in VALUE_TYPES else 1
    return min(tile.values_per_thread * dtype.itemsize // per_byte, LOAD_BYTES)
