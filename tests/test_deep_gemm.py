"""The consumer: DeepGEMM reads what comes out, and its own functions give the same bits."""

import pytest
import torch

from cute_quant import dequantize, quantize
from cute_quant.compat import per_token_cast_to_fp8
from tests.helpers import assert_same_bits
from tests.test_activations import ACTIVATIONS
from tests.test_compat import DTYPES, finite_activations

deep_gemm = pytest.importorskip("deep_gemm", reason="needs DeepGEMM and a CUDA GPU")
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("k", [128, 7168, 7296])
@pytest.mark.parametrize("mn", [1, 3, 128, 4096, 4097])
def test_packed_words_equal_those_of_deep_gemm(mn, k):
    x = torch.randn(mn, k, dtype=torch.bfloat16, device="cuda")
    q, sf = per_token_cast_to_fp8(x, use_ue8m0=True, use_packed_ue8m0=True)
    their_q, their_scales = deep_gemm.utils.math.per_token_cast_to_fp8(x, use_ue8m0=True)
    their_sf = deep_gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(their_scales)
    assert_same_bits(q, their_q)
    assert_same_bits(sf, their_sf)
    assert sf.stride(-1) == their_sf.stride(-1)
    assert sf.stride(-2) == their_sf.stride(-2) == 1 or mn == 1


@pytest.mark.parametrize("use_ue8m0", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", ["cuda", "cpu"])
def test_cast_equals_that_of_deep_gemm(dtype, use_ue8m0, place):
    x = finite_activations((511, 2048), dtype, seed=7).to(place)
    q, sf = per_token_cast_to_fp8(x, use_ue8m0)
    their_q, their_sf = deep_gemm.utils.math.per_token_cast_to_fp8(x, use_ue8m0)
    assert_same_bits(q, their_q)
    assert_same_bits(sf, their_sf)


@pytest.mark.parametrize("k", [128, 7296])
@pytest.mark.parametrize("mn", [1, 3, 128, 4097])
def test_float32_scales_need_no_transpose(mn, k):
    """DeepGEMM hands scales back untouched, same memory, where their layout is what it wants."""
    _, sf = quantize(torch.ones(mn, k, dtype=torch.bfloat16, device="cuda"), scale_format="float32")
    theirs = deep_gemm.get_mn_major_tma_aligned_tensor(sf)
    assert theirs.data_ptr() == sf.data_ptr() and theirs.stride() == sf.stride()


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    "name", ["random", *(f"{name}-{m}" for name in ACTIVATIONS for m in (1, 5, 250))]
)
@pytest.mark.parametrize("round_scale", [False, True])
def test_gemm(name, round_scale):
    if name == "random":
        x = torch.randn(333, 7168, dtype=torch.bfloat16, device="cuda")
    else:
        source, rows = name.split("-")
        x = ACTIVATIONS[source][: int(rows)].cuda()
    m, k = x.shape
    n = 512
    w = torch.randn(n, k, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    w8, sfw = deep_gemm.utils.math.per_block_cast_to_fp8(w.to(torch.bfloat16), use_ue8m0=False)
    expected = x.double() @ w.double().t()

    q, sf = quantize(x, scale_format="float32", round_scale=round_scale)
    ours = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
    deep_gemm.fp8_gemm_nt((q, sf), (w8, sfw), ours)
    theirs = torch.empty_like(ours)
    cast = deep_gemm.utils.math.per_token_cast_to_fp8(x, use_ue8m0=round_scale)
    deep_gemm.fp8_gemm_nt(cast, (w8, sfw), theirs)

    our_error, their_error = relative_error(ours, expected), relative_error(theirs, expected)
    print(f"{name}: relative error {our_error:.6f}, with DeepGEMM's cast {their_error:.6f}")
    assert our_error < 0.05 and our_error <= their_error * 1.01
    # What the GEMM computed is the product of what dequantize says the operands are.
    scales = sfw.repeat_interleave(128, 0).repeat_interleave(128, 1)[:n]
    product = dequantize(q, sf, dtype=torch.float32).double() @ (w8.float() * scales).double().t()
    assert relative_error(ours, product) < 0.005
