"""Launch shapes: each choice at both sides of where it changes."""

import pytest
import torch

from cute_quant import DEEP_GEMM, DEEP_GEMM_SM90, MXFP4, MXFP8, NVFP4, ROWWISE_FP8
from cute_quant.kernels import heuristics
from cute_quant.kernels.config import DEFAULT_TILE, MAX_GRID_Y
from cute_quant.kernels.heuristics import TWO_ROWS, TWO_ROWS_FROM

SMS = 132


def tile(rows, k, fmt=DEEP_GEMM, masked=False):
    return heuristics.shape(1, rows, k, fmt, masked, SMS).tile


def test_a_thread_takes_two_rows_of_large_matrices():
    k = 4096
    rows = TWO_ROWS_FROM * SMS // k
    assert tile(rows, k) == DEFAULT_TILE
    assert tile(rows + 1, k) == TWO_ROWS
    assert tile(rows + 1, k, masked=True) == DEFAULT_TILE
    assert heuristics.shape(2, rows // 2 + 1, k, DEEP_GEMM, False, SMS).tile == TWO_ROWS


@pytest.mark.parametrize(("k", "two"), [(4096, True), (4112, False), (4128, True), (4104, False)])
def test_the_lanes_that_store_scales_of_two_rows_have_columns(k, two):
    """A row that ends within the values of two lanes has one that stores no scale."""
    assert (tile(2048, k) == TWO_ROWS) == two


def test_a_smaller_sm_is_full_sooner():
    """48 warps of an SM hold three quarters of what 64 do."""
    k = 4096
    rows = TWO_ROWS_FROM * SMS * 3 // 4 // k
    for more, tile in ((0, DEFAULT_TILE), (1, TWO_ROWS)):
        assert heuristics.shape(1, rows + more, k, DEEP_GEMM, False, SMS, 48).tile == tile


def test_two_rows_need_two_lanes_of_a_group():
    assert tile(2048, 4096, DEEP_GEMM.replace(group_size=32)) == TWO_ROWS
    assert tile(2048, 4096, DEEP_GEMM.replace(group_size=16)) == DEFAULT_TILE


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
    assert heuristics.shape(1, rows, 16, fmt, False, SMS).tall == tall


def test_ctas_of_masked_experts():
    """At least 8 for each SM, and 2 for each expert, but no more than there are tiles."""
    assert heuristics.shape(8, 4096, 7168, DEEP_GEMM, True, SMS).row_ctas == 8 * 10
    assert heuristics.shape(256, 4096, 7168, DEEP_GEMM, True, SMS).row_ctas == 256 * 2
    assert heuristics.shape(256, 4, 7168, DEEP_GEMM, True, SMS).row_ctas == 256
    assert heuristics.shape(8, 16, 7168, DEEP_GEMM, True, SMS).row_ctas == 8 * 4
    assert heuristics.row_shape(8, 4096, 7168, ROWWISE_FP8, True, SMS, "sm_90a").row_ctas == 8 * 132
    assert heuristics.row_shape(8, 16, 512, ROWWISE_FP8, True, SMS, "sm_90a").row_ctas == 8 * 4
    assert heuristics.shape(2**16, 64, 128, DEEP_GEMM, True, SMS).row_ctas == MAX_GRID_Y
    assert heuristics.shape(0, 64, 128, DEEP_GEMM, True, SMS).row_ctas == 0


@pytest.mark.parametrize(
    ("matrices", "rows", "masked", "values", "row_warps"),
    [
        (1, 1, False, 8, 1),
        (1, 2, False, 16, 1),
        (1, 75, False, 16, 1),
        (5, 15, False, 16, 1),
        (1, 76, False, 8, 8),
        (1, 1, True, 8, 8),
    ],
)
def test_tiles_of_few_gates_and_ups(matrices, rows, masked, values, row_warps):
    size = matrices, rows, 7168, DEEP_GEMM, masked, SMS
    tile = heuristics.silu_shape(*size, "sm_90a").tile
    assert (tile.values_per_thread, tile.row_warps) == (values, row_warps)
    assert heuristics.silu_shape(*size, "sm_100a").tile == DEFAULT_TILE


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
    assert heuristics.norm_shape(8, 4096, 7168, DEEP_GEMM, True, SMS).row_ctas == 8 * 132
    assert heuristics.norm_shape(8, 9, 7168, DEEP_GEMM, True, SMS).row_ctas == 8 * 12


@pytest.mark.parametrize(
    ("dtype", "nbytes"), [(torch.float8_e4m3fn, 16), (torch.bfloat16, 32), (torch.float32, 32)]
)
def test_bytes_of_a_store(dtype, nbytes):
    assert heuristics.store_bytes(DEFAULT_TILE, dtype) == nbytes
