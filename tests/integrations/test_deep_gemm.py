"""The consumer: DeepGEMM reads what comes out, and its own functions give the same bits."""

import math

import pytest
import torch

from cute_quant import (
    DEEP_GEMM,
    DEEP_GEMM_32,
    DEEP_GEMM_SM90,
    Indexed,
    Masked,
    PrefixSum,
    dequantize,
    quantize,
)
from cute_quant.integrations.deep_gemm import per_token_cast_to_fp8
from tests.helpers import assert_same_bits
from tests.integrations.test_vllm import DTYPES, finite_activations
from tests.kernels.test_activations import ACTIVATIONS

try:
    import deep_gemm
except ImportError:
    deep_gemm = None


def with_deep_gemm(test):
    """The mark of tests that call DeepGEMM; the others ask only for what its checks demand."""
    missing = pytest.mark.skipif(deep_gemm is None, reason="needs DeepGEMM")
    return pytest.mark.gpu(missing(test))


def on_hopper(test):
    """The mark of tests whose GEMM reads float32 scales."""
    return with_deep_gemm(pytest.mark.skipif(_architecture() != 9, reason="needs SM90")(test))


def on_blackwell(test):
    """The mark of tests of what DeepGEMM packs there alone."""
    return with_deep_gemm(pytest.mark.skipif(_architecture() != 10, reason="needs SM100")(test))


def _architecture() -> int | None:
    """Return the major number of the GPU's compute capability."""
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else None


@with_deep_gemm
@pytest.mark.parametrize("k", [128, 7168, 7296])
@pytest.mark.parametrize("mn", [1, 3, 128, 4096, 4097])
@pytest.mark.parametrize("gran_k", [32, 128])
def test_packed_words_equal_those_of_deep_gemm(gran_k, mn, k):
    x = torch.randn(mn, k, dtype=torch.bfloat16, device="cuda")
    q, sf = per_token_cast_to_fp8(x, True, gran_k, use_packed_ue8m0=True)
    their_q, their_scales = deep_gemm.utils.math.per_token_cast_to_fp8(x, True, gran_k)
    their_sf = deep_gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor(their_scales)
    assert_same_bits(q, their_q)
    assert_same_bits(sf, their_sf)
    assert sf.stride(-1) == their_sf.stride(-1)
    assert sf.stride(-2) == their_sf.stride(-2) == 1 or mn == 1


@with_deep_gemm
@pytest.mark.parametrize("use_ue8m0", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", ["cuda", "cpu"])
@pytest.mark.parametrize(("gran_k", "n"), [(128, 2048), (128, 2000), (32, 2048), (32, 2001)])
def test_cast_equals_that_of_deep_gemm(gran_k, n, dtype, use_ue8m0, place):
    x = finite_activations((511, n), dtype, seed=7).to(place)
    q, sf = per_token_cast_to_fp8(x, use_ue8m0, gran_k)
    their_q, their_sf = deep_gemm.utils.math.per_token_cast_to_fp8(x, use_ue8m0, gran_k)
    assert_same_bits(q, their_q)
    assert_same_bits(sf, their_sf)


@with_deep_gemm
@pytest.mark.parametrize("k", [128, 7296])
@pytest.mark.parametrize("mn", [1, 3, 128, 4097])
def test_float32_scales_need_no_transpose(mn, k):
    """DeepGEMM hands scales back untouched, same memory, where their layout is what it wants."""
    _, sf = quantize(torch.ones(mn, k, dtype=torch.bfloat16, device="cuda"), DEEP_GEMM_SM90)
    theirs = deep_gemm.get_mn_major_tma_aligned_tensor(sf)
    assert theirs.data_ptr() == sf.data_ptr() and theirs.stride() == sf.stride()


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@on_hopper
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

    q, sf = quantize(x, DEEP_GEMM_SM90.replace(round_scale=round_scale))
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
    product = (
        dequantize(q, sf, DEEP_GEMM_SM90, dtype=torch.float32).double()
        @ (w8.float() * scales).double().t()
    )
    assert relative_error(ours, product) < 0.005


# Grouped GEMMs: of a mixture of experts, with rows that do not exist.

GROUPS, N, K = 5, 512, 2048


def grouped_weights():
    """(groups, n, k) for comparison, and as DeepGEMM takes them: blocks of 128 x 128."""
    generator = torch.Generator("cuda").manual_seed(0)
    w = torch.randn(GROUPS, N, K, generator=generator, device="cuda").to(torch.bfloat16)
    casts = [deep_gemm.utils.math.per_block_cast_to_fp8(one, use_ue8m0=False) for one in w]
    return w, tuple(torch.stack(parts) for parts in zip(*casts, strict=True))


def check_errors(name, ours, theirs, expected):
    our_error, their_error = relative_error(ours, expected), relative_error(theirs, expected)
    print(f"{name}: relative error {our_error:.6f}, with DeepGEMM's cast {their_error:.6f}")
    assert our_error < 0.05 and our_error <= their_error * 1.01


def grouped_rows(counts, alignment):
    """Starts and ends of groups that each begin at a multiple of `alignment`, and all rows."""
    starts, ends, at = [], [], 0
    for count in counts:
        starts.append(at)
        ends.append(at + count)
        at = -(-(at + count) // alignment) * alignment
    return starts, ends, at


@on_hopper
@pytest.mark.parametrize("counts", [(1, 127, 128, 300, 64), (128, 0, 5, 1, 256)])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("layout", ["m_indices", "psum"])
@pytest.mark.parametrize("round_scale", [False, True])
def test_contiguous_grouped_gemm(layout, gathered, counts, round_scale):
    """Rows between the groups hold NaN, of which nothing is to be seen."""
    alignment = deep_gemm.utils.layout.get_mk_alignment_for_contiguous_layout()
    starts, ends, m = grouped_rows(counts, alignment)
    group_of_row = torch.full((m,), -1, dtype=torch.int32, device="cuda")
    for group, (start, end) in enumerate(zip(starts, ends, strict=True)):
        group_of_row[start:end] = group
    live = group_of_row >= 0
    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(m, K, generator=generator, device="cuda").to(torch.bfloat16)
    w, weights = grouped_weights()
    expected = torch.zeros(m, N, dtype=torch.float64, device="cuda")
    for group, (start, end) in enumerate(zip(starts, ends, strict=True)):
        expected[start:end] = x[start:end].double() @ w[group].double().t()

    if layout == "psum":
        grouped_layout = torch.tensor(ends, dtype=torch.int32, device="cuda")
        rows = PrefixSum(grouped_layout, alignment)
    else:
        grouped_layout = group_of_row
        rows = Indexed(grouped_layout)
    choices = {"fmt": DEEP_GEMM_SM90.replace(round_scale=round_scale), "rows": rows}
    if gathered:
        order = torch.randperm(m, generator=torch.Generator().manual_seed(0)).cuda()
        tokens = torch.full_like(x, math.nan)
        tokens[order[live]] = x[live]
        index = order.where(live, -1).to(torch.int32)
        q, sf = quantize(tokens, **choices, index=index, check=True)
    else:
        poisoned = x.where(live[:, None], math.nan)
        q, sf = quantize(poisoned, **choices, check=True)
    assert sf[~live].eq(0).all() and q[~live].float().eq(0).all()
    cast = deep_gemm.utils.math.per_token_cast_to_fp8(x.where(live[:, None], 0), round_scale)
    results = []
    for a in ((q, sf), cast):
        d = torch.zeros(m, N, dtype=torch.bfloat16, device="cuda")
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
            a, weights, d, grouped_layout, use_psum_layout=layout == "psum"
        )
        results.append(d[live])
    check_errors(f"contiguous, {layout}, {counts}", *results, expected[live])


@on_hopper
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize(
    ("max_m", "counts"), [(256, (0, 1, 5, 64, 256)), (384, (30, 257, 0, 2, 383)), (128, (8,) * 5)]
)
def test_masked_grouped_gemm(max_m, counts, gathered):
    """Rows past an expert's count hold NaN; those of the results are whatever they were."""
    masked_m = torch.tensor(counts, dtype=torch.int32, device="cuda")
    live = torch.arange(max_m, device="cuda") < masked_m[:, None]
    generator = torch.Generator("cuda").manual_seed(2)
    x = torch.randn(GROUPS, max_m, K, generator=generator, device="cuda").to(torch.bfloat16)
    w, weights = grouped_weights()
    expected = torch.einsum("gmk,gnk->gmn", x.double(), w.double())

    poisoned = x.where(live[:, :, None], math.nan)
    choices = {"fmt": DEEP_GEMM_SM90, "rows": Masked(masked_m)}
    if gathered:
        index = torch.arange(GROUPS * max_m, dtype=torch.int32, device="cuda").view(GROUPS, max_m)
        q, sf = quantize(poisoned.flatten(0, 1), **choices, index=index, check=True)
    else:
        q, sf = quantize(poisoned, **choices, check=True)
    taken = deep_gemm.get_mn_major_tma_aligned_tensor(sf)
    assert taken.data_ptr() == sf.data_ptr() and taken.stride() == sf.stride()
    their_q, their_sf = deep_gemm.utils.math.per_token_cast_to_fp8(
        x.where(live[:, :, None], 0).flatten(0, 1), use_ue8m0=False
    )
    cast = their_q.view(GROUPS, max_m, K), their_sf.view(GROUPS, max_m, -1)
    results = []
    for a in ((q, sf), cast):
        d = torch.zeros(GROUPS, max_m, N, dtype=torch.bfloat16, device="cuda")
        deep_gemm.m_grouped_fp8_gemm_nt_masked(a, weights, d, masked_m, max(counts))
        results.append(d[live])
    check_errors(f"masked, {counts} of {max_m}", *results, expected[live])


# The batched GEMM of an output projection in groups: activations (T, G, D), scales (T, G, P).


def quantize_by_group(x, fmt):
    """(T, G, D) into values (T, G, D), contiguous, and the view (T, G, P) of scales by group."""
    q = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    by_group = x.transpose(0, 1)
    _, sf = quantize(by_group, fmt, out=(q.transpose(0, 1), None))
    return q, sf.transpose(0, 1)


@pytest.mark.parametrize("fmt", [DEEP_GEMM, DEEP_GEMM_32, DEEP_GEMM_SM90], ids=str)
@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("tokens", [1, 3, 4, 129])
def test_scales_of_an_einsum(tokens, groups, fmt, device):
    """``check_sf_layout`` of DeepGEMM's csrc/utils/layout.hpp with `tma_stride_check` holds.

    It is for the permutation (G, T, P) that ``fp8_einsum`` makes of what it is given.
    """
    k = 640
    x = torch.randn(tokens, groups, k, device=device).to(torch.bfloat16)
    q, sf = quantize_by_group(x, fmt)
    columns = {DEEP_GEMM: 2, DEEP_GEMM_32: 5, DEEP_GEMM_SM90: 5}[fmt]
    aligned = -(-tokens // 4) * 4
    assert sf.shape == (tokens, groups, columns)
    assert sf.stride() == (1, columns * aligned, aligned)
    permuted = sf.permute(1, 0, 2)
    assert permuted.stride(-3) == permuted.stride(-1) * permuted.size(-1)
    assert permuted.stride(-2) == 1
    assert permuted.stride(-1) * permuted.element_size() == -(-tokens * 4 // 16) * 16
    for group in range(groups):
        one_q, one_sf = quantize(x[:, group], fmt)
        assert_same_bits(q[:, group], one_q)
        assert_same_bits(sf[:, group], one_sf)


@on_hopper
@pytest.mark.parametrize("tokens", [4, 130])
def test_einsum(tokens):
    h, r, d = 4, 1024, 512
    generator = torch.Generator("cuda").manual_seed(3)
    x = torch.randn(tokens, h, r, generator=generator, device="cuda").to(torch.bfloat16)
    w = torch.randn(h, d, r, generator=generator, device="cuda").to(torch.bfloat16)
    casts = [deep_gemm.utils.math.per_block_cast_to_fp8(one, use_ue8m0=False) for one in w]
    weights = tuple(torch.stack(parts) for parts in zip(*casts, strict=True))
    their_q, their_sf = deep_gemm.utils.math.per_token_cast_to_fp8(x.view(-1, r), use_ue8m0=False)
    cast = their_q.view(x.shape), their_sf.view(tokens, h, -1)
    results = []
    for a in (quantize_by_group(x, DEEP_GEMM_SM90), cast):
        z = torch.empty(tokens, h, d, dtype=torch.bfloat16, device="cuda")
        deep_gemm.fp8_einsum("bhr,hdr->bhd", a, weights, z)
        results.append(z)
    expected = torch.einsum("bhr,hdr->bhd", x.double(), w.double())
    check_errors(f"einsum of {tokens} tokens", *results, expected)
