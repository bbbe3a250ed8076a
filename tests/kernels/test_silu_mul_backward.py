"""Gradients of SwiGLU into the quantizer: its kernels against long double, every byte."""

import pytest
import torch

from cute_quant import (
    DEEP_GEMM,
    DEEP_GEMM_SM90,
    INT8,
    MXFP4,
    NVFP4,
    ROWWISE_FP8,
    Masked,
    PrefixSum,
    PrefixSumWithGaps,
)
from cute_quant.contract.formats import Format
from cute_quant.contract.prologues import make_silu_mul_backward
from cute_quant.kernels.config import ONE_ROW
from tests.helpers import POISON, poisoned_results
from tests.kernels.cases import strided
from tests.kernels.emulated_gpu import Gpu
from tests.kernels.prologues import halves, quantize_within
from tests.prologues import silu_backward_bounds

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

GPT_OSS = {"clamp": 7.0, "alpha": 1.702, "beta": 1.0, "interleaved": True}
VARIANTS = {
    "plain": {},
    "clamped": {"clamp": 2.5},
    "scaled": {"alpha": -0.7},
    "shifted": {"beta": -1.0},
    "interleaved": {"interleaved": True},
    "gpt-oss": GPT_OSS,
}
FORMATS = (
    (FP16, DEEP_GEMM, 640),
    (FP32, DEEP_GEMM_SM90.replace(values=torch.float8_e5m2), 136),
    (BF16, INT8, 520),
    (BF16, ROWWISE_FP8, 640),
    (BF16, NVFP4, 416),
    (FP16, MXFP4.replace(scale_layout="8x4"), 100),
    (FP32, NVFP4.replace(row_scale=True), 272),
)


def check(
    gpu: Gpu,
    mn: int,
    k: int,
    fmt: Format,
    dtype: torch.dtype = BF16,
    *,
    batch: tuple[int, ...] = (),
    rows: Masked | None = None,
    extra_rows: int = 0,
    **options: object,
) -> None:
    """Run a call of ``silu_mul_backward_quantize`` into poisoned memory."""
    interleaved = options.get("interleaved", False)
    count = mn * batch[0] if batch else mn
    gate, up = halves(count, k, dtype, seed=mn + k)
    x = torch.stack((gate, up), 2).flatten(1) if interleaved else torch.cat((gate, up), 1)
    grad = torch.randn(count, k, generator=torch.Generator().manual_seed(k)).to(dtype)
    x = strided(x.view(*batch, mn, 2 * k), 2 * k)
    grad = strided(grad.view(*batch, mn, k), k + 16 * (k % 16 == 0))
    given = {"interleaved": False, "clamp": None, "alpha": 1.0, "beta": 0.0} | options
    results = poisoned_results(fmt, mn, 2 * k, "cpu", extra_rows, False, batch)
    bounds = silu_backward_bounds(grad, x, **options)
    prologue = make_silu_mul_backward(grad, **given)
    quantize_within(gpu, x, results, fmt, bounds, rows, prologue=prologue)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_variants(gpu, variant):
    """Also of k whose gates and ups share a thread, and of more tiles than a warp has."""
    for mn, k in ((5, 640), (3, 24), (2, 264)):
        check(gpu, mn, k, DEEP_GEMM_SM90, extra_rows=mn % 3, **variant)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({}, id="held", marks=pytest.mark.slow),
        pytest.param({"held": False, "max_warps": 2}, id="two passes"),
    ],
)
def test_rows_that_are_one_group(kernels, arch, shape):
    """Of several warps, and in each pass over the tiles of a row that no CTA holds."""
    gpu = Gpu(kernels, arch, tile=ONE_ROW._replace(tiles_per_thread=2), **shape)
    check(gpu, 3, 1300, ROWWISE_FP8)


def test_gaps_that_are_kept(gpu):
    """Rows between groups hold what they held; those of groups are what they are without gaps."""
    mn, k, fmt, ends = 12, 136, DEEP_GEMM_SM90, torch.tensor([3, 9], dtype=torch.int32)
    live = torch.tensor([*[1] * 3, 0, *[1] * 5, *[0] * 3], dtype=torch.bool)
    grad, gate_up = torch.randn(mn, 3 * k, generator=torch.Generator().manual_seed(2)).split(
        [k, 2 * k], 1
    )
    prologue = make_silu_mul_backward(
        grad.contiguous(), interleaved=False, clamp=None, alpha=1.0, beta=0.0
    )
    found = []
    for kind in (PrefixSumWithGaps, PrefixSum):
        q, sf = poisoned_results(fmt, mn, 2 * k, "cpu")
        gpu.quantize(gate_up.contiguous(), q, sf, fmt, kind(ends, 4), prologue=prologue)
        found.append([t.contiguous().view(torch.uint8) for t in (q, sf)])
    for kept, zeroed in zip(*found, strict=True):
        assert kept[~live].eq(POISON).all() and not zeroed[~live].any()
        assert torch.equal(kept[live], zeroed[live])


@pytest.mark.slow
@pytest.mark.parametrize("variant", [{}, GPT_OSS], ids=["plain", "gpt-oss"])
@pytest.mark.parametrize(("dtype", "fmt", "k"), FORMATS, ids=str)
def test_formats(gpu, dtype, fmt, k, variant):
    check(gpu, 5, k, fmt, dtype, extra_rows=1, **variant)


@pytest.mark.slow
def test_batches(kernels, arch):
    """Of masked experts, and of more rows and matrices than the grid counts."""
    counts = torch.tensor([9, 0, 17, 1, 4], dtype=torch.int32)
    for max_grid in (65535, 2):
        gpu = Gpu(kernels, arch, max_grid=max_grid)
        check(gpu, 17, 136, DEEP_GEMM, batch=(5,), extra_rows=1)
        check(gpu, 17, 136, DEEP_GEMM, batch=(5,), rows=Masked(counts), **GPT_OSS)
