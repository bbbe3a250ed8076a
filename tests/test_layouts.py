"""The layouts that the kernel uses, evaluated on the host."""

import itertools
from collections.abc import Iterator

import cutlass
import cutlass.cute as cute
import pytest
import torch
from cutlass._mlir import ir

from cute_quant.kernels import layouts
from tests.helpers import FLOAT32, UE8M0


@pytest.fixture
def mlir() -> Iterator[None]:
    with ir.Context(), ir.Location.unknown():
        module = ir.Module.create()
        with ir.InsertionPoint(module.body):
            yield


@pytest.mark.parametrize(("mn", "groups"), [(1, 1), (3, 4), (5, 7), (8, 56)])
def test_packed_scales_are_the_words_of_the_tensor(mlir, mn, groups):
    sf = UE8M0.empty_scales(mn, 128 * groups, torch.device("cpu"))
    rows, words = sf.stride(1), sf.shape[1]
    layout = layouts.scales(rows, words)
    for row, word in itertools.product(range(mn), range(words)):
        assert layout((row, word)) == row * sf.stride(0) + word * sf.stride(1)
    assert 4 * cute.cosize(layout) == sf.untyped_storage().nbytes()


@pytest.mark.parametrize(("mn", "groups"), [(1, 1), (3, 4), (5, 7), (8, 56)])
def test_float32_scales_are_the_elements_of_the_tensor(mlir, mn, groups):
    sf = FLOAT32.empty_scales(mn, 128 * groups, torch.device("cpu"))
    layout = layouts.scales(sf.stride(1), groups)
    for row, group in itertools.product(range(mn), range(groups)):
        assert layout((row, group)) == row * sf.stride(0) + group * sf.stride(1)
    assert 4 * cute.cosize(layout) == sf.untyped_storage().nbytes()


def test_lanes_and_values_cover_a_tile_of_a_row_once(mlir):
    atom = cute.make_copy_atom(
        cute.nvgpu.CopyUniversalOp(), cutlass.BFloat16, num_bits_per_copy=256
    )
    thread_value = layouts.tiled_copy(atom).layout_tv_tiled
    columns = []
    for lane, value in itertools.product(range(layouts.LANES), range(layouts.VALUES_PER_THREAD)):
        column = thread_value((lane, value))
        assert column == 16 * lane + value, "a thread's values are neighbours"
        assert column // 128 == lane // 8, "an octet of lanes holds a group"
        columns.append(column)
    assert columns == list(range(layouts.COLUMNS_PER_WARP))
