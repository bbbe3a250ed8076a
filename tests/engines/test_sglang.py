"""SGLang's own callers reach the calls that are taken over, without a GPU.

SGLang's GEMMs are mocks, which note what they are given.
"""

from importlib import metadata
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from tests.engines import pretended_sglang

pretended_sglang.pretend()

import sglang.srt.plugins  # noqa: E402
from sglang.kernels.ops.activation import silu_and_mul_clamp  # noqa: E402
from sglang.kernels.ops.quantization import fp8_kernel, int8_kernel  # noqa: E402
from sglang.kernels.ops.quantization import (  # noqa: E402
    per_token_group_quant as group_kernel,
)
from sglang.srt.layers import deep_gemm_wrapper  # noqa: E402
from sglang.srt.layers.moe.moe_runner import deep_gemm as runner  # noqa: E402
from sglang.srt.layers.moe.token_dispatcher import deepep  # noqa: E402
from sglang.srt.layers.quantization import (  # noqa: E402
    fp8_utils,
    int8_utils,
    w8a8_int8,
)
from sglang.srt.model_executor import model_runner  # noqa: E402
from sglang.srt.plugins.hook_registry import HookRegistry  # noqa: E402

import cute_quant as cq  # noqa: E402
from cute_quant.dispatch.call_range import CallRange  # noqa: E402
from cute_quant.integrations.engines import sglang_worker  # noqa: E402
from cute_quant.integrations.engines.comparison import difference  # noqa: E402
from cute_quant.integrations.engines.engine import LEFT, TAKEN  # noqa: E402
from cute_quant.integrations.engines.sglang import ENGINE  # noqa: E402

PACKED = cq.DEEP_GEMM.replace(min_scale="sglang")
COLUMN_MAJOR = cq.DEEP_GEMM_SM90.replace(numerics="sglang")
FUNCTIONS = (
    "sglang_per_token_group_quant_fp8",
    "sglang_per_token_group_quant_fp8_row_padded",
    "sglang_per_token_quant_fp8",
    "scaled_fp8_quant",
    "per_token_group_quant",
    "silu_and_mul_masked_post_quant_fwd",
    "silu_and_mul_masked_post_quant",
    "silu_and_mul_contig_post_quant",
    "sglang_per_token_group_quant_int8",
    "per_token_group_quant_int8",
    "per_token_quant_int8",
)


def takeover(function):
    (found,) = (t for t in ENGINE.takeovers if t.place.name == function)
    return found


def calls(function):
    return takeover(function).counter.calls


def rows(mn, k, seed=0):
    x = torch.randn(mn, k, generator=torch.Generator().manual_seed(seed)).bfloat16()
    x[0, :128] = 0.0
    return x


@pytest.fixture(autouse=True, scope="module")
def loaded():
    """SGLang's own loader of plug-ins, which finds the entry point."""
    names = {ep.name for ep in metadata.entry_points(group="sglang.srt.plugins")}
    assert "cute_quant" in names, "install cute_quant in the environment of the engines"
    sglang.srt.plugins._plugins_loaded = False
    sglang.srt.plugins.load_plugins()
    assert ENGINE.installed
    ENGINE.import_all()
    yield
    ENGINE.restore()


@pytest.fixture(params=[True, False], ids=["packed", "float32"])
def scales(request):
    """DeepGEMM reads packed scales, or float32 ones."""
    with mock.patch.multiple(
        deep_gemm_wrapper,
        DEEPGEMM_SCALE_UE8M0=request.param,
        DEEPGEMM_NEED_TMA_ALIGNED_SCALES=not request.param,
        ENABLE_JIT_DEEPGEMM=True,
    ):
        yield PACKED if request.param else COLUMN_MAJOR


def test_what_is_taken_over():
    for name in FUNCTIONS:
        key = takeover(name).key
        assert ENGINE.states[key].status == TAKEN, ENGINE.states[key]
        assert key in HookRegistry._patched
    assert fp8_utils.sglang_per_token_group_quant_fp8 is fp8_kernel.sglang_per_token_group_quant_fp8


def test_install_is_idempotent():
    before = fp8_kernel.sglang_per_token_group_quant_fp8
    sglang.srt.plugins._plugins_loaded = False
    sglang.srt.plugins.load_plugins()
    assert fp8_kernel.sglang_per_token_group_quant_fp8 is before


def test_linear_layer(scales):
    """``Fp8LinearMethod`` calls it for weights in blocks."""
    x, weight = rows(6, 512), torch.zeros(256, 512).to(torch.float8_e4m3fn)
    before = calls("sglang_per_token_group_quant_fp8")
    with mock.patch.object(fp8_utils, "w8a8_block_fp8_matmul_deepgemm") as gemm:
        gemm.return_value = torch.zeros(6, 256, dtype=torch.bfloat16)
        fp8_utils.deepgemm_w8a8_block_fp8_linear_with_fallback(
            x, weight, [128, 128], torch.ones(2, 4)
        )
    assert calls("sglang_per_token_group_quant_fp8") == before + 1
    q, _, sf, *_ = gemm.call_args.args
    assert difference((q, sf), cq.quantize(x, scales)) is None


def test_deepep_staging(scales):
    """What DeepEP sends is quantized before; SM90 has row-major scales there."""
    x = rows(6, 512)
    topk = SimpleNamespace(topk_weights=None, topk_ids=torch.zeros(6, 2, dtype=torch.int32))
    dispatcher = SimpleNamespace(use_fp8=True, async_finish=False)
    before = calls("sglang_per_token_group_quant_fp8")
    found, *_ = deepep._DeepEPDispatcherImplNormal.dispatch_a(dispatcher, x, topk)
    assert calls("sglang_per_token_group_quant_fp8") == before + 1
    fmt = scales if scales is PACKED else cq.GROUPWISE_FP8.replace(numerics="sglang")
    assert difference(found, cq.quantize(x, fmt)) is None


@pytest.mark.parametrize("keep_fp32", [False, True])
def test_masked_experts(scales, keep_fp32):
    """The experts of DeepGEMM's masked GEMM, whose SiLU is rounded, or kept in float32."""
    gate_up = rows(2 * 8, 2 * 512).view(2, 8, 1024)
    counts = torch.tensor([8, 3], dtype=torch.int32)
    name = "silu_and_mul_masked_post_quant" if keep_fp32 else "per_token_group_quant"
    before = calls(name)
    q, sf = runner._varlen_deep_gemm_silu_mul_quant(
        gate_up, counts, 128, 2, silu_mul_keep_fp32=keep_fp32
    )
    assert calls(name) == before + 1
    fmt = scales
    if keep_fp32 and scales is COLUMN_MAJOR:
        fmt = cq.GROUPWISE_FP8.replace(numerics="vllm_triton")
    rounding = "fused" if keep_fp32 else "unfused"
    expected = cq.silu_mul_quantize(gate_up, fmt, rounding=rounding, rows=cq.Masked(counts))
    for expert, count in enumerate(counts.tolist()):
        ours = [t[expert, :count] for t in (q, sf)]
        assert difference(ours, [t[expert, :count] for t in expected]) is None


def test_activation_of_gpt_oss(scales):
    """Its up plus one is rounded, and nothing else; scales are packed, or in rows."""
    gate_up = 4 * rows(2 * 8, 2 * 512).view(2, 8, 1024)
    counts = torch.tensor([8, 3], dtype=torch.int32)
    before = calls("silu_and_mul_masked_post_quant_fwd")
    q, sf = runner._varlen_deep_gemm_silu_mul_quant(
        gate_up, counts, 128, 2, gemm1_alpha=1.702, gemm1_clamp_limit=7.0, num_real_tokens=8
    )
    assert calls("silu_and_mul_masked_post_quant_fwd") == before + 1
    fmt = scales if scales is PACKED else cq.GROUPWISE_FP8.replace(numerics="vllm_triton")
    options = {"clamp": 7.0, "alpha": 1.702, "beta": 1.0, "rows": cq.Masked(counts)}
    expected = cq.silu_mul_quantize(gate_up, fmt, rounding="sglang", **options)
    for expert, count in enumerate(counts.tolist()):
        ours = [t[expert, :count] for t in (q, sf)]
        assert difference(ours, [t[expert, :count] for t in expected]) is None


def test_activation_of_gpt_oss_without_a_bound():
    """SGLang's own kernel has the bound 0 then."""
    counter = takeover("silu_and_mul_masked_post_quant_fwd").counter
    before = counter.declined
    with pytest.raises(RuntimeError, match="driver"):
        runner._varlen_deep_gemm_silu_mul_quant(
            rows(8, 1024).view(1, 8, 1024), torch.tensor([8]), 128, 2, gemm1_alpha=1.702
        )
    assert counter.declined == before + 1


def test_rows_of_cutlass():
    """Rows and scales are padded to a multiple of 4 with zeros."""
    x = rows(5, 256)
    before = calls("sglang_per_token_group_quant_fp8_row_padded")
    q, sf = fp8_utils.sglang_per_token_group_quant_fp8_row_padded(x, 128)
    assert calls("sglang_per_token_group_quant_fp8_row_padded") == before + 1
    assert q.shape == (8, 256) and sf.shape == (8, 2) and sf.stride() == (1, 8)
    assert not q[5:].view(torch.uint8).any() and not sf[5:].any()
    assert difference((q[:5], sf[:5]), cq.quantize(x, COLUMN_MAJOR)) is None


@pytest.mark.parametrize("compressed", [False, True])
def test_linear_layer_with_scales_of_rows(compressed):
    x, weight = rows(6, 512), torch.zeros(512, 256).to(torch.float8_e4m3fn)
    name = "scaled_fp8_quant" if compressed else "sglang_per_token_quant_fp8"
    before = calls(name)
    gemm = mock.Mock(return_value=torch.zeros(6, 256, dtype=torch.bfloat16))
    # No configuration is tuned for this machine.
    tuned = mock.Mock(return_value=None)
    options = {
        "get_w8a8_channelwise_fp8_config": tuned,
        "_is_cuda": True,
        "fp8_scaled_mm": gemm,
        "triton_scaled_mm": gemm,
    }
    with mock.patch.multiple(fp8_utils, create=True, **options):
        fp8_utils.apply_fp8_linear(
            x,
            weight,
            torch.ones(256, 1),
            cutlass_fp8_supported=True,
            use_per_token_if_dynamic=True,
            compressed_tensor_quant=compressed,
        )
    assert calls(name) == before + 1
    q, _, sf, *_ = gemm.call_args.args
    fmt = cq.ROWWISE_FP8.replace(numerics="sglang", min_scale="sglang")
    assert difference((q, sf), cq.quantize(x, fmt)) is None


def test_int8():
    x = rows(6, 512)
    before = calls("sglang_per_token_group_quant_int8")
    found = int8_kernel.sglang_per_token_group_quant_int8(x, 128)
    assert calls("sglang_per_token_group_quant_int8") == before + 1
    assert difference(found, cq.quantize(x, cq.INT8.replace(numerics="sglang"))) is None


def test_int8_with_columns_of_scales():
    x = rows(6, 512)
    q = torch.empty(6, 512, dtype=torch.int8)
    sf = fp8_kernel.create_per_token_group_quant_fp8_output_scale(
        x.shape, x.device, 128, True, True, False
    )
    before = calls("per_token_group_quant")
    group_kernel.per_token_group_quant(x, q, sf, 128)
    assert calls("per_token_group_quant") == before + 1
    fmt = cq.INT8.replace(numerics="sglang", scale_layout="mn_major")
    assert difference((q, sf), cq.quantize(x, fmt)) is None


def test_int8_linear_layer_with_scales_of_rows():
    """Values are rounded to nearest, halves away from zero."""
    x, weight = rows(6, 512), torch.zeros(512, 256, dtype=torch.int8)
    layer = SimpleNamespace(weight=weight, weight_scale=torch.ones(256, 1), use_intel_amx_backend=0)
    gemm = mock.Mock(return_value=torch.zeros(6, 256, dtype=torch.bfloat16))
    before = calls("per_token_quant_int8")
    with mock.patch.object(w8a8_int8, "int8_scaled_mm", gemm, create=True):
        w8a8_int8.W8A8Int8LinearMethod.apply(None, layer, x)
    assert calls("per_token_quant_int8") == before + 1
    q, _, sf, *_ = gemm.call_args.args
    assert difference((q, sf), cq.quantize(x, cq.ROWWISE_INT8.replace(numerics="sglang"))) is None


def test_int8_linear_layer_with_blocks():
    """A kernel of Triton quantizes them in SGLang."""
    x, weight = rows(6, 512), torch.zeros(256, 512, dtype=torch.int8)
    gemm = mock.Mock(return_value=torch.zeros(6, 256, dtype=torch.bfloat16))
    before = calls("per_token_group_quant_int8")
    with mock.patch.object(int8_utils, "w8a8_block_int8_matmul", gemm):
        int8_utils.apply_w8a8_block_int8_linear(x, weight, [128, 128], torch.ones(2, 4))
    assert calls("per_token_group_quant_int8") == before + 1
    q, _, sf, *_ = gemm.call_args.args
    assert difference((q, sf), cq.quantize(x, cq.INT8.replace(numerics="vllm_triton"))) is None


def test_results_are_compared_before_a_model_is_loaded(monkeypatch):
    done = []
    monkeypatch.setattr(ENGINE, "check", lambda device: done.append(device), raising=False)
    monkeypatch.setattr(sglang_worker.seen, "watch", lambda: done.append("watch"))
    with pytest.raises(AttributeError):
        # SGLang's own goes on with a runner that has nothing.
        model_runner.ModelRunner.load_model(SimpleNamespace(device="cpu", gpu_id=0))
    assert done == [torch.device("cpu", 0), "watch"]


def test_steps_of_other_sizes_are_warmed_up(monkeypatch):
    """After the first step with a call of a new kind, for as many tokens as one may have."""
    warmed = []
    monkeypatch.setattr(sglang_worker, "most_tokens", lambda: 8192)
    monkeypatch.setattr(
        sglang_worker.seen.warming,
        "on_device",
        lambda found, device: warmed.append((found, device)),
    )
    calls_of_step = []

    def step(*arguments):
        for mn in calls_of_step:
            sglang_worker.seen._note(CallRange("quantize", PACKED, torch.bfloat16, (512,), mn))
        return arguments

    runner = SimpleNamespace(device="cpu", gpu_id=0)
    batch = SimpleNamespace(input_ids=torch.ones(4))
    sglang_worker.seen.forget()
    try:
        for mn, warms in ((8, True), (4, False), (2 * 8192, False), (3 * 8192, True)):
            calls_of_step[:] = [mn]
            before = len(warmed)
            assert sglang_worker.forward(step, runner, batch)[:2] == (runner, batch)
            assert (len(warmed) > before) == warms
        (first, _), (second, _) = warmed
        assert [calls.max_rows for calls in first] == [2 * 8192]
        assert [calls.max_rows for calls in second] == [3 * 8192 * 2048]
    finally:
        sglang_worker.seen.forget()


def test_most_tokens_of_a_step(monkeypatch):
    from sglang.srt import runtime_context

    schedule = SimpleNamespace(chunked_prefill_size=None, max_prefill_tokens=16384)
    monkeypatch.setattr(runtime_context, "get_schedule", lambda: schedule)
    assert sglang_worker.most_tokens() == 16384


def test_contiguous_experts():
    """Their SiLU stays in float32, and its limit is one of bfloat16."""
    gate_up = 8 * rows(8, 2 * 512)
    q = torch.empty(8, 512, dtype=torch.float8_e4m3fn)
    sf = torch.empty(8, 4)
    before = calls("silu_and_mul_contig_post_quant")
    silu_and_mul_clamp.silu_and_mul_contig_post_quant(gate_up, q, sf, 128, swiglu_limit=7.03)
    assert calls("silu_and_mul_contig_post_quant") == before + 1
    fmt = cq.GROUPWISE_FP8.replace(numerics="vllm_triton")
    limit = torch.tensor(7.03).bfloat16().item()
    assert difference((q, sf), cq.silu_mul_quantize(gate_up, fmt, clamp=limit)) is None


@pytest.mark.parametrize("ue8m0", [True, False])
def test_in_a_graph(ue8m0):
    """Traced without a break, of any number of rows in one graph."""
    counter = takeover("sglang_per_token_group_quant_fp8").counter
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def quantize(x):
        return fp8_kernel.sglang_per_token_group_quant_fp8(x, 128, 1e-10, True, True, ue8m0)

    traced = counter.traced
    for mn in (8, 5, 13):
        x = rows(mn, 512)
        assert difference(quantize(x), cq.quantize(x, PACKED if ue8m0 else COLUMN_MAJOR)) is None
    assert counter.traced > traced


def test_memory_of_the_caller():
    """The scales that SGLang allocates itself are written in place, float32 and packed."""
    x = rows(6, 512)
    for ue8m0 in (True, False):
        sf = fp8_kernel.create_per_token_group_quant_fp8_output_scale(
            x.shape, x.device, 128, True, True, ue8m0
        )
        q = torch.empty(6, 512, dtype=torch.float8_e4m3fn)
        found = fp8_kernel.sglang_per_token_group_quant_fp8(
            x, 128, scale_ue8m0=ue8m0, output_q=q, output_s=sf
        )
        assert found[0] is q and found[1] is sf
        assert difference(found, cq.quantize(x, PACKED if ue8m0 else COLUMN_MAJOR)) is None


def test_columns_that_are_not_aligned():
    """FlashInfer's GEMM takes columns of as many rows as there are; they are written directly."""
    x = rows(6, 512)
    q, sf = fp8_kernel.sglang_per_token_group_quant_fp8(x, 128, column_major_scales=True)
    assert sf.stride() == (1, 6)
    expected = cq.quantize(x, COLUMN_MAJOR)
    assert difference((q, sf.contiguous()), (expected[0], expected[1].contiguous())) is None


def test_arguments_that_are_left():
    """What is no call of this package goes to SGLang's own function."""
    x = rows(6, 512)
    counter = takeover("sglang_per_token_group_quant_fp8").counter
    before = counter.declined
    for size, options in ((128, {"eps": 1e-5}), (8, {})):
        # Without a GPU it has no kernel.
        with pytest.raises((AssertionError, NameError)):
            fp8_kernel.sglang_per_token_group_quant_fp8(x, size, **options)
    assert counter.declined == before + 2


def test_nothing_is_taken_over_without_the_variable(monkeypatch):
    ENGINE.restore()
    try:
        monkeypatch.setenv("CUTE_QUANT_SGLANG", "0")
        ENGINE.install()
        assert not ENGINE.installed
        monkeypatch.setenv("CUTE_QUANT_SGLANG", "silu")
        ENGINE.install()
        assert ENGINE.states[takeover("per_token_group_quant").key].status == LEFT
        assert ENGINE.states[takeover("silu_and_mul_masked_post_quant").key].status == TAKEN
    finally:
        ENGINE.restore()
        monkeypatch.delenv("CUTE_QUANT_SGLANG")
        ENGINE.install()
