"""vLLM's emulation of NVFP4: its own reference in torch where it is installed, and formulas.

Tolerances are zero.
"""

import pytest
import torch

from bench.shapes import VLLM_FP4_SHAPES
from cute_quant.integrations.vllm import dequantize_to_dtype, ref_nvfp4_quant_dequant
from tests.helpers import assert_same_bits
from tests.peers import libraries

SHAPES = (*VLLM_FP4_SHAPES, (127, 272), (257, 1040))
CPU_VALUES = 2**15
"""Most values on the CPU, in rows of the whole width."""
GLOBAL_SCALES = [0.5, 1.0, 0.001]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])

every_shape = pytest.mark.parametrize(("m", "k"), SHAPES)
every_scale = pytest.mark.parametrize(
    "global_scale",
    [GLOBAL_SCALES[0], *(pytest.param(g, marks=pytest.mark.slow) for g in GLOBAL_SCALES[1:])],
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def fewer_rows(m, k, device="cpu"):
    """As many rows as there is time for."""
    return m if device == "cuda" else max(1, min(m, CPU_VALUES // k))


def scalar(number, device="cpu"):
    return torch.tensor([number], dtype=torch.float32, device=device)


def random_bytes(*shape, seed=0, finite=False):
    generator = torch.Generator().manual_seed(seed)
    t = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    return t.where(t & 0x7F != 0x7F, 0x38) if finite else t


def decoded(codes):
    """Return the float32 of bytes of two codes, (..., k / 2) to (..., k)."""
    nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()
    return E2M1[nibbles & 7] * torch.where(nibbles & 8 != 0, -1.0, 1.0)


def products(codes, scales, global_scale, dtype):
    """Return value * (scale * global_scale), for bytes of row-major scales."""
    factors = scales.view(torch.float8_e4m3fn).float() * global_scale
    return (decoded(codes) * factors.repeat_interleave(16, -1)).to(dtype)


def swizzled(scales):
    """Return bytes of scales (rows, groups) in blocks of 128x4, by their offsets."""
    rows, groups = scales.shape
    tiles = -(-groups // 4)
    row, group = torch.arange(rows)[:, None], torch.arange(groups)
    inside = row % 32 * 16 + row % 128 // 32 * 4 + group % 4
    offsets = (row // 128 * tiles + group // 4) * 512 + inside
    blocks = torch.zeros(-(-rows // 128) * tiles * 512, dtype=scales.dtype)
    blocks[offsets.flatten()] = scales.flatten()
    return blocks.view(-(-rows // 128) * 128, 4 * tiles)


def assert_equal(actual, expected):
    """Check bits, of NaN that it is one."""
    assert actual.dtype is expected.dtype and actual.is_contiguous()
    actual = actual.cpu()
    assert torch.equal(actual.isnan(), expected.isnan())
    assert_same_bits(*(t.where(~t.isnan(), 0.0) for t in (actual, expected)))


def finite_rows(m, k, dtype, seed=0):
    """Return groups of every magnitude up to about 1000, some of them zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k // 16, 16, generator=generator)
    x *= 2.0 ** torch.randint(-12, 8, (m, k // 16, 1), generator=generator)
    x *= torch.rand(m, k // 16, 1, generator=generator) > 0.05
    # +0: zeros keep their sign here, and lose it there.
    return (x.view(m, k) + 0.0).to(dtype).where(x.view(m, k) != 0, 0.0)


@every_shape
@every_scale
def test_dequantize(global_scale, m, k, device):
    m = fewer_rows(m, k, device)
    codes, scales = random_bytes(m, k // 2), random_bytes(m, k // 16, seed=1)
    q, g = codes.to(device), scalar(global_scale)
    for dtype, sf_dtype in ((torch.bfloat16, torch.float8_e4m3fn), (torch.float32, torch.uint8)):
        expected = products(codes, scales, g, dtype)
        for swizzle, stored in ((False, scales), (True, swizzled(scales))):
            sf = stored.to(device).view(sf_dtype)
            y = dequantize_to_dtype(q, sf, g.to(device), dtype, swizzle=swizzle)
            assert_equal(y, expected)


@pytest.mark.parametrize("m", [1, 100, 128, 256])
@pytest.mark.parametrize("swizzle", [False, True, None])
@pytest.mark.parametrize("scales_of", ["experts", "all"])
@every_dtype
def test_dequantize_experts(dtype, scales_of, swizzle, m, device):
    """The blocks of all experts are one: with 100 rows each, a block has rows of two."""
    experts, k = 3, 96
    codes = random_bytes(experts, m, k // 2)
    scales = random_bytes(experts, m, k // 16, seed=1)
    g = torch.tensor([0.5, 1.7, 0.001]) if scales_of == "experts" else scalar(0.3)
    stored = swizzled(scales.flatten(0, 1)) if swizzle else scales
    y = dequantize_to_dtype(
        codes.to(device), stored.to(device), g.to(device), dtype, swizzle=swizzle
    )
    assert_equal(y, products(codes, scales, g.view(-1, 1, 1), dtype))


def test_dequantize_strided(device):
    codes, scales = random_bytes(4, 9, 80).to(device), random_bytes(4, 9, 16, seed=1).to(device)
    g = torch.tensor([1.0, 0.5, 3.0], device=device)
    views = codes[1:, ::2, 8:56], codes[:3, :5, ::2][..., :24], codes.transpose(0, 1)[:3, :4, 3:35]
    for view in views:
        _, m, columns = view.shape
        sf = scales[1:, :m, 2 : 2 + columns // 8]
        y = dequantize_to_dtype(view, sf, g, torch.float32, swizzle=False)
        assert_equal(y, products(view.cpu(), sf.cpu(), g.cpu().view(-1, 1, 1), torch.float32))
        blocks = swizzled(sf.cpu().flatten(0, 1)).to(device)
        assert_equal(dequantize_to_dtype(view, blocks, g, torch.float32), y.cpu())


@pytest.mark.parametrize("shape", [(0, 32), (4, 0), (3, 0, 32), (0, 4, 32)])
@pytest.mark.parametrize("swizzle", [False, True])
def test_dequantize_nothing(swizzle, shape, device):
    codes = torch.empty(*shape[:-1], shape[-1] // 2, dtype=torch.uint8, device=device)
    rows, groups = codes[..., 0].numel() if shape[-1] else codes.shape[0], shape[-1] // 16
    size = (-(-rows // 128) * 128 * -(-groups // 4) * 4,) if swizzle else (*shape[:-1], groups)
    sf = torch.empty(size, dtype=torch.uint8, device=device)
    y = dequantize_to_dtype(codes, sf, scalar(1.0, device), torch.float16, swizzle=swizzle)
    assert y.shape == shape and y.dtype is torch.float16


@pytest.mark.library("vllm")
@every_shape
@every_scale
def test_dequantize_equals_vllm(global_scale, m, k):
    vllm, m = libraries.vllm_nvfp4(), fewer_rows(m, k)
    codes, scales, g = random_bytes(m, k // 2), random_bytes(m, k // 16), scalar(global_scale)
    layouts = [(False, scales)]
    if k % 64 == 0:  # of other blocks it does not cut the padding off
        layouts.append((True, swizzled(scales)))
    for swizzle, stored in layouts:
        for dtype in (torch.bfloat16, torch.float32):
            options = codes, stored, g, dtype, 16, swizzle
            assert_equal(dequantize_to_dtype(*options), vllm.dequantize_to_dtype(*options))


@pytest.mark.library("vllm")
@pytest.mark.parametrize("m", [1, 100, 128])
@pytest.mark.parametrize("swizzle", [False, True])
def test_dequantize_experts_equals_vllm(swizzle, m):
    vllm = libraries.vllm_nvfp4()
    codes, scales = random_bytes(3, m, 64), random_bytes(3, m, 8, seed=1)
    stored = swizzled(scales.flatten(0, 1)) if swizzle else scales
    options = codes, stored, torch.tensor([0.5, 1.7, 0.001]), torch.bfloat16, 16, swizzle
    assert_equal(dequantize_to_dtype(*options), vllm.dequantize_to_dtype(*options))


def quant_dequant(x, g):
    """Return what the formulas give, in float64 where float32 rounds no further."""
    groups = x.float().unflatten(-1, (-1, 16))
    amax = groups.abs().amax(-1, keepdim=True)
    sixth = torch.tensor(1.0) / 6.0
    d = (g * (amax * sixth)).clamp(max=448.0).to(torch.float8_e4m3fn).float()
    multiplier = (1.0 / (d * (1.0 / g))).where(d != 0, 1e-8)
    codes = rounded_to_e2m1(groups * multiplier + 0.0)  # -0 loses its sign
    return (codes * (d / g)).flatten(-2).to(x.dtype)


def rounded_to_e2m1(x):
    """Return the nearest values of e2m1, of two the one with the even code; the sign stays."""
    middles = (E2M1[1:] + E2M1[:-1]) / 2
    magnitudes = x.abs()
    below = torch.bucketize(magnitudes, middles, right=False)
    # bucketize counts the middles below x: at a middle itself the lower code, odd ones go up.
    tie = (magnitudes == middles[below.clamp(max=6)]) & (below < 7)
    code = below + (tie & (below % 2 == 1)).long()
    return E2M1[code].copysign(x)


@every_shape
@every_scale
def test_quant_dequant(global_scale, m, k, device):
    m, g = fewer_rows(m, k, device), scalar(global_scale)
    for dtype in DTYPES:
        x = finite_rows(m, k, dtype)
        y = ref_nvfp4_quant_dequant(x.to(device), g.to(device), 16)
        assert_equal(y, quant_dequant(x, g))


@pytest.mark.library("vllm")
@pytest.mark.parametrize("global_scale", [*GLOBAL_SCALES, 57.0, 2688 / 4.5, 1e-5, 3e4])
@every_dtype
def test_quant_dequant_equals_vllm(dtype, global_scale):
    vllm = libraries.vllm_nvfp4()
    for m, k in SHAPES:
        x, g = finite_rows(fewer_rows(m, k), k, dtype, seed=m), scalar(global_scale)
        y = ref_nvfp4_quant_dequant(x, g, 16)
        assert torch.equal(y, vllm.ref_nvfp4_quant_dequant(x, g, 16))


def test_quant_dequant_divides(device):
    """For 57 a scale over it is not the scale times its reciprocal, rounded."""
    x, g = finite_rows(64, 256, torch.float32), scalar(57.0)
    expected = quant_dequant(x, g)
    d = torch.arange(1, 256).float()
    assert (d / g != d * (1.0 / g)).any()
    assert_equal(ref_nvfp4_quant_dequant(x.to(device), g.to(device), 16), expected)


def test_quant_dequant_differs_from_a_quotient_as_multiplier():
    """Triton on CUDA multiplies by global_scale / scale: the docs say for whom that matters."""
    for global_scale, most in ((0.5, 0), (1.0, 0), (0.001, 0), (2688 / 4.5, 0.01)):
        x, g = finite_rows(256, 1024, torch.bfloat16), scalar(global_scale)
        groups = x.float().unflatten(-1, (-1, 16))
        amax = groups.abs().amax(-1, keepdim=True)
        d = (g * (amax * (torch.tensor(1.0) / 6.0))).clamp(max=448.0).to(torch.float8_e4m3fn)
        d = d.float()
        codes = rounded_to_e2m1(groups * (g / d).where(d != 0, 0.0))
        theirs = (codes * (d / g)).flatten(-2).to(x.dtype)
        share = (ref_nvfp4_quant_dequant(x, g, 16) != theirs).double().mean().item()
        assert share <= most and (share > 0) == (most > 0)


def test_quant_dequant_strided(device):
    x = finite_rows(40, 512, torch.bfloat16).to(device)
    for view in (x[::3, 32:480], x[:, 3:259]):
        y = ref_nvfp4_quant_dequant(view, scalar(2.0, device), 16)
        assert_equal(y, quant_dequant(view.cpu(), scalar(2.0)))


U8, ONE = torch.zeros(4, 16, dtype=torch.uint8), torch.ones(1)
SF = torch.zeros(512, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((U8, SF, ONE, torch.float16, 32), ValueError, "block_size: expected 16, got 32"),
        ((U8.float(), SF, ONE, torch.float16), TypeError, "tensor_fp4: expected a tensor of"),
        ((U8, SF.float(), ONE, torch.float16), TypeError, "tensor_sf: expected a tensor of"),
        ((U8, SF, 1.0, torch.float16), TypeError, "global_scale: expected a tensor of"),
        ((U8, SF, ONE.double(), torch.float16), TypeError, "global_scale: expected a tensor of"),
        ((U8, SF, torch.ones(3), torch.float16), ValueError, "global_scale: expected 1 element"),
        ((U8[:, :12], SF, ONE, torch.float16), ValueError, "tensor_fp4: expected .*multiple of 16"),
        ((U8[0], SF, ONE, torch.float16), ValueError, "tensor_fp4: expected"),
        ((U8, SF[1:], ONE, torch.float16), ValueError, "tensor_sf: expected 512 contiguous"),
        (
            (U8, SF, ONE, torch.float16, 16, False),
            ValueError,
            "tensor_sf: expected shape",
        ),
        ((U8, SF, ONE, torch.float16, 16, 1), TypeError, "swizzle: expected a bool or None"),
        ((U8, SF, ONE, torch.int8), (TypeError, ValueError), "dtype"),
    ],
)
def test_refusals_of_dequantize(arguments, error, message):
    with pytest.raises(error, match=message):
        dequantize_to_dtype(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(4, 32), ONE, 32), ValueError, "block_size: expected 16"),
        ((torch.ones(4, 24), ONE, 16), ValueError, "x: expected .*multiple of 16"),
        ((torch.ones(2, 4, 32), ONE, 16), ValueError, "x: expected"),
        ((torch.ones(4, 32).double(), ONE, 16), TypeError, "x: expected a tensor of"),
        ((torch.ones(4, 32), torch.ones(4), 16), ValueError, "global_scale: expected 1 element"),
    ],
)
def test_refusals_of_quant_dequant(arguments, error, message):
    with pytest.raises(error, match=message):
        ref_nvfp4_quant_dequant(*arguments)


@pytest.mark.gpu
@pytest.mark.slow
def test_rows_times_columns_past_32_bits():
    """The last rows of 2^31 and more elements are those of a small tensor."""
    m, k = 300032, 7168
    codes = torch.zeros(m, k // 2, dtype=torch.uint8, device="cuda")
    scales = torch.zeros(m, k // 16, dtype=torch.uint8, device="cuda")
    codes[-1], scales[-1] = random_bytes(k // 2).cuda(), random_bytes(k // 16, finite=True).cuda()
    g = scalar(0.5, "cuda")
    expected = products(codes[-1].cpu(), scales[-1].cpu(), 0.5, torch.bfloat16)
    for swizzle in (False, True):
        stored = scales
        if swizzle:  # whole blocks: groups of four, 128 rows
            blocks = scales.view(m // 128, 4, 32, k // 64, 4).permute(0, 3, 2, 1, 4)
            stored = blocks.reshape(m, -1)
        y = dequantize_to_dtype(codes, stored, g, torch.bfloat16, swizzle=swizzle)
        assert_equal(y[-1], expected)
        del y
    x = torch.zeros(m, k, dtype=torch.bfloat16, device="cuda")
    x[-1] = finite_rows(1, k, torch.bfloat16).cuda()
    y = ref_nvfp4_quant_dequant(x, g, 16)
    assert_equal(y[-1:], quant_dequant(x[-1:].cpu(), scalar(0.5)))
