"""RMSNorm into the quantizer: its kernels against float64, every byte of all that they write."""

import math

import pytest
import torch

from cute_quant.formats import Format, make_format
from cute_quant.specs import Tile
from tests.emulator.cases import (
    assert_quantized_within,
    assert_same_storage,
    poisoned_matrix,
    strided,
)
from tests.emulator.errors import EmulatorError
from tests.emulator.intervals import Interval
from tests.emulator.quantizer import Gpu
from tests.helpers import FLOAT32, UE8M0, full_id, poisoned_scales, poisoned_values, storage_bits

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
RELATIVE_ERROR = 1e-6
"""What a few roundings of float32 and the error of the root stay below."""

VARIANTS = {
    "fused": {},
    "unfused": {"unfused": True},
    "offset": {"offset": 1.0, "eps": 0.1},
    "float32 weight": {"weight_dtype": FP32},
    "residual": {"residual": True},
    "residual in place": {"residual": True, "in_place": True},
    "normalized": {"normalized": True},
    "all": {"residual": True, "normalized": True, "unfused": True, "offset": 1.0},
}
SHAPES = [(mn, k) for k in (16, 128, 640) for mn in (1, 3, 5, 33)]
FORMATS = (
    (BF16, FLOAT32, 640),
    (FP16, UE8M0, 640),
    (FP32, UE8M0, 640),
    (FP32, make_format(16, "float32", True, torch.int8), 130),
    (BF16, make_format(32, "ue8m0_128x4", False, torch.float8_e5m2), 416),
    (BF16, make_format(256, "ue8m0_row_major", False), 640),
    (BF16, make_format(-1, "float32_row_major", False), 1040),
    (FP16, make_format(-1, "ue8m0", False), 520),
)
WIDE = {"tiles_per_thread": 2, "max_warps": 32}
"""Rows of many warps, each with two tiles."""
SHORT = {"tile": Tile(row_warps=4), "max_warps": 1}
"""Four rows a block, each of one warp."""


def rows_of(mn: int, k: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Rows of different magnitudes; of five, one with NaN and one with Inf in it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(mn, k, generator=generator) * 3.0 ** (torch.arange(mn) % 7).unsqueeze(1)
    x[:, 3:5] = torch.tensor([0.0, -0.0])
    x[:, 128:256] *= 1e-3
    x[1::5, 5] = torch.nan
    x[2::5, min(300, k - 1)] = -torch.inf
    return x.to(dtype)


def normalized_rows(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, unfused: bool
) -> Interval:
    """``x * rsqrt(mean(x^2) + eps) * (weight + offset)`` in float64; unfused rounded at the end."""
    factors = (weight.float() + offset).double()
    eps = torch.tensor(eps, dtype=FP32).double()
    mean = x.double().square().mean(-1, keepdim=True)
    result = Interval.of(x.double() / (mean + eps).sqrt() * factors).spread(RELATIVE_ERROR)
    return result.rounded(x.dtype) if unfused else result


def check(
    gpu: Gpu,
    mn: int,
    k: int,
    fmt: Format,
    dtype: torch.dtype = BF16,
    *,
    weight_dtype: torch.dtype | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    residual: bool = False,
    in_place: bool = False,
    normalized: bool = False,
    unfused: bool = False,
    extra_rows: int = 0,
    last_padding: bool = True,
    batch: tuple[int, ...] = (),
    **launch,
) -> None:
    """Run a call into poisoned memory."""
    shape = (*batch, mn, k)
    strides = torch.empty(shape, device="meta").stride()
    x = rows_of(math.prod(shape[:-1]), k, dtype, seed=mn + k).view(shape)
    weight = torch.linspace(-1.5, 2, k).to(weight_dtype or dtype)
    added = torch.randn(shape, generator=torch.Generator().manual_seed(k)).to(dtype)
    outputs, rows = {}, x
    if residual:
        before = strided(added, k)
        sums = before if in_place else poisoned_matrix(shape, strides, dtype)
        outputs |= {"residual": before, "total": sums}
        rows = x.float() + added.float()
        expected_sums = strided(rows.to(dtype), k)
        rows = rows.to(dtype) if unfused else rows
    if normalized:
        outputs["normalized"] = poisoned_matrix(shape, strides, dtype)
    q = poisoned_values(mn + extra_rows, k, "cpu", fmt.dtype, batch)
    sf = poisoned_scales(fmt, mn, k, "cpu", last_padding, batch)
    numbers = {"eps": eps, "offset": offset, "unfused": unfused}
    gpu.rms_norm_quantize(strided(x, k), weight, q, sf, fmt, **outputs, **numbers, **launch)

    values = normalized_rows(rows, weight, **numbers)
    assert_quantized_within(q, sf, fmt, values)
    if residual:
        for t in (sums, expected_sums):
            t.masked_fill_(t.isnan(), torch.nan)
        assert_same_storage("total", sums, expected_sums)
    if normalized:
        result = outputs["normalized"]
        low, high = values.rounded(dtype)
        inside = (low <= result) & (result <= high) | low.isnan() & result.isnan()
        assert inside.all(), f"normalized: {(~inside).nonzero()[0].tolist()}"
        assert len(storage_bits(result)) > result.nbytes
        padding = storage_bits(result)[result.nbytes :]
        assert (padding == padding[0]).all(), "normalized: written past its end"


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_variants(gpu, variant):
    for mn, k in SHAPES:
        check(gpu, mn, k, UE8M0, extra_rows=mn % 3, last_padding=k != 128, **variant)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_ragged_rows(gpu, variant):
    for mn in (1, 5):
        check(gpu, mn, 520, UE8M0, extra_rows=2, **variant)


@pytest.mark.parametrize("name", ["fused", "all"])
def test_long_rows(gpu, name):
    """Also in blocks of more than 128 threads, of a number that is known at launch alone."""
    check(gpu, 5, 7168, UE8M0, **VARIANTS[name])
    assert gpu.launched[-1].host.launches[-1].block == (32, 14, 1)
    check(gpu, 5, 7168, UE8M0, **WIDE, **VARIANTS[name])
    assert gpu.launched[-1].host.launches[-1].block == (32, 7, 1)


@pytest.mark.parametrize("name", ["fused", "all"])
@pytest.mark.parametrize("launch", [WIDE, SHORT], ids=["wide", "short"])
def test_shapes_of_blocks(gpu, launch, name):
    for mn in (1, 3, 5, 33):
        for k in (16, 128, 512) if launch is SHORT else (16, 640, 1536):
            check(gpu, mn, k, UE8M0, extra_rows=mn % 3, **launch, **VARIANTS[name])


def test_more_threads_than_compiled_for(gpu):
    with pytest.raises(EmulatorError, match=r"block \(32, 3, 1\), at most 64 threads"):
        check(gpu, 1, 1040, UE8M0, max_warps=2)


@pytest.mark.parametrize(
    ("dtype", "fmt", "k"), FORMATS, ids=lambda v: full_id(v) if isinstance(v, Format) else str(v)
)
def test_formats(gpu, dtype, fmt, k):
    for name in ("fused", "all"):
        check(gpu, 5, k, fmt, dtype, extra_rows=1, last_padding=False, **VARIANTS[name])


@pytest.mark.parametrize("fmt", [UE8M0, make_format(-1, "float32_row_major", False)], ids=full_id)
def test_batches(kernels, arch, fmt):
    """Also of more rows and matrices than the grid counts, for which a block goes round a loop
    with its barriers."""
    for max_grid in (65535, 2):
        gpu = Gpu(kernels, arch, max_grid=max_grid)
        check(gpu, 5, 1040, fmt, batch=(5,), extra_rows=1, **VARIANTS["all"])
