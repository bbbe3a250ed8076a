"""Launch shapes: each choice at both sides of where it changes."""

import math

import pytest
import torch

from cute_quant import DEEP_GEMM, DEEP_GEMM_SM90, MXFP4, MXFP8, NVFP4, ROWWISE_FP8
from cute_quant.contract.formats import all_formats
from cute_quant.kernels import architectures, heuristics
from cute_quant.kernels.config import DEFAULT_TILE, MAX_GRID_Y, Tile
from cute_quant.kernels.heuristics import TWO_ROWS, TWO_TILES

SMS = 132


TABLES = {
    name: table
    for name, tables in (
        ("8-bit", heuristics.QUANTIZE_TILES),
        ("FP4", heuristics.FP4_TILES),
        ("SiLU", heuristics.SILU_TILES),
    )
    for name, table in ((f"{name}, {nbytes} bytes", table) for nbytes, table in tables.items())
}


def tile(rows, k, fmt=DEEP_GEMM, masked=False, arch="sm_90a", matrices=1):
    return heuristics.shape(matrices, rows, k, fmt, masked, SMS, arch).tile


def silu_tile(rows, k, fmt=DEEP_GEMM, masked=False, arch="sm_90a", matrices=1):
    return heuristics.silu_shape(matrices, rows, k, fmt, masked, SMS, arch).tile


@pytest.mark.parametrize(
    ("choose", "fmt", "rows", "k", "values", "row_warps", "tiles"),
    [
        (tile, MXFP8, 64, 7168, 16, 4, 1),
        (tile, DEEP_GEMM, 384, 7168, 16, 8, 1),
        (tile, DEEP_GEMM, 512, 7168, 16, 8, 1),
        (tile, DEEP_GEMM, 2048, 2048, 16, 8, 1),
        (tile, DEEP_GEMM, 768, 7168, 16, 8, 1),
        (tile, DEEP_GEMM, 1024, 7168, 8, 8, 1),
        (tile, MXFP8, 1024, 7168, 8, 8, 1),
        (tile, DEEP_GEMM, 8192, 4096, 8, 8, 1),
        (tile, DEEP_GEMM, 16384, 7168, 8, 8, 1),
        (tile, NVFP4, 64, 7168, 8, 4, 1),
        (tile, NVFP4, 4096, 7168, 16, 4, 2),
        (silu_tile, DEEP_GEMM, 256, 7168, 8, 8, 1),
        (silu_tile, DEEP_GEMM, 4096, 2048, 8, 8, 1),
    ],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_tiles_as_measured(choose, fmt, rows, k, values, row_warps, tiles):
    """Those that an H100 was fastest with, but for noise."""
    expected = Tile(values, row_warps, tiles_per_thread=tiles)
    assert choose(rows, k, fmt) == expected


@pytest.mark.parametrize(
    ("choose", "fmt", "rows", "values", "row_warps"),
    [
        (tile, NVFP4, 1, 8, 8),
        (tile, NVFP4, 16, 8, 8),
        (tile, NVFP4, 256, 16, 4),
        (silu_tile, DEEP_GEMM, 1, 8, 4),
        (silu_tile, DEEP_GEMM, 8, 8, 4),
        (silu_tile, DEEP_GEMM, 16, 16, 1),
        (silu_tile, DEEP_GEMM, 32, 16, 1),
        (silu_tile, DEEP_GEMM, 64, 8, 4),
        (silu_tile, DEEP_GEMM, 128, 8, 4),
    ],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_few_rows_are_of_low_latency(choose, fmt, rows, values, row_warps):
    assert choose(rows, 7168, fmt) == Tile(values, row_warps, low_latency=True)


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_ranges_are_found_by_powers_of_two(table):
    """A range inside of two of one tile has a power of two, or nothing says that it is there."""
    bounds = [0, *(sizes.below for sizes in table)]
    assert bounds == sorted(set(bounds)) and bounds[-1] == math.inf
    for before, sizes, after in zip(table, table[1:], table[2:], strict=False):
        assert before.tile != after.tile or sizes.below >= 2 * before.below
        assert before.tile != sizes.tile != after.tile


def test_a_batch_counts_as_a_whole():
    k, rows = 4096, 48_000 * SMS // 4096
    assert tile(rows, k) == Tile(row_warps=8)
    assert tile(rows + 1, k) == tile(rows // 2 + 1, k, matrices=2) == Tile(8, 8)
    assert silu_tile(75, 7168, matrices=5) == silu_tile(375, 7168) != silu_tile(75, 7168)


def test_tiles_of_masked_experts_are_those_of_any_rows():
    for rows in (1, 75, 4096):
        assert tile(rows, 4096, masked=True) == tile(rows, 4096, NVFP4, True) == DEFAULT_TILE
        for arch in ("sm_90a", "sm_100a"):
            assert silu_tile(rows, 4096, masked=True, arch=arch) == DEFAULT_TILE


@pytest.mark.parametrize("matrices", [1, 2])
def test_blackwell_takes_two_rows_or_tiles_of_large_matrices(matrices):
    k, rows = 4096, 30_000 * SMS // 4096 // matrices
    for fmt, large in ((DEEP_GEMM, TWO_ROWS), (NVFP4, TWO_TILES)):
        size = {"k": k, "fmt": fmt, "matrices": matrices, "arch": "sm_100a"}
        assert tile(rows, **size) == DEFAULT_TILE
        assert tile(rows + 1, **size) == large
        assert silu_tile(rows + 1, **size) == DEFAULT_TILE


@pytest.mark.parametrize(("k", "two"), [(4096, True), (4112, False), (4128, True), (4104, False)])
def test_the_lanes_that_store_scales_of_two_rows_have_columns(k, two):
    """A row that ends within the values of two lanes has one that stores no scale."""
    assert tile(2048, k, arch="sm_100a") == (TWO_ROWS if two else DEFAULT_TILE)


@pytest.mark.parametrize(("k", "two"), [(512, False), (513, True)])
def test_two_tiles_need_a_row_of_more_than_one(k, two):
    for arch in ("sm_90a", "sm_100a"):
        assert tile(2**16, k, NVFP4, arch=arch) == (TWO_TILES if two else DEFAULT_TILE)


def test_a_smaller_sm_is_full_sooner():
    """48 warps of an SM hold three quarters of what 64 do."""
    k = 4096
    for arch, most in (("sm_120a", 30_000), ("sm_89", 48_000)):
        rows = most * SMS * 3 // 4 // k
        assert tile(rows, k, arch=arch) != tile(rows + 1, k, arch=arch)


def test_two_rows_need_two_lanes_of_a_group():
    for group_size, expected in ((32, TWO_ROWS), (16, DEFAULT_TILE)):
        fmt = DEEP_GEMM.replace(group_size=group_size)
        assert tile(2048, 4096, fmt, arch="sm_100a") == expected


@pytest.mark.parametrize("arch", ["sm_89", "sm_90a", "sm_100a"])
def test_every_tile_keeps_the_contract(arch):
    """Of any format, whatever its groups."""
    nbytes = architectures.named(arch).widest_load
    tables = heuristics.QUANTIZE_TILES[nbytes], heuristics.FP4_TILES[nbytes]
    for fmt in (f for f in all_formats() if not f.by_row):
        eight_bits = fmt.value_type.per_byte == 1
        for sizes in tables[0 if eight_bits else 1]:
            rows = max(1, int(min(sizes.below, 1e6) * SMS * 0.7) // 4096)
            tile(rows, 4096, fmt, arch=arch).check(fmt, torch.float32)
        for sizes in heuristics.SILU_TILES[nbytes]:
            sizes.tile.check(fmt, torch.float32)


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize(("fmt", "large"), [(DEEP_GEMM, TWO_ROWS), (NVFP4, TWO_TILES)], ids=str)
def test_threads_of_16_values(arch, fmt, large):
    for rows, masked, expected in (
        (256, False, DEFAULT_TILE),
        (4096, False, large),
        (4096, True, DEFAULT_TILE),
    ):
        size = 1, rows, 7168, fmt, masked, SMS, arch
        assert heuristics.wide_shape(*size).tile == expected


@pytest.mark.parametrize(
    ("fmt", "rows", "tall"),
    [
        (DEEP_GEMM, 4 * MAX_GRID_Y, False),
        (DEEP_GEMM, 4 * MAX_GRID_Y + 1, True),
        (MXFP8, 4 * MAX_GRID_Y - 124, False),
        # The rows of a block of scales are counted, which are more than those of x.
        (MXFP8, 4 * MAX_GRID_Y - 123, True),
    ],
    ids=str,
)
def test_rows_past_a_dimension_of_the_grid(fmt, rows, tall):
    assert heuristics.shape(1, rows, 16, fmt, False, SMS, "sm_100a").tall == tall
    # A CTA of 8 warps has twice as many rows.
    assert not heuristics.shape(1, rows, 16, fmt, False, SMS, "sm_90a").tall


def row_ctas(matrices, rows, k=7168):
    return heuristics.shape(matrices, rows, k, DEEP_GEMM, True, SMS, "sm_90a").row_ctas


def test_ctas_of_masked_experts():
    """At most 8 for each SM, but 3 for each expert, and no more than there are tiles."""
    assert row_ctas(8, 4096) == 8 * 9
    assert row_ctas(32, 1024) == 32 * 3
    assert row_ctas(64, 1024) == 64 * 3
    assert row_ctas(256, 4096) == 256 * 3
    assert row_ctas(256, 4) == 256
    assert row_ctas(8, 16) == 8 * 4
    assert heuristics.row_shape(8, 4096, 7168, ROWWISE_FP8, True, SMS, "sm_90a").row_ctas == 8 * 132
    assert heuristics.row_shape(8, 16, 512, ROWWISE_FP8, True, SMS, "sm_90a").row_ctas == 8 * 4
    assert row_ctas(2**16, 64, 128) == MAX_GRID_Y
    assert row_ctas(0, 64, 128) == 0


def test_tiles_of_gates_and_ups():
    by_arch = [
        heuristics.silu_shape(1, 4096, 2048, DEEP_GEMM, False, SMS, arch).tile
        for arch in ("sm_90a", "sm_100a", "sm_89", "sm_120f")
    ]
    assert [tile.values_per_thread for tile in by_arch] == [8, 16, 8, 16]


@pytest.mark.parametrize(("fmt", "values"), [(DEEP_GEMM, 16), (NVFP4, 8), (MXFP4, 8)], ids=str)
def test_tiles_of_fake_quantization(fmt, values):
    """Large ones, too: there is no scale to be stored with those of another row."""
    for arch, expected in (("sm_90a", values), ("sm_100a", 16)):
        tile = heuristics.fake_shape(1, 8192, 8192, fmt, False, SMS, arch).tile
        assert (tile.values_per_thread, tile.rows_per_thread) == (expected, 1)


@pytest.mark.parametrize(
    ("fmt", "k", "tiles_per_thread", "max_warps", "row_warps"),
    [
        (DEEP_GEMM, 512, 1, 1, 4),
        (DEEP_GEMM, 513, 1, 2, 2),
        (DEEP_GEMM, 1024, 1, 2, 2),
        (DEEP_GEMM, 1536, 1, 4, 1),
        (DEEP_GEMM, 2560, 1, 8, 1),
        (DEEP_GEMM, 4608, 1, 16, 1),
        (DEEP_GEMM, 8192, 1, 16, 1),
        (DEEP_GEMM, 8193, 2, 16, 1),
        (DEEP_GEMM, 16385, 4, 16, 1),
        # A word of packed scales whose last bytes another warp writes.
        (DEEP_GEMM.replace(group_size=256), 512, 1, 2, 2),
        (DEEP_GEMM_SM90.replace(group_size=256), 512, 1, 1, 4),
        (DEEP_GEMM.replace(group_size=256), 8000, 1, 16, 1),
        (ROWWISE_FP8, 8192, 1, 16, 1),
    ],
    ids=str,
)
def test_warps_of_a_norm(fmt, k, tiles_per_thread, max_warps, row_warps):
    shape = heuristics.norm_shape(1, 64, k, fmt, False, SMS)
    assert (shape.tiles_per_thread, shape.max_warps) == (tiles_per_thread, max_warps)
    assert shape.tile.row_warps == row_warps and not shape.tall


@pytest.mark.parametrize(
    ("rows", "masked", "arch", "free"),
    [
        (2 * SMS, False, "sm_90a", True),
        (2 * SMS + 1, False, "sm_90a", False),
        (2, True, "sm_90a", False),
        (2, False, "sm_100a", False),
    ],
)
def test_latency_of_rows_with_a_scale_of_their_own(rows, masked, arch, free):
    fmt = NVFP4.replace(row_scale=True)
    shape = heuristics.row_shape(1, rows, 7168, fmt, masked, SMS, arch)
    assert shape.tile.low_latency == free
    of_groups = heuristics.row_shape(1, rows, 7168, ROWWISE_FP8, masked, SMS, arch)
    assert not of_groups.tile.low_latency


@pytest.mark.parametrize(
    ("fmt", "k", "tiles", "max_warps", "held"),
    [
        (ROWWISE_FP8, 7, 2, 1, True),
        (ROWWISE_FP8, 1024, 2, 1, True),
        (ROWWISE_FP8, 1025, 4, 8, True),
        (ROWWISE_FP8, 8192, 4, 8, True),
        (ROWWISE_FP8, 8193, 2, 16, True),
        (ROWWISE_FP8, 16384, 2, 16, True),
        (ROWWISE_FP8, 16385, 4, 16, True),
        (ROWWISE_FP8, 32768, 4, 16, True),
        (ROWWISE_FP8, 32769, 1, 16, False),
        (ROWWISE_FP8, 2**20, 1, 16, False),
        (NVFP4.replace(row_scale=True), 512, 1, 1, True),
        (NVFP4.replace(row_scale=True), 7168, 2, 8, True),
        (NVFP4.replace(row_scale=True), 32768, 4, 16, True),
    ],
    ids=str,
)
def test_warps_of_a_row_that_is_scaled_as_a_whole(fmt, k, tiles, max_warps, held):
    shape = heuristics.row_shape(1, 64, k, fmt, False, SMS, "sm_90a")
    assert (shape.tile.tiles_per_thread, shape.max_warps, shape.held) == (tiles, max_warps, held)
    # Short rows share a CTA: there may be 2^31 - 1 of them, and a row of padding.
    assert shape.tile.row_warps == (4 if max_warps == 1 else 1)
    if held:
        assert max_warps * tiles * shape.tile.columns >= k


@pytest.mark.parametrize(
    ("matrices", "rows", "masked", "arch", "columns", "tiles", "max_warps"),
    [
        (1, SMS, False, "sm_90a", 256, 4, 8),
        (2, SMS // 2, False, "sm_90a", 256, 4, 8),
        (1, SMS, False, "sm_100a", 512, 2, 8),
        (1, SMS + 1, False, "sm_90a", 512, 1, 16),
        (2, SMS, False, "sm_100a", 512, 1, 16),
        (1, SMS, True, "sm_90a", 512, 1, 16),
    ],
)
def test_few_rows_have_fewer_warps(matrices, rows, masked, arch, columns, tiles, max_warps):
    shape = heuristics.row_shape(matrices, rows, 7168, ROWWISE_FP8, masked, SMS, arch)
    assert (shape.tile.columns, shape.tile.tiles_per_thread) == (columns, tiles)
    assert (shape.tiles_per_thread, shape.max_warps, shape.held) == (tiles, max_warps, True)


def test_ctas_of_masked_norms():
    for rows, ctas in ((4096, 132), (9, 12)):
        shape = heuristics.norm_shape(8, rows, 7168, DEEP_GEMM, True, SMS)
        assert shape.row_ctas == 8 * ctas


@pytest.mark.parametrize(
    ("dtype", "nbytes"), [(torch.float8_e4m3fn, 16), (torch.bfloat16, 32), (torch.float32, 32)]
)
def test_bytes_of_a_store(dtype, nbytes):
    assert heuristics.store_bytes(DEFAULT_TILE, dtype) == nbytes
