"""The layouts that the kernels use, evaluated on the host."""

import itertools
from collections.abc import Iterator

import cutlass
import cutlass.cute as cute
import pytest
import torch
from cutlass._mlir import ir

from cute_quant import DEEP_GEMM_32, GROUPWISE_FP8, MXFP8, NVFP4
from cute_quant.contract.checks import MIN_TILE_ROWS
from cute_quant.jit.lookup import ARCHITECTURES
from cute_quant.kernels import heuristics, layouts
from cute_quant.kernels.config import (
    ALONG,
    BLOCK_TILE,
    BLOCK_WARPS,
    DEFAULT_TILE,
    DOWN,
    LANES,
    Tile,
)
from cute_quant.kernels.heuristics import TWO_ROWS
from tests.helpers import FLOAT32, UE8M0

BLOCKED = MXFP8
BLOCKED_8 = NVFP4.replace(scale_layout="8x4")
EVERY_LAYOUT = (
    UE8M0,
    DEEP_GEMM_32,
    FLOAT32,
    GROUPWISE_FP8,
    MXFP8.replace(scale_layout="row_major"),
    BLOCKED,
    BLOCKED_8,
    NVFP4.replace(scale_layout="mn_major_packed"),
    NVFP4.replace(scale_layout="row_major_packed"),
)

every_size = pytest.mark.parametrize(("mn", "groups"), [(1, 1), (3, 4), (5, 7), (8, 56)])


@pytest.fixture
def mlir() -> Iterator[None]:
    with ir.Context(), ir.Location.unknown():
        module = ir.Module.create()
        with ir.InsertionPoint(module.body):
            yield


def addresses(fmt, mn, k):
    """(row, group) -> byte of sf, padding included."""
    rows, groups = fmt.scale_rows(mn), fmt.columns(k) * fmt.groups_per_column
    layout = layouts.scales(fmt, rows, groups)
    places = [layout(place) for place in itertools.product(range(rows), range(groups))]
    size = fmt.sf_dtype.itemsize
    return torch.tensor([element * size + byte for byte, element in places]).view(rows, groups)


@every_size
@pytest.mark.parametrize("fmt", EVERY_LAYOUT, ids=str)
def test_scales_cover_their_storage_once(mlir, mn, groups, fmt):
    k = fmt.group_size * groups
    sf = fmt.empty_scales((), mn, k, torch.device("cpu"))
    found = addresses(fmt, mn, k)
    step = 1 if fmt.packed else fmt.sf_dtype.itemsize
    assert torch.equal(found.flatten().sort()[0], torch.arange(found.numel()) * step)
    assert found.numel() * step == sf.untyped_storage().nbytes()


@every_size
@pytest.mark.parametrize("fmt", [fmt for fmt in EVERY_LAYOUT if not fmt.blocked], ids=str)
def test_scales_are_where_the_strides_say(mlir, mn, groups, fmt):
    k = fmt.group_size * groups
    sf = fmt.empty_scales((), mn, k, torch.device("cpu"))
    found = addresses(fmt, mn, k)
    for row, group in itertools.product(range(mn), range(groups)):
        column, byte = divmod(group, fmt.groups_per_column)
        element = row * sf.stride(0) + column * sf.stride(1)
        assert found[row, group] == element * sf.itemsize + byte


@pytest.mark.parametrize(("mn", "groups"), [(1, 1), (130, 7), (300, 8)])
@pytest.mark.parametrize("fmt", [BLOCKED, BLOCKED_8], ids=str)
def test_scales_in_blocks(mlir, fmt, mn, groups):
    found = addresses(fmt, mn, fmt.group_size * groups)
    rows, columns = found.shape
    for row, group in itertools.product(range(rows), range(columns)):
        block = row // fmt.block_rows * (columns // 4) + group // 4
        in_block = row % 8 * 4 if fmt is BLOCKED_8 else row % 32 * 16 + row % 128 // 32 * 4
        assert found[row, group] == block * fmt.block_rows * 4 + in_block + group % 4


@pytest.mark.parametrize("groups_per_tile", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("fmt", EVERY_LAYOUT, ids=str)
def test_a_tile_has_the_groups_that_follow_each_other(mlir, fmt, groups_per_tile):
    layout = layouts.scales(fmt, fmt.scale_rows(5), 32)
    groups = layouts.groups_by_tile(layout, groups_per_tile)
    for row, group in itertools.product((0, 3), range(32)):
        tile, in_tile = divmod(group, groups_per_tile)
        assert layout((row, groups((in_tile, tile)))) == layout((row, group))


@pytest.mark.parametrize("size", [16, 32, 128, 256, -1])
@pytest.mark.parametrize("tile", [DEFAULT_TILE, TWO_ROWS, Tile(8, rows_per_thread=2)])
def test_lanes_and_values_cover_a_tile_once(mlir, tile, size):
    atom = cute.make_copy_atom(
        cute.nvgpu.CopyUniversalOp(), cutlass.BFloat16, num_bits_per_copy=128
    )
    lanes_per_group, values = tile.lanes_per_group(size), tile.values_per_thread
    if tile.rows_per_thread > lanes_per_group:
        pytest.skip("a tile that is not allowed")
    columns = layouts.tiled_copy(atom, values).layout_tv_tiled
    thread_value = layouts.thread_value(tile, size)
    lanes = layouts.lanes(lanes_per_group)
    places = []
    for lane, value in itertools.product(range(LANES), range(values)):
        in_group, group = lanes(lane)
        assert lane == group * lanes_per_group + in_group, "adjacent lanes hold a group"
        for i in range(tile.rows_per_thread):
            row, column = thread_value((lane, (value, i)))
            assert column == columns((lane, value)), "the copy moves what the layout says"
            assert column == values * lane + value, "a thread's values are contiguous along k"
            assert row == i, "a thread's rows follow each other"
            if size != -1:
                assert column // size == group
            places.append((row, column))
    every = itertools.product(range(tile.rows_per_thread), range(tile.columns))
    assert sorted(places) == sorted(every)


@pytest.mark.parametrize("fmt", EVERY_LAYOUT, ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES.values())
@pytest.mark.parametrize("rows", [1, 64, 100_000])
def test_tiles_of_experts_have_the_rows_that_checks_count_with(rows, arch, fmt):
    size = (8, rows, 7168, fmt, True, 132)
    for launch in (heuristics.shape(*size, arch), heuristics.silu_shape(*size, arch)):
        assert launch.tile.rows >= MIN_TILE_ROWS


@pytest.mark.parametrize("order", [DOWN, ALONG])
@pytest.mark.parametrize("shape", [(4, 1), (2, 2), (1, 3)])
def test_warps_cover_a_cta_once(mlir, shape, order):
    """Consecutive warps follow each other along M (down) or along N."""
    rows, columns = shape
    tile = Tile(8, row_warps=rows, column_warps=columns, rows_per_thread=2, warp_order=order)
    layout = layouts.warps(tile)
    places = [tuple(map(int, layout(warp))) for warp in range(rows * columns)]
    expected = [(2 * row, column) for column in range(columns) for row in range(rows)]
    assert places == (expected if order == DOWN else sorted(expected))


def wavefronts(accesses):
    """Return in how many steps shared memory serves a warp: addresses and bytes of each lane.

    Lanes that access 4 bytes take turns all at once, of 8 bytes by halves, of 16 by quarters of a
    warp. In a turn each of 32 banks serves one word of 4 bytes.
    """
    per_turn = LANES // max(1, accesses[0][1] // 4)
    steps = 0
    for first in range(0, LANES, per_turn):
        banks = {}
        for address, nbytes in accesses[first : first + per_turn]:
            assert address % nbytes == 0
            for word in range(address // 4, -(-(address + nbytes) // 4)):
                banks.setdefault(word % 32, set()).add(word)
        steps += max(map(len, banks.values()))
    return steps


def test_wavefronts_are_counted():
    assert wavefronts([(4 * lane, 4) for lane in range(LANES)]) == 1
    assert wavefronts([(128 * lane, 4) for lane in range(LANES)]) == 32
    assert wavefronts([(0, 4)] * LANES) == 1
    assert wavefronts([(16 * lane, 16) for lane in range(LANES)]) == 4
    assert wavefronts([(32 * lane, 16) for lane in range(LANES)]) == 8


every_width = pytest.mark.parametrize("values", [4, 8, 16])


@every_width
def test_threads_of_a_column_tile_cover_it_once(mlir, values):
    threads, rows = layouts.threads_of_column_tile(values), layouts.rows_of_block_thread(values)
    places = []
    for warp in range(BLOCK_WARPS):
        of_warp = [threads((lane, warp)) for lane in range(LANES)]
        assert {int(row) // 16 for row, _ in of_warp} == {warp}, "a warp is in one group of rows"
        places += [
            (row + i, column * values + j)
            for row, column in of_warp
            for i in range(rows)
            for j in range(values)
        ]
    assert sorted(places) == list(itertools.product(range(BLOCK_TILE), range(BLOCK_TILE)))


@every_width
def test_a_tile_is_transposed_without_bank_conflicts(mlir, values):
    layout, rows = layouts.transposed_tile(values, 1), layouts.rows_of_block_thread(values)
    threads, vectors = (
        layouts.threads_of_column_tile(values),
        layouts.vectors_of_transposed_tile(16),
    )
    stored, read = set(), set()
    for warp in range(BLOCK_WARPS):
        places = [threads((lane, warp)) for lane in range(LANES)]
        for i in range(values):
            stores = [(int(layout((c * values + i, row))), rows) for row, c in places]
            assert wavefronts(stores) == max(1, rows // 4)
            stored |= {address + j for address, nbytes in stores for j in range(nbytes)}
        for i in range(cute.size(vectors.shape[2])):
            places_read = [vectors((lane, warp, i)) for lane in range(LANES)]
            loads = [(int(layout((row, 16 * vector))), 16) for row, vector in places_read]
            assert wavefronts(loads) == 4
            read |= {address + j for address, nbytes in loads for j in range(nbytes)}
    assert stored == read == set(range(BLOCK_TILE * BLOCK_TILE))


@every_width
@pytest.mark.parametrize("itemsize", [2, 4])
def test_columns_are_shared_without_bank_conflicts(mlir, values, itemsize):
    vector = min(16 // itemsize, values)
    layout = layouts.vectors_of_column_tile(values, 16 // itemsize, 4)
    threads = layouts.threads_of_column_tile(values)
    places = [threads((lane, 0)) for lane in range(LANES)]
    for i in range(values // vector):
        accesses = [
            (int(layout((3, (0, i, column)))) * itemsize, vector * itemsize) for _, column in places
        ]
        assert wavefronts(accesses) <= max(1, vector * itemsize // 4)
    columns = [int(layout((row, c))) for row in range(4) for c in range(BLOCK_TILE)]
    assert sorted(columns) == list(range(4 * BLOCK_TILE))
