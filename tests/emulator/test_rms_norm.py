"""RMSNorm into the quantizer: its kernels against float64, every byte of all that they write."""

import pytest
import torch

from cute_quant.contract.formats import Format, make_format
from cute_quant.kernels.config import Tile
from tests.emulator.errors import EmulatorError
from tests.emulator.prologues import check_rms_norm
from tests.emulator.quantizer import Gpu
from tests.helpers import FLOAT32, UE8M0, full_id

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

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


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_variants(gpu, variant):
    for mn, k in SHAPES:
        check_rms_norm(gpu, mn, k, UE8M0, extra_rows=mn % 3, last_padding=k != 128, **variant)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_ragged_rows(gpu, variant):
    for mn in (1, 5):
        check_rms_norm(gpu, mn, 520, UE8M0, extra_rows=2, **variant)


@pytest.mark.parametrize("name", ["fused", "all"])
def test_long_rows(gpu, name):
    """Also in blocks of more than 128 threads, of a number that is known at launch alone."""
    check_rms_norm(gpu, 5, 7168, UE8M0, **VARIANTS[name])
    assert gpu.launched[-1].host.launches[-1].block == (32, 14, 1)
    check_rms_norm(gpu, 5, 7168, UE8M0, **WIDE, **VARIANTS[name])
    assert gpu.launched[-1].host.launches[-1].block == (32, 7, 1)


@pytest.mark.parametrize("name", ["fused", "all"])
@pytest.mark.parametrize("launch", [WIDE, SHORT], ids=["wide", "short"])
def test_shapes_of_blocks(gpu, launch, name):
    for mn in (1, 3, 5, 33):
        for k in (16, 128, 512) if launch is SHORT else (16, 640, 1536):
            check_rms_norm(gpu, mn, k, UE8M0, extra_rows=mn % 3, **launch, **VARIANTS[name])


def test_more_threads_than_compiled_for(gpu):
    with pytest.raises(EmulatorError, match=r"block \(32, 3, 1\), at most 64 threads"):
        check_rms_norm(gpu, 1, 1040, UE8M0, max_warps=2)


@pytest.mark.parametrize(
    ("dtype", "fmt", "k"), FORMATS, ids=lambda v: full_id(v) if isinstance(v, Format) else str(v)
)
def test_formats(gpu, dtype, fmt, k):
    for name in ("fused", "all"):
        check_rms_norm(gpu, 5, k, fmt, dtype, extra_rows=1, last_padding=False, **VARIANTS[name])


@pytest.mark.parametrize("fmt", [UE8M0, make_format(-1, "float32_row_major", False)], ids=full_id)
def test_batches(kernels, arch, fmt):
    """Also of more rows and matrices than the grid counts, for which a block goes round a loop
    with its barriers."""
    for max_grid in (65535, 2):
        gpu = Gpu(kernels, arch, max_grid=max_grid)
        check_rms_norm(gpu, 5, 1040, fmt, batch=(5,), extra_rows=1, **VARIANTS["all"])
