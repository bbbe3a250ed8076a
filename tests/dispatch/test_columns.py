"""Operators of groups along rows: tracers, compilation, export, missing kernels."""

import functools
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cute_quant as cq
from cute_quant import DEEP_GEMM, DEEP_GEMM_32, DEEP_GEMM_SM90, MXFP4, MXFP8, PrefixSum
from cute_quant.jit import lookup
from tests.helpers import assert_same_bits
from tests.kernels.emulated_gpu import OnGpu

X = torch.randn(200, 136, generator=torch.Generator().manual_seed(0)).bfloat16()
ENDS = torch.tensor([70, 199], dtype=torch.int32)
FORMATS = (DEEP_GEMM_SM90, DEEP_GEMM_32, MXFP8)
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)
operators = torch.ops.cute_quant


def flat(results):
    return [t for result in results for t in (result if isinstance(result, tuple) else [result])]


def assert_results(results, expected):
    for actual, wanted in zip(flat(results), flat(expected), strict=True):
        assert_same_bits(actual, wanted)
        assert actual.stride() == wanted.stride()


GATED_CALLS = {
    "products": lambda x, *formats, **options: cq.silu_mul_quantize_both(
        x, *formats, weight=torch.full(x.shape[:-1], 2.0), clamp=3.0, **options
    ),
    "gradients": lambda x, *formats, **options: cq.silu_mul_backward_quantize_both(
        x[..., :68], x, *formats, alpha=1.5, **options
    ),
}


@pytest.mark.parametrize("name", GATED_CALLS)
@pytest.mark.parametrize("stochastic", [False, True])
def test_tracers_of_gated_activations(name, stochastic):
    """Fakes, compiled functions that allocate, and such that write."""
    function, state = GATED_CALLS[name], torch.tensor([3, 4]) if stochastic else None
    options = {"transposed": stochastic, "rng_state": state, "rows": PrefixSum(ENDS)}

    def call(x, out=None):
        return flat(function(x, MXFP8, DEEP_GEMM_32, out=out, **options))

    expected = call(X)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = call(mode.from_tensor(X))
    for fake, real in zip(fakes, expected, strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert_results(compiled(X), expected)
    memory = [torch.empty_like(t) for t in expected]
    assert_results(compiled(X, (memory[:2], memory[2:])), expected)
    assert_results(memory, expected)


@every_format
@pytest.mark.parametrize("transposed", [False, True])
def test_fakes_are_like_results(fmt, transposed):
    x = X.expand(2, 3, -1, -1).contiguous()
    expected = (
        *cq.quantize_columns(x, fmt, transposed=transposed),
        *flat(cq.quantize_both(x, MXFP8, fmt, transposed=transposed)),
    )
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        fakes = (
            *cq.quantize_columns(fake, fmt, transposed=transposed),
            *flat(cq.quantize_both(fake, MXFP8, fmt, transposed=transposed)),
        )
    for fake, real in zip(fakes, expected, strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@every_format
def test_a_compiled_function(fmt):
    def function(x, ends):
        rows = PrefixSum(ends)
        columns = cq.quantize_columns(x * 2, fmt, rows=rows)
        return *columns, *flat(cq.quantize_both(x, DEEP_GEMM, fmt, transposed=True, rows=rows))

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (200, 77):
        assert_results(compiled(X[:rows], ENDS), function(X[:rows], ENDS))


@every_format
def test_compiled_into_memory(fmt):
    def function(x, pair, columns):
        cq.quantize_columns(x, fmt, out=columns)
        cq.quantize_both(x, MXFP8, fmt, out=(pair, columns))
        return *pair, *columns

    expected = flat(cq.quantize_both(X, MXFP8, fmt))
    memory = [torch.empty_like(t) for t in expected]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_results(compiled(X, memory[:2], memory[2:]), expected)
    partly = torch.compile(
        lambda x, q: cq.quantize_both(x, MXFP8, fmt, out=(None, (q, None))),
        backend="aot_eager",
        fullgraph=True,
    )
    assert_results(partly(X, torch.empty_like(expected[2])), expected)


def test_export():
    class Module(torch.nn.Module):
        def forward(self, x):
            return cq.quantize_columns(x, DEEP_GEMM_32, transposed=True)

    program = torch.export.export(Module(), (X,))
    assert_results(program.module()(X), cq.quantize_columns(X, DEEP_GEMM_32, transposed=True))


def test_operators_keep_their_promises():
    (q, sf), (column_q, column_sf) = cq.quantize_both(X, DEEP_GEMM, DEEP_GEMM_32)
    text, column_text = DEEP_GEMM.text, DEEP_GEMM_32.text
    # The check of schemas has no arithmetic for 8-bit arguments.
    utilities = "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"
    rows = {"rows": "prefix_sum", "alignment": 128}
    gated = {"interleaved": False, "clamp": 2.0, "alpha": 1.0, "beta": 0.0}
    formats, state = (text, column_text), torch.tensor([1, 2])
    for operator, arguments, options in (
        (operators.silu_mul_quantize_both, (X, None, *formats, ENDS), {"rounding": "unfused"}),
        (operators.silu_mul_backward_quantize_both, (X[:, :68], X, *formats, ENDS, state), {}),
    ):
        given = rows | gated | options
        torch.library.opcheck(operator.default, arguments, given, test_utils=utilities)
    for operator, arguments in (
        (operators.quantize_columns, (X, column_text, ENDS, state)),
        (operators.quantize_columns, (X, column_text, ENDS)),
        (operators.quantize_columns_out, (X, column_q, column_sf, column_text, ENDS)),
        (operators.quantize_both, (X, text, column_text, ENDS)),
        (operators.quantize_both_out, (X, q, sf, column_q, column_sf, text, column_text, ENDS)),
    ):
        torch.library.opcheck(operator.default, arguments, rows, test_utils=utilities)


def test_vmap_and_gradients_are_refused():
    x = X.expand(2, -1, -1)
    with pytest.raises(RuntimeError, match="vmap is not supported"):
        torch.vmap(lambda t: cq.quantize_columns(t, MXFP8))(x)
    with pytest.raises(RuntimeError, match="vmap is not supported"):
        torch.vmap(lambda t: cq.quantize_both(t, MXFP8, MXFP8))(x)
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="quantize_columns is not differentiable"):
        operators.quantize_columns(x, DEEP_GEMM_SM90.text)[1].sum().backward()
    with pytest.raises(RuntimeError, match="quantize_both is not differentiable"):
        operators.quantize_both(x, MXFP8.text, DEEP_GEMM_SM90.text)[3].sum().backward()
    with pytest.raises(RuntimeError, match="since quantize_both is not differentiable"):
        cq.quantize_both(x, MXFP8, MXFP8)
    gated = {"interleaved": False, "clamp": None, "alpha": 1.0, "beta": 0.0}
    with pytest.raises(RuntimeError, match=r"grad and gate_up: .*silu_mul_backward_quantize_both"):
        operators.silu_mul_backward_quantize_both(X[:, :68], x, MXFP8.text, MXFP8.text, **gated)[
            1
        ].sum().backward()
    with pytest.raises(RuntimeError, match="since silu_mul_quantize_both is not differentiable"):
        cq.silu_mul_quantize_both(x, MXFP8, MXFP8)


def test_a_tracer_reads_no_ends():
    call = torch.compile(
        lambda x: cq.quantize_columns(x, DEEP_GEMM_32, rows=PrefixSum(ENDS), check=True),
        backend="aot_eager",
    )
    with pytest.raises(Exception, match="check: expected False under a tracer"):
        call(X)


def test_a_tracer_names_the_format_that_columns_do_not_have():
    call = torch.compile(lambda x: cq.quantize_both(x, MXFP8, MXFP4), backend="aot_eager")
    with pytest.raises(Exception, match="column_fmt: expected 8-bit values, got e2m1:32"):
        call(X)


def test_a_missing_kernel_is_named(monkeypatch):
    monkeypatch.setattr(lookup, "_functions", {})
    monkeypatch.setattr(lookup, "_found", lambda spec, arch: None)
    monkeypatch.setattr("cute_quant.ops.arguments.is_traced", lambda t: False)
    with (
        mock.patch.multiple(
            lookup,
            architecture=lambda device: "sm_90a",
            find_architecture=lambda device: "sm_90a",
        ),
        cq.forbid_compilation(),
        pytest.raises(
            RuntimeError,
            match=r"columns-bfloat16.* for sm_90a.*quantize_both.*--column-format",
        ),
    ):
        cq.quantize_both(X.as_subclass(OnGpu), MXFP8, MXFP8)


@pytest.mark.gpu
@pytest.mark.parametrize("name", GATED_CALLS)
def test_a_cuda_graph_captures_gated_activations_after_a_warm_up(name):
    operation = f"silu_mul_{'backward_' * (name == 'gradients')}quantize_both"
    numbers = {"clamp": 3.0} if name == "products" else {"alpha": 1.5}
    k = X.shape[1] // (2 if name == "products" else 1)
    formats = {"fmt": MXFP8, "column_fmt": DEEP_GEMM_32, "stochastic": True}
    cq.warm_up(k=k, max_rows=200, operations=operation, **formats, **numbers)
    x, state = X.cuda(), torch.tensor([5, 6], device="cuda")
    options = {"rng_state": state}
    if name == "products":
        options |= {"weight": torch.ones(200, device="cuda"), "clamp": 3.0}
        call = functools.partial(cq.silu_mul_quantize_both, x, MXFP8, DEEP_GEMM_32, **options)
    else:
        grad = x[:, :68].contiguous()
        call = functools.partial(
            cq.silu_mul_backward_quantize_both, grad, x, MXFP8, DEEP_GEMM_32, alpha=1.5, **options
        )
    graph = torch.cuda.CUDAGraph()
    with cq.forbid_compilation(), torch.cuda.graph(graph):
        results = flat(call())
    graph.replay()
    state += 1
    graph.replay()
    assert_results(results, flat(call()))


@pytest.mark.gpu
def test_a_cuda_graph_captures_it():
    x = X.cuda()
    expected = flat(cq.quantize_both(x, DEEP_GEMM, DEEP_GEMM_32, transposed=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = flat(cq.quantize_both(x, DEEP_GEMM, DEEP_GEMM_32, transposed=True))
    for t in results:
        torch.empty(0, dtype=torch.uint8, device="cuda").set_(t.untyped_storage()).zero_()
    graph.replay()
    assert_results(results, expected)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True])
def test_offsets_past_32_bits(transposed):
    x = torch.zeros(300000, 7184, dtype=torch.bfloat16, device="cuda")
    x[299999, 7183], x[150000, 3] = 448.0, -448.0
    ends = torch.tensor([299999 // 128 * 128, 300000], dtype=torch.int32, device="cuda")
    for fmt, row_fmt, rows in (
        (DEEP_GEMM_SM90, DEEP_GEMM_SM90, None),
        (DEEP_GEMM_32, MXFP8, PrefixSum(ends)),
    ):
        (row_q, _), (q, sf) = cq.quantize_both(x, row_fmt, fmt, transposed=transposed, rows=rows)
        for values in (row_q, q.mT if transposed else q):
            assert values[299999, 7183:].float().item() == 448.0
            assert values[150000, 3:4].float().item() == -448.0
            assert int(values.view(torch.uint8).count_nonzero()) == 2
        zeros = sf[:, :1]
        assert int((sf != zeros).sum()) == 2 and sf[-1, -1] != zeros[-1, 0]
        del row_q, q, values
