"""What DeepEP's ``ElasticBuffer.dispatch((x, sf), ...)`` asks of values and scales, and returns.

Its checks, as of commit dd758ca of deepseek-ai/DeepEP (csrc/elastic/buffer.hpp), are written out
here; DeepEP itself needs several GPUs.
"""

import pytest
import torch

from cute_quant import (
    DEEP_GEMM,
    DEEP_GEMM_32,
    DEEP_GEMM_SM90,
    GROUPWISE_FP8,
    MXFP8,
    check_scales,
    quantize,
)

SCALE_BYTES = 4
"""Of ``sf_pack_t``: a float32, or four UE8M0 bytes."""
VECTOR_BYTES = 16
READERS = {
    DEEP_GEMM: "deep_gemm_sm100",
    DEEP_GEMM_32: "deep_gemm_sm100",
    DEEP_GEMM_SM90: "deep_gemm_sm90",
}
ACCEPTED = (
    *READERS,
    GROUPWISE_FP8,
    DEEP_GEMM.replace(scale_layout="row_major_packed"),
)

every_accepted = pytest.mark.parametrize("fmt", ACCEPTED, ids=str)


def problem_of(x: torch.Tensor, sf: torch.Tensor) -> str | None:
    """Return the first of DeepEP's checks that fails, None if there is none."""
    if x.ndim != 2 or not x.is_contiguous():
        return "x is not contiguous"
    if x.shape[1] * x.element_size() % VECTOR_BYTES:
        return "a row of x has no whole vectors"
    if sf.ndim != 2 or sf.shape[0] != x.shape[0]:
        return "sf has other rows"
    if sf.element_size() != SCALE_BYTES:
        return "sf has no elements of 4 bytes"
    return None


def received(sf: torch.Tensor, tokens: list[int], *, aligned: bool) -> torch.Tensor:
    """Return scales of these tokens as DeepEP lays them out; an element at a time, as it does."""
    strides = (1, -(-len(tokens) // 4) * 4) if aligned else (sf.shape[1], 1)
    result = torch.empty_strided((len(tokens), sf.shape[1]), strides, dtype=sf.dtype)
    for row, token in enumerate(tokens):
        for pack in range(sf.shape[1]):
            result[row, pack] = sf[token, pack]
    return result


@every_accepted
@pytest.mark.parametrize(("mn", "k"), [(5, 7168), (1, 512), (33, 2048)])
def test_it_takes_values_and_scales_as_they_are(fmt, mn, k):
    q, sf = quantize(torch.randn(mn, k).bfloat16(), fmt)
    assert problem_of(q, sf) is None


def test_it_refuses_scales_in_blocks():
    assert problem_of(*quantize(torch.randn(5, 512).bfloat16(), MXFP8)) == "sf has other rows"


@pytest.mark.parametrize("fmt", READERS, ids=str)
@pytest.mark.parametrize("count", [4, 7])
def test_deep_gemm_reads_what_it_returns(fmt, count):
    """Words are moved whole, so they are those of the received rows in the layout of a GEMM."""
    x = torch.randn(9, 2048).bfloat16()
    tokens = [8, 0, 3, 3, 7, 2, 5][:count]
    q, sf = quantize(x, fmt)
    _, own_sf = quantize(x[tokens], fmt)
    arrived = received(sf, tokens, aligned=True)
    assert torch.equal(arrived, own_sf) and arrived.stride() == own_sf.stride()
    values = q.view(torch.uint8)[tokens].view(fmt.values)
    found = check_scales(values, arrived, fmt, READERS[fmt], x=x[tokens])
    # DeepEP leaves the padding rows of the columns undefined, which no row that exists reads.
    assert all(finding.rule == "padding" for finding in found)
    if fmt.packed:
        rows = received(sf, tokens, aligned=False)
        assert any(
            finding.rule == "strides" for finding in check_scales(values, rows, fmt, READERS[fmt])
        )
