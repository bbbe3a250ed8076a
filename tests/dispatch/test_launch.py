"""Bound operations: checked once, launched often, always the same memory."""

import gc
import threading
import weakref
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cute_quant import (
    DEEP_GEMM,
    DEEP_GEMM_SM90,
    INT8,
    MXFP8,
    Launch,
    Masked,
    PrefixSum,
    bind,
    dequantize,
    empty_scales,
    fake_quantize,
    quantize,
    rms_norm_quantize,
    silu_mul_quantize,
)
from cute_quant.contract import checks
from cute_quant.dispatch import launch as launch_module
from tests.helpers import assert_same_bits, poisoned_scales, poisoned_values

FORMATS = pytest.mark.parametrize("fmt", [DEEP_GEMM, DEEP_GEMM_SM90, MXFP8, INT8], ids=str)
OPERATIONS = pytest.mark.parametrize(
    "operation",
    [quantize, silu_mul_quantize, rms_norm_quantize, dequantize, fake_quantize],
    ids=lambda operation: operation.__name__,
)
MN, K = 5, 640


def normal(*shape, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(torch.bfloat16).to(device)


def arguments(operation, fmt, device, seed=0):
    """Tensors that an operation reads, and its keywords."""
    x = normal(MN, K, device=device, seed=seed)
    if operation is dequantize:
        return list(quantize(x, fmt)), {}
    if operation is silu_mul_quantize:
        return [normal(MN, 2 * K, device=device, seed=seed)], {"clamp": 1.0}
    if operation is rms_norm_quantize:
        residual = normal(MN, K, device=device, seed=seed + 1)
        weight = normal(K, device=device, seed=seed + 2)
        return [x, weight], {"residual": residual, "normalized": True}
    return [x], {}


def out_of(operation, fmt, device):
    """Memory for the results of an operation, poisoned, with two more rows of values."""
    if operation is dequantize:
        return {}
    if operation is fake_quantize:
        return {"out": torch.full((MN, K), torch.nan, dtype=torch.bfloat16, device=device)}
    q = poisoned_values(MN + 2, K, device, fmt.values)
    return {"out": (q, poisoned_scales(fmt, MN, K, device))}


def copied(tensors, keywords):
    """The same arguments in memory of their own."""
    clone = lambda t: t.clone() if isinstance(t, torch.Tensor) else t  # noqa: E731
    return [clone(t) for t in tensors], {name: clone(t) for name, t in keywords.items()}


def as_tuple(results):
    return results if isinstance(results, tuple) else (results,)


def assert_results(results, expected):
    assert len(as_tuple(results)) == len(as_tuple(expected))
    for result, wanted in zip(as_tuple(results), as_tuple(expected), strict=True):
        assert_same_bits(result[: wanted.shape[0]], wanted)


@OPERATIONS
@FORMATS
@pytest.mark.parametrize("with_out", [False, True])
def test_launches_run_again_on_what_tensors_hold_then(with_out, fmt, operation, device):
    inputs, keywords = arguments(operation, fmt, device)
    out = out_of(operation, fmt, device) if with_out else {}
    launch = bind(*inputs, fmt, operation=operation, **keywords, **out)
    assert isinstance(launch, Launch)
    results = launch.results
    for seed in (0, 1, 2):
        new_inputs, new_keywords = arguments(operation, fmt, device, seed)
        expected = operation(*new_inputs, fmt, **new_keywords)
        fresh, fresh_keywords = arguments(operation, fmt, device, seed)
        for t, new in zip(inputs, fresh, strict=True):
            t.copy_(new)
        for name, new in fresh_keywords.items():
            if isinstance(new, torch.Tensor):
                keywords[name].copy_(new)
        again = launch()
        assert again is results and launch.results is results
        assert_results(results, expected)


@OPERATIONS
def test_binding_launches_nothing(operation, device):
    inputs, keywords = arguments(operation, DEEP_GEMM, device)
    out = out_of(operation, DEEP_GEMM, device)
    tensors = [*inputs, *(t for t in keywords.values() if isinstance(t, torch.Tensor))]
    given = out.get("out", ())
    tensors += given if isinstance(given, tuple) else [given]
    before = [t.clone() for t in tensors]
    versions = [t._version for t in tensors]
    bind(*inputs, operation=operation, **keywords, **out)
    for t, wanted in zip(tensors, before, strict=True):
        assert_same_bits(t, wanted)
    assert [t._version for t in tensors] == versions


def test_results_are_those_of_the_caller(device):
    x, weight = normal(MN, K, device=device), normal(K, device=device, seed=1)
    q = torch.empty(MN, K, dtype=torch.float8_e4m3fn, device=device)
    sf = empty_scales(DEEP_GEMM, (MN, K), device=device)
    residual, row, y = (torch.zeros_like(x) for _ in range(3))
    launch = bind(x, out=(q, sf))
    assert launch.results[0] is q and launch.results[1] is sf and launch() is launch.results
    launch = bind(
        x, weight, operation=rms_norm_quantize, residual=residual, normalized=row, out=(q, None)
    )
    assert launch.results[0] is q and launch.results[2] is residual and launch.results[3] is row
    launch = bind(x, operation=fake_quantize, out=y)
    assert launch.results is y and launch() is y


def test_a_residual_is_added_at_each_launch(device):
    x, weight = normal(MN, K, device=device), normal(K, device=device, seed=1)
    residual = normal(MN, K, device=device, seed=2)
    other = residual.clone()
    launch = bind(x, weight, operation=rms_norm_quantize, residual=residual)
    for _ in range(3):
        results = launch()
        for result, wanted in zip(
            results, rms_norm_quantize(x, weight, residual=other), strict=True
        ):
            assert_same_bits(result, wanted)


def test_rows_and_indices_are_read_at_each_launch(device):
    x = normal(9, K, device=device)
    index = torch.tensor([4, 1, -1, 0, 9, 8], dtype=torch.int32, device=device)
    ends = torch.tensor([2, 6], dtype=torch.int32, device=device)
    launch = bind(x, MXFP8, rows=PrefixSum(ends, 4), index=index, check=False)
    for _ in range(2):
        assert_results(launch(), quantize(x, MXFP8, rows=PrefixSum(ends, 4), index=index))
        index += 1
        ends -= 1
    batch, counts = x.view(3, 3, K), torch.tensor([3, 1, 0], dtype=torch.int32, device=device)
    out = poisoned_values(3, K, device, batch_shape=(3,)), None
    launch = bind(batch, rows=Masked(counts), out=out)
    q, _ = launch()
    assert q is out[0]
    for _ in range(2):
        expected, _ = quantize(batch)
        launch()
        for expert, count in enumerate(counts.tolist()):
            assert_same_bits(q[expert, :count], expected[expert, :count])
        counts.copy_(counts.flip(0))


@pytest.mark.parametrize("shape", [(0, K), (3, 0), (2, 0, K)])
@OPERATIONS
def test_nothing_to_launch(operation, shape, device):
    x = torch.empty(shape, dtype=torch.bfloat16, device=device)
    inputs = {
        dequantize: lambda: quantize(x),
        rms_norm_quantize: lambda: (x, x.new_empty(shape[-1])),
    }.get(operation, lambda: (x,))()
    launch = bind(*inputs, operation=operation)
    assert_results(launch(), operation(*inputs))
    assert launch() is launch.results


def test_autograd_knows_what_launches_write(device):
    x, weight = normal(MN, K, device=device), normal(K, device=device, seed=1)
    q, sf = quantize(x)
    residual, row, y = (torch.zeros_like(x) for _ in range(3))
    for tensors, launch in (
        ((q, sf), bind(x, out=(q, sf))),
        (
            (residual, row),
            bind(x, weight, operation=rms_norm_quantize, residual=residual, normalized=row),
        ),
        ((y,), bind(x, operation=fake_quantize, out=y)),
    ):
        for _ in range(2):
            before = [t._version for t in tensors]
            launch()
            assert all(t._version > v for t, v in zip(tensors, before, strict=True))


def test_launches_keep_their_memory(device):
    """Tensors that nobody else holds stay for the launch, and go with it."""
    x = normal(MN, K, device=device)
    expected = quantize(x)
    kept = weakref.ref(x)
    launch = bind(x)
    del x
    gc.collect()
    assert_results(launch(), expected)
    assert kept() is not None
    del launch
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("operation", [None, "quantize", bind, empty_scales, torch.relu, Launch])
def test_operation_is_one_that_can_be_bound(operation, device):
    names = (
        "quantize, silu_mul_quantize, silu_mul_backward_quantize, rms_norm_quantize, dequantize, "
        "fake_quantize, quantize_blocks, dequantize_blocks, requantize_blocks, convert_scales, "
        "quantize_columns, quantize_both, silu_mul_quantize_both, silu_mul_backward_quantize_both"
    )
    with pytest.raises(TypeError, match=rf"^operation: expected one of {names}, got "):
        bind(normal(MN, K, device=device), operation=operation)


def test_binding_refuses_what_the_operation_refuses(device):
    x = normal(MN, K, device=device)
    q, sf = quantize(x)
    x8 = x.view(torch.float8_e4m3fn)[:, :K]
    cases = [
        (TypeError, "x: expected a torch.Tensor, got list", quantize, ([1.0],), {}),
        (TypeError, "fmt: expected a Format", quantize, (x, "DEEP_GEMM"), {}),
        (ValueError, "x: expected rows contiguous along k", quantize, (x.t(),), {}),
        (TypeError, r"out: expected \(q, sf\), got a tensor", quantize, (x,), {"out": q}),
        (ValueError, "out q: expected memory of its own", quantize, (x,), {"out": (x8, None)}),
        (TypeError, "check: expected a bool", quantize, (x,), {"check": 1}),
        (
            ValueError,
            "index: expected -1 to 4, got 5 at 0",
            quantize,
            (x,),
            {"check": True, "index": torch.full((2,), 5, dtype=torch.int32, device=device)},
        ),
        (
            RuntimeError,
            "x: .*quantize is not differentiable",
            quantize,
            (x.clone().requires_grad_(),),
            {},
        ),
        (ValueError, "gate_up: expected an even number", silu_mul_quantize, (x[:, 1:],), {}),
        (ValueError, "weight: expected shape", rms_norm_quantize, (x, x[0, 1:]), {}),
        (
            ValueError,
            "residual: expected memory of its own",
            rms_norm_quantize,
            (x, x[0].clone()),
            {"residual": x},
        ),
        (TypeError, "sf: expected a tensor of int32", dequantize, (q, sf.float()), {}),
        (ValueError, "out: expected memory of its own", fake_quantize, (x,), {"out": x}),
        (TypeError, "unexpected keyword argument 'nothing'", quantize, (x,), {"nothing": 1}),
    ]
    for error, message, operation, inputs, keywords in cases:
        with pytest.raises(error, match=message):
            operation(*inputs, **keywords)
        with pytest.raises(error, match=message):
            bind(*inputs, operation=operation, **keywords)
    # The thread binds nothing any more.
    assert_results(quantize(x), (q, sf))


def test_other_threads_are_not_bound(device, monkeypatch):
    """Another thread quantizes and binds while this one is between its checks and its launch."""
    x, other = normal(MN, K + 2, device=device), normal(MN, K + 4, device=device, seed=1)
    expected, other_expected = quantize(x.clone()), quantize(other.clone())
    check, main, seen = checks.check_fake_quantize, threading.current_thread(), {}

    def work():
        seen["results"] = quantize(other)
        seen["launch"] = bind(other)

    def check_and_let_the_other_run(*args):
        if threading.current_thread() is main:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        return check(*args)

    monkeypatch.setattr(checks, "check_fake_quantize", check_and_let_the_other_run)
    y = torch.zeros_like(x)
    launch = bind(x, operation=fake_quantize, out=y)
    assert y.eq(0).all()
    assert_results(seen["results"], other_expected)
    assert_results(seen["launch"](), other_expected)
    assert_results(launch(), dequantize(*expected))


def test_threads_bind_at_once(device):
    inputs = [normal(MN + i, K, device=device, seed=i) for i in range(8)]
    expected = [quantize(x) for x in inputs]
    barrier, results = threading.Barrier(8), [[] for _ in inputs]

    def work(i):
        barrier.wait()
        for _ in range(20):
            results[i].append(bind(inputs[i])())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for pairs, wanted in zip(results, expected, strict=True):
        assert len(pairs) == 20
        for pair in pairs:
            assert_results(pair, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_no_graph_of_torch_holds_a_launch(backend, device):
    """A compiled function breaks its graph there, and means the same."""

    def call(x, weight, residual, launch):
        own = bind(x, weight, operation=rms_norm_quantize, residual=residual)
        x.mul_(3)
        return own(), launch()

    x, weight = normal(MN, K, device=device), normal(K, device=device, seed=1)
    residual, other = torch.zeros_like(x), torch.zeros_like(x)
    torch._dynamo.reset()
    launch = bind(x)
    own, results = torch.compile(call, backend=backend)(x, weight, residual, launch)
    assert_results(own, rms_norm_quantize(x, weight, residual=other))
    assert_same_bits(residual, other)
    assert results is launch.results
    assert_results(results, quantize(x))
    for refused in (lambda x: bind(x).results, lambda x: launch()):
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(refused, backend=backend, fullgraph=True)(x)


@pytest.mark.gpu
@OPERATIONS
def test_launches_in_a_graph(operation):
    inputs, keywords = arguments(operation, DEEP_GEMM, "cuda")
    launch = bind(*inputs, operation=operation, **keywords)
    launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert launch() is launch.results
    for seed in (3, 4):
        fresh, fresh_keywords = arguments(operation, DEEP_GEMM, "cuda", seed)
        for t, new in zip(inputs, fresh, strict=True):
            t.copy_(new)
        if "residual" in keywords:
            keywords["residual"].copy_(fresh_keywords["residual"])
        graph.replay()
        assert_results(launch.results, operation(*fresh, **fresh_keywords))


@pytest.mark.gpu
def test_launches_run_on_the_current_stream():
    x = torch.zeros(4096, 7168, dtype=torch.bfloat16, device="cuda")
    source = normal(4096, 7168, device="cuda")
    expected = quantize(source)
    launch = bind(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        x.copy_(source)
        launch()
    stream.synchronize()
    assert_results(launch.results, expected)


def test_a_call_that_makes_no_launch_is_refused():
    """A mode that answers for the operator, or tensors without memory."""

    class Answer(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    x = normal(MN, K, device="cpu")
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    for inputs in (fake, x.to("meta")):
        with pytest.raises(TypeError, match=r"^bind: expected plain tensors with memory"):
            bind(inputs)
    with Answer():
        launch = bind(x)
    assert torch.equal(launch()[0].view(torch.uint8), quantize(x)[0].view(torch.uint8))


@pytest.mark.gpu
def test_views_of_two_alignments_are_both_found_again():
    memory = torch.randn(MN * K + 8, device="cuda").to(torch.bfloat16)
    views = [memory[start:][: MN * K].view(MN, K) for start in (0, 8)]
    for x in views:
        quantize(x)
    with mock.patch.object(launch_module, "quantize", side_effect=AssertionError("looked closer")):
        for x in views * 3:
            quantize(x)
