"""The consumer of groups along rows: DeepGEMM's weight gradients, and the bits of its own casts."""

import itertools

import pytest
import torch

from cute_quant import (
    DEEP_GEMM_32,
    DEEP_GEMM_SM90,
    PrefixSum,
    quantize_both,
    quantize_columns,
)
from cute_quant.nn import gemms
from cute_quant.nn.recipes import SM90
from tests.helpers import assert_same_bits
from tests.integrations.test_deep_gemm import deep_gemm, on_blackwell, on_hopper, with_deep_gemm

SIZES = ([128], [256, 128, 512], [128, 0, 384, 128])
"""Rows of each expert, as its GEMMs of weight gradients take them."""


def psum(sizes: list[int]) -> PrefixSum:
    return PrefixSum(torch.tensor(list(itertools.accumulate(sizes)), dtype=torch.int32).cuda())


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def their_cast(x: torch.Tensor, use_ue8m0: bool, gran_k: int) -> list[torch.Tensor]:
    """Cast on the CPU: on a GPU torch divides by a number as it multiplies by its reciprocal."""
    cast = deep_gemm.utils.math.per_channel_cast_to_fp8
    return [t.cuda() for t in cast(x.cpu(), use_ue8m0, gran_k)]


@with_deep_gemm
@pytest.mark.parametrize("k", [256, 7168])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values_and_scales_are_those_of_its_cast(sizes, k):
    x = torch.randn(sum(sizes), k, dtype=torch.bfloat16, device="cuda")
    their_q, their_sf = their_cast(x, False, 128)
    _, (q, sf) = quantize_both(x, DEEP_GEMM_SM90, DEEP_GEMM_SM90, rows=psum(sizes))
    assert_same_bits(q, their_q)
    assert_same_bits(sf, their_sf)


@on_blackwell
@pytest.mark.parametrize("sizes", [[128], [256, 96, 512], [32, 0, 160, 128]], ids=str)
def test_words_are_those_that_it_packs(sizes):
    """Of experts whose rows are multiples of 32, which lie at multiples of 128 in front of us."""
    k, starts, start = 512, [], 0
    for size in sizes:
        starts.append(start)
        start += -(-size // 128) * 128
    ends = torch.tensor([a + n for a, n in zip(starts, sizes, strict=True)], dtype=torch.int32)
    x = torch.randn(start, k, dtype=torch.bfloat16, device="cuda")
    q, words = quantize_columns(x, DEEP_GEMM_32, rows=PrefixSum(ends.cuda()))
    parts = torch.cat([x[a : a + n] for a, n in zip(starts, sizes, strict=True)])
    their_q, their_sf = their_cast(parts, True, 32)
    layout = torch.tensor(sizes, dtype=torch.int32, device="cuda")
    pack = deep_gemm.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor
    assert_same_bits(words, pack(their_sf, layout, sizes, 32, 32))
    own = torch.cat([q[a : a + n].view(torch.uint8) for a, n in zip(starts, sizes, strict=True)])
    assert torch.equal(own, their_q.view(torch.uint8))


@on_hopper
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_weight_gradients_have_the_error_of_its_casts(sizes):
    n, k = 512, 768
    grad, x = (torch.randn(sum(sizes), m, dtype=torch.bfloat16, device="cuda") for m in (n, k))
    rows = psum(sizes)
    operands = [quantize_columns(t, DEEP_GEMM_SM90, transposed=True, rows=rows) for t in (grad, x)]
    ours = gemms.weight_gradient(*operands, SM90, rows.ends)

    their_operands = []
    for t in (grad, x):
        q, sf = their_cast(t, False, 128)
        parts = [part.T.flatten() for part in q.view(torch.uint8).split(sizes)]
        their_operands.append((torch.cat(parts).view(q.dtype), sf.T))
    theirs = torch.zeros_like(ours)
    layout = torch.tensor(sizes, dtype=torch.int32, device="cuda")
    deep_gemm.k_grouped_fp8_gemm_nt_contiguous(
        *their_operands, theirs, sizes, layout, c=theirs, recipe=(1, 1, 128)
    )
    exact = torch.stack(
        [a.double().mT @ b.double() for a, b in zip(grad.split(sizes), x.split(sizes), strict=True)]
    )
    error = relative_error(ours, exact)
    assert error <= 1.001 * relative_error(theirs, exact)
    assert 0.01 < error < 0.05
