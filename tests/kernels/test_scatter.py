"""Rows that are scattered, in the emulator: every byte against the oracle."""

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
)
from cute_quant.contract.rows import PrefixSum
from tests.helpers import ARCHITECTURES
from tests.kernels.cases import check, special_groups
from tests.kernels.emulated_gpu import Gpu
from tests.places import DOMAINS, places, row_domain

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
    pytest.param(ARCHITECTURES[(i + j) % 2], kind, *fmt, id=f"{kind}-{fmt[1]}-{fmt[2]}")
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
