"""The steps of vLLM's Triton kernels, as Triton compiles them for a GPU."""

import pytest
import torch

import cute_quant as cq
from cute_quant.integrations.engines.comparison import difference
from tests.integrations.test_package_numerics import beside_middles_of_8_bits

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

GROUP = 128
pytestmark = pytest.mark.gpu


@triton.jit
def quantize_group(x_ptr, q_ptr, s_ptr, size: tl.constexpr, largest: tl.constexpr):
    """The lines of vLLM's ``_per_token_group_quant_fp8`` that compute."""
    group = tl.program_id(0)
    columns = tl.arange(0, size)
    x = tl.load(x_ptr + group * size + columns).to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(x)), 1e-10)
    scale = amax * (1.0 / largest)
    q = tl.clamp(x / scale, -largest, largest).to(q_ptr.dtype.element_ty)
    tl.store(q_ptr + group * size + columns, q)
    tl.store(s_ptr + group, scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_division_of_triton(dtype):
    x = torch.from_numpy(beside_middles_of_8_bits("GROUPWISE_FP8")).to(dtype).cuda()
    wide = torch.randn(4096, GROUP, device="cuda").to(dtype)
    x = torch.cat([x, wide, torch.zeros_like(x[:1])])
    q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device="cuda")
    sf = torch.empty(len(x), 1, device="cuda")
    quantize_group[(len(x),)](x, q, sf, GROUP, 448.0)
    ours = cq.quantize(x, cq.GROUPWISE_FP8.replace(numerics="vllm_triton"))
    assert difference(ours, (q, sf)) is None
    assert difference(cq.quantize(x, cq.GROUPWISE_FP8.replace(min_scale="sglang")), (q, sf))
