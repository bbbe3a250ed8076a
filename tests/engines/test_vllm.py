"""vLLM's own callers reach the calls that are taken over, on a GPU that is pretended.

DeepGEMM reads packed scales on compute capability 10.0, float32 on 9.0.
"""

import json
import os
import re
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import pytest
import torch
import vllm.plugins
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state

import cute_quant as cq
from cute_quant.integrations.deep_gemm import per_block_cast_to_fp8
from cute_quant.integrations.engines import vllm_worker
from cute_quant.integrations.engines.comparison import difference, sample
from cute_quant.integrations.engines.engine import LEFT, TAKEN, WAITS
from cute_quant.integrations.engines.takeover import paused
from cute_quant.integrations.engines.vllm import ENGINE

DEEP_GEMM = sys.modules["deep_gemm"]
CPU = torch.device("cpu")
HOPPER = os.environ["PRETENDED_GPU"] == "9.0"
on_hopper = pytest.mark.skipif(not HOPPER, reason="vLLM calls it on Hopper")
on_blackwell = pytest.mark.skipif(HOPPER, reason="vLLM calls it on Blackwell")


@pytest.fixture(autouse=True, scope="module")
def loaded():
    """VLLM's own loader of plug-ins, which finds the entry point."""
    vllm.plugins.load_general_plugins()
    assert ENGINE.installed
    parallel_state._TP = SimpleNamespace(world_size=1, rank_in_group=0)
    yield
    ENGINE.restore()


@pytest.fixture(autouse=True)
def config():
    found = VllmConfig()
    # DeepGEMM's kernel asks for the model's type.
    model = SimpleNamespace(hf_text_config=SimpleNamespace(model_type="x"), dtype=torch.bfloat16)
    object.__setattr__(found, "model_config", model)
    torch._dynamo.reset()
    with set_current_vllm_config(found):
        yield found


def counter(function):
    (found,) = (t.counter for t in ENGINE.takeovers if t.key.endswith(f".{function}"))
    return found


class counted:  # noqa: N801
    """A context in which calls of a function are taken over, so many of them."""

    def __init__(self, function, *, calls=None, traced=None):
        self.counter, self.calls, self.traced = counter(function), calls, traced

    def __enter__(self):
        self.before = (self.counter.calls, self.counter.traced, self.counter.declined)

    def __exit__(self, kind, *_):
        if kind is not None:
            return
        calls, traced, declined = self.before
        assert self.counter.declined == declined
        if self.calls is not None:
            assert self.counter.calls - calls == self.calls
        if self.traced is not None:
            assert self.counter.traced - traced >= self.traced


class TestLinear:
    K, N = 512, 256

    @pytest.fixture
    def layer(self):
        from vllm.model_executor.layers.linear import ReplicatedLinear
        from vllm.model_executor.layers.quantization.fp8 import Fp8Config

        quant_config = Fp8Config(
            is_checkpoint_fp8_serialized=True,
            activation_scheme="dynamic",
            weight_block_size=[128, 128],
        )
        # That of the result, which DeepGEMM has in bfloat16.
        torch.set_default_dtype(torch.bfloat16)
        layer = ReplicatedLinear(
            self.K,
            self.N,
            bias=False,
            quant_config=quant_config,
            params_dtype=torch.bfloat16,
            disable_tp=True,
        )
        torch.set_default_dtype(torch.float32)
        w = torch.randn(self.N, self.K, generator=torch.Generator().manual_seed(1))
        w8, scales = per_block_cast_to_fp8(w, use_ue8m0=True)
        layer.weight.data.copy_(w8)
        layer.weight_scale_inv.data.copy_(scales)
        layer.quant_method.process_weights_after_loading(layer)
        layer.exact = w
        return layer

    @pytest.fixture
    def x(self):
        x = torch.randn(5, self.K, generator=torch.Generator().manual_seed(2))
        return x.to(torch.bfloat16)

    def check(self, layer, x, y):
        expected = x.float() @ layer.exact.mT
        assert ((y - expected).norm() / expected.norm()).item() < 0.05
        q, sf = DEEP_GEMM.calls[-1]
        fmt = cq.DEEP_GEMM_SM90.replace(round_scale=True) if HOPPER else cq.DEEP_GEMM
        assert difference((q, sf), cq.quantize(x, fmt)) is None

    def test_kernel_is_deep_gemms(self, layer):
        kernel = layer.quant_method.fp8_linear
        assert type(kernel).__name__ == "DeepGemmFp8BlockScaledMMKernel"
        assert type(kernel.quant_fp8).__module__.startswith("cute_quant.")
        # It is switched on and off by the name of vLLM's own.
        assert kernel.quant_fp8.name == "quant_fp8"

    @pytest.mark.parametrize("custom_ops", ["none", "all"])
    def test_eager(self, layer, x, custom_ops):
        kernel = layer.quant_method.fp8_linear.quant_fp8
        native = custom_ops == "none"
        kernel._forward_method = kernel.forward_native if native else kernel.forward_cuda
        with counted("forward_native" if native else "forward_cuda", calls=1):
            self.check(layer, x, layer(x)[0])

    @pytest.mark.parametrize("custom_ops", ["none", "all"])
    def test_compiled(self, layer, x, custom_ops):
        kernel = layer.quant_method.fp8_linear.quant_fp8
        native = custom_ops == "none"
        kernel._forward_method = kernel.forward_native if native else kernel.forward_cuda
        compiled = torch.compile(lambda x: layer(x)[0], fullgraph=True)
        with counted("forward_native" if native else "forward_cuda", calls=0, traced=1):
            self.check(layer, x, compiled(x))

    def test_one_graph_for_all_numbers_of_rows(self, layer, x):
        compiled = torch.compile(lambda x: layer(x)[0], fullgraph=True, dynamic=True)
        compiled(x)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for rows in (2, 3, 4):
                self.check(layer, x[:rows], compiled(x[:rows]))

    def test_rows_have_scales_of_their_own(self):
        from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
        from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

        layer = QuantFP8(static=False, group_shape=GroupShape.PER_TOKEN, compile_native=False)
        x = sample((5, 256), CPU) * 1024
        with counted("forward_native", calls=1):
            q, sf = layer(x)
        with paused():
            theirs = layer(x)
        assert difference(sf, theirs[1]) is None
        assert q.dtype is torch.float8_e4m3fn

    def test_static_scales_are_left_to_vllm(self):
        from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
        from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

        layer = QuantFP8(static=True, group_shape=GroupShape.PER_TENSOR, compile_native=False)
        before = counter("forward_native").declined
        layer(sample((5, 256), CPU), torch.tensor([1.0]))
        assert counter("forward_native").declined == before + 1


def experts(cls, **more):
    """Return experts of a class of vLLM without its configuration."""
    found = object.__new__(cls)
    options = {"gemm1_clamp_limit": None, "gemm1_alpha": 1.0, "gemm1_beta": 0.0}
    found.__dict__.update(options | more)
    found.quant_config = SimpleNamespace(block_shape=[128, 128], w1_scale=None, w2_scale=None)
    return found


class TestExperts:
    @pytest.fixture
    def quantize(self):
        from vllm.model_executor.layers.fused_moe.activation import MoEActivation
        from vllm.model_executor.layers.fused_moe.experts.deep_gemm_moe import DeepGemmExperts

        found = experts(DeepGemmExperts)

        def quantize(gate_up, **options):
            rows, columns = gate_up.shape
            output = torch.empty(rows, columns // 2, dtype=torch.float8_e4m3fn)
            return found._act_mul_quant(gate_up, output, MoEActivation.SILU, **options)

        return quantize

    @pytest.fixture
    def gate_up(self):
        # Whole words of scales: vLLM fills up others with the scale of zeros.
        x = sample((256, 1024), CPU, torch.float32)
        x.chunk(2, -1)[0].clamp_(-16, 16)
        return x.to(torch.bfloat16)

    @property
    def function(self):
        return (
            "silu_mul_per_token_group_quant_fp8_colmajor"
            if HOPPER
            else "silu_mul_quant_fp8_packed_triton"
        )

    def test_eager(self, quantize, gate_up):
        with counted(self.function, calls=1):
            ours = quantize(gate_up)
        with paused():
            theirs = quantize(gate_up)
        assert difference(ours, theirs) is None

    @on_hopper
    def test_activation_of_gpt_oss(self, gate_up):
        from vllm.model_executor.layers.quantization.utils import fp8_utils

        options = {"clamp_limit": 7.03, "alpha": 1.702, "beta": 1.0, "use_ue8m0": True}
        with counted(self.function, calls=1):
            q, sf = fp8_utils.silu_mul_per_token_group_quant_fp8_colmajor(gate_up, **options)
        with paused():
            theirs = fp8_utils.silu_mul_per_token_group_quant_fp8_colmajor(gate_up, **options)
        # The exponential is approximate in both.
        for ours, other in ((q.view(torch.uint8), theirs[0].view(torch.uint8)), (sf, theirs[1])):
            assert (ours != other).float().mean() < 2.0**-9

    def test_compiled(self, quantize, gate_up):
        compiled = torch.compile(quantize, fullgraph=True)
        with counted(self.function, traced=1):
            ours = compiled(gate_up)
        assert difference(ours, quantize(gate_up)) is None

    def test_rows_of_experts(self, quantize, gate_up):
        ends = torch.tensor([100, 140], dtype=torch.int32)
        with counted(self.function, calls=1):
            ours = quantize(gate_up, expert_ends=ends, expert_alignment=128)
        with paused():
            theirs = quantize(gate_up, expert_ends=ends, expert_alignment=128)
        live = torch.cat([torch.arange(100), torch.arange(128, 140)])
        assert difference([t[live] for t in ours], [t[live] for t in theirs]) is None

    def test_masked(self):
        from vllm.model_executor.layers.fused_moe.activation import MoEActivation
        from vllm.model_executor.layers.fused_moe.experts import batched_deep_gemm_moe as module

        found = experts(module.BatchedDeepGemmExperts, estimate_expected_m=lambda **_: 4)
        count, rows, k, n = 2, 8, 256, 512
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(count, rows, k, generator=generator).to(torch.bfloat16)
        w1 = torch.randn(count, n, k, generator=generator) / 16
        w2 = torch.randn(count, k, n // 2, generator=generator) / 16
        fmt = cq.DEEP_GEMM_SM90.replace(round_scale=True) if HOPPER else cq.DEEP_GEMM
        blocks = cq.DEEP_GEMM_SM90.replace(round_scale=True)
        (q1, s1), (q2, s2) = (cq.quantize_blocks(w, blocks) for w in (w1, w2))
        found.quant_config.w1_scale, found.quant_config.w2_scale = s1, s2
        q, sf = cq.quantize(x, fmt)
        y = torch.zeros(count, rows, k, dtype=torch.bfloat16)
        tokens = torch.tensor([8, 3], dtype=torch.int32)
        with counted("persistent_masked_m_silu_mul_quant", calls=1):
            found.apply(
                output=y,
                hidden_states=q,
                w1=q1,
                w2=q2,
                topk_weights=torch.ones(1, 1),
                topk_ids=torch.zeros(1, 1, dtype=torch.int64),
                activation=MoEActivation.SILU,
                global_num_experts=count,
                expert_map=None,
                a1q_scale=sf,
                a2_scale=None,
                workspace13=torch.empty(count * rows * n, dtype=torch.bfloat16),
                workspace2=None,
                expert_tokens_meta=SimpleNamespace(expert_num_tokens=tokens),
                apply_router_weight_on_input=False,
            )
        gate, up = (x.float() @ w1.mT).chunk(2, -1)
        expected = (torch.nn.functional.silu(gate) * up) @ w2.mT
        for e, live in enumerate(tokens.tolist()):
            error = (y[e, :live] - expected[e, :live]).norm() / expected[e, :live].norm()
            assert error < 0.08


class TestFusedActivation:
    def fuse(self, x, key, **attributes):
        from vllm.model_executor.layers.activation import SiluAndMul
        from vllm.model_executor.layers.fusion.fused_act_quant import maybe_fused_act_quant

        linear = SimpleNamespace(_input_quant_key=key, **attributes)
        # Only its class matters; its operator is in an extension that is not here.
        return maybe_fused_act_quant(object.__new__(SiluAndMul), x, linear)

    def test_groups(self):
        from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8Dynamic128Sym

        x = sample((3, 5, 512), CPU).clamp(-16, 16)
        with counted("_silu_and_mul_fp8_dynamic_128", calls=1):
            result = self.fuse(x, kFp8Dynamic128Sym)
        assert (result.data.shape, result.scale.shape) == ((3, 5, 256), (3, 5, 2))
        assert result.orig_shape == (3, 5, 256)
        y = cq.dequantize(result.data, result.scale, cq.GROUPWISE_FP8)
        gate, up = x.float().chunk(2, -1)
        expected = torch.nn.functional.silu(gate) * up
        assert ((y - expected).norm() / expected.norm()).item() < 0.05

    @on_blackwell
    def test_nvfp4(self):
        from vllm.model_executor.layers.fusion import fused_act_quant
        from vllm.model_executor.layers.quantization.utils.quant_utils import kNvfp4Dynamic

        # vLLM has the entry where its extension has the operator.
        producer = fused_act_quant._silu_and_mul_nvfp4_dynamic
        x = sample((5, 512), CPU).clamp(-16, 16)
        linear = SimpleNamespace(input_global_scale_inv=torch.tensor([4.0]))
        with counted("_silu_and_mul_nvfp4_dynamic", calls=1):
            result = producer(x, linear)
        assert result.quant_key is kNvfp4Dynamic
        assert (result.data.shape, result.scale.shape) == ((5, 128), (128, 16))


class TestInputsOfExperts:
    """``moe_kernel_quantize_input``, which also stages tokens for DeepEP."""

    def quantize(
        self, x, dtype, block_shape=None, scale=None, per_act_token_quant=False, **options
    ):
        from vllm.model_executor.layers.fused_moe.utils import moe_kernel_quantize_input

        return moe_kernel_quantize_input(
            x, scale, dtype, per_act_token_quant, block_shape, **options
        )

    def test_groups(self):
        x = sample((12, 512), CPU)
        with counted("per_token_group_quant_fp8", calls=1):
            ours = self.quantize(x, torch.float8_e4m3fn, [128, 128])
        fmt = cq.GROUPWISE_FP8.replace(round_scale=True)
        assert difference(ours, cq.quantize(x, fmt)) is None

    def test_groups_compiled(self):
        x = sample((12, 512), CPU)
        compiled = torch.compile(self.quantize, fullgraph=True)
        with counted("per_token_group_quant_fp8", traced=1):
            ours = compiled(x, torch.float8_e4m3fn, [128, 128])
        assert difference(ours, self.quantize(x, torch.float8_e4m3fn, [128, 128])) is None

    def test_int8(self):
        x = sample((12, 512), CPU)
        with counted("per_token_group_quant_int8", calls=1):
            q, sf = self.quantize(x, torch.int8, [128, 128])
        assert (q.dtype, sf.shape) == (torch.int8, (12, 4))

    def test_int8_of_rows(self):
        x = sample((12, 512), CPU)
        with counted("per_token_quant_int8", calls=1):
            ours = self.quantize(x, torch.int8, per_act_token_quant=True)
        assert difference(ours, cq.quantize(x, cq.ROWWISE_INT8.replace(numerics="sglang"))) is None

    def test_int8_of_rows_in_a_graph(self):
        """Linear layers call it by its module."""
        from vllm import _custom_ops

        x = sample((3, 4, 512), CPU)
        compiled = torch.compile(lambda x: _custom_ops.scaled_int8_quant(x), fullgraph=True)
        with counted("scaled_int8_quant", traced=1):
            q, sf, azp = compiled(x)
        expected = cq.quantize(x, cq.ROWWISE_INT8.replace(numerics="vllm"))
        assert difference((q, sf), (expected[0], expected[1].view(12, 1))) is None
        assert azp is None

    def test_rows(self):
        from vllm.model_executor.layers.fused_moe.utils import moe_kernel_quantize_input

        x = sample((12, 512), CPU)
        with counted("scaled_fp8_quant", calls=1):
            q, sf = moe_kernel_quantize_input(x, None, torch.float8_e4m3fn, True)
        assert (q.shape, sf.shape) == ((12, 512), (12, 1))

    @on_blackwell
    @pytest.mark.parametrize("swizzled", [True, False])
    def test_mxfp8(self, swizzled):
        x = sample((12, 512), CPU)
        with counted("mxfp8_e4m3_quantize", calls=1):
            ours = self.quantize(x, "mxfp8", is_scale_swizzled=swizzled)
        with paused():
            theirs = self.quantize(x, "mxfp8", is_scale_swizzled=swizzled)
        assert difference(ours, theirs) is None
        compiled = torch.compile(self.quantize, fullgraph=True)
        with counted("mxfp8_e4m3_quantize", traced=1):
            assert difference(compiled(x, "mxfp8", is_scale_swizzled=swizzled), ours) is None

    @on_blackwell
    @pytest.mark.parametrize("swizzled", [True, False])
    def test_no_rows(self, swizzled):
        x = torch.empty(0, 128, dtype=torch.bfloat16)
        q, sf = self.quantize(x, "mxfp8", is_scale_swizzled=swizzled)
        assert (q.shape, sf.shape) == ((0, 128), (0,) if swizzled else (0, 4))
        scale = torch.tensor([4.0])
        q, sf = self.quantize(x, "nvfp4", scale=scale, is_scale_swizzled=swizzled)
        assert (q.shape, sf.shape) == ((0, 64), (0, 8))

    @on_blackwell
    @pytest.mark.parametrize("swizzled", [True, False])
    def test_nvfp4(self, swizzled):
        x, scale = sample((12, 512), CPU), torch.tensor([4.0])
        with counted("scaled_fp4_quant", calls=1):
            q, sf = self.quantize(x, "nvfp4", scale=scale, is_scale_swizzled=swizzled)
        assert (q.shape, sf.shape) == ((12, 256), (128, 32) if swizzled else (12, 32))
        compiled = torch.compile(self.quantize, fullgraph=True)
        with counted("scaled_fp4_quant", traced=1):
            again = compiled(x, "nvfp4", scale=scale, is_scale_swizzled=swizzled)
        assert difference(again, (q, sf)) is None

    @on_blackwell
    def test_nvfp4_is_vllms_where_its_passes_look_for_it(self, config):
        from vllm import _custom_ops

        config.compilation_config.pass_config.fuse_act_quant = True
        compiled = torch.compile(_custom_ops.scaled_fp4_quant, fullgraph=True)
        before = counter("scaled_fp4_quant").declined
        # Its operator is in an extension that is not here.
        with pytest.raises(Exception, match="scaled_fp4_quant"):
            compiled(sample((12, 512), CPU), torch.tensor([4.0]))
        assert counter("scaled_fp4_quant").declined > before

    def test_scales_that_deep_ep_brings(self):
        from vllm.model_executor.layers.fused_moe.prepare_finalize import deepep_v2

        x = sample((130, 512), CPU)
        rows = cq.MXFP8.replace(scale_layout="row_major", numerics="vllm")
        _, sf = cq.quantize(x, rows)
        words = deepep_v2._pack_mxfp8_scale(sf.view(torch.uint8))
        with counted("swizzle_mxfp8_scale", calls=1):
            ours = deepep_v2._unpack_mxfp8_scale(words, 512, is_scale_swizzled=True)
        _, expected = cq.quantize(x, cq.MXFP8.replace(numerics="vllm"))
        assert difference(ours, expected.view(torch.uint8)) is None


class TestGraphs:
    """The pass over vLLM's graphs, and its lowering of norms after it."""

    K = 512

    @pytest.fixture
    def run(self, config):
        """Compile as vLLM does, with or without the pass; return results and operators."""
        from torch._inductor import custom_graph_pass
        from vllm.compilation.passes.ir.lowering_pass import VllmIRLoweringPass

        from cute_quant.integrations.engines.vllm_passes import FuseWithQuantize

        class Passes(custom_graph_pass.CustomGraphPass):
            def __init__(self, fuses):
                self.fuses, self.operators = fuses, []

            def __call__(self, graph):
                if self.fuses:
                    FuseWithQuantize(config, vllm_worker.fused)(graph)
                self.operators = [str(n.target) for n in graph.nodes if n.op == "call_function"]
                VllmIRLoweringPass(config)(graph)

            def uuid(self):
                return None

        def run(function, *inputs, fuses=True):
            torch._dynamo.reset()
            for t in inputs:
                if t.ndim > 1:
                    torch._dynamo.mark_dynamic(t, 0)
            passes = Passes(fuses)
            options = {"post_grad_custom_post_pass": passes, "force_disable_caches": True}
            with torch._inductor.config.patch(options):
                return torch.compile(function, fullgraph=True)(*inputs), passes.operators

        return run

    @pytest.fixture
    def tensors(self):
        generator = torch.Generator().manual_seed(0)
        shapes = [(6, self.K), (6, self.K), (self.K,), (6, 2 * self.K)]
        return [torch.randn(*s, generator=generator).to(torch.bfloat16) for s in shapes]

    FORMATS = (cq.DEEP_GEMM, cq.DEEP_GEMM_SM90.replace(round_scale=True), cq.ROWWISE_FP8)

    def check(self, run, function, *inputs, operator, eager=True):
        """Compare with the function as it stands, or as Inductor computes it.

        Inductor leaves out roundings between what it computes at once.
        """
        before = vllm_worker.fused.traced
        ours, operators = run(function, *inputs)
        assert vllm_worker.fused.traced == before + 1
        assert any(operator in name for name in operators)
        assert not any(n.rpartition("cute_quant.")[2] == "quantize.default" for n in operators)
        theirs = function(*inputs) if eager else run(function, *inputs, fuses=False)[0]
        assert difference(ours, theirs) is None

    @pytest.mark.parametrize("fmt", FORMATS, ids=str)
    def test_norm(self, run, tensors, fmt):
        from vllm.ir import ops

        x, _, weight, _ = tensors

        def function(x, weight):
            return cq.quantize(ops.rms_norm(x, weight, 1e-6).view(-1, self.K), fmt)

        self.check(run, function, x, weight, operator="rms_norm_quantize.default")

    @pytest.mark.parametrize("fmt", FORMATS, ids=str)
    def test_norm_of_a_sum(self, run, tensors, fmt):
        from vllm.ir import ops

        x, residual, weight, _ = tensors

        def function(x, residual, weight):
            y, residual = ops.fused_add_rms_norm(x, residual, weight, 1e-5)
            return *cq.quantize(y, fmt), residual

        self.check(run, function, x, residual, weight, operator="auto_functionalized")

    @pytest.mark.parametrize("with_sum", [False, True])
    def test_rows_that_others_read_too(self, run, tensors, with_sum):
        from vllm.ir import ops

        x, residual, weight, _ = tensors

        def function(x, residual, weight):
            if with_sum:
                y, residual = ops.fused_add_rms_norm(x, residual, weight, 1e-5)
            else:
                y = ops.rms_norm(x, weight, 1e-5)
            return *cq.quantize(y), y * 2, residual * 2

        self.check(run, function, x, residual, weight, operator="auto_functionalized")

    @pytest.mark.parametrize("fmt", FORMATS, ids=str)
    def test_activation(self, run, tensors, fmt):
        from vllm.model_executor.layers.activation import SiluAndMul

        def function(gate_up):
            return cq.quantize(SiluAndMul.forward_native(gate_up), fmt)

        self.check(run, function, tensors[3], operator="silu_mul_quantize.default", eager=False)

    @pytest.mark.parametrize("which", ["variance of a part", "no weight", "rows of experts"])
    def test_what_is_left(self, run, tensors, which):
        from vllm.ir import ops

        x, _, weight, _ = tensors
        ends = torch.tensor([3, 6], dtype=torch.int32)

        def function(x, weight, ends):
            if which == "variance of a part":
                return cq.quantize(ops.rms_norm(x, weight, 1e-6, 64))
            if which == "no weight":
                return cq.quantize(ops.rms_norm(x, None, 1e-6))
            return cq.quantize(ops.rms_norm(x, weight, 1e-6), rows=cq.PrefixSum(ends, 1))

        before = vllm_worker.fused.traced
        ours, _ = run(function, x, weight, ends)
        assert vllm_worker.fused.traced == before
        assert difference(ours, run(function, x, weight, ends, fuses=False)[0]) is None

    def test_managers_of_passes_have_it(self, config):
        manager = SimpleNamespace(passes=["vLLM's"])
        given = []
        vllm_worker.configure_passes(lambda *args: given.append(args), manager, config)
        assert given == [(manager, config)]
        first, last = manager.passes
        assert first == "vLLM's"
        assert type(last).__name__ == "FuseWithQuantize"
        assert len(last.uuid()) == 64


class TestWorker:
    def test_hooks_are_vllms(self):
        from vllm.model_executor.warmup import kernel_warmup
        from vllm.v1.worker import gpu_worker

        assert gpu_worker.kernel_warmup is kernel_warmup.kernel_warmup
        assert gpu_worker.kernel_warmup.__wrapped__ is not None
        assert gpu_worker.Worker.load_model.__wrapped__ is not None

    def test_load_model_compares_before(self, monkeypatch):
        from vllm.v1.worker.gpu_worker import Worker

        done = []
        monkeypatch.setattr(ENGINE, "check", lambda device: done.append(device), raising=False)
        key = "vllm.v1.worker.gpu_worker.Worker.load_model"
        original = ENGINE.states[key].original
        monkeypatch.setattr(vllm_worker.seen, "watch", lambda: done.append("watch"))
        with pytest.raises(AttributeError):
            # vLLM's own goes on with a worker that has nothing.
            Worker.load_model(SimpleNamespace(device=CPU), load_dummy_weights=True)
        assert done == ["watch", CPU]
        assert original is Worker.load_model.__wrapped__

    def test_kernel_warmup(self):
        order = []
        vllm_worker.kernel_warmup(
            lambda worker, process_local_only: order.append(process_local_only),
            SimpleNamespace(device=CPU),
            process_local_only=True,
        )
        assert order == [True]

    def test_cache_of_graphs_knows_what_is_taken_over(self):
        from vllm import envs

        factor = envs.compile_factors()[vllm_worker.COMPILE_FACTOR]
        assert cq.__version__ in factor
        assert "QuantFP8.forward_native" in factor


def test_which_calls():
    """All that the GPU has are taken over, or wait for their module."""
    statuses = {key.rpartition(".")[2]: state.status for key, state in ENGINE.states.items()}
    left = {name for name, status in statuses.items() if status == LEFT}
    hopper, blackwell = (
        {"silu_mul_per_token_group_quant_fp8_colmajor"},
        {
            "per_token_group_quant_fp8_packed_for_deepgemm",
            "silu_mul_quant_fp8_packed_triton",
            "_silu_and_mul_nvfp4_dynamic",
            "mxfp8_e4m3_quantize",
            "scaled_fp4_quant",
        },
    )
    assert left == (blackwell if HOPPER else hopper)
    assert set(statuses.values()) <= {LEFT, TAKEN, WAITS}


COMPARED_WITHOUT_CUDA = {
    "forward_cuda",
    "forward_native",
    "per_token_group_quant_fp8",
    "silu_mul_quant_fp8_packed_triton",
    "silu_mul_per_token_group_quant_fp8_colmajor",
    "mxfp8_e4m3_quantize",
    "swizzle_mxfp8_scale",
}


def test_bits_are_those_of_vllms_triton_kernels():
    """Without a GPU vLLM takes its Triton kernels, which are interpreted."""
    command = [sys.executable, "-m", "tests.engines.compare_vllm"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (report,) = json.loads(done.stdout[done.stdout.index("[\n") :])
    equal = {
        call["call"].rpartition(".")[2]
        for call in report["calls"]
        if call["compared"] == "equal on cpu"
    }
    assert equal == COMPARED_WITHOUT_CUDA


SPAWNED = """
import multiprocessing, sys

def child(queue):
    import vllm.plugins
    vllm.plugins.load_general_plugins()
    loaded = "cute_quant.integrations.engines.vllm" in sys.modules
    queue.put((loaded, sys.modules.keys() & {LAYERS}))
    from cute_quant.integrations.engines.vllm import ENGINE
    queue.put(ENGINE.summary())

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    print(queue.get())
    print(queue.get())
    process.join()
"""


@pytest.mark.parametrize(
    ("selected", "says"),
    [
        ("", "takes over: linear, group_quant"),
        ("linear,silu", "takes over: linear, silu; leaves: group_quant (not selected)"),
        ("0", "takes over: nothing"),
        ("lineal", "takes over: nothing"),
    ],
)
def test_spawned_processes(selected, says, tmp_path):
    script = tmp_path / "spawned.py"
    layers = "{'vllm.model_executor.layers.quantization.utils.fp8_utils', 'cutlass'}"
    script.write_text(SPAWNED.replace("{LAYERS}", layers))
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env=os.environ | {"CUTE_QUANT_VLLM": selected, "PYTHONPATH": os.getcwd()},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "(True, set())" in done.stdout
    assert says in done.stdout
    if selected == "lineal":
        assert "expected 0 or some of linear, group_quant" in done.stdout + done.stderr


def test_tensor_parallel(tmp_path):
    """Two spawned processes share the weight of a linear layer, and each reaches its quantizer."""
    command = [sys.executable, "-m", "tests.engines.tensor_parallel", tmp_path / "store"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = sorted(re.findall(r"rank (\d): (\d+) calls, (\S+) off", done.stdout))
    # Dynamo may begin anew, and traces a call again then.
    assert [rank for rank, calls, _ in found if int(calls) > 0] == ["0", "1"]
    assert all(float(off) < 0.05 for *_, off in found)


@on_hopper
def test_the_archive_of_a_layer_is_small_and_runs(tmp_path):
    """On a machine without vLLM, whose other modules and dependencies are stand-ins."""
    archive = tmp_path / "vllm.tar.xz"
    command = [sys.executable, "-m", "bench.vllm_layer"]
    packed = subprocess.run([*command, "pack", archive], capture_output=True, text=True)
    assert packed.returncode == 0, packed.stderr[-2000:]
    with tarfile.open(archive) as tar:
        assert sum(member.size for member in tar) < 2 * 2**20
    sizes = ("--k", "256", "--n", "128", "--rows", "3")
    done = subprocess.run(
        [*command, "run", archive, "--device", "cpu", *sizes], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "cute_quant: QuantFP8 of cute_quant.integrations.engines.vllm" in done.stdout
    assert "QuantFP8.forward_native Counter(calls=0, traced=" in done.stdout
