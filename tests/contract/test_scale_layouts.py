"""The description of where scales lie, against CuTe's and the libraries' own."""

import itertools

import cutlass.cute as cute
import pytest
import torch
from cutlass._mlir import ir
from cutlass.utils import blockscaled_layout

import cute_quant as cq
from cute_quant.contract import scale_layouts
from cute_quant.kernels import layouts
from tests.helpers import assert_same_bits, bits
from tests.integrations.test_scaled_mm import to_blocked

EVERY_LAYOUT = [
    cq.DEEP_GEMM,
    cq.DEEP_GEMM_32,
    cq.DEEP_GEMM_SM90,
    cq.GROUPWISE_FP8,
    cq.ROWWISE_FP8,
    cq.MXFP8,
    cq.MXFP8.replace(scale_layout="row_major"),
    cq.MXFP8.replace(scale_layout="row_major_packed"),
    cq.NVFP4,
    cq.NVFP4.replace(scale_layout="8x4"),
]
SIZES = [(1, 1), (3, 5), (5, 100), (130, 700), (300, 2048)]


@pytest.fixture
def mlir():
    with ir.Context(), ir.Location.unknown():
        module = ir.Module.create()
        with ir.InsertionPoint(module.body):
            yield


@pytest.mark.parametrize(("mn", "k"), SIZES)
@pytest.mark.parametrize("fmt", EVERY_LAYOUT, ids=str)
def test_every_place_once(fmt, mn, k):
    layout = scale_layouts.scale_layout(fmt, mn, k)
    rows, groups = layout.sizes
    assert rows == fmt.scale_rows(mn) and groups >= fmt.groups(k)
    places = [layout.offset(*at) for at in itertools.product(range(rows), range(groups))]
    assert sorted(places) == list(range(rows * groups))
    sf = fmt.empty_scales((), mn, k, "cpu")
    unit = 1 if fmt.byte_scales else 4
    assert rows * groups * unit == sf.untyped_storage().nbytes()


@pytest.mark.parametrize(("mn", "k"), SIZES)
@pytest.mark.parametrize("fmt", EVERY_LAYOUT, ids=str)
def test_cute_has_the_same_layout(mlir, fmt, mn, k):
    described = scale_layouts.scale_layout(fmt, mn, k)
    layout = layouts.scale_layout(fmt, mn, k)
    rows, groups = described.sizes
    assert cute.size(layout) == rows * groups
    for row, group in itertools.product({0, 1, rows // 2, rows - 1}, {0, groups // 3, groups - 1}):
        if 0 <= row < rows:
            assert layout((row, group)) == described.offset(row, group)


@pytest.mark.parametrize(("mn", "k"), [(128, 64), (256, 512), (384, 1024)])
@pytest.mark.parametrize("fmt", [cq.MXFP8, cq.NVFP4], ids=str)
def test_blocks_are_those_of_cutlass(mlir, fmt, mn, k):
    """``tile_atom_to_shape_SF``, which takes columns of values."""
    size = fmt.group_size
    k = -(-k // (4 * size)) * 4 * size
    theirs = blockscaled_layout.tile_atom_to_shape_SF((mn, k, 1), size)
    ours = scale_layouts.scale_layout(fmt, mn, k)
    for row, group in itertools.product(range(0, mn, 7), range(k // size)):
        assert theirs((row, group * size, 0)) == ours.offset(row, group)


@pytest.mark.parametrize(("mn", "groups"), [(1, 1), (128, 4), (200, 30), (257, 9)])
def test_blocks_are_those_of_torchao(mn, groups):
    numbers = torch.randint(0, 256, (mn, groups), dtype=torch.uint8)
    to, shape = cq.MXFP8, (mn, 32 * groups)
    fmt = to.replace(scale_layout="row_major")
    found = cq.convert_scales(numbers.view(torch.float8_e8m0fnu), fmt, to, shape)
    assert torch.equal(bits(found), to_blocked(numbers))


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize(("mn", "groups"), [(1, 1), (128, 4), (200, 30), (257, 9)])
def test_blocks_are_those_of_flashinfer(batch, mn, groups):
    """``block_scale_interleave``: an offset for each scale, and 0 elsewhere."""
    numbers = torch.randint(1, 127, (*batch, mn, groups), dtype=torch.uint8)
    rows, columns = -(-mn // 128) * 128, -(-groups // 4) * 4
    expected = torch.zeros(max(1, *batch, 1), rows * columns, dtype=torch.uint8)
    for i, matrix in enumerate(numbers.view(-1, mn, groups)):
        for row, column in itertools.product(range(mn), range(groups)):
            inner_k, inner_m = column % 4, row % 128 // 32
            outer_m, k_tile, m_tile = row % 32, column // 4, row // 128
            offset = m_tile * (columns // 4) * 512 + k_tile * 512
            expected[i, offset + outer_m * 16 + inner_m * 4 + inner_k] = matrix[row, column]
    fmt = cq.NVFP4.replace(scale_layout="row_major")
    shape = (*batch, mn, 16 * groups)
    found = cq.convert_scales(numbers.view(torch.float8_e4m3fn), fmt, cq.NVFP4, shape)
    assert torch.equal(bits(found), expected.flatten())


def deep_gemm_packed(sf):
    """Return what ``get_mn_major_tma_aligned_packed_ue8m0_tensor`` returns, in other steps."""
    batch, mn, groups = sf.shape
    aligned, columns = -(-mn // 4) * 4, -(-groups // 4)
    words = torch.zeros(batch, columns, aligned, dtype=torch.int64)
    for group in range(groups):
        exponents = (sf[..., group].contiguous().view(torch.int32) >> 23).long()
        words[:, group // 4, :mn] += exponents << 8 * (group % 4)
    words = torch.where(words >= 2**31, words - 2**32, words).int()
    return words.transpose(1, 2)[:, :mn]


@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 128, 56), (2, 6, 8)])
@pytest.mark.parametrize("size", [32, 128])
def test_words_are_those_of_deep_gemm(shape, size):
    sf = torch.randint(-126, 128, shape).float().exp2()
    to = cq.DEEP_GEMM.replace(group_size=size)
    fmt = cq.DEEP_GEMM_SM90.replace(round_scale=True, scale_layout="row_major", group_size=size)
    values = (*shape[:-1], size * shape[-1])
    found = cq.convert_scales(sf, fmt, to, values)
    expected = deep_gemm_packed(sf)
    assert found.stride() == expected.stride()
    assert_same_bits(found, expected)
    single = cq.convert_scales(sf[0], fmt, to, values[1:])
    assert_same_bits(single, expected[0])
    # Its other transform moves float32 of any value.
    fmt = cq.GROUPWISE_FP8.replace(group_size=size)
    to = cq.DEEP_GEMM_SM90.replace(group_size=size)
    sf = torch.rand(shape)
    moved = cq.convert_scales(sf, fmt, to, values)
    aligned = -(-shape[1] // 4) * 4
    assert moved.stride() == (aligned * shape[2], 1, aligned) and torch.equal(moved, sf)


@pytest.mark.gpu
@pytest.mark.library("deep_gemm")
@pytest.mark.parametrize("shape", [(5, 7), (128, 56), (4096, 56), (3, 130, 8)])
def test_deep_gemm_itself(shape):
    from deep_gemm import get_mn_major_tma_aligned_packed_ue8m0_tensor as packed
    from deep_gemm import get_mn_major_tma_aligned_tensor as aligned

    sf = torch.randint(-126, 128, shape, device="cuda").float().exp2()
    values = (*shape[:-1], 128 * shape[-1])
    fmt = cq.GROUPWISE_FP8.replace(round_scale=True)
    found = cq.convert_scales(sf, fmt, cq.DEEP_GEMM, values)
    assert_same_bits(found, packed(sf))
    assert found.stride() == packed(sf).stride()
    to = cq.DEEP_GEMM_SM90.replace(round_scale=True)
    assert_same_bits(cq.convert_scales(sf, fmt, to, values), aligned(sf))


@pytest.mark.gpu
@pytest.mark.library("flashinfer")
def test_flashinfer_itself():
    from flashinfer import block_scale_interleave

    numbers = torch.randint(1, 127, (200, 30), dtype=torch.uint8, device="cuda")
    fmt = cq.NVFP4.replace(scale_layout="row_major")
    found = cq.convert_scales(numbers.view(torch.float8_e4m3fn), fmt, cq.NVFP4, (200, 480))
    assert torch.equal(bits(found), bits(block_scale_interleave(numbers)))


def test_places_that_are_not_there():
    layout = scale_layouts.scale_layout(cq.MXFP8, 5, 64)
    assert layout.offset(127, 3) == 511
    for row, group, name in ((128, 0, "row"), (-1, 0, "row"), (0, 4, "group")):
        with pytest.raises(ValueError, match=f"{name}: expected 0 to "):
            layout.offset(row, group)


def test_text():
    layout = scale_layouts.scale_layout(cq.MXFP8, 200, 512)
    assert str(layout) == "((32, 4, 2), (4, 4)) : ((16, 4, 2048), (1, 512))"
    packed = scale_layouts.scale_layout(cq.DEEP_GEMM, 5, 1000)
    assert str(packed) == "((8), (4, 2)) : ((4), (1, 32))"
