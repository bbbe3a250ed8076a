"""Rows that are scattered, in the emulator: every byte against the oracle, each written once."""

import itertools

import pytest
import torch

from cute_quant import (
    DEEP_GEMM,
    DEEP_GEMM_SM90,
    GROUPWISE_FP8,
    MXFP4,
    MXFP8,
    NVFP4,
    ROWWISE_FP8,
    ROWWISE_INT8,
    PrefixSum,
    quantize,
)
from cute_quant.contract.prologues import make_rms_norm, make_silu_mul
from cute_quant.emulator import MemoryFault
from cute_quant.kernels.config import ONE_ROW
from tests import oracle
from tests.helpers import ARCHITECTURES, poisoned, poisoned_results
from tests.kernels.cases import assert_same_storage, check, special_groups
from tests.kernels.emulated_gpu import Gpu
from tests.places import DOMAINS, in_records, places, row_domain

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FORMATS = (
    (BF16, DEEP_GEMM, 640),
    (FP32, DEEP_GEMM_SM90, 130),
    (FP16, DEEP_GEMM.replace(scale_layout="row_major_packed"), 520),
    (BF16, MXFP8, 288),
    (BF16, NVFP4, 544),
    (FP16, MXFP4.replace(scale_layout="8x4"), 100),
    (BF16, GROUPWISE_FP8.replace(values=torch.int8, group_size=256), 600),
    (FP32, ROWWISE_FP8, 700),
    (BF16, ROWWISE_INT8, 520),
    (FP16, DEEP_GEMM.replace(group_size=-1), 77),
    (BF16, NVFP4.replace(row_scale=True), 1040),
    (FP32, NVFP4.replace(row_scale=True, scale_layout="row_major"), 96),
)
CASES = [
    pytest.param(
        ARCHITECTURES[(i + j) % 2],
        kind,
        *fmt,
        id=f"{ARCHITECTURES[(i + j) % 2]}-{kind}-{fmt[1]}-{fmt[2]}",
        # Each format and each domain is in what is not slow.
        marks=() if j % 4 == i else pytest.mark.slow,
    )
    for (i, kind), (j, fmt) in itertools.product(enumerate(DOMAINS), enumerate(FORMATS))
]


@pytest.mark.parametrize(("arch", "kind", "dtype", "fmt", "k"), CASES)
def test_every_byte(kernels, arch, kind, dtype, fmt, k):
    for seed, width in ((1, 4), (2, 1)):
        rows, matrices, mn = row_domain(kind, seed)
        scatter = places(rows, matrices, mn, seed, width, unnamed=3 * (seed - 1))
        x = special_groups(len(scatter), k, dtype, seed, fmt)
        options = {"rows": rows, "scatter": scatter, "num_rows": mn}
        check(Gpu(kernels, arch), x, fmt, **options, last_padding=seed == 1)


@pytest.mark.parametrize(
    ("arch", "fmt"),
    [
        ("sm_90a", DEEP_GEMM),
        ("sm_100a", ROWWISE_INT8),
        pytest.param("sm_90a", NVFP4.replace(row_scale=True), marks=pytest.mark.slow),
        pytest.param("sm_100a", MXFP8, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gaps_that_are_kept(kernels, arch, fmt):
    """Rows between groups keep what memory held, whatever places name them."""
    rows, _, mn = row_domain("prefix_sum_with_gaps", 4)
    scatter = places(rows, 1, mn, 4, 3, unnamed=2)
    x = special_groups(len(scatter), 640, BF16, 4, fmt)
    check(Gpu(kernels, arch), x, fmt, rows=rows, scatter=scatter, num_rows=mn)


@pytest.mark.parametrize(
    ("arch", "kind", "fmt"),
    [
        ("sm_100a", "masked", DEEP_GEMM),
        ("sm_90a", "dense", ROWWISE_FP8),
        pytest.param("sm_90a", "prefix_sum", MXFP4, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_stochastic_rounding(kernels, arch, kind, fmt):
    """All places of a row have the same bytes, drawn for its place in x."""
    rows, matrices, mn = row_domain(kind, 5)
    scatter = places(rows, matrices, mn, 5)
    x = special_groups(len(scatter), 640, BF16, 5, fmt)
    state = torch.tensor([2**40 + 3, 5])
    options = {"rows": rows, "scatter": scatter, "num_rows": mn, "rng_state": state}
    check(Gpu(kernels, arch), x, fmt, **options)


@pytest.mark.parametrize(
    ("fmt", "shape"),
    [
        (ROWWISE_FP8, {"tile": ONE_ROW._replace(tiles_per_thread=2), "max_warps": 4}),
        (ROWWISE_INT8, {"tile": ONE_ROW, "held": False, "max_warps": 2}),
    ],
    ids=["held", "two passes"],
)
def test_rows_that_are_one_group(kernels, arch, fmt, shape):
    """Of several warps, and in each pass over the tiles of a row that no CTA holds."""
    rows, matrices, mn = row_domain("masked", 6)
    scatter = places(rows, matrices, mn, 6, 2)
    x = special_groups(len(scatter), 3001, FP16, 8, fmt)
    gpu = Gpu(kernels, arch, max_grid=3, **shape)
    check(gpu, x, fmt, rows=rows, scatter=scatter, num_rows=mn)


@pytest.mark.parametrize("kind", ["dense", "masked"])
def test_columns_of_scales_without_padding_rows(gpu, kind):
    rows, matrices, mn = row_domain(kind, 3)
    scatter = places(rows, matrices, mn, 3)
    batch = (matrices,) if kind == "masked" else ()
    x = special_groups(len(scatter), 640, BF16, 3)
    found = []
    for run in (gpu.quantize, on_cpu):
        q, _ = poisoned_results(DEEP_GEMM_SM90, mn, 640, "cpu", batch_shape=batch)
        sf = poisoned(4 * matrices * mn * 5, "cpu").view(torch.float32).view(*batch, 5, mn).mT
        run(x, q, sf, DEEP_GEMM_SM90, rows, scatter=scatter)
        found.append((q, sf))
    for name, a, b in zip(("q", "sf"), *found, strict=True):
        assert_same_storage(name, a, b)


def on_cpu(x, q, sf, fmt, rows, scatter):
    quantize(x, fmt, rows=rows, scatter=scatter, out=(q, sf))


@pytest.mark.parametrize("width", [9, pytest.param(32, marks=pytest.mark.slow)])
def test_more_places_than_a_group_has_lanes(gpu, width):
    rows, matrices, mn = row_domain("masked", 3)
    scatter = places(rows, matrices, mn, 4, width)
    x = special_groups(len(scatter), 640, BF16, 1)
    check(gpu, x, DEEP_GEMM, rows=rows, scatter=scatter, num_rows=mn)


def test_more_groups_than_a_warp_has_lanes(gpu):
    """Groups of 0 to 3 rows, of which several end in one window."""
    counts = torch.arange(70) % 4
    starts = (-(-counts // 2) * 2).cumsum(0) - -(-counts // 2) * 2
    rows, mn = PrefixSum((starts + counts).int(), 2), int(starts[-1]) + 40
    scatter = places(rows, 1, mn, 5, 3)
    x = special_groups(len(scatter), 130, BF16, 1)
    check(gpu, x, DEEP_GEMM, rows=rows, scatter=scatter, num_rows=mn)


def test_a_lane_has_two_groups_of_a_window(gpu):
    """Between them lie the empty groups of all other lanes."""
    ends = torch.tensor([12] * 32 + [15] + [14, 40], dtype=torch.int32)
    rows, mn = PrefixSum(ends, 1), 77
    scatter = places(rows, 1, mn, 5, 3)
    x = special_groups(len(scatter), 130, BF16, 1)
    check(gpu, x, DEEP_GEMM, rows=rows, scatter=scatter, num_rows=mn)


@pytest.mark.parametrize(
    ("arch", "kind", "fmt"),
    [
        ("sm_100a", "prefix_sum", DEEP_GEMM),
        ("sm_90a", "masked", NVFP4.replace(row_scale=True)),
        pytest.param("sm_90a", "masked", DEEP_GEMM, marks=pytest.mark.slow),
        pytest.param("sm_100a", "indexed", NVFP4.replace(row_scale=True), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_grid_that_is_not_large_enough(kernels, arch, kind, fmt):
    """Its CTAs have several tiles of x and several windows of the result."""
    rows, matrices, mn = row_domain(kind, 7)
    scatter = places(rows, matrices, mn, 7, 2)
    x = special_groups(len(scatter), 640, BF16, 1, fmt)
    gpu = Gpu(kernels, arch, max_grid=2)
    check(gpu, x, fmt, rows=rows, scatter=scatter, num_rows=mn)


@pytest.mark.parametrize("fmt", [DEEP_GEMM, NVFP4.replace(row_scale=True)], ids=str)
def test_no_rows_or_no_places(kernels, fmt):
    """What does not exist becomes 0 all the same, and a grid is never empty."""
    gpu = Gpu(kernels, "sm_90a")
    ends = PrefixSum(torch.tensor([3, 12], dtype=torch.int32), 8)
    for tokens, width in ((0, 2), (3, 0)):
        x = torch.ones(tokens, 640, dtype=BF16)
        scatter = torch.zeros(tokens, width, dtype=torch.int32)
        for rows, mn in ((None, 128), (None, 35), (ends, 21)):
            check(gpu, x, fmt, rows=rows, scatter=scatter, num_rows=mn)


def test_rows_and_matrices_of_the_result_with_strides(gpu):
    rows, matrices, mn = row_domain("masked", 2)
    scatter = places(rows, matrices, mn, 2)
    x = special_groups(len(scatter), 640, BF16, 1)
    strides = (mn * 656 + 48, 656)
    check(gpu, x, DEEP_GEMM, rows=rows, scatter=scatter, num_rows=mn, q_strides=strides, q_offset=8)


def test_a_row_that_is_named_twice_is_a_race(gpu):
    """As the emulator sees it; so none of the others writes a byte twice."""
    x = special_groups(8, 128, BF16, 1)
    scatter = torch.arange(16, dtype=torch.int32).view(8, 2)
    check(gpu, x, DEEP_GEMM, scatter=scatter, num_rows=16)
    scatter[7, 1] = 3
    with pytest.raises(MemoryFault, match="another thread wrote"):
        check(gpu, x, DEEP_GEMM, scatter=scatter, num_rows=16)


@pytest.mark.parametrize(
    ("arch", "operation", "kind"),
    [
        ("sm_90a", "silu_mul", "masked"),
        ("sm_100a", "rms_norm", "dense"),
        pytest.param("sm_100a", "silu_mul", "dense", marks=pytest.mark.slow),
        pytest.param("sm_90a", "rms_norm", "masked", marks=pytest.mark.slow),
    ],
)
def test_operations_scatter_what_they_gather(kernels, arch, operation, kind):
    """The same bytes as a gather by the inverse, and the updated residual of every row of x."""
    gpu = Gpu(kernels, arch)
    rows, matrices, mn = row_domain(kind, 8)
    scatter = places(rows, matrices, mn, 8)
    tokens, k = len(scatter), 640
    generator = torch.Generator().manual_seed(1)
    index = torch.from_numpy(oracle.tokens_of_scatter(scatter, matrices, mn)).int()
    index = index if kind == "masked" else index[0]
    factors = torch.rand(tokens, generator=generator)
    of_rows = torch.cat([factors, torch.zeros(1)])[index.long()]
    weight = torch.rand(k, generator=generator)

    def prologue(factors, residual=None):
        if operation == "silu_mul":
            options = {"interleaved": False, "clamp": 1.0, "alpha": 1.0, "beta": 0.5}
            return make_silu_mul(**options, rounding="fused", weight=factors)
        options = {"eps": 1e-6, "weight_offset": 0.0, "rounding": "unfused"}
        return make_rms_norm(weight, **options, residual=residual)

    columns = 2 * k if operation == "silu_mul" else k
    x = torch.randn(tokens, columns, generator=generator).to(BF16)
    residual, given = None, x
    if operation == "rms_norm":
        residual = torch.randn(tokens, k, generator=generator).to(BF16)
        given = x
        x = (x.float() + residual.float()).to(BF16)
    batch_shape = (matrices,) if kind == "masked" else ()
    actual, expected = (
        poisoned_results(DEEP_GEMM, mn, k, "cpu", batch_shape=batch_shape) for _ in range(2)
    )
    gpu.quantize(
        given, *actual, DEEP_GEMM, rows, None, prologue(factors, residual), scatter=scatter
    )
    gpu.quantize(x, *expected, DEEP_GEMM, rows, index, prologue(of_rows))
    for name, a, b in zip(("q", "sf"), actual, expected, strict=True):
        assert_same_storage(name, a, b)
    if residual is not None:
        assert torch.equal(residual, x)


@pytest.mark.parametrize(
    ("fmt", "k"),
    [
        (DEEP_GEMM.replace(scale_layout="row_major_packed"), 640),
        pytest.param(GROUPWISE_FP8, 130, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_records_of_values_and_scales(gpu, fmt, k):
    """A row of q and its scales lie beside each other, with other bytes behind them."""
    rows, _, mn = row_domain("prefix_sum", 3)
    scatter = places(rows, 1, mn, 3)
    x = special_groups(len(scatter), k, BF16, 1, fmt)
    own, expected = (in_records(fmt, mn, k) for _ in range(2))
    gpu.quantize(x, *own, fmt, rows, scatter=scatter)
    q, sf = poisoned_results(fmt, mn, k, "cpu")
    oracle.quantize_into(x, q, sf, fmt, rows, scatter=scatter)
    for t, values in zip(expected, (q, sf), strict=True):
        t.view(torch.uint8).copy_(values.view(torch.uint8))
    for name, a, b in zip(("q", "sf"), own, expected, strict=True):
        assert_same_storage(name, a, b)
