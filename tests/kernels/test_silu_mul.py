"""SiLU times up into the quantizer: its kernels against long double, every byte."""

import pytest
import torch

from cute_quant import DEEP_GEMM, DEEP_GEMM_SM90, MXFP4, MXFP8, NVFP4, ROWWISE_FP8
from cute_quant.contract.prologues import FUSED, make_silu_mul
from tests.helpers import (
    FLOAT32,
    UE8M0,
    assert_quantized_within,
    poisoned_scales,
    poisoned_values,
)
from tests.kernels.emulated_gpu import Gpu
from tests.kernels.prologues import check_silu_mul, halves
from tests.prologues import gathered, silu_bounds

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

VARIANTS = {
    "fused": {},
    "unfused": {"rounding": "unfused"},
    "vllm": {"rounding": "vllm", "clamp": 2.53, "beta": 0.3},
    "vllm weighted": {"rounding": "vllm", "weighted": True},
    "triton": {"rounding": "vllm_triton", "clamp": 7.03, "alpha": 1.702, "beta": 1.0},
    "cuda": {"rounding": "vllm_cuda", "weighted": True},
    "bf16": {"rounding": "vllm_bf16", "clamp": 7.03, "alpha": 1.702, "beta": 1.0},
    "sglang": {"rounding": "sglang", "clamp": 7.0, "alpha": 1.702, "beta": 1.0},
    "clamped": {"clamp": 2.5},
    "scaled": {"alpha": 1.702},
    "shifted": {"beta": -1.0},
    "weighted": {"weighted": True},
    "interleaved": {"interleaved": True},
    "gpt-oss": {"clamp": 7.0, "alpha": 1.702, "beta": 1.0, "interleaved": True},
    "scaled unfused": {"alpha": -0.7, "beta": 0.3, "rounding": "unfused"},
    "all": {"clamp": 7.0, "alpha": 1.702, "beta": 1.0, "weighted": True, "rounding": "unfused"},
}
SHAPES = [(mn, k) for k in (16, 128, 640) for mn in (1, 3, 5, 33)]
FORMATS = (
    (BF16, FLOAT32, 640),
    (FP16, UE8M0, 640),
    (FP32, UE8M0, 640),
    (FP32, DEEP_GEMM_SM90.replace(group_size=16, values=torch.int8, round_scale=True), 130),
    (BF16, MXFP8.replace(values=torch.float8_e5m2), 416),
    (BF16, ROWWISE_FP8, 1040),
    (FP16, DEEP_GEMM.replace(group_size=-1), 520),
    (BF16, DEEP_GEMM.replace(scale_layout="row_major", group_size=256), 640),
    (BF16, NVFP4, 416),
    (FP16, MXFP4.replace(scale_layout="mn_major_packed"), 520),
    (BF16, NVFP4.replace(scale_layout="row_major", row_scale=True), 130),
)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_variants(gpu, variant):
    for mn, k in SHAPES:
        check_silu_mul(gpu, mn, k, UE8M0, extra_rows=mn % 3, last_padding=k != 128, **variant)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_ragged_rows(gpu, variant):
    for mn in (1, 5):
        check_silu_mul(gpu, mn, 520, UE8M0, extra_rows=2, **variant)


def test_long_rows(gpu):
    check_silu_mul(gpu, 5, 7168, UE8M0)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "fmt", "k"), FORMATS, ids=str)
def test_formats(gpu, dtype, fmt, k):
    for variant in ("weighted", "all"):
        check_silu_mul(gpu, 5, k, fmt, dtype, extra_rows=1, last_padding=False, **VARIANTS[variant])


@pytest.mark.slow
def test_batches(kernels, arch):
    """Also of more rows and matrices than the grid counts."""
    for max_grid in (65535, 2):
        gpu = Gpu(kernels, arch, max_grid=max_grid)
        check_silu_mul(gpu, 33, 640, UE8M0, batch=(5,), extra_rows=1, **VARIANTS["weighted"])


def test_factors_of_rows_that_do_not_exist(gpu):
    """Rows without a source have values 0, whatever their factors are and beta adds."""
    tokens, k = 7, 128
    gate, up = halves(tokens, k, BF16, seed=1)
    index = torch.tensor([5, -1, 0, 7, 5, 4], dtype=torch.int32)
    live = (index >= 0) & (index < tokens)
    weight = torch.tensor([0.5, torch.nan, 2.0, torch.inf, -1.0, 3.0])
    options = {"clamp": None, "alpha": 1.0, "beta": -1.0}
    prologue = make_silu_mul(interleaved=False, rounding=FUSED, weight=weight, **options)
    q = poisoned_values(6, k, "cpu")
    sf = poisoned_scales(UE8M0, 6, k, "cpu")
    x = torch.cat((gate, up), 1)
    gpu.quantize(x, q, sf, UE8M0, None, index, prologue)
    assert not q[~live].view(torch.uint8).any() and not sf[~live].any()
    rows, places = gathered(x, index)
    bounds = silu_bounds(rows, weight.where(live, 0.0), beta=-1.0)
    assert_quantized_within(q, sf, UE8M0, *bounds, None, places)
