"""The layouts that the kernels use, evaluated on the host."""

import itertools
from collections.abc import Iterator

import cutlass
import cutlass.cute as cute
import pytest
import torch
from cutlass._mlir import ir

from cute_quant.contract import reference
from cute_quant.contract.formats import make_format
from cute_quant.kernels import layouts
from cute_quant.kernels.config import DEFAULT_TILE, LANES
from tests.helpers import FLOAT32, UE8M0, format_id

BLOCKED = make_format(32, "ue8m0_128x4", False)
ROW_MAJOR = make_format(128, "float32_row_major", False)

every_size = pytest.mark.parametrize(("mn", "groups"), [(1, 1), (3, 4), (5, 7), (8, 56)])


@pytest.fixture
def mlir() -> Iterator[None]:
    with ir.Context(), ir.Location.unknown():
        module = ir.Module.create()
        with ir.InsertionPoint(module.body):
            yield


@every_size
@pytest.mark.parametrize("fmt", [UE8M0, FLOAT32], ids=format_id)
def test_scales_by_column(mlir, mn, groups, fmt):
    sf = fmt.empty_scales((), mn, 128 * groups, torch.device("cpu"))
    layout = layouts.scales_by_column(fmt.scale_rows(mn), sf.shape[1])
    for row, column in itertools.product(range(mn), range(sf.shape[1])):
        assert layout((row, column)) == row * sf.stride(0) + column * sf.stride(1)
    assert 4 * cute.cosize(layout) == sf.untyped_storage().nbytes()


@every_size
def test_scales_by_row(mlir, mn, groups):
    sf = ROW_MAJOR.empty_scales((), mn, 128 * groups, torch.device("cpu"))
    layout = layouts.scales_by_row(mn, groups)
    for row, group in itertools.product(range(mn), range(groups)):
        assert layout((row, group)) == row * sf.stride(0) + group * sf.stride(1)
    assert cute.cosize(layout) == sf.numel()


@pytest.mark.parametrize(("mn", "groups"), [(1, 1), (130, 7), (300, 8)])
def test_scales_by_block(mlir, mn, groups):
    rows, columns = BLOCKED.scale_rows(mn), BLOCKED.columns(32 * groups)
    layout = layouts.scales_by_block(rows, columns)
    places = torch.arange(rows * columns).view(1, rows, columns)
    blocks = reference.to_blocks(places)[0]
    for row, group in itertools.product(range(0, rows, 7), range(columns)):
        assert blocks[layout((row, group))] == places[0, row, group]
    assert cute.cosize(layout) == rows * columns


def test_lanes_and_values_cover_a_tile_of_a_row_once(mlir):
    atom = cute.make_copy_atom(
        cute.nvgpu.CopyUniversalOp(), cutlass.BFloat16, num_bits_per_copy=256
    )
    tile = DEFAULT_TILE
    thread_value = layouts.tiled_copy(atom, tile.values_per_thread).layout_tv_tiled
    columns = []
    for lane, value in itertools.product(range(LANES), range(tile.values_per_thread)):
        column = thread_value((lane, value))
        assert column == 16 * lane + value, "a thread's values are neighbours"
        assert column // 128 == lane // 8, "an octet of lanes holds a group"
        columns.append(column)
    assert columns == list(range(tile.columns))
