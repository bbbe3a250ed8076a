"""Emulated kernels of square blocks against the oracle: every byte of their results."""

import pytest
import torch

from cute_quant import DEEP_GEMM, DEEP_GEMM_32, DEEP_GEMM_SM90, GROUPWISE_FP8, MXFP4, MXFP8, NVFP4
from cute_quant.contract.upper_scales import KINDS, UpperScale
from cute_quant.kernels import architectures, heuristics
from tests import oracle
from tests.helpers import ARCHITECTURES, assert_same_bits, poisoned_values, storage_bits
from tests.helpers import poisoned_results as rows_of_poison
from tests.kernels.emulated_gpu import Gpu, OnGpu
from tests.weights import (
    DTYPES,
    E2M1,
    FORMATS,
    GROUPS,
    checkpoint,
    expect_requantized,
    poisoned_results,
    special_weights,
    views,
)

SMALL_BLOCKS = GROUPWISE_FP8.replace(group_size=32)


def check(gpu, w, fmt, last_padding=True):
    """Quantize on the emulated GPU into poisoned memory; every byte must be the oracle's."""
    given, expected = (poisoned_results(fmt, w.shape, "cpu", last_padding) for _ in range(2))
    results = gpu.quantize_blocks(w, *given, fmt)
    assert all(result is own for result, own in zip(results, given, strict=True))
    oracle.quantize_blocks_into(w, *expected, fmt)
    assert_same_bits(given[0], expected[0])
    assert torch.equal(storage_bits(given[1]), storage_bits(expected[1]))


def formats_and_dtypes():
    """Every format with one dtype, and with the others where there is time."""
    for i, fmt in enumerate(FORMATS):
        for j, dtype in enumerate(DTYPES):
            marks = () if (i + j) % 3 == 0 else pytest.mark.slow
            yield pytest.param(fmt, dtype, marks=marks, id=f"{fmt}-{dtype}")


def sizes_and_formats():
    """Every size with a format of bytes or words, and with one of small blocks."""
    formats = (DEEP_GEMM, DEEP_GEMM_32, MXFP8, SMALL_BLOCKS)
    sizes = ((1, 1), (1, 130), (130, 1), (3, 513), (144, 30), (129, 641))
    for i, (n, k) in enumerate(sizes):
        for fmt in formats[i % 2 :: 2]:
            yield pytest.param(n, k, fmt, id=f"{n}-{k}-{fmt}")


@pytest.mark.parametrize(("fmt", "dtype"), list(formats_and_dtypes()))
def test_every_format(fmt, dtype, gpu):
    for seed, shape in enumerate([(128, 256), (2, 133, 302)]):
        w = special_weights(shape, dtype, fmt.group_size, seed)
        check(gpu, w, fmt, last_padding=seed == 0)
        check(gpu, w.mT.contiguous().mT, fmt, last_padding=seed == 1)


@pytest.mark.parametrize("name", views(torch.zeros(1, 1)))
@pytest.mark.parametrize(
    ("shape", "fmt"),
    [
        ((3, 64, 160), DEEP_GEMM),
        ((3, 64, 160), MXFP4),
        ((2, 2, 40, 136), MXFP8),
        ((2, 2, 40, 136), DEEP_GEMM_SM90),
    ],
    ids=str,
)
def test_every_stride(shape, fmt, name, gpu):
    w = special_weights(shape, torch.bfloat16, fmt.group_size, 3)
    check(gpu, views(w)[name], fmt)


@pytest.mark.parametrize(("n", "k", "fmt"), list(sizes_and_formats()))
def test_sizes_of_no_whole_block(n, k, fmt, gpu):
    w = special_weights((n, k), torch.bfloat16, fmt.group_size, n + k)
    check(gpu, w, fmt)
    check(gpu, w.mT.contiguous().mT, fmt)


@pytest.mark.parametrize("fmt", [DEEP_GEMM_SM90, SMALL_BLOCKS], ids=str)
def test_each_value_counts_in_its_block_alone(fmt, gpu):
    for place in ((0, 0), (15, 127), (16, 0), (31, 96), (32, 31), (127, 127)):
        w = torch.ones(128, 256, dtype=torch.bfloat16)
        w[place] = -5.0
        check(gpu, w, fmt)
        check(gpu, w.mT.contiguous().mT, fmt)


def test_a_view_into_a_larger_result(gpu):
    w = special_weights((2, 130, 96), torch.bfloat16, 128, 5)
    given, expected = (poisoned_results(DEEP_GEMM, w.shape) for _ in range(2))
    wide = poisoned_values(130, 112, "cpu", batch_shape=(2,))
    gpu.quantize_blocks(w, wide[..., :96], given[1], DEEP_GEMM)
    oracle.quantize_blocks_into(w, *expected, DEEP_GEMM)
    assert_same_bits(wide[..., :96].contiguous(), expected[0])
    assert (
        wide[..., 96:].view(torch.uint8) == poisoned_values(1, 1, "cpu").view(torch.uint8)
    ).all()


def test_more_tiles_than_a_grid_counts(gpu, monkeypatch):
    monkeypatch.setattr(gpu.kernels, "_kernels", {})
    gpu.max_grid = 2
    w = special_weights((3, 5 * 128 - 3, 40), torch.bfloat16, 128, 7)
    with monkeypatch.context() as patch:
        patch.setattr(heuristics, "MAX_GRID_Y", 2)
        check(gpu, w, DEEP_GEMM)
        check(gpu, w.mT.contiguous().mT, DEEP_GEMM_SM90)
        q, sf = poisoned_results(DEEP_GEMM_SM90, w.shape)
        oracle.quantize_blocks_into(w, q, sf, DEEP_GEMM_SM90)
        y = gpu.dequantize_blocks(q, sf, DEEP_GEMM_SM90, torch.float32)
        expected = oracle.products_of_blocks(q, sf, DEEP_GEMM_SM90, torch.float32, 128)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.scale_dtype is torch.float32], ids=str)
def test_dequantize(fmt, dtype, gpu):
    for shape in ((256, 128), (2, 133, 302)):
        w = special_weights(shape, torch.bfloat16, fmt.group_size, 11)
        q, sf = poisoned_results(fmt, shape)
        oracle.quantize_blocks_into(w, q, sf, fmt)
        expected = oracle.products_of_blocks(q, sf, fmt, dtype, fmt.group_size)
        for scales in (sf, sf.mT.contiguous().mT):
            y = gpu.dequantize_blocks(q, scales, fmt, dtype)
            assert y.dtype is dtype and y.shape == shape
            assert torch.equal(y.isnan(), expected.isnan())
            assert_same_bits(y.nan_to_num().contiguous(), expected.nan_to_num())


def checkpoints_and_formats():
    """Every format with some checkpoints, and with the others where there is time."""
    checkpoints = (
        ((2, 133, 300), 128, False),
        ((2, 133, 300), 32, False),
        ((128, 384), 128, True),
        ((150, 72), 32, True),
        ((1, 72), 128, False),
    )
    for i, fmt in enumerate(f for f in FORMATS if f.values is not E2M1):
        for j, source in enumerate(checkpoints):
            marks = () if (i + j) % 3 == 0 else pytest.mark.slow
            yield pytest.param(*source, fmt, marks=marks)


@pytest.mark.parametrize(("shape", "size", "along_n", "fmt"), list(checkpoints_and_formats()))
def test_requantize_in_blocks(shape, size, along_n, fmt, gpu):
    w8, w_sf = checkpoint(shape, 13, size)
    given, expected = (poisoned_results(fmt, shape) for _ in range(2))
    source, scales = w8, w_sf.mT.contiguous().mT
    if along_n:
        source, scales = w8.mT.contiguous().mT, w_sf
    gpu.requantize_blocks(source, scales, *given, fmt)
    expect_requantized(expected, w8, w_sf, fmt)
    assert_same_bits(given[0], expected[0])
    assert torch.equal(storage_bits(given[1]), storage_bits(expected[1]))


@pytest.mark.parametrize("fmt", GROUPS, ids=str)
@pytest.mark.parametrize("shape", [(128, 384), (2, 133, 302)])
@pytest.mark.parametrize("kind", KINDS)
def test_requantize_in_groups_of_rows(kind, shape, fmt, gpu):
    w8, w_sf = checkpoint(shape, 17, 32 if kind == KINDS[0] else 128)
    *leading, n, k = shape
    upper = None
    if fmt.upper_scale:
        upper = UpperScale(kind, torch.linspace(0.5, 2.0, max(1, *leading, 1)).view(leading))
    elif kind != KINDS[0]:
        return
    given, expected = (
        rows_of_poison(fmt, n, k, "cpu", batch_shape=tuple(leading)) for _ in range(2)
    )
    gpu.requantize_blocks(w8, w_sf, *given, fmt, upper)
    expect_requantized(expected, w8, w_sf, fmt, upper)
    assert_same_bits(given[0], expected[0])
    assert torch.equal(storage_bits(given[1]), storage_bits(expected[1]))


@pytest.mark.parametrize("fmt", [MXFP4, NVFP4], ids=str)
def test_requantize_two_tiles_a_thread(fmt, kernels, arch):
    """As large weights are: the last tile of a row is short, or there is none."""
    gpu = Gpu(kernels, arch, rows_per_thread=2)
    upper = UpperScale("amax", torch.tensor(0.7)) if fmt.upper_scale else None
    for k in (1072, 1552):
        w8, w_sf = checkpoint((2, 131, k), 23)
        given, expected = (rows_of_poison(fmt, 131, k, "cpu", batch_shape=(2,)) for _ in range(2))
        gpu.requantize_blocks(w8, w_sf, *given, fmt, upper)
        expect_requantized(expected, w8, w_sf, fmt, upper)
        assert_same_bits(given[0], expected[0])
        assert torch.equal(storage_bits(given[1]), storage_bits(expected[1]))


def test_weights_of_any_stride_are_requantized(gpu):
    w8, w_sf = checkpoint((2, 150, 304), 19)
    memory = torch.zeros(2, 151, 321, dtype=torch.uint8).view(w8.dtype)
    source = memory[:, 1:, 1:305]
    source.view(torch.uint8).copy_(w8.view(torch.uint8))
    for fmt in (DEEP_GEMM, NVFP4):
        upper = UpperScale("amax", torch.tensor(3.0)) if fmt.upper_scale else None
        for actual, expected in zip(
            gpu.requantize_blocks(source, w_sf, None, None, fmt, upper),
            gpu.requantize_blocks(w8, w_sf, None, None, fmt, upper),
            strict=True,
        ):
            assert_same_bits(actual.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))


def test_nothing_to_quantize_launches_nothing(gpu):
    for shape in ((0, 128), (128, 0), (0, 3, 8)):
        w = torch.empty(shape, dtype=torch.bfloat16)
        q, sf = gpu.quantize_blocks(w, None, None, DEEP_GEMM)
        assert q.numel() == 0 == gpu.dequantize_blocks(q, sf, DEEP_GEMM, torch.float32).numel()
    assert not gpu.launched


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loads_are_as_wide_as_an_architecture_has_them(dtype, arch):
    from cute_quant.dispatch import blocks

    widest = architectures.named(arch).widest_load
    for transposed in (False, True):
        w = torch.zeros(256, 512, dtype=dtype)
        w = w.mT if transposed else w
        q = torch.zeros(w.shape, dtype=torch.float8_e4m3fn)
        spec = blocks.choose_spec(w.as_subclass(OnGpu), DEEP_GEMM, q, arch)
        assert spec.access.load_bytes == widest and spec.transposed == transposed
        assert not spec.access.ragged and not spec.q_access.ragged
        assert spec.q_access.store_bytes == (16 if transposed else widest // dtype.itemsize)
