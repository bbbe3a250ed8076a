"""Launch shapes by the size of the input, as measured.

A kernel's tile follows from the elements of a launch for each SM, by tables of one range after the
other. There is one for each operation and class of values, by the bytes of the architecture's
vectors. Those of vectors of 16 bytes were measured on an H100 (132 SMs), k = 7168 unless a column
says otherwise, as programmatic dependents: times over that of the streaming ceiling, whose noise is
1 to 2%. That Ada, whose vectors have 16 bytes too, is like Hopper is not measured, and nothing is
on Blackwell, whose vectors have 32.
"""

import math
from typing import NamedTuple

import torch

from cute_quant.contract.dtypes import LOAD_BYTES, VALUE_TYPES, align, ceil_div
from cute_quant.contract.formats import Format
from cute_quant.contract.philox import VALUES_PER_CALL
from cute_quant.kernels import architectures
from cute_quant.kernels.architectures import MAX_WARPS_PER_SM
from cute_quant.kernels.config import DEFAULT_TILE, MAX_GRID_Y, ONE_ROW, Tile


class Range(NamedTuple):
    """Sizes that take a tile, from those of the range before on.

    Attributes:
        below: elements for each SM of 64 warps that are too many. An SM of fewer warps holds fewer
            in proportion, which is not measured.
        tile: of the range. The ranges around one have different tiles, or it spans a factor of two,
            since kernels are listed by the powers of two of their rows.
    """

    below: float
    tile: Tile


TWO_ROWS = Tile(rows_per_thread=2)
"""Tile of a thread with twice as many loads in flight and one address for both rows.

On an H100 it is slower than others but in kernels of `wide_shape`, on Blackwell nothing is
measured."""
TWO_TILES = Tile(tiles_per_thread=2)
"""Tile of large matrices of FP4 values: two tiles of a row have one address, where two rows have
two, and half the bytes of FP8 leave a GPU half the time for instructions."""

QUANTIZE_TILES = {
    16: (
        Range(20_000, DEFAULT_TILE),
        Range(48_000, Tile(row_warps=8)),
        Range(math.inf, Tile(values_per_thread=8, row_warps=8)),
    ),
    32: (Range(30_000, DEFAULT_TILE), Range(math.inf, TWO_ROWS)),
}
"""Tiles of 8-bit values, by the bytes of a vector.

On an H100, DEEP_GEMM where no format is named, by values a thread x warps x rows a thread:

    elements an SM    rows            16 x 4    16 x 8    8 x 8    16 x 4 x 2    8 x 8 x 2
     3476             64, MXFP8       1.246     1.546     1.250    1.382         1.790
    20852             384             1.086     1.053     1.107    1.066         1.078
    27803             512             1.044     1.014     1.069    1.085         1.019
    31775             2048, k 2048    1.126     1.022     1.072    1.035         1.024
    41705             768             1.110     1.029     1.055    1.093         1.029
    55606             1024            1.085     1.050     1.037    1.061         1.029
    55606             1024, MXFP8     1.087     1.062     1.045    1.109         1.060
   222425             4096            1.035     1.026     1.011    1.025         1.024
   222425             4096, MXFP8     1.063     1.062     1.030    1.055         1.056
   254200             8192, k 4096    1.034     1.031     1.011    1.026         1.026
   889700             16384           1.021     1.019     1.004    1.019         1.021
   889700             16384, MXFP8    1.050     1.047     1.033    1.044         1.040
"""
FP4_TILES = {
    16: (
        Range(2_000, Tile(values_per_thread=8, row_warps=8, low_latency=True)),
        Range(5_000, Tile(values_per_thread=8)),
        Range(20_000, Tile(low_latency=True)),
        Range(30_000, DEFAULT_TILE),
        Range(math.inf, TWO_TILES),
    ),
    32: (Range(30_000, DEFAULT_TILE), Range(math.inf, TWO_TILES)),
}
"""Tiles of FP4 values, by the bytes of a vector.

On an H100, NVFP4 with scales in blocks of 128x4, by values a thread x warps,
*low* for tiles of low latency:

    elements an SM    rows    8 x 4    8 x 8    16 x 4    8 x 4    8 x 8    16 x 4
                                                          low      low      low
       54             1       2.241    1.455    1.823     2.009    1.451    1.676
      869             16      1.935    1.820    1.466     1.687    1.417    1.532
     3476             64      1.637    1.876    2.168     1.636    1.736    1.746
     6951             128     1.234    -        -         1.227    1.237    1.194
    13902             256     1.467    1.343    1.496     1.503    1.415    1.249
    27803             512     1.236    1.202    1.233     1.366    1.321    1.223

Larger sizes were not measured by tile. Two tiles have the bound that two rows of 8-bit values had,
and were measured alone, earlier: 1.19 at 55606 elements an SM, 1.08 at 222425, 1.04 at 889700.
"""

VECTOR_TILES = {16: Tile(values_per_thread=8, row_warps=8), 32: DEFAULT_TILE}
"""Tiles whose threads load and store 16-bit elements as one vector, by its bytes.

On an H100, whose vectors have 16 bytes, a thread of two stores beside those of the next lane, not
between them. Of gates and ups 1.00 of the ceiling at 4096 x 2048, where the default tile has 1.04
and two rows a thread 1.08. Of NVFP4 and back 0.94 instead of 0.98 at 4096 x 7168, and 1.14 instead
of 1.27 at one row."""
SILU_TILES = {
    16: (
        Range(600, Tile(values_per_thread=8, low_latency=True)),
        Range(2_500, Tile(row_warps=1, low_latency=True)),
        Range(10_000, Tile(values_per_thread=8, low_latency=True)),
        Range(math.inf, VECTOR_TILES[16]),
    ),
    32: (Range(math.inf, VECTOR_TILES[32]),),
}
"""Tiles of gates and ups, by the bytes of a vector. Few have CTAs of one warp on all SMs.

On an H100, by values a thread x warps, *low* for tiles of low latency; k and elements are
those of the result:

    elements an SM    rows          8 x 4   8 x 8   16 x 1  8 x 2   8 x 4   8 x 8   16 x 1  16 x 2
                                                            low     low     low     low     low
       54             1             1.405   1.452   1.450   1.332   1.336   1.362   1.459   1.467
      109             2             -       -       -       1.223   1.217   1.237   1.338   1.335
      217             4             1.348   1.364   1.425   1.313   1.249   1.255   1.407   1.361
      434             8             -       -       -       1.373   1.327   1.390   1.450   1.379
      869             16            1.580   1.599   1.497   1.531   1.492   1.443   1.418   1.394
      993             64, k 2048    1.539   1.651   1.418   1.455   1.409   1.470   1.358   1.373
     1738             32            1.612   1.749   1.336   1.403   1.437   1.408   1.302   1.322
     3476             64            1.260   1.395   1.182   1.216   1.136   1.160   1.212   1.226
     3972             256, k 2048   1.239   1.308   1.442   1.161   1.052   1.091   1.156   1.057
     5214             96            -       -       -       1.320   1.117   1.093   1.273   1.171
     6951             128           1.233   1.253   1.324   1.331   1.081   1.086   1.347   1.164
    13902             256           1.205   1.113   1.365   1.152   1.188   1.126   1.170   1.209
    55606             1024          1.081   1.032   1.400   1.388   1.053   1.041   1.396   1.060

Of masked experts, whose CTAs walk them, microseconds with FUSED and with VLLM_CUDA, whose sigmoid
has more instructions:

    experts x rows of each    8 x 8           16 x 4
    8 x 8, of 1024             3.01,  3.14     2.41,  3.01
    8 x 128                   16.25, 18.12    16.29, 16.36
    8 x 512                   55.55, 65.08    58.30, 57.45
    32 x 64, of 1024          29.84, 30.60    30.42, 30.32
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
FREE_ROWS = {16: 2, 32: 0}
"""Rows for each SM up to which threads of rows with a scale of their own have unlimited registers,
by the bytes of a vector.

On an H100, of NVFP4 with k = 7168, without and with: 3.39 and 2.17 at 64 rows, 2.02 and 1.53 at
128, 2.09 and 1.62 at 256, 1.25 and 1.69 at 1024."""
WARPS_PER_NORM = 4
"""Least warps of a CTA where rows are so short that it can have several."""


NORM_TILES = {16: 1, 32: 2}
"""Least tiles of a thread that holds part of a row to be normalized, by the bytes of a vector.

On an H100 two tiles were slower than one at every size (k = 2048 and 7168). Blackwell is not
measured: a B200 has 226 instructions of a warp for each of its tiles before they take longer than
memory does. Kernels of one tile have 200, of two tiles 166.
"""

RESIDENT_CTAS = 8
"""CTAs for each SM that walk the experts of a batch, at most, where each expert has its least."""
EXPERT_CTAS = 3
"""CTAs for each expert and tile of columns, at least.

On an H100, k = 7168, time over that of the ceiling, by the CTAs of an expert x their warps:

    experts x rows of each    2 x 4    3 x 4    4 x 4    8 x 4    2 x 8    3 x 8    4 x 8
    32 x 8, of 1024           1.438    1.429    1.526    1.931    1.451    1.456    1.565
    32 x 64, of 1024          1.206    1.171    1.202    -        1.220    1.124    1.143
    32 x 512, of 1024         1.144    1.127    1.151    1.098    -        1.092    1.092
    256 x 16, of 640          1.354    1.369    1.359    1.809    1.320    1.419    1.587
    256 x 512, of 640         1.080    1.068    1.063    1.057    -        1.058    1.055

CTAs of 8 warps take 1.79 of 256 experts with 8 rows of 4096 each, which were at 1.18 with 4.

A CTA without a tile of rows costs the time to count those of all experts.
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
    arch: str,
    tile: Tile | None = None,
) -> Shape:
    """Return the launch for a batch of (rows, k) matrices, on a GPU with `sms` multiprocessors.

    A `tile` that is given is taken, whatever the size. Of masked experts the host does not know the
    rows that exist: they take the default.
    """
    if tile is None and masked:
        tile = DEFAULT_TILE
    elif tile is None:
        table = _quantize_tiles(fmt)[architectures.named(arch).widest_load]
        tile = _tile(table, matrices * rows * k, k, fmt, sms, arch)
    row_tiles = ceil_div(fmt.scale_rows(rows), tile.rows)
    row_ctas = expert_ctas(matrices, row_tiles, ceil_div(k, tile.columns), sms)
    return Shape(tile, row_tiles > MAX_GRID_Y, row_ctas)


def _quantize_tiles(fmt: Format) -> dict[int, tuple[Range, ...]]:
    return QUANTIZE_TILES if fmt.value_type.per_byte == 1 else FP4_TILES


def _tile(
    table: tuple[Range, ...], elements: int, k: int, fmt: Format, sms: int, arch: str
) -> Tile:
    """Return the tile of the range that a launch is in, or the default where it does not fit."""
    full = sms * architectures.named(arch).warps / MAX_WARPS_PER_SM
    tile = next(sizes.tile for sizes in table if elements < sizes.below * full)
    return tile if _fits(tile, k, fmt) else DEFAULT_TILE


def _fits(tile: Tile, k: int, fmt: Format) -> bool:
    """Return whether rows have all tiles of a thread, and groups a lane for each of its rows."""
    if tile.tiles_per_thread > 1 and k <= tile.columns:
        return False
    rows = tile.rows_per_thread
    lanes = tile.lanes_per_group(fmt.group_size)
    # A row that ends within the values of these lanes has one that stores no scale.
    return rows == 1 or (rows <= lanes and k % (rows * tile.values_per_thread) == 0)


def wide_shape(
    matrices: int, rows: int, k: int, fmt: Format, masked: bool, sms: int, arch: str
) -> Shape:
    """Return the launch of kernels whose threads hold 16 values on every architecture.

    These are 8-bit weights, of which a vector of 16 bytes has as many as one of 32 bytes has 16-bit
    elements, and values that are rounded by random numbers. For those `bench.bound` estimates 119
    µs of an H100 at 16384 x 7168, bound by memory, and of 8 values a thread 139 to 150, bound by
    arithmetic. Measured are 127 to 129, of two rows a thread.
    """
    tile = DEFAULT_TILE
    if not masked:
        tile = _tile(_quantize_tiles(fmt)[LOAD_BYTES], matrices * rows * k, k, fmt, sms, arch)
    return shape(matrices, rows, k, fmt, masked, sms, arch, tile)


def expert_ctas(matrices: int, row_tiles: int, column_tiles: int, sms: int) -> int:
    """Return how many CTAs along M share the rows of all masked experts."""
    slots = RESIDENT_CTAS * sms // (column_tiles * max(matrices, 1))
    return min(matrices * min(max(slots, EXPERT_CTAS), row_tiles), MAX_GRID_Y)


def silu_shape(
    matrices: int, rows: int, k: int, fmt: Format, masked: bool, sms: int, arch: str
) -> Shape:
    """Return the launch for gates and ups on an architecture."""
    tile = DEFAULT_TILE
    if not masked:
        widest_load = architectures.named(arch).widest_load
        tile = _tile(SILU_TILES[widest_load], matrices * rows * k, k, fmt, sms, arch)
    return shape(matrices, rows, k, fmt, masked, sms, arch, tile)


def fake_shape(
    matrices: int, rows: int, k: int, fmt: Format, masked: bool, sms: int, arch: str
) -> Shape:
    """Return the launch for values that are multiplied by their scales again, and not kept.

    On an H100 threads of vectors win 4% for FP4, and lose 14% for 64 rows of FP8.
    """
    fp4 = fmt.value_type.per_byte > 1
    tile = VECTOR_TILES[architectures.named(arch).widest_load] if fp4 else DEFAULT_TILE
    return shape(matrices, rows, k, fmt, masked, sms, arch, tile)


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
        most = FREE_ROWS[architectures.named(arch).widest_load] * sms
        free = not masked and matrices * rows <= most
        tile = shape.tile._replace(tiles_per_thread=tiles, low_latency=free)
        return shape._replace(tile=tile)
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

    Several rows in a CTA were slower at every size (k = 2048 and 7168). So was a row over the CTAs
    of a cluster, but for a single one: on an H100, with a residual, k = 7168, time over that of the
    ceiling:

        rows    one CTA    cluster of 2    4        8
        1       2.422      2.606           2.464    2.158
        16      2.039      2.323           2.213    2.312
        64      1.537      1.921           1.781    1.603
        128     1.213      1.473           1.367    1.622

    `least_tiles` is the least number of tiles of a thread, `norm_tiles` of a norm.
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
