"""The consumers of MXFP8 and of row-wise scales: ``torch._scaled_mm``, which is cuBLAS and CUTLASS.

The tensor cores that multiply MXFP8 are those of SM100. Without one, what can be shown is that
torch takes the scales, and that they lie where the readers of blocks of 128x4 compute that they do.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cute_quant import DEEP_GEMM, MXFP8, ROWWISE_FP8, dequantize, quantize
from tests.helpers import bits, random_bits

SHAPES = [(1, 32), (5, 33), (128, 128), (130, 129), (300, 704), (129, 7168)]
MAX_RELATIVE_ERROR = 0.1
"""Bound for a row or column of a product of e4m3 operands that few of its terms dominate."""


def to_blocked(scales):
    """Return scales (rows, groups) as bytes in blocks, by the steps of torchao's ``to_blocked``.

    It is in torchao/prototype/mx_formats/utils.py. Scales are padded to whole blocks, and each
    block of 128x4 is cut into four of 32x4, which come to lie side by side.
    """
    rows, groups = scales.shape
    row_blocks, column_blocks = -(-rows // 128), -(-groups // 4)
    padded = scales.new_zeros(128 * row_blocks, 4 * column_blocks)
    padded[:rows, :groups] = scales
    blocks = padded.view(row_blocks, 128, column_blocks, 4).permute(0, 2, 1, 3)
    return blocks.reshape(-1, 4, 32, 4).transpose(1, 2).reshape(-1, 32, 16).flatten()


def offsets_128x4(rows, groups):
    """Return the byte of each scale, (rows, groups), as ``get_sf_out_offset_128x4`` computes it.

    It is in FlashInfer and TensorRT-LLM, and goes by the strides of a layout [row tiles, group
    tiles, 32, 4, 4]. A row has the coordinates (row / 128, row % 32, row % 128 / 32), and a group
    (group / 4, group % 4).
    """
    row, group = torch.arange(rows)[:, None], torch.arange(groups)
    group_tiles = -(-groups // 4)
    inside = (row % 32) * 16 + (row % 128) // 32 * 4 + group % 4
    return (row // 128) * (512 * group_tiles) + (group // 4) * 512 + inside


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize(("mn", "k"), SHAPES)
def test_blocks_lie_where_their_readers_look(mn, k, dtype, device):
    x = random_bits((mn, k), torch.bfloat16, seed=3)
    x = x.where(x.isfinite(), 1.0).to(device)
    q, row_major = quantize(
        x, DEEP_GEMM.replace(scale_layout="row_major", group_size=32, values=dtype)
    )
    blocked_q, blocked = quantize(x, MXFP8.replace(values=dtype))
    assert torch.equal(bits(blocked_q), bits(q))
    groups = -(-k // 32)
    expected = bits(row_major).view(mn, groups)
    assert torch.equal(bits(blocked), to_blocked(expected))
    offsets = offsets_128x4(mn, groups)
    assert torch.equal(bits(blocked)[offsets], expected)
    padding = torch.ones(blocked.numel(), dtype=torch.bool)
    padding[offsets.flatten()] = False
    assert bits(blocked)[padding].eq(0).all()


@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 32), (300, 64, 640), (4096, 512, 7168)])
def test_torch_takes_the_scales(m, n, k):
    """Run torch's checks of shapes, strides and dtypes, which need no GPU."""
    with FakeTensorMode():
        x = torch.empty(m, k, dtype=torch.bfloat16, device="cuda")
        w = torch.empty(n, k, dtype=torch.bfloat16, device="cuda")
        for fmt in (MXFP8, ROWWISE_FP8):
            q, sf = quantize(x, fmt)
            w8, sfw = quantize(w, fmt)
            sfw = sfw.t() if fmt is ROWWISE_FP8 else sfw
            y = torch._scaled_mm(q, w8.t(), sf, sfw, out_dtype=torch.bfloat16)
            assert y.shape == (m, n) and y.dtype is torch.bfloat16


def operands(m, n, k, device):
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, k, generator=generator) for rows in (m, n))
    # Rows and outliers of different magnitudes, so that a scale in a wrong place shows.
    x *= 2.0 ** torch.randint(-8, 8, (m, 1), generator=generator)
    w *= 2.0 ** torch.randint(-8, 8, (n, 1), generator=generator)
    return x.to(device, torch.bfloat16), w.to(device, torch.bfloat16)


def row_errors(actual, expected):
    """Return errors relative to each row and column, whose magnitudes differ."""
    difference = actual.double() - expected
    return torch.cat(
        [difference.norm(dim=d) / expected.norm(dim=d).clamp(min=1e-30) for d in (0, 1)]
    )


def check_product(name, y, x, w, casts, fmt):
    """Check that y is the product of the quantized operands, up to the rounding of the result.

    It is also close to that of the operands given.
    """
    exact = x.double() @ w.double().t()
    a, b = (dequantize(*cast, fmt, dtype=torch.float32).double() for cast in casts)
    worst = row_errors(y, exact).max().item()
    rounding = row_errors(y, a @ b.t()).max().item()
    print(f"{name}: relative error {worst:.4f}, beside the product of the casts {rounding:.5f}")
    assert worst < MAX_RELATIVE_ERROR and rounding < 0.01


@pytest.mark.parametrize(("m", "n", "k"), [(256, 512, 1024), (1024, 256, 7168)])
def test_row_wise(m, n, k, device):
    """Row-wise scales are float32 (m, 1), as `quantize` returns them for whole rows."""
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("row-wise scales need SM90")
    if device == "cpu" and torch.__version__ < (2, 13):
        pytest.skip("row-wise scales on the CPU need torch 2.13")
    x, w = operands(m, n, k, device)
    cast = quantize(x, ROWWISE_FP8)
    weights = quantize(w, ROWWISE_FP8)
    assert cast[1].shape == (m, 1) and cast[1].is_contiguous()
    y = torch._scaled_mm(cast[0], weights[0].t(), cast[1], weights[1].t(), out_dtype=torch.bfloat16)
    check_product(f"row-wise {m} x {n} x {k}", y, x, w, (cast, weights), ROWWISE_FP8)


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "k"), [(128, 128, 128), (300, 256, 1024), (1000, 512, 7168)])
def test_mxfp8(m, n, k):
    if torch.cuda.get_device_capability() < (10, 0):
        pytest.skip("MXFP8 needs the tensor cores of SM100")
    x, w = operands(m, n, k, "cuda")
    cast = quantize(x, MXFP8)
    weights = quantize(w, MXFP8)
    y = torch._scaled_mm(cast[0], weights[0].t(), cast[1], weights[1], out_dtype=torch.bfloat16)
    check_product(f"MXFP8 {m} x {n} x {k}", y, x, w, (cast, weights), MXFP8)
