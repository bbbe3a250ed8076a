"""RMSNorm into the quantizer: its kernels against long double, every byte that they write."""

import pytest
import torch

from cute_quant import DEEP_GEMM, DEEP_GEMM_SM90, MXFP4, MXFP8, NVFP4, ROWWISE_FP8, Masked
from cute_quant.contract.prologues import FUSED, make_rms_norm
from cute_quant.emulator.errors import EmulatorError
from cute_quant.kernels import heuristics
from cute_quant.kernels.config import ONE_ROW, Tile
from tests.helpers import FLOAT32, UE8M0, poisoned_scales, poisoned_values
from tests.kernels.emulated_gpu import Gpu
from tests.kernels.prologues import check_rms_norm, rows_of

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

VARIANTS = {
    "fused": {},
    "unfused": {"rounding": "unfused"},
    "huggingface": {"rounding": "huggingface", "residual": True},
    "vllm": {"rounding": "vllm", "residual": True, "normalized": True},
    "offset": {"offset": 1.0, "eps": 0.1},
    "float32 weight": {"weight_dtype": FP32},
    "residual": {"residual": True},
    "residual in place": {"residual": True, "in_place": True},
    "normalized": {"normalized": True},
    "all": {"residual": True, "normalized": True, "rounding": "unfused", "offset": 1.0},
}
SHAPES = [(mn, k) for k in (16, 128, 640) for mn in (1, 3, 5, 33)]
FORMATS = (
    (BF16, FLOAT32, 640),
    (FP16, UE8M0, 640),
    (FP32, UE8M0, 640),
    (FP32, DEEP_GEMM_SM90.replace(group_size=16, values=torch.int8, round_scale=True), 130),
    (BF16, MXFP8.replace(values=torch.float8_e5m2), 416),
    (BF16, DEEP_GEMM.replace(scale_layout="row_major", group_size=256), 640),
    (BF16, ROWWISE_FP8, 1040),
    (FP16, DEEP_GEMM.replace(group_size=-1), 520),
    (FP32, NVFP4, 130),
    (BF16, MXFP4.replace(scale_layout="8x4"), 416),
    (FP16, NVFP4.replace(scale_layout="row_major_packed", row_scale=True), 1040),
)
WIDE = {"tiles_per_thread": 2, "max_warps": 32}
"""Rows of many warps, each with two tiles."""
SHORT = {"tile": Tile(row_warps=4), "max_warps": 1}
"""Four rows a block, each of one warp."""


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_variants(gpu, variant):
    for mn, k in SHAPES:
        check_rms_norm(gpu, mn, k, UE8M0, extra_rows=mn % 3, last_padding=k != 128, **variant)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_ragged_rows(gpu, variant):
    for mn in (1, 5):
        check_rms_norm(gpu, mn, 520, UE8M0, extra_rows=2, **variant)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fused", "all"])
def test_long_rows(gpu, name):
    """Also in blocks of more than 128 threads, of a number that is known at launch alone."""
    check_rms_norm(gpu, 5, 7168, UE8M0, **VARIANTS[name])
    warps = 14 // heuristics.norm_tiles(gpu.arch)
    assert gpu.launched[-1].host.launches[-1].block == (32, warps, 1)
    gpu = Gpu(gpu.kernels, gpu.arch, **WIDE)
    check_rms_norm(gpu, 5, 7168, UE8M0, **VARIANTS[name])
    assert gpu.launched[-1].host.launches[-1].block == (32, 7, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fused", "all"])
@pytest.mark.parametrize("launch", [WIDE, SHORT], ids=["wide", "short"])
def test_shapes_of_blocks(kernels, arch, launch, name):
    gpu = Gpu(kernels, arch, **launch)
    for mn in (1, 3, 5, 33):
        for k in (16, 128, 512) if launch is SHORT else (16, 640, 1536):
            check_rms_norm(gpu, mn, k, UE8M0, extra_rows=mn % 3, **VARIANTS[name])


def test_more_threads_than_compiled_for(kernels, arch):
    gpu = Gpu(kernels, arch, tile=ONE_ROW, max_warps=2, tiles_per_thread=1)
    with pytest.raises(EmulatorError, match=r"block \(32, 3, 1\), at most 64 threads"):
        check_rms_norm(gpu, 1, 1040, UE8M0)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "fmt", "k"), FORMATS, ids=str)
def test_formats(gpu, dtype, fmt, k):
    for name in ("fused", "all", "vllm"):
        check_rms_norm(gpu, 5, k, fmt, dtype, extra_rows=1, last_padding=False, **VARIANTS[name])


@pytest.mark.slow
@pytest.mark.parametrize("fmt", [UE8M0, ROWWISE_FP8], ids=str)
def test_batches(kernels, arch, fmt):
    """More rows and matrices than the grid counts do too.

    A block goes round a loop with its barriers for them.
    """
    for max_grid in (65535, 2):
        gpu = Gpu(kernels, arch, max_grid=max_grid)
        for name in ("all", "huggingface"):
            check_rms_norm(gpu, 5, 1040, fmt, batch=(5,), extra_rows=1, **VARIANTS[name])


MASKED = {
    "4 rows": ([2, -(2**31), 5], 4, False),
    "1 row": ([1, 0, -(2**31), 2**31 - 1, 1], 1, False),
    "5 rows": ([5, 1, 4], 5, False),
    "gathered": ([2, -(2**31), 5], 5, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("fmt", [UE8M0, FLOAT32], ids=str)
@pytest.mark.parametrize(("counts", "max_m", "gathered"), MASKED.values(), ids=MASKED)
@pytest.mark.parametrize("row_warps", [1, 2])
def test_masked_experts(kernels, arch, fmt, counts, max_m, gathered, row_warps):
    """Also of fewer rows a tile than the padding of an expert's scales has."""
    counts, index = torch.tensor(counts, dtype=torch.int32), None
    if gathered:
        index = torch.arange(len(counts) * max_m, dtype=torch.int32).flip(0).view(-1, max_m)
        index[0, 1] = -1
    for row_ctas in (1, 2 * len(counts)):
        tile = Tile(row_warps=row_warps)
        gpu = Gpu(kernels, arch, tile=tile, max_warps=2, row_ctas=row_ctas)
        check_rms_norm(
            gpu, max_m, 640, fmt, FP16, rows=Masked(counts), index=index, batch=(len(counts),)
        )


@pytest.mark.slow
@pytest.mark.parametrize("fmt", [UE8M0, ROWWISE_FP8], ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_dead_rows(gpu, fmt, eps):
    """Rows without a source have values +0 and scales 0, whatever the weights and their offset."""
    k = 640
    x = rows_of(5, k, FP16, seed=1)
    index = torch.tensor([4, -1, 0, 5, -(2**31)], dtype=torch.int32)
    live = (index >= 0) & (index < 5)
    weight = torch.linspace(-1.5, 2, k).to(FP16)
    prologue = make_rms_norm(weight, eps=eps, weight_offset=-3.0, rounding=FUSED)
    q = poisoned_values(7, k, "cpu")
    sf = poisoned_scales(fmt, 5, k, "cpu")
    gpu.quantize(x, q, sf, fmt, None, index, prologue)
    assert not q[:5][~live].view(torch.uint8).any() and not q[5:].view(torch.uint8).any()
    assert not sf[~live].contiguous().view(torch.uint8).any()
    assert q[:5][live].view(torch.uint8).any(1).all()


@pytest.mark.slow
@pytest.mark.parametrize("fmt", [MXFP8, DEEP_GEMM.replace(group_size=256)], ids=str)
@pytest.mark.parametrize("k", [32, 544, 1056, 1568])
def test_padding_scales(gpu, fmt, k):
    """Rows that end right behind a tile: a tile more has the padding of a word, or of a block."""
    check_rms_norm(gpu, 3, k, fmt, extra_rows=1)
