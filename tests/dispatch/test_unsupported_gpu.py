"""Calls on a GPU that no kernel is built for: the reference on its tensors, and one warning."""

import warnings

import pytest
import torch

import cute_quant
from cute_quant import DEEP_GEMM, MXFP8, ROWWISE_INT8, Masked, bind
from cute_quant.contract.calls import Call
from cute_quant.contract.prologues import make_rms_norm, make_silu_mul
from cute_quant.dispatch import launch
from cute_quant.jit import lookup
from tests import oracle
from tests.helpers import (
    EVERY_LAYOUT,
    assert_quantized_as,
    assert_same_bits,
    poisoned_scales,
    poisoned_values,
    storage_bits,
)
from tests.kernels.cases import special_groups
from tests.kernels.emulated_gpu import OnGpu
from tests.prologues import norm_bounds, silu_bounds

BF16 = torch.bfloat16
AMPERE = (8, 0)


@pytest.fixture(autouse=True)
def ampere(monkeypatch):
    """A GPU of compute capability 8.0, on which nothing may be compiled or launched."""

    def refused(*arguments):
        raise AssertionError("a kernel for a GPU that there is none for")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: AMPERE)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(lookup, "function", refused)
    clear()
    yield
    clear()


def clear():
    lookup.find_architecture.cache_clear()
    launch._warn_of_reference.cache_clear()


def one_warning():
    return pytest.warns(UserWarning, match=r"slowly, on cuda:-1, Some GPU, of 8.0: .* 8.9, .*12.1$")


@pytest.fixture
def warned():
    """The warning was given before."""
    with one_warning():
        launch._warn_of_reference(-1)


def on_gpu(x: torch.Tensor) -> torch.Tensor:
    return x.as_subclass(OnGpu)


@pytest.mark.parametrize("fmt", EVERY_LAYOUT, ids=str)
def test_quantize(warned, fmt):
    x = special_groups(9, 544, BF16, 1, fmt)
    results = [
        (poisoned_values(11, 544, "cpu"), poisoned_scales(fmt, 9, 544, "cpu")) for _ in range(2)
    ]
    q, sf = launch.quantize(Call(on_gpu(x), fmt, *results[0]))
    oracle.quantize_into(x, *results[1], fmt)
    assert_same_bits(q, results[1][0])
    assert torch.equal(storage_bits(sf), storage_bits(results[1][1]))


def test_one_warning_for_all_calls():
    x = special_groups(5, 256, BF16, 1)
    with one_warning() as given:
        q, sf = launch.quantize(Call(on_gpu(x), DEEP_GEMM))
        launch.quantize(Call(on_gpu(x), DEEP_GEMM))
        launch.fake_quantize(Call(on_gpu(x), DEEP_GEMM), None)
        launch.dequantize(on_gpu(q), sf, DEEP_GEMM, BF16)
    assert len(given) == 1


def test_there_and_back(warned):
    x = special_groups(5, 256, BF16, 1)
    q, sf = launch.quantize(Call(on_gpu(x), MXFP8))
    y = launch.dequantize(on_gpu(q), sf, MXFP8, BF16)
    out = launch.fake_quantize(Call(on_gpu(x), MXFP8), None)
    expected = oracle.dequantize(q, sf, MXFP8, BF16)
    for result in (y, out):
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


def test_gates_and_ups(warned):
    gate_up = torch.randn(5, 512, generator=torch.Generator().manual_seed(1)).to(BF16)
    prologue = make_silu_mul(
        interleaved=False, clamp=None, alpha=1.0, beta=0.0, rounding="fused", weight=None
    )
    q, sf = launch.quantize(Call(on_gpu(gate_up), DEEP_GEMM, prologue=prologue))
    assert_quantized_as(q, sf, DEEP_GEMM, silu_bounds(gate_up))


def test_norms(warned):
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1)).to(BF16)
    weight = torch.linspace(-1.5, 2, 256).to(BF16)
    options = {"residual": None, "residual_out": None, "normalized": None}
    prologue = make_rms_norm(weight, eps=1e-6, weight_offset=0.0, rounding="fused", **options)
    q, sf = launch.quantize(Call(on_gpu(x), DEEP_GEMM, prologue=prologue))
    assert_quantized_as(q, sf, DEEP_GEMM, norm_bounds(x.float(), weight, 1e-6, 0.0, "fused", BF16))


def test_counts_are_checked(warned):
    x = special_groups(10, 256, BF16, 1).view(2, 5, 256)
    rows = Masked(torch.tensor([3, 6], dtype=torch.int32))
    with pytest.raises(ValueError, match="masked_m"):
        launch.quantize(Call(on_gpu(x), DEEP_GEMM, rows=rows), check=True)
    launch.quantize(Call(on_gpu(x), DEEP_GEMM, rows=rows))


def test_public_calls(monkeypatch):
    """`quantize`, its kept plans, and `bind`, on tensors that are taken for CUDA's."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    x = special_groups(5, 256, BF16, 1)
    expected_q, expected_sf = poisoned_values(5, 256, "cpu", torch.int8), torch.zeros(5, 1)
    oracle.quantize_into(x, expected_q, expected_sf, ROWWISE_INT8)
    with one_warning() as given:
        for _ in range(3):
            q, sf = cute_quant.quantize(x, ROWWISE_INT8)
            assert_same_bits(q, expected_q)
            assert_same_bits(sf, expected_sf)
        bound = bind(x, ROWWISE_INT8)
        x.copy_(special_groups(5, 256, BF16, 2))
        q, sf = bound()
    assert len(given) == 1
    oracle.quantize_into(x, expected_q, expected_sf, ROWWISE_INT8)
    assert_same_bits(q, expected_q)
    assert_same_bits(sf, expected_sf)


def test_a_gpu_that_has_kernels_takes_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
    monkeypatch.setattr(lookup, "multiprocessors", lambda index: 142)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(AssertionError, match="a kernel for a GPU"):
            launch.quantize(Call(on_gpu(special_groups(5, 256, BF16, 1)), DEEP_GEMM))


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", EVERY_LAYOUT, ids=str)
def test_the_reference_on_a_gpu(fmt):
    """The bits of the CPU, also captured in a graph."""
    for dtype in (BF16, torch.float16, torch.float32):
        x = special_groups(33, 544, dtype, 1, fmt)
        expected = cute_quant.quantize(x, fmt)
        there = x.cuda()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own = cute_quant.quantize(there, fmt)
            bound = bind(there, fmt)
            bound()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = cute_quant.quantize(there, fmt)
            graph.replay()
            back = cute_quant.dequantize(*own, fmt)
        for results in (own, captured, bound.results):
            for actual, wanted in zip(results, expected, strict=True):
                assert_same_bits(actual, wanted)
        wanted = cute_quant.dequantize(*expected, fmt)
        torch.testing.assert_close(back.cpu(), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", ["fused", "unfused"])
def test_fused_operations_of_the_reference_on_a_gpu(rounding):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 1024, generator=generator).to(BF16)
    weight = torch.linspace(-1.5, 2, 1024).to(BF16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        q, sf = cute_quant.silu_mul_quantize(x.cuda(), rounding=rounding)
        bounds = silu_bounds(x, rounding=rounding)
        assert_quantized_as(q, sf, DEEP_GEMM, bounds)
        q, sf = cute_quant.rms_norm_quantize(x.cuda(), weight.cuda(), rounding=rounding)
    assert_quantized_as(q, sf, DEEP_GEMM, norm_bounds(x.float(), weight, 1e-6, 0.0, rounding, BF16))
