"""Launch shapes to be tried: each keeps the contract, and calls take it."""

import pytest
import torch

from bench import tune
from cute_quant import DEEP_GEMM, ROWWISE_FP8, empty_scales
from cute_quant.kernels import heuristics
from cute_quant.kernels.config import LANES, ONE_ROW, Tile
from tests.kernels.emulated_gpu import Gpu

K = (640, 2048, 7168, 32768)


@pytest.mark.parametrize("k", K)
def test_shapes_keep_the_contract(k):
    for fields in tune.tiles_of_groups(k):
        fields["tile"].check(DEEP_GEMM, torch.bfloat16)
        assert fields["tile"].columns * fields["tile"].tiles_per_thread <= k
    for shapes, fmt in ((tune.tiles_of_rows, ROWWISE_FP8), (tune.tiles_of_norms, DEEP_GEMM)):
        seen = list(shapes(k))
        assert len(seen) == len({tune.describe(fields) for fields in seen}) > 0
        for fields in seen:
            tile = fields["tile"]
            tile.check(fmt, torch.bfloat16)
            tiles = fields.get("tiles_per_thread", tile.tiles_per_thread)
            assert fields["max_warps"] * tiles * tile.columns >= k
            assert fields["max_warps"] * tile.row_warps * LANES <= 512


@pytest.mark.parametrize("k", [2048, 7168])
def test_what_calls_take_is_among_the_shapes(k):
    few, many = (
        heuristics.row_shape(1, m, k, ROWWISE_FP8, False, 132, "sm_90a") for m in (64, 4096)
    )
    norm = heuristics.norm_shape(1, 64, k, DEEP_GEMM, False, 132)
    silu = heuristics.silu_shape(1, 64, k, DEEP_GEMM, False, 132, "sm_90a")
    for shape, candidates in (
        (few, tune.tiles_of_rows(k)),
        (many, tune.tiles_of_rows(k)),
        (norm, tune.tiles_of_norms(k)),
        (silu, tune.tiles_of_groups(k)),
        (heuristics.shape(1, 4096, k, DEEP_GEMM, False, 132, "sm_90a"), tune.tiles_of_groups(k)),
    ):
        assert any(all(getattr(shape, n) == v for n, v in f.items()) for f in candidates)


def test_a_call_takes_the_shape(kernels):
    gpu = Gpu(kernels, "sm_90a")
    x = torch.randn(5, 512).bfloat16()
    q = torch.empty(5, 512, dtype=torch.float8_e4m3fn)
    tile = Tile(8, 1)
    with tune.launched_as({"tile": tile}) as chosen:
        gpu.quantize(x, q, empty_scales(DEEP_GEMM, x.shape), DEEP_GEMM)
    assert chosen == [{"tile": Tile()}]
    spec = gpu.launched[-1].kernel.spec
    assert spec.tile == tile
    gpu.quantize(x, q, empty_scales(DEEP_GEMM, x.shape), DEEP_GEMM)
    assert gpu.launched[-1].kernel.spec.tile == Tile()


def test_a_shape_is_named_by_what_it_changes():
    fields = {"tile": ONE_ROW._replace(values_per_thread=8), "max_warps": 4}
    assert tune.describe(fields) == "ONE_ROW(values_per_thread=8), max_warps=4"
    assert tune.describe({"tile": Tile(row_warps=8)}) == "Tile(row_warps=8)"


def test_the_best_average_comes_first():
    found = {1: {"a": 1.2, "b": 1.1}, 64: {"a": 1.0, "b": 1.3, "c": 0.9}}
    header, *lines, fastest = tune.table(found, {1: "a", 64: "b"})
    assert header.split() == ["M=1", "M=64", "mean"]
    assert [line.split() for line in lines] == [
        ["a", "1.200*", "1.000", "1.100"],
        ["b", "1.100", "1.300*", "1.200"],
        ["c", "nan", "0.900", "nan"],
    ]
    assert fastest == "fastest: 1: b; 64: c"
