"""The consumers of FP4: ``torch.nn.functional.scaled_mm``, CuTe's MMA, and DeepGEMM on SM100.

Their tensor cores are those of SM100. What can be shown without one is that torch and DeepGEMM take
values and scales by their checks, and that scales lie where CuTe's own layout has them.
"""

import itertools

import pytest
import torch
from torch.nn import functional

import cute_quant as cq
from tests.helpers import bits

ScalingType = getattr(functional, "ScalingType", None)
SwizzleType = getattr(functional, "SwizzleType", None)
needs_scaled_mm = pytest.mark.skipif(ScalingType is None, reason="needs scaled_mm of torch 2.10")

FLOAT32_SCALES = cq.Format(
    torch.float4_e2m1fn_x2, 32, torch.float32, "mn_major", round_scale=True, min_scale="deepgemm"
)
MN_MAJOR_WORDS = cq.MXFP4.replace(scale_layout="mn_major_packed")
K_MAJOR_WORDS = cq.MXFP4.replace(scale_layout="row_major_packed")


def activations(shape):
    """Return groups of different magnitudes, so that a scale in a wrong place shows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape[:-1], shape[-1] // 16, 16, generator=generator)
    x *= 2.0 ** torch.randint(-6, 6, (*x.shape[:-1], 1), generator=generator)
    return x.view(shape).to(torch.bfloat16)


def on_meta(rows, k, fmt):
    x = torch.empty(rows, k, dtype=torch.bfloat16, device="meta")
    amax = {"amax": torch.empty((), device="meta")} if fmt.upper_scale else {}
    return cq.quantize(x, fmt, **amax)


def scaled_mm(a, b, scale_a, scale_b, kinds):
    """Run torch's checks of shapes, strides and dtypes, which need no memory."""
    blocks = [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE][: len(kinds)]
    return functional.scaled_mm(
        a, b.t(), scale_a, kinds, scale_b, kinds, swizzle_a=blocks, swizzle_b=blocks
    )


@needs_scaled_mm
@pytest.mark.parametrize("two_levels", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 32), (300, 64, 640), (4096, 512, 7168)])
def test_torch_takes_nvfp4(m, n, k, two_levels):
    """With two levels it multiplies by the decode scale, without by none."""
    kinds = [ScalingType.BlockWise1x16, ScalingType.TensorWise][: 1 + two_levels]
    decode_scale = [torch.empty((), device="meta")] * two_levels
    (a, sfa), (b, sfb) = on_meta(m, k, cq.NVFP4), on_meta(n, k, cq.NVFP4)
    y = scaled_mm(a, b, [sfa, *decode_scale], [sfb, *decode_scale], kinds)
    assert y.shape == (m, n) and y.dtype is torch.bfloat16
    for wrong in (sfa[4:], sfa.view(torch.uint8)):
        with pytest.raises(RuntimeError, match="scale_a must have"):
            scaled_mm(a, b, [wrong, *decode_scale], [sfb, *decode_scale], kinds)


@needs_scaled_mm
@pytest.mark.parametrize("fmt", [cq.MXFP4, cq.MXFP8], ids=str)
@pytest.mark.parametrize(("m", "n"), [(1, 16), (300, 64)])
def test_torch_takes_groups_of_32(m, n, fmt):
    """K is 128: of FP4 torch 2.13's check counts the bytes of a row instead of its values.

    So it expects the scales of half of k, which are as many up to 128, for blocks have 4 groups.
    """
    (a, sfa), (b, sfb) = on_meta(m, 128, fmt), on_meta(n, 128, fmt)
    y = scaled_mm(a, b, [sfa], [sfb], [ScalingType.BlockWise1x32])
    assert y.shape == (m, n) and y.dtype is torch.bfloat16
    for wrong in (sfa[4:], sfa.view(torch.uint8)):
        with pytest.raises(RuntimeError, match="scale_a must have"):
            scaled_mm(a, b, [wrong], [sfb], [ScalingType.BlockWise1x32])


def offsets_by_cute(matrices, rows, k, group_size):
    """Return the byte of each scale, (matrices, rows, groups), as CuTe's MMA reads them."""
    from cutlass._mlir import ir
    from cutlass.utils import blockscaled_layout

    groups = range(0, k, group_size)
    with ir.Context(), ir.Location.unknown():
        module = ir.Module.create()
        with ir.InsertionPoint(module.body):
            layout = blockscaled_layout.tile_atom_to_shape_SF((rows, k, matrices), group_size)
            places = itertools.product(range(matrices), range(rows), groups)
            offsets = [layout((row, column, matrix)) for matrix, row, column in places]
    return torch.tensor(offsets).view(matrices, rows, len(groups))


@pytest.mark.parametrize("fmt", [cq.NVFP4, cq.MXFP4, cq.MXFP8], ids=str)
@pytest.mark.parametrize(("matrices", "rows", "k"), [(1, 5, 64), (1, 300, 320), (3, 130, 704)])
def test_blocks_are_those_of_cute(matrices, rows, k, fmt, device):
    x = activations((matrices, rows, k)).to(device)
    amax = {"amax": cq.tensor_amax(x)} if fmt.upper_scale else {}
    _, blocked = cq.quantize(x, fmt, **amax)
    _, row_major = cq.quantize(x, fmt.replace(scale_layout="row_major"), **amax)
    offsets = offsets_by_cute(matrices, rows, k, fmt.group_size)
    expected = bits(row_major).view(offsets.shape)
    assert len(expected.unique()) > 4
    assert torch.equal(bits(blocked)[offsets], expected)


def check_sf_layout(sf, mn, k, gran_k, num_groups, tma):
    """Check what ``check_sf_layout`` of DeepGEMM's csrc/utils/layout.hpp asserts, gran_mn being 1.

    Args:
        sf: the scales.
        mn, k: size of a matrix.
        gran_k: elements that share a scale.
        num_groups: experts, None without.
        tma: whether it is called with `tma_stride_check`.
    """
    assert sf.dtype in (torch.float32, torch.int32)
    assert sf.ndim == 2 + (num_groups is not None)
    assert num_groups is None or sf.shape[-3] == num_groups
    assert sf.shape[-2] == mn
    assert sf.shape[-1] == -(-k // (gran_k * (1 if sf.dtype is torch.float32 else 4)))
    if tma:
        assert num_groups is None or sf.stride(-3) == sf.stride(-1) * sf.shape[-1]
        assert sf.stride(-2) == 1 or mn == 1
        assert sf.stride(-1) >= -(-mn // 4) * 4 and sf.stride(-1) % 4 == 0
        assert sf.data_ptr() % 16 == 0


@pytest.mark.parametrize("num_groups", [None, 3])
@pytest.mark.parametrize(("mn", "k"), [(1, 128), (5, 512), (129, 7168)])
def test_deep_gemm_takes_fp4(mn, k, num_groups, device):
    """``fp8_fp4_gemm_nt`` and its grouped kin: recipe (1, 32), values as int8, K-major."""
    shape = (mn, k) if num_groups is None else (num_groups, mn, k)
    x = activations(shape).to(device)
    q, words = cq.quantize(x, MN_MAJOR_WORDS)
    check_sf_layout(words, mn, k, 32, num_groups, tma=True)
    packed = q.view(torch.int8)
    assert packed.shape == (*shape[:-1], k // 2) and packed.is_contiguous()

    float_q, floats = cq.quantize(x, FLOAT32_SCALES)
    check_sf_layout(floats, mn, k, 32, num_groups, tma=True)
    # It traps on any other bits than those of a power of two.
    assert not (floats.view(torch.int32) & -0x7F800001).any()
    assert torch.equal(bits(float_q), bits(q))
    exponents = (floats.contiguous().view(torch.int32) >> 23).to(torch.uint8)
    assert torch.equal(exponents.view(torch.int32), words)

    _, k_major = cq.quantize(x, K_MAJOR_WORDS)
    check_sf_layout(k_major, mn, k, 32, num_groups, tma=False)
    assert k_major.is_contiguous() and torch.equal(k_major, words)
