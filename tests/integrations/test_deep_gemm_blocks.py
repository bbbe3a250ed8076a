"""Square blocks of weights to the bits of DeepGEMM's own torch code, and in front of its GEMMs."""

import importlib.util

import pytest
import torch

import cute_quant as cq
from cute_quant import DEEP_GEMM, DEEP_GEMM_32, DEEP_GEMM_SM90
from cute_quant.integrations.deep_gemm import per_block_cast_to_fp8
from tests.helpers import assert_same_bits
from tests.peers import libraries
from tests.weights import DTYPES, special_weights, views

SHAPES = [(128, 128), (256, 640), (200, 300), (1, 1), (3, 130)]
of_deep_gemm = pytest.mark.library("deep_gemm", "vllm")


def finite(shape, dtype, size, seed=0):
    return special_weights(shape, dtype, size, seed).nan_to_num(0.5, 3.0, -3.0)


def words_of(sf, n, size):
    """Return the words (n, ceil(k / 4 size)) that DeepGEMM's transform makes of scales of blocks.

    It repeats the scales of blocks for their rows, and packs the exponents of four.
    """
    rows = sf[torch.arange(n) // size]
    exponents = (rows.view(torch.int32) >> 23).to(torch.uint8)
    padded = torch.nn.functional.pad(exponents, (0, -exponents.shape[1] % 4))
    return padded.view(torch.int32)


@of_deep_gemm
@pytest.mark.parametrize("gran_k", [32, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("use_ue8m0", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_cast_of_blocks(shape, use_ue8m0, dtype, gran_k):
    theirs = libraries.deep_gemm_math().per_block_cast_to_fp8
    w = finite(shape, dtype, gran_k)
    expected = theirs(w, use_ue8m0, gran_k)
    for view in views(w).values():
        for actual, wanted in zip(
            per_block_cast_to_fp8(view, use_ue8m0, gran_k), expected, strict=True
        ):
            assert_same_bits(actual, wanted)
            assert actual.is_contiguous()


@of_deep_gemm
@pytest.mark.parametrize("fmt", [DEEP_GEMM, DEEP_GEMM_32], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_words_of_its_transform(shape, fmt):
    theirs = libraries.deep_gemm_math().per_block_cast_to_fp8
    w = finite(shape, torch.bfloat16, fmt.group_size, 1)
    their_q, their_sf = theirs(w, True, fmt.group_size)
    q, sf = cq.quantize_blocks(w, fmt.replace(min_scale="deepgemm"))
    assert_same_bits(q, their_q)
    assert_same_bits(sf, words_of(their_sf, shape[0], fmt.group_size))


@of_deep_gemm
@pytest.mark.parametrize("shape", SHAPES)
def test_the_cast_of_dequantized_weights(shape):
    cast = libraries.deep_gemm_math().per_block_cast_to_fp8
    w8, w_sf = cast(finite(shape, torch.bfloat16, 128, 2), False)
    by_row = w_sf.repeat_interleave(128, 0).repeat_interleave(128, 1)
    dequantized = w8.float() * by_row[: shape[0], : shape[1]]
    their_q, their_sf = cast(dequantized, True)
    q, sf = cq.requantize_blocks(w8, w_sf, DEEP_GEMM.replace(min_scale="deepgemm"))
    assert_same_bits(q, their_q)
    assert_same_bits(sf, words_of(their_sf, shape[0], 128))
    assert_same_bits(
        cq.dequantize_blocks(w8, w_sf, DEEP_GEMM_SM90, dtype=torch.float32), dequantized
    )


@of_deep_gemm
def test_the_cast_to_fp4_of_dequantized_weights():
    math = libraries.deep_gemm_math()
    w8, w_sf = math.per_block_cast_to_fp8(finite((200, 512), torch.bfloat16, 128, 3), False)
    by_row = w_sf.repeat_interleave(128, 0).repeat_interleave(128, 1)
    dequantized = w8.float() * by_row[:200, :512]
    their_q, their_sf = math.per_token_cast_to_fp4(dequantized, True, 32, True)
    fmt = cq.MXFP4.replace(numerics="deepgemm", scale_layout="row_major_packed")
    q, sf = cq.requantize_blocks(w8, w_sf, fmt)
    assert_same_bits(q.view(torch.int8), their_q)
    assert_same_bits(sf, their_sf)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 2), 1), TypeError, "use_ue8m0: expected a bool, got 1"),
        ((torch.ones(2), True), ValueError, r"x: expected 2 dimensions \(m, n\)"),
        ((torch.ones(2, 2).double(), True), TypeError, "x: expected a tensor of bfloat16"),
        ((torch.ones(2, 2), True, 64), ValueError, r"gran_k: expected one of \(32, 128\), got 64"),
    ],
)
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        per_block_cast_to_fp8(*arguments)


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("deep_gemm") is None, reason="needs DeepGEMM")
@pytest.mark.parametrize("use_ue8m0", [False, True])
@pytest.mark.parametrize("shape", [(4096, 7168), (7168, 2048), (200, 300)])
def test_the_cast_of_blocks_on_a_gpu(shape, use_ue8m0):
    import deep_gemm

    w = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    expected = deep_gemm.utils.math.per_block_cast_to_fp8(w, use_ue8m0)
    for view in (w, w.mT.contiguous().mT):
        for actual, wanted in zip(per_block_cast_to_fp8(view, use_ue8m0), expected, strict=True):
            assert_same_bits(actual, wanted)
    if use_ue8m0:
        _, sf = cq.quantize_blocks(w, DEEP_GEMM.replace(min_scale="deepgemm"))
        rows = expected[1][torch.arange(shape[0], device="cuda") // 128]
        theirs = deep_gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(rows)
        assert_same_bits(sf, theirs)
        assert sf.stride(-1) == theirs.stride(-1)


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("deep_gemm") is None, reason="needs DeepGEMM")
def test_a_gemm_reads_blocks():
    import deep_gemm

    fmt = cq.deep_gemm_format("cuda")
    x = torch.randn(256, 2048, dtype=torch.bfloat16, device="cuda")
    w = torch.randn(512, 2048, dtype=torch.bfloat16, device="cuda")
    d = torch.empty(256, 512, dtype=torch.bfloat16, device="cuda")
    operands = cq.quantize(x, fmt), cq.quantize_blocks(w, fmt)
    deep_gemm.fp8_gemm_nt(*operands, d)
    wide = (
        cq.dequantize(*operands[0], fmt, dtype=torch.float32).double(),
        cq.dequantize_blocks(*operands[1], fmt, dtype=torch.float32).double(),
    )
    product = wide[0] @ wide[1].t()
    assert ((d - product).norm() / product.norm()).item() < 0.005
