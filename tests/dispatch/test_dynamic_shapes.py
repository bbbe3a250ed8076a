"""Sizes that vary, or that only the run can tell, under torch.compile and torch.export."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import cute_quant as cq
from tests.helpers import EVERY_LAYOUT, bits

FORMATS = [*EVERY_LAYOUT, cq.ROWWISE_FP8, cq.MXFP8.replace(min_scale="ocp")]
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)


def dequantize(x):
    q, sf = cq.quantize(x, cq.MXFP8)
    return (cq.dequantize(q, sf, cq.MXFP8),)


def fake_quantize(x):
    return (cq.fake_quantize(x, cq.DEEP_GEMM_32),)


def silu_mul_quantize(x):
    return cq.silu_mul_quantize(x, weight=x.new_ones(x.shape[0], dtype=torch.float32))


def rms_norm_quantize(x):
    weight, residual = x.new_ones(x.shape[1]), torch.ones_like(x)
    return cq.rms_norm_quantize(x, weight, residual=residual, normalized=True)


def quantize_into(x):
    out = torch.empty_like(x, dtype=torch.float8_e4m3fn), cq.empty_scales(cq.MXFP8, x.shape)
    return cq.quantize(x, cq.MXFP8, out=out)


OPERATIONS = [dequantize, fake_quantize, silu_mul_quantize, rms_norm_quantize, quantize_into]
every_operation = pytest.mark.parametrize("operation", [cq.quantize, *OPERATIONS])


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def assert_same(function: Callable[..., Any], compiled: Callable[..., Any], *args: Any) -> None:
    for actual, expected in zip(compiled(*args), function(*args), strict=True):
        assert actual.shape == expected.shape and actual.stride() == expected.stride()
        assert torch.equal(bits(actual), bits(expected))


@every_format
def test_one_graph_for_all_numbers_of_rows(fmt):
    """Whether mn is a multiple of 4 decides about padding, and must not be guarded on."""

    def function(x):
        return cq.quantize(x, fmt)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, dynamic=True, fullgraph=True, backend=counter)
    for mn in (8, 5, 6, 16, 2, 7):
        assert_same(function, compiled, normal(mn, 512))
    assert counter.frame_count == 1


def test_one_graph_for_fused_operations():
    weight = normal(512)

    def function(x):
        residual = torch.zeros_like(x)
        return (
            *cq.silu_mul_quantize(x, cq.MXFP8),
            *cq.rms_norm_quantize(x, weight),
            *cq.rms_norm_quantize(x, weight, residual=residual, normalized=True),
        )

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, dynamic=True, fullgraph=True, backend=counter)
    assert_same(function, compiled, normal(8, 512))
    first = counter.frame_count
    for mn in (5, 6, 16):
        assert_same(function, compiled, normal(mn, 512))
    assert counter.frame_count == first


@every_format
def test_rows_that_only_the_run_counts(fmt):
    def function(x, mask):
        return cq.quantize(x[mask], fmt)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = normal(16, 512)
    for count in (16, 5, 1, 0):
        assert_same(function, compiled, x, torch.arange(16) < count)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_operations_on_rows_that_only_the_run_counts(backend):
    weight = normal(512)

    def function(x, mask, other):
        rows = x[mask]
        q, sf = cq.quantize(rows)
        return (
            cq.dequantize(q, sf),
            cq.fake_quantize(rows, cq.DEEP_GEMM_32),
            *cq.silu_mul_quantize(rows),
            *cq.rms_norm_quantize(rows, weight),
            *cq.rms_norm_quantize(rows, weight, residual=other[mask], normalized=True),
        )

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    assert_same(function, compiled, normal(16, 512), torch.arange(16) % 3 > 0, normal(16, 512))


@every_operation
def test_a_dimension_marked_unbacked(operation):
    x = normal(9, 512)
    torch._dynamo.decorators.mark_unbacked(x, 0)
    compiled = torch.compile(operation, fullgraph=True, backend="aot_eager")
    assert_same(operation, compiled, x)
    assert_same(operation, compiled, normal(14, 512))


@every_format
@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1)], ids=str)
def test_dimensions_of_a_batch_marked_unbacked(dims, fmt):
    def function(x):
        q, sf = cq.quantize(x, fmt)
        return q, sf, cq.dequantize(q, sf, fmt), cq.fake_quantize(x, fmt)

    x = normal(3, 9, 512)
    for dim in dims:
        torch._dynamo.decorators.mark_unbacked(x, dim)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(function, compiled, x)


@pytest.mark.parametrize("fmt", [cq.DEEP_GEMM, cq.MXFP8, cq.GROUPWISE_FP8], ids=str)
def test_values_and_scales_marked_unbacked(fmt):
    """Whether both have as many rows is checked in the run."""
    q, sf = cq.quantize(normal(9, 512), fmt)
    torch._dynamo.decorators.mark_unbacked(q, 0)
    torch._dynamo.decorators.mark_unbacked(sf, 0)

    def function(q, sf):
        return (cq.dequantize(q, sf, fmt),)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(function, compiled, q, sf)
    with pytest.raises(Exception, match="sf: expected shape"):
        compiled(q, cq.quantize(normal(256, 512), fmt)[1])


def assert_exported(function: Callable[..., Any], sizes: tuple[int, ...]) -> None:
    class Module(torch.nn.Module):
        def forward(self, x):
            return function(x)

    dynamic = {"x": {0: torch.export.Dim("b", min=2)}}
    exported = torch.export.export(Module(), (normal(9, 512),), dynamic_shapes=dynamic)
    for mn in sizes:
        assert_same(function, exported.module(), normal(mn, 512))


@every_format
def test_export_of_a_format_with_a_dynamic_dimension(fmt):
    assert_exported(lambda x: cq.quantize(x, fmt), (9, 14, 2))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_export_of_an_operation_with_a_dynamic_dimension(operation):
    assert_exported(operation, (9, 14, 2))


def test_a_count_that_does_not_fit_is_refused_in_the_run():
    """A check that a graph leaves open is made when it runs."""

    def function(x, mask, counts):
        return cq.quantize(x[mask], rows=cq.PrefixSum(counts, 2**31))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"rows\.alignment: expected 1 to"):
        compiled(normal(8, 512), torch.arange(8) < 5, torch.tensor([3], dtype=torch.int32))
