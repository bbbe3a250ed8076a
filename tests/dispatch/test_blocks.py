"""Operators of weights in square blocks: tracers, compilation, export, missing kernels."""

from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cute_quant as cq
from cute_quant import DEEP_GEMM, DEEP_GEMM_SM90, MXFP4, MXFP8, NVFP4
from cute_quant.contract.blocks import is_transposed
from cute_quant.dispatch import blocks, reachable
from cute_quant.dispatch.call_range import CallRange
from cute_quant.dispatch.plan import Gpu
from cute_quant.dispatch.warm_up import small_weights
from cute_quant.jit import keys, lookup
from tests.helpers import assert_same_bits
from tests.kernels.emulated_gpu import OnGpu
from tests.weights import views

W = torch.randn(2, 200, 304, generator=torch.Generator().manual_seed(0)).bfloat16()
Q8, SF8 = cq.quantize_blocks(W, DEEP_GEMM_SM90)
FORMATS = (DEEP_GEMM, DEEP_GEMM_SM90, MXFP8, MXFP4)
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)
operators = torch.ops.cute_quant


def assert_results(results, expected):
    for actual, wanted in zip(results, expected, strict=True):
        assert_same_bits(actual, wanted)
        assert actual.stride() == wanted.stride()


@every_format
def test_fakes_are_like_results(fmt):
    expected = cq.quantize_blocks(W, fmt)
    back = cq.dequantize_blocks(*expected, fmt)
    anew = cq.requantize_blocks(Q8, SF8, fmt)
    with FakeTensorMode() as mode:
        w = mode.from_tensor(W)
        results = cq.quantize_blocks(w, fmt)
        fakes = (*results, cq.dequantize_blocks(*results, fmt))
        fakes += cq.requantize_blocks(mode.from_tensor(Q8), mode.from_tensor(SF8), fmt)
    for fake, real in zip(fakes, (*expected, back, *anew), strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@every_format
def test_a_compiled_function(fmt):
    def function(w):
        q, sf = cq.quantize_blocks(w * 2, fmt)
        return q, sf, cq.dequantize_blocks(q, sf, fmt)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (200, 77):
        assert_results(compiled(W[:, :rows]), function(W[:, :rows]))


@pytest.mark.parametrize("fmt", [DEEP_GEMM, NVFP4, MXFP4], ids=str)
def test_compiled_requantization(fmt):
    scales = {"amax": torch.tensor(5.0)} if fmt.upper_scale else {}

    def function(w8, w_sf):
        return cq.requantize_blocks(w8, w_sf, fmt, **scales)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_results(compiled(Q8, SF8), function(Q8, SF8))


@every_format
def test_compiled_into_memory(fmt):
    def function(w, q, sf):
        cq.quantize_blocks(w, fmt, out=(q, sf))
        return q, sf

    expected = cq.quantize_blocks(W, fmt)
    memory = [torch.empty_like(t) for t in expected]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_results(compiled(W, *memory), expected)
    partly = torch.compile(
        lambda w, q: cq.quantize_blocks(w, fmt, out=(q, None)), backend="aot_eager", fullgraph=True
    )
    assert_results(partly(W, torch.empty_like(expected[0])), expected)
    anew = cq.requantize_blocks(Q8, SF8, fmt)
    memory = [torch.empty_like(t) for t in anew]
    compiled = torch.compile(
        lambda *out: cq.requantize_blocks(Q8, SF8, fmt, out=out),
        backend="aot_eager",
        fullgraph=True,
    )
    assert_results(compiled(*memory), anew)


def test_export():
    class Module(torch.nn.Module):
        def forward(self, w):
            return cq.quantize_blocks(w, DEEP_GEMM)

    program = torch.export.export(Module(), (W,))
    assert_results(program.module()(W), cq.quantize_blocks(W, DEEP_GEMM))


def test_operators_keep_their_promises():
    q, sf = cq.quantize_blocks(W, DEEP_GEMM)
    text = DEEP_GEMM.text
    # The check of schemas has no arithmetic for 8-bit arguments.
    utilities = "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"
    for operator, arguments in (
        (operators.quantize_blocks, (W, text)),
        (operators.quantize_blocks_out, (W, q, sf, text)),
        (operators.requantize_blocks, (Q8, SF8, text)),
        (operators.requantize_blocks_out, (Q8, SF8, q, sf, text)),
        (operators.dequantize_blocks, (Q8, SF8, DEEP_GEMM_SM90.text, torch.bfloat16)),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils=utilities)


def test_vmap_and_gradients_are_refused():
    with pytest.raises(RuntimeError, match="vmap is not supported"):
        torch.vmap(cq.quantize_blocks)(W)
    w = W.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="quantize_blocks is not differentiable"):
        operators.quantize_blocks(w, DEEP_GEMM_SM90.text)[1].sum().backward()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda w: cq.quantize_blocks(w), "blocks-bfloat16"),
        (lambda w: cq.dequantize_blocks(Q8.as_subclass(OnGpu), SF8, DEEP_GEMM_SM90), "dequantize"),
        (lambda w: cq.requantize_blocks(Q8.as_subclass(OnGpu), SF8, MXFP4), "requantize"),
    ],
)
def test_a_missing_kernel_is_named(call, name, monkeypatch):
    monkeypatch.setattr(lookup, "_functions", {})
    monkeypatch.setattr(lookup, "_found", lambda spec, arch: None)
    for module in ("weights", "arguments"):
        monkeypatch.setattr(f"cute_quant.ops.{module}.is_traced", lambda t: False)
    with (
        mock.patch.multiple(
            lookup,
            architecture=lambda device: "sm_90a",
            find_architecture=lambda device: "sm_90a",
            multiprocessors=lambda device: 132,
        ),
        cq.forbid_compilation(),
        pytest.raises(RuntimeError, match=rf"{name}.* for sm_90a.*run `cute-quant warm-up"),
    ):
        call(W.as_subclass(OnGpu))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_warm_up_has_every_kernel_of_a_range(fmt, dtype):
    for arch, k in (("sm_90a", 304), ("sm_100a", 70)):
        of_any = CallRange("quantize_blocks", fmt, dtype, (k,), 1000, batched=True, alignment=1)
        any_view = reachable.specs(of_any, Gpu(arch, 132))
        contiguous = reachable.specs(of_any._replace(alignment=32), Gpu(arch, 132))
        for shape in ((1, k), (130, k), (2, 136, k), (3, 1, k), (2, 33, k)):
            for name, w in views(torch.zeros(shape, dtype=dtype)).items():
                q = torch.empty((*shape[:-1], fmt.value_columns(k)), dtype=fmt.values)
                spec = blocks.choose_spec(w, fmt, q, arch)
                assert spec in any_view
                assert spec in contiguous or not name.startswith("whole")


@pytest.mark.parametrize(("k", "operation"), [(64, "requantize_blocks"), (70, "quantize_blocks")])
def test_a_small_launch_fits_every_kernel_of_a_warm_up(k, operation, gpu):
    calls = CallRange(operation, MXFP8, torch.bfloat16, (k,), 64, alignment=16)
    found = sorted(reachable.specs(calls, Gpu(gpu.arch, 132)).items(), key=str)
    for spec, variant in found[:: max(1, len(found) // 5)]:
        w, q = small_weights(variant, torch.device("cpu"))
        assert is_transposed(w) == variant.along_n
        with mock.patch.object(blocks, "choose_spec", lambda *arguments, spec=spec: spec):
            if operation == "quantize_blocks":
                gpu.quantize_blocks(w, q, None, MXFP8)
                continue
            size = variant.source_block
            w_sf = torch.zeros([-(-columns // size) for columns in w.shape])
            gpu.requantize_blocks(w, w_sf, q, None, MXFP8)


def test_a_warm_up_of_formats_without_blocks_is_refused():
    with pytest.raises(ValueError, match="fmt: expected UE8M0 or float32 scales"):
        cq.warm_up(NVFP4, k=128, max_rows=8, operations="quantize_blocks")


@pytest.mark.parametrize("fmt", [DEEP_GEMM_SM90, MXFP8, NVFP4], ids=str)
def test_kernels_of_a_range_have_names_of_their_own(fmt):
    for operation in ("quantize_blocks", "requantize_blocks"):
        if operation == "quantize_blocks" and fmt is NVFP4:
            continue
        calls = CallRange(operation, fmt, torch.bfloat16, (304, 70), 1000, alignment=1)
        specs = reachable.specs(calls.with_upper_scale("amax"), Gpu("sm_90a", 132))
        assert len({keys.spec_name(spec) for spec in specs}) == len(specs)


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_warm_up(fmt):
    cq.warm_up(fmt, k=304, max_rows=400, operations="quantize_blocks", batched=True)
    w = W.cuda()
    with cq.forbid_compilation():
        for one in (w, w[0], w.mT.contiguous().mT):
            cq.quantize_blocks(one, fmt)


@pytest.mark.gpu
def test_a_cuda_graph_captures_it():
    w = W.cuda()
    expected = cq.quantize_blocks(w)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = cq.quantize_blocks(w)
    for t in results:
        torch.empty(0, dtype=torch.uint8, device="cuda").set_(t.untyped_storage()).zero_()
    graph.replay()
    assert_results(results, expected)


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_past_32_bits():
    w = torch.zeros(300000, 7184, dtype=torch.bfloat16, device="cuda")
    w[299999, 7183], w[150000, 3] = 2.0, -3.0
    for fmt in (DEEP_GEMM, DEEP_GEMM_SM90):
        q, sf = cq.quantize_blocks(w, fmt)
        y = cq.dequantize_blocks(q, sf, fmt)
        assert torch.equal(y[299999, 7183:].cpu(), w[299999, 7183:].cpu())
        assert y[150000, 3] == -3.0 and int(y.count_nonzero()) == 2
