"""Stochastic rounding in the kernels, against the oracle, every byte."""

import pytest
import torch

from cute_quant import (
    DEEP_GEMM,
    DEEP_GEMM_SM90,
    INT8,
    MXFP4,
    MXFP8,
    NVFP4,
    ROWWISE_FP8,
    quantize,
)
from cute_quant.contract.calls import Call
from cute_quant.contract.rows import Indexed, Masked, PrefixSum, PrefixSumWithGaps
from cute_quant.dispatch import launch
from cute_quant.kernels.config import ONE_ROW
from tests.helpers import poisoned_scales, poisoned_values
from tests.kernels.cases import assert_same_storage, check, special_groups
from tests.kernels.emulated_gpu import Gpu, OnGpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E5M2 = torch.float8_e5m2

CASES = (
    (BF16, DEEP_GEMM, 640),
    (FP32, MXFP8.replace(values=E5M2), 130),
    (FP16, INT8, 520),
    (BF16, NVFP4, 544),
    (FP32, DEEP_GEMM_SM90.replace(values=E5M2, group_size=16), 100),
    (FP16, MXFP4.replace(scale_layout="8x4"), 100),
    (BF16, ROWWISE_FP8, 1040),
    (FP32, NVFP4.replace(row_scale=True), 544),
)
STATES = [torch.tensor(numbers) for numbers in ([0, 0], [-1, 2**47 - 1], [2**40 + 9, 2**33 + 7])]


@pytest.mark.parametrize(("dtype", "fmt", "k"), CASES, ids=str)
def test_formats(gpu, dtype, fmt, k):
    """Also groups that are not finite, subnormal values, and zeros of either sign."""
    x = special_groups(13, k, dtype, 3, fmt)
    check(gpu, x, fmt, extra_rows=2, rng_state=STATES[k % 3])


@pytest.mark.parametrize("fmt", [DEEP_GEMM_SM90, MXFP8.replace(values=E5M2), INT8, MXFP4], ids=str)
def test_values_next_to_those_of_the_format(gpu, fmt):
    """From the smallest to the largest, also between subnormal ones, under one scale."""
    largest = fmt.value_type.max
    magnitudes = torch.logspace(-26, 0, 1023, base=2.0, dtype=torch.float64) * largest
    x = torch.cat([magnitudes.float(), torch.tensor([largest])]).view(-1, 128)
    x[:, 0] = largest
    x[:, 1::2] *= -1
    check(gpu, x.view(2, -1), fmt, rng_state=STATES[2])


def test_rows(gpu):
    given, dtype = STATES[2], torch.int32
    x = special_groups(27, 640, BF16, 4).view(3, 9, 640)
    check(gpu, x, DEEP_GEMM, rows=Masked(torch.tensor([9, 0, 4], dtype=dtype)), rng_state=given)
    ends = torch.tensor([3, 8], dtype=dtype)
    check(gpu, x[0], DEEP_GEMM, rows=PrefixSum(ends, 4), rng_state=given)
    indices = torch.tensor([0, 0, -1] * 3, dtype=dtype)
    check(gpu, x[0], DEEP_GEMM, rows=Indexed(indices), rng_state=given)
    check(gpu, x[0], DEEP_GEMM, index=torch.tensor([8, -1, 8, 9], dtype=dtype), rng_state=given)


def test_gaps_that_are_kept(gpu):
    """Rows between groups hold what they held, and do not shift the draws of those after them."""
    mn, k, ends = 12, 640, torch.tensor([3, 9], dtype=torch.int32)
    x, found = special_groups(mn, k, BF16, 7), []
    for run in (
        gpu.quantize,
        lambda x, q, sf, fmt, rows, rng_state: quantize(
            x, fmt, rows=rows, rng_state=rng_state, out=(q, sf)
        ),
    ):
        q = poisoned_values(mn + 1, k, "cpu").view(DEEP_GEMM.values)
        sf = poisoned_scales(DEEP_GEMM, mn, k, "cpu")
        run(x, q, sf, DEEP_GEMM, PrefixSumWithGaps(ends, 4), rng_state=STATES[1])
        found.append((q, sf))
    for name, actual, expected in zip(("q", "sf"), *found, strict=True):
        assert_same_storage(name, actual, expected)


@pytest.mark.parametrize(
    ("fmt", "shape"),
    [(ROWWISE_FP8, {}), (INT8.replace(group_size=-1), {"held": False, "max_warps": 2})],
    ids=["held", "two passes"],
)
def test_rows_that_are_one_group(kernels, arch, fmt, shape):
    """Of several warps, and in each pass over the tiles of a row that no CTA holds."""
    tile = ONE_ROW._replace(tiles_per_thread=2)
    x = special_groups(7, 3001, FP16, 8, fmt)
    check(Gpu(kernels, arch, tile=tile, **shape), x, fmt, rng_state=STATES[2])


@pytest.mark.slow
def test_launch_shapes(kernels, arch):
    """A draw belongs to an element, however threads, CTAs and grids share the rows."""
    x = special_groups(33, 1536, BF16, 5)
    for shape in ({"rows_per_thread": 2}, {"max_grid": 2}):
        check(Gpu(kernels, arch, **shape), x, DEEP_GEMM_SM90, rng_state=STATES[2])
        check(Gpu(kernels, arch, **shape), x.view(3, 11, -1), DEEP_GEMM_SM90, rng_state=STATES[2])


def test_both_roundings_of_one_call(kernels):
    """Calls that differ in the state alone take different kernels, whichever comes first."""
    gpu = Gpu(kernels, "sm_90a")
    x = special_groups(4, 512, BF16, 6)
    with gpu.present([x, STATES[1]], {}):
        for given in (None, STATES[1], None):
            q, _ = launch.quantize(Call(x.as_subclass(OnGpu), DEEP_GEMM_SM90, rng_state=given))
            expected, _ = quantize(x, DEEP_GEMM_SM90, rng_state=given)
            assert torch.equal(q.view(torch.uint8), expected.view(torch.uint8))
