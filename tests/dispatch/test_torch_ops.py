"""Under torch: the registered operators, compilation, export, graphs, streams, threads."""

import io
import math
import subprocess
import sys
import threading

import pytest
import torch
from torch._export.serde import serialize
from torch._functorch.compile_utils import fx_graph_cse
from torch._inductor.utils import run_and_get_code
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from cute_quant import (
    DEEP_GEMM,
    DEEP_GEMM_32,
    DEEP_GEMM_SM90,
    GROUPWISE_FP8,
    INT8,
    MXFP8,
    Indexed,
    Masked,
    PrefixSum,
    dequantize,
    fake_quantize,
    quantize,
    rms_norm_quantize,
    silu_mul_quantize,
)
from cute_quant.contract.rows import from_operands, to_operands
from cute_quant.integrations.deep_gemm import per_token_cast_to_fp8
from cute_quant.integrations.vllm import per_token_group_quant_fp8_packed_for_deepgemm
from tests.helpers import (
    EVERY_DTYPE,
    FORMATS,
    UE8M0,
    all_formats,
    assert_same_bits,
    bits,
    poisoned_scales,
    poisoned_values,
    random_bits,
)

every_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)
LAYOUTS = [*all_formats((torch.float8_e4m3fn,), (32,)), *all_formats((torch.int8,), (-1,))[:2]]
every_layout = pytest.mark.parametrize("fmt", LAYOUTS, ids=str)
ROWS = [1, 3, 4, 5, 33]


operators = torch.ops.cute_quant


def end_of_operands(fmt, rows=None, index=None):
    """The last positional arguments of an operator: format, counts and index."""
    return str(fmt), to_operands(rows).row_data, index


def row_keywords(rows=None):
    kind, _, alignment = to_operands(rows)
    return {"rows": kind, "alignment": alignment}


def activations(mn, device, k=640, seed=0):
    return random_bits((mn, k), torch.bfloat16, seed=seed).to(device)


def test_import_is_quick_and_needs_no_dsl():
    program = (
        "import sys, torch, time; before = set(sys.modules); start = time.perf_counter();"
        "import cute_quant; seconds = time.perf_counter() - start;"
        "came = {'cutlass', 'tvm_ffi', 'cuda'} & (set(sys.modules) - before);"
        "assert not came, came; assert seconds < 1, seconds"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@every_format
@pytest.mark.parametrize("mn", [0, *ROWS])
def test_opcheck(fmt, mn, device):
    # opcheck compares with allclose, to which a NaN differs from itself.
    x = torch.randn(mn, 640, generator=torch.Generator().manual_seed(mn)).to(torch.bfloat16)
    x = x.to(device)
    torch.library.opcheck(operators.quantize.default, (x, str(fmt)))


@every_format
@pytest.mark.parametrize("mn", [4, 8])
def test_opcheck_out(fmt, mn, device):
    # opcheck clones its arguments, which keeps the strides of scales only where mn is aligned, and
    # compares them with allclose, which float8 lacks.
    utils = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    args = (
        activations(mn, device),
        poisoned_values(mn + 3, 640, device),
        poisoned_scales(fmt, mn, 640, device),
    )
    operator = operators.quantize_out.default
    torch.library.opcheck(operator, (*args, None, str(fmt)), test_utils=utils)


@every_format
@pytest.mark.parametrize("mn", [0, *ROWS])
def test_fake_tensors_have_the_shapes_dtypes_and_strides(fmt, mn, device):
    x = activations(mn, device)
    real = quantize(x, fmt)
    mode = FakeTensorMode()
    fake = quantize(mode.from_tensor(x), fmt)
    meta = quantize(x.to("meta"), fmt)
    for results in (fake, meta):
        for result, expected in zip(results, real, strict=True):
            assert result.shape == expected.shape and result.dtype == expected.dtype
            assert result.stride() == expected.stride()
    assert fake[0].device == x.device and meta[0].is_meta


def test_fake_tensors_are_checked():
    with FakeTensorMode(), pytest.raises(ValueError, match="x: expected rows contiguous along k"):
        quantize(torch.empty(128, 4, dtype=torch.bfloat16).t())
    with FakeTensorMode(), pytest.raises(TypeError, match="fmt: expected a Format"):
        quantize(torch.empty(4, 128, dtype=torch.bfloat16), "e4m3:128")


@pytest.mark.slow
@every_format
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_gives_the_same_bits_and_strides(fmt, dynamic, device):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=dynamic)
    def compiled(x):
        return quantize(x * 2, fmt)

    for mn in ROWS:
        x = activations(mn, device)
        q, sf = compiled(x)
        expected_q, expected_sf = quantize(x * 2, fmt)
        assert_same_bits(q, expected_q)
        assert_same_bits(sf, expected_sf)
        assert q.stride() == expected_q.stride() and sf.stride() == expected_sf.stride()


@pytest.mark.slow
@every_format
@pytest.mark.parametrize("given", ["both", "q", "sf"])
def test_compile_with_out(fmt, given, device):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True)
    def compiled(x, q, sf):
        q, sf = quantize(x, fmt, out=(q, sf))
        return q, sf, dequantize(q[: x.shape[0]], sf, fmt)

    for mn in ROWS:
        x = activations(mn, device)
        q = None if given == "sf" else poisoned_values(mn + 2, 640, device)
        sf = None if given == "q" else poisoned_scales(fmt, mn, 640, device)
        result_q, result_sf, y = compiled(x, q, sf)
        expected_q, expected_sf = quantize(x, fmt)
        assert_same_bits(result_q[:mn], expected_q)
        assert_same_bits(result_sf, expected_sf)
        assert result_sf.stride() == expected_sf.stride()
        assert bits(result_q[mn:]).eq(0).all()
        torch.testing.assert_close(y, dequantize(expected_q, expected_sf, fmt), equal_nan=True)
        if q is not None:
            assert_same_bits(q[:mn], expected_q)
        if sf is not None:
            assert_same_bits(sf, expected_sf)


@every_format
def test_export_with_any_number_of_rows(fmt):
    """One graph for all rows: nothing in the operator's fake depends on mn % 4."""

    class Module(torch.nn.Module):
        def forward(self, x):
            return quantize(x, fmt)

    rows = torch.export.Dim("rows", min=2, max=99)
    example = (torch.ones(8, 640, dtype=torch.bfloat16),)
    program = torch.export.export(Module(), example, dynamic_shapes=({0: rows},)).module()
    for mn in (4, 5, 33):
        x = activations(mn, "cpu")
        for result, expected in zip(program(x), quantize(x, fmt), strict=True):
            assert_same_bits(result, expected)
            assert result.stride() == expected.stride()


@pytest.mark.parametrize("first", [8, 5])
def test_compiled_once_for_any_number_of_rows(first, device):
    """As serving engines compile: without guards, what was traced has to hold for every mn."""
    torch._dynamo.reset()
    drop = {"guard_filter_fn": lambda guards: [False for _ in guards]}
    compiled = torch.compile(lambda x: quantize(x), fullgraph=True, options=drop)
    for mn in (first, 5, 33, 4, 6):
        x = activations(mn, device)
        torch._dynamo.mark_dynamic(x, 0)
        for result, expected in zip(compiled(x), quantize(x), strict=True):
            assert_same_bits(result, expected)
            assert result.stride() == expected.stride()


def test_integrations_compile(device):
    torch._dynamo.reset()
    x = torch.randn(5, 3, 256, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    x = x.to(device)
    calls = [
        lambda x: per_token_group_quant_fp8_packed_for_deepgemm(x, 128),
        lambda x: per_token_group_quant_fp8_packed_for_deepgemm(x[:, :, 128:], 128, eps=1e-4),
        lambda x: per_token_group_quant_fp8_packed_for_deepgemm(x, 32),
        lambda x: per_token_cast_to_fp8(x[0], True),
        lambda x: per_token_cast_to_fp8(x[0, :, :200], True, gran_k=32),
        lambda x: per_token_cast_to_fp8(x[0], False),
        lambda x: per_token_cast_to_fp8(x[0], True, use_packed_ue8m0=True),
    ]
    for call in calls:
        compiled = torch.compile(call, fullgraph=True)
        for result, expected in zip(compiled(x), call(x), strict=True):
            assert_same_bits(result, expected)
            assert result.stride() == expected.stride()
    with FakeTensorMode() as mode:
        q, sf = per_token_group_quant_fp8_packed_for_deepgemm(mode.from_tensor(x), 128)
    assert q.shape == x.shape and sf.stride() == (1, 16)


def test_global_defaults_do_not_matter():
    x = activations(5, "cpu")
    expected = [quantize(x, fmt) for fmt in FORMATS]
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        results = [quantize(x, fmt) for fmt in FORMATS]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for pair, wanted in zip(results, expected, strict=True):
        for result, want in zip(pair, wanted, strict=True):
            assert_same_bits(result, want)


def test_operator_has_no_gradient(device):
    x = torch.ones(4, 128, dtype=torch.bfloat16, device=device, requires_grad=True)
    compiled = torch.compile(lambda x: quantize(x))
    with pytest.raises(Exception, match="not differentiable"):
        compiled(x)


def normal(*shape, device, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)


def as_stored(sf):
    """Scales as operators take and return them."""
    return sf.view(torch.uint8) if sf.dtype == torch.float8_e8m0fnu else sf


def int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def kinds_of_rows(device):
    """x, rows, index: results in which every row is defined, so that they can be compared."""
    return [
        (normal(2, 3, 70, device=device), None, None),
        (normal(2, 3, 70, device=device), Masked(int32([3, 3], device)), None),
        (normal(9, 70, device=device), PrefixSum(int32([3, 6, 9], device), 4), None),
        (normal(9, 70, device=device), Indexed(int32([0, 1, -1] * 3, device)), None),
        (normal(9, 70, device=device), None, int32([[4, 1, -1], [0, 0, 9]], device)),
        (normal(9, 70, device=device), PrefixSum(int32([3], device)), int32([4, 1, 2, 3], device)),
    ]


def every_kind_of_rows(formats):
    """Return the mark of tests of formats and `kinds_of_rows`.

    Masked rows leave the rest of their last block as it was, so not all of a result is defined.
    """
    kinds = [rows for _, rows, _ in kinds_of_rows("cpu")]
    cases = [
        pytest.param(fmt, case, id=f"{fmt}-{case}")
        for fmt in formats
        for case, rows in enumerate(kinds)
        if not (fmt.blocked and isinstance(rows, Masked))
    ]
    return pytest.mark.parametrize(("fmt", "case"), cases)


@pytest.mark.slow
@every_kind_of_rows(LAYOUTS)
def test_opcheck_of_all_rows(case, fmt, device):
    x, rows, index = kinds_of_rows(device)[case]
    torch.library.opcheck(
        operators.quantize.default, (x, *end_of_operands(fmt, rows, index)), row_keywords(rows)
    )


@pytest.mark.slow
@every_layout
@pytest.mark.parametrize("out", [torch.bfloat16, torch.float32], ids=str)
def test_opcheck_dequantize(out, fmt, device):
    # The schema's test computes with its arguments, which float8 on the CPU cannot.
    utils = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for shape in ((5, 70), (2, 3, 70), (3, 0)):
        q, sf = quantize(normal(*shape, device=device), fmt)
        for stored in (sf, as_stored(sf)):
            args = (q, stored, str(fmt), out)
            torch.library.opcheck(operators.dequantize.default, args, test_utils=utils)


@every_layout
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_opcheck_fake_quantize(dtype, fmt, device):
    for shape in ((5, 70), (2, 3, 70), (3, 0)):
        x = normal(*shape, device=device, dtype=dtype)
        torch.library.opcheck(operators.fake_quantize.default, (x, str(fmt)))


@every_layout
def test_fakes_of_all_rows(fmt, device):
    for x, rows, index in kinds_of_rows(device):
        real = quantize(x, fmt, rows=rows, index=index)
        with FakeTensorMode() as mode:
            to_fake = lambda t: None if t is None else mode.from_tensor(t)  # noqa: E731
            row_operands = to_operands(rows)
            fake_rows = from_operands(
                row_operands._replace(row_data=to_fake(row_operands.row_data))
            )
            fake = quantize(to_fake(x), fmt, rows=fake_rows, index=to_fake(index))
            y = dequantize(*fake, fmt)
        for result, expected in zip(fake, real, strict=True):
            assert result.shape == expected.shape and result.dtype == expected.dtype
            assert result.stride() == expected.stride()
        assert y.shape == real[0].shape and y.dtype == torch.bfloat16


@pytest.mark.slow
@every_layout
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_all_rows(dynamic, fmt, device):
    """Rows are made inside of the graph and come from outside."""
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=dynamic)
    def masked(x, counts):
        q, sf = quantize(x, fmt, rows=Masked(counts))
        return q, sf, dequantize(q, sf, fmt)

    @torch.compile(fullgraph=True, dynamic=dynamic)
    def routed(x, rows, index):
        q, sf = quantize(x * 2, fmt, rows=rows, index=index)
        return q, sf, fake_quantize(x, fmt)

    for mn in (2, 5, 8):
        x = normal(3, mn, 70, device=device)
        counts = int32([mn] * 3, device)
        q, sf = quantize(x, fmt)
        results = (q, sf, dequantize(q, sf, fmt))
        for result, expected in zip(masked(x, counts), results, strict=True):
            if expected is not sf or not fmt.blocked:  # the rest of a block keeps what it held
                assert_same_bits(result, expected)
            assert result.stride() == expected.stride()
        x = x.flatten(0, 1)
        index = torch.arange(2 * mn, device=device, dtype=torch.int32) - 1
        rows = PrefixSum(int32([1, mn], device), 3)
        q, sf = quantize(x * 2, fmt, rows=rows, index=index)
        results = (q, sf, fake_quantize(x, fmt))
        for result, expected in zip(routed(x, rows, index), results, strict=True):
            assert_same_bits(result, expected)
            assert result.stride() == expected.stride()


@pytest.mark.slow
@every_layout
@pytest.mark.parametrize("given", ["both", "q", "sf"])
def test_compile_with_any_out(given, fmt, device):
    torch._dynamo.reset()
    # On the CPU Inductor has no code for float8_e8m0fnu that comes from outside of the graph.
    limited = given != "q" and fmt.sf_dtype == torch.float8_e8m0fnu

    @torch.compile(fullgraph=True, backend="aot_eager" if limited else "inductor")
    def compiled(x, q, sf, y):
        return *quantize(x, fmt, out=(q, sf)), fake_quantize(x, fmt, out=y)

    for mn in (3, 4):
        x = normal(2, mn, 70, device=device)
        q = poisoned_values(mn + 2, 70, device, fmt.values, (2,)) if given != "sf" else None
        sf = poisoned_scales(fmt, mn, 70, device, batch_shape=(2,)) if given != "q" else None
        y = torch.zeros_like(x)
        result_q, result_sf, result_y = compiled(x, q, sf, y)
        expected_q, expected_sf = quantize(x, fmt)
        for out, result in ((q, result_q), (sf, result_sf), (y, result_y)):
            if out is not None:
                assert_same_bits(out, result)
        assert_same_bits(result_q[:, :mn], expected_q)
        assert bits(result_q[:, mn:]).eq(0).all()
        assert_same_bits(result_sf, expected_sf)
        assert result_sf.stride() == expected_sf.stride()
        assert_same_bits(y, fake_quantize(x, fmt))


@pytest.mark.parametrize("fmt", all_formats((torch.float8_e4m3fn,), (32,)), ids=str)
def test_export_any_batch_and_rows(fmt):
    """Two columns of scales or more: torch asks whether one column of a batch is contiguous."""

    class Module(torch.nn.Module):
        def forward(self, x, index):
            q, sf = quantize(x, fmt)
            return (
                q,
                sf,
                dequantize(q, sf, fmt),
                *quantize(x[0], fmt, index=index),
            )

    sizes = {
        0: torch.export.Dim("batch", min=2, max=99),
        1: torch.export.Dim("rows", min=2, max=999),
    }
    shapes = (sizes, {0: torch.export.Dim("tokens", min=2, max=999)})
    index = torch.zeros(5, dtype=torch.int32)
    example = (torch.ones(2, 8, 300), index)
    program = torch.export.export(Module(), example, dynamic_shapes=shapes).module()
    for batch, mn in ((2, 4), (3, 5), (7, 33)):
        x = normal(batch, mn, 300, device="cpu", dtype=torch.float32)
        index = torch.arange(batch + mn, dtype=torch.int32) - 1
        for result, expected in zip(program(x, index), Module()(x, index), strict=True):
            assert_same_bits(result, expected)
            assert result.stride() == expected.stride()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("min_scale", ["vllm", "deepgemm", "sglang", "ocp"])
def test_compiled_presets(min_scale, dtype, device):
    torch._dynamo.reset()
    x = normal(4, 70, device=device) * 1e-8
    fmt = DEEP_GEMM.replace(values=dtype, min_scale=min_scale)
    compiled = torch.compile(lambda x: quantize(x, fmt), fullgraph=True)
    for result, expected in zip(compiled(x), quantize(x, fmt), strict=True):
        assert_same_bits(result, expected)


# What scales are to torch: int32 with strides, contiguous floats, bytes.
SOME_LAYOUTS = [
    DEEP_GEMM_32,
    GROUPWISE_FP8.replace(group_size=32),
    DEEP_GEMM_32.replace(scale_layout="row_major"),
    MXFP8,
]
some_layouts = pytest.mark.parametrize("fmt", SOME_LAYOUTS, ids=str)
SILU_MUL_OPTIONS = ("interleaved", "clamp", "alpha", "beta", "rounding")
GPT_OSS = dict(zip(SILU_MUL_OPTIONS, (True, 7.0, 1.702, 1.0, "fused"), strict=True))
PLAIN = dict(zip(SILU_MUL_OPTIONS, (False, None, 1.0, 0.0, "unfused"), strict=True))


@pytest.mark.slow
@every_kind_of_rows(SOME_LAYOUTS)
@pytest.mark.parametrize("options", [PLAIN, GPT_OSS], ids=["plain", "gpt-oss"])
def test_opcheck_silu_mul(options, case, fmt, device):
    x, rows, index = kinds_of_rows(device)[case]
    weight = torch.ones(x.shape[:-1] if index is None else index.shape, device=device)
    for w in (None, weight):
        args = (x, w, *end_of_operands(fmt, rows, index))
        operator = operators.silu_mul_quantize.default
        torch.library.opcheck(operator, args, options | row_keywords(rows))


# opcheck compares what is written with allclose, which float8 lacks, and clones its arguments.
OUT_UTILS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@every_format
def test_opcheck_silu_mul_out(fmt, device):
    out = poisoned_values(11, 320, device), poisoned_scales(fmt, 8, 320, device)
    args = (activations(8, device), torch.ones(8, device=device), *out, None, str(fmt))
    operator = operators.silu_mul_quantize_out.default
    torch.library.opcheck(operator, args, GPT_OSS, test_utils=OUT_UTILS)


@every_kind_of_rows(SOME_LAYOUTS)
def test_opcheck_rms_norm(case, fmt, device):
    x, rows, index = kinds_of_rows(device)[case]
    weight = normal(70, device=device)
    options = {"eps": 1e-6, "weight_offset": 1.0, "rounding": "fused"}
    torch.library.opcheck(
        operators.rms_norm_quantize.default,
        (x, weight, *end_of_operands(fmt, rows, index)),
        options | row_keywords(rows),
    )


@some_layouts
def test_opcheck_rms_norm_with_a_residual(fmt, device):
    x, weight = normal(2, 3, 70, device=device), normal(70, device=device)
    residual, other, row = (normal(*x.shape, device=device) for _ in range(3))
    options = {"eps": 1e-6, "weight_offset": 1.0, "rounding": "fused"}
    for rows in (
        (None, residual, None),
        (None, None, row),
        (residual, other, None),
        (residual, other, row),
    ):
        args = (x, weight, *rows, str(fmt))
        torch.library.opcheck(operators.rms_norm_quantize_residual.default, args, options)


@pytest.mark.slow
@every_format
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
def test_opcheck_rms_norm_out(normalized, in_place, fmt, device):
    x = activations(8, device)
    residual, row = torch.ones_like(x), torch.empty_like(x) if normalized else None
    args = (
        x,
        normal(640, device=device),
        poisoned_values(11, 640, device),
        poisoned_scales(fmt, 8, 640, device),
        None,
        None if in_place else residual,
        residual if in_place else torch.empty_like(x),
        row,
        str(fmt),
    )
    options = {"eps": 1e-6, "weight_offset": 0.0, "rounding": "unfused"}
    operator = operators.rms_norm_quantize_out.default
    torch.library.opcheck(operator, args, options, test_utils=OUT_UTILS)


def prologue_calls(fmt):
    """Calls on x, a factor of each row, one of each column, and a residual."""
    return [
        lambda x, row, column, residual: silu_mul_quantize(x, fmt),
        lambda x, row, column, residual: silu_mul_quantize(
            x, fmt, weight=row, interleaved=True, clamp=7, alpha=1.702, beta=1
        ),
        lambda x, row, column, residual: rms_norm_quantize(x, column, fmt),
        lambda x, row, column, residual: rms_norm_quantize(
            x, column, fmt, eps=1e-5, weight_offset=1, normalized=True
        ),
        lambda x, row, column, residual: rms_norm_quantize(x, column, fmt, residual=residual),
        lambda x, row, column, residual: rms_norm_quantize(
            x, column, fmt, residual=residual, rounding="unfused", normalized=True
        ),
        lambda x, row, column, residual: rms_norm_quantize(
            x, column, fmt, residual=residual, out=(None, None, residual)
        ),
        lambda x, row, column, residual: rms_norm_quantize(
            x, column, fmt, residual=residual, out=(None, None, torch.empty_like(x))
        ),
    ]


every_call = pytest.mark.parametrize("call", range(8))


def prologue_inputs(*shape, device):
    x, residual = normal(*shape, device=device), normal(*shape, device=device) * 2
    row = torch.linspace(-1, 1, math.prod(shape[:-1])).to(device)
    return x, row.view(shape[:-1]), normal(shape[-1], device=device), residual


@every_call
@some_layouts
def test_fakes_of_prologues(fmt, call, device):
    call = prologue_calls(fmt)[call]
    for shape in ((5, 70), (2, 3, 70), (0, 70), (3, 0)):
        inputs = prologue_inputs(*shape, device=device)
        real = call(*inputs)
        mode = FakeTensorMode()
        fake = call(*map(mode.from_tensor, inputs))
        meta = call(*(t.to("meta") for t in inputs))
        assert len(fake) == len(meta) == len(real)
        for results in (fake, meta):
            for result, expected in zip(results, real, strict=True):
                assert result.shape == expected.shape and result.dtype == expected.dtype
                assert result.stride() == expected.stride()
        assert fake[0].device == inputs[0].device and meta[0].is_meta


def test_fakes_of_prologues_are_checked():
    with FakeTensorMode():
        x, weight = torch.empty(4, 70), torch.empty(70)
        with pytest.raises(ValueError, match="gate_up: expected an even number"):
            silu_mul_quantize(x[:, :69])
        with pytest.raises(ValueError, match="weight: expected shape"):
            rms_norm_quantize(x, weight[:69])
        with pytest.raises(ValueError, match="residual: expected shape"):
            rms_norm_quantize(x, weight, residual=x[:3])
        with pytest.raises(ValueError, match="check: expected False under a tracer"):
            rms_norm_quantize(x, weight, check=True)
        with pytest.raises(ValueError, match="check: expected False under a tracer"):
            silu_mul_quantize(x, check=True)


@pytest.mark.slow
@every_call
@some_layouts
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_prologues(dynamic, fmt, call, device):
    torch._dynamo.reset()
    call = prologue_calls(fmt)[call]
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic)
    for shape in ((2, 3, 70), (2, 5, 70)):
        inputs = prologue_inputs(*shape, device=device)
        others = [t.clone() for t in inputs]
        results, expected = compiled(*inputs), call(*others)
        assert len(results) == len(expected)
        for result, wanted in zip(results, expected, strict=True):
            assert_same_bits(result, wanted)
            assert result.stride() == wanted.stride()
        for result, wanted in zip(inputs, others, strict=True):
            assert_same_bits(result, wanted)


@pytest.mark.slow
@some_layouts
@pytest.mark.parametrize("given", ["both", "q", "sf"])
def test_compiled_prologues_with_out(given, fmt, device):
    torch._dynamo.reset()
    # On the CPU Inductor has no code for float8_e8m0fnu that comes from outside of the graph.
    limited = given != "q" and fmt.sf_dtype == torch.float8_e8m0fnu
    backend = "aot_eager" if limited else "inductor"

    def silu_mul(x, out):
        return silu_mul_quantize(torch.cat([x, x + 1], -1), fmt, out=out)

    def rms_norm(x, column, residual, out, row):
        return rms_norm_quantize(x, column, fmt, residual=residual, normalized=row, out=out)

    for mn in (3, 4):
        x, _, column, residual = prologue_inputs(2, mn, 70, device=device)
        for call, inputs, more in (
            (silu_mul, (x,), ()),
            (rms_norm, (x, column, residual), (torch.empty_like(x),)),
        ):
            q = poisoned_values(mn + 2, 70, device, fmt.values, (2,)) if given != "sf" else None
            sf = poisoned_scales(fmt, mn, 70, device, batch_shape=(2,)) if given != "q" else None
            expected = call(*(t.clone() for t in inputs), None, *map(torch.clone, more))
            compiled = torch.compile(call, fullgraph=True, backend=backend)
            results = compiled(*inputs, (q, sf), *more)
            assert bits(results[0][:, mn:]).eq(0).all()
            for result, wanted in zip((results[0][:, :mn], *results[1:]), expected, strict=True):
                assert_same_bits(result, wanted)
            for out, result in ((q, results[0]), (sf, results[1])):
                assert out is None or bits(out).equal(bits(result))
            if more:
                assert_same_bits(residual, expected[2])
                assert_same_bits(more[0], expected[3])


def test_compiled_residual_is_updated_in_place(device):
    """The operator gets the residual itself: the generated code allocates and copies nothing."""
    torch._dynamo.reset()

    def call(x, weight, residual):
        return rms_norm_quantize(x, weight, eps=1e-6, residual=residual)

    x, _, weight, residual = prologue_inputs(8, 256, device=device)
    expected = call(x, weight, residual.clone())
    compiled = torch.compile(call, fullgraph=True)
    results, (code,) = run_and_get_code(compiled, x, weight, residual)
    for result, wanted in zip(results, expected, strict=True):
        assert_same_bits(result, wanted)
    assert results[2].data_ptr() == residual.data_ptr()
    assert_same_bits(residual, expected[2])
    code = code[code.index("def call(") : code.index("def get_args(")]
    assert code.count("torch.ops.cute_quant.rms_norm_quantize_residual.default(") == 1
    assert "empty_strided" not in code and "copy_(" not in code


@pytest.mark.parametrize("first", [8, 5])
def test_prologues_compiled_once_for_any_number_of_rows(first, device):
    torch._dynamo.reset()
    drop = {"guard_filter_fn": lambda guards: [False for _ in guards]}
    for call in prologue_calls(FORMATS[0]):
        compiled = torch.compile(call, fullgraph=True, options=drop)
        for mn in (first, 5, 33, 4, 6):
            inputs = prologue_inputs(mn, 640, device=device)
            expected = call(*(t.clone() for t in inputs))
            for t in (inputs[0], inputs[1], inputs[3]):
                torch._dynamo.mark_dynamic(t, 0)
            for result, wanted in zip(compiled(*inputs), expected, strict=True):
                assert_same_bits(result, wanted)
                assert result.stride() == wanted.stride()


@every_format
@every_call
def test_export_prologues_with_any_number_of_rows(call, fmt):
    class Module(torch.nn.Module):
        def forward(self, x, row, column, residual):
            return prologue_calls(fmt)[call](x, row, column, residual)

    rows = torch.export.Dim("rows", min=2, max=99)
    shapes = ({0: rows}, {0: rows}, {}, {0: rows})
    example = prologue_inputs(8, 640, device="cpu")
    program = torch.export.export(Module(), example, dynamic_shapes=shapes).module()
    for mn in (4, 5, 33):
        inputs = prologue_inputs(mn, 640, device="cpu")
        expected = Module()(*(t.clone() for t in inputs))
        for result, wanted in zip(program(*inputs), expected, strict=True):
            assert_same_bits(result, wanted)
            assert result.stride() == wanted.stride()


# What needs all of a format's text: other values, groups, scales, bounds and roundings.
not_default = pytest.mark.parametrize(
    "fmt",
    [
        DEEP_GEMM_32.replace(min_scale="ocp"),
        DEEP_GEMM_SM90.replace(group_size=64, min_scale=0.1, numerics="deepgemm"),
        GROUPWISE_FP8.replace(values=torch.float8_e5m2, group_size=16, round_scale=True),
        DEEP_GEMM.replace(scale_layout="row_major"),
        MXFP8,
        INT8.replace(group_size=-1, min_scale="sglang"),
    ],
    ids=str,
)


@not_default
@pytest.mark.parametrize("name", ["quantize", "silu_mul", "rms_norm", "residual", "dequantize"])
def test_exported_programs_are_saved_and_loaded(name, fmt):
    if fmt.sf_dtype not in serialize._TORCH_TO_SERIALIZE_DTYPE:
        pytest.skip(f"this torch saves no program with {fmt.sf_dtype}")

    class Module(torch.nn.Module):
        def forward(self, x, row, column, residual):
            if name == "quantize":
                return quantize(x, fmt)
            if name == "dequantize":
                return dequantize(*quantize(x, fmt), fmt, dtype=x.dtype), fake_quantize(x, fmt)
            calls = prologue_calls(fmt)
            return calls[{"silu_mul": 1, "rms_norm": 2, "residual": 5}[name]](
                x, row, column, residual
            )

    program = torch.export.export(Module(), prologue_inputs(2, 5, 70, device="cpu"))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    inputs, others = ([t * 3 for t in prologue_inputs(2, 5, 70, device="cpu")] for _ in range(2))
    for result, wanted in zip(loaded(*inputs), Module()(*others), strict=True):
        assert_same_bits(result, wanted)
        assert result.stride() == wanted.stride()
    for t, wanted in zip(inputs, others, strict=True):
        assert_same_bits(t, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", [MXFP8, DEEP_GEMM.replace(scale_layout="row_major")], ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
def test_graphs_compute_with_bytes_of_scales(dynamic, fmt, device):
    """Scales of float8_e8m0fnu stay inside of a graph, and bytes of them are used there."""

    def call(x, row, column, residual):
        results = (
            quantize(x, fmt),
            silu_mul_quantize(x, fmt, weight=row),
            rms_norm_quantize(x, column, fmt),
            rms_norm_quantize(x, column, fmt, residual=residual)[:2],
        )
        return [
            (q.view(torch.uint8) + 0, sf.view(torch.uint8) + 0, dequantize(q, sf, fmt))
            for q, sf in results
        ]

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic)
    for mn in (5, 8):
        inputs, others = (prologue_inputs(mn, 300, device=device) for _ in range(2))
        for results, expected in zip(compiled(*inputs), call(*others), strict=True):
            for result, wanted in zip(results, expected, strict=True):
                assert_same_bits(result, wanted)


def count_calls(graph, *names):
    targets = [getattr(operators, name).default for name in names]
    return sum(node.target in targets for node in graph.nodes)


@some_layouts
def test_equal_calls_are_merged(fmt):
    """An operator that writes to no argument is a pure function to compilers."""
    x, row, column, _ = prologue_inputs(5, 70, device="cpu")

    def call(x, row, column):
        results = [rms_norm_quantize(x, column, fmt) for _ in range(3)]
        results += [silu_mul_quantize(x, fmt, weight=row) for _ in range(3)]
        results += [quantize(x, fmt) for _ in range(3)]
        return [q.view(torch.uint8) + 0 for q, _ in results]

    names = "rms_norm_quantize", "silu_mul_quantize", "quantize"
    graph = make_fx(call, tracing_mode="fake")(x, row, column).graph
    assert [count_calls(graph, name) for name in names] == [3, 3, 3]
    merged = fx_graph_cse(graph)
    assert [count_calls(merged, name) for name in names] == [1, 1, 1]
    module = torch.fx.GraphModule({}, merged)
    for result, wanted in zip(module(x, row, column), call(x, row, column), strict=True):
        assert_same_bits(result, wanted)


def test_calls_that_write_are_not_merged():
    x, _, column, residual = prologue_inputs(5, 70, device="cpu")

    def call(x, column, residual):
        results = [rms_norm_quantize(x, column, residual=residual)[:2] for _ in range(3)]
        return [q.view(torch.uint8) + 0 for q, _ in results]

    graph = fx_graph_cse(make_fx(call, tracing_mode="fake")(x, column, residual).graph)
    assert count_calls(graph, "rms_norm_quantize_residual") == 3


def calls_by_argument():
    """Arguments that may be inside of a transform, and calls on them."""
    x, row, column, residual = prologue_inputs(5, 70, device="cpu")
    q, sf = quantize(x)
    index = torch.arange(5, dtype=torch.int32)
    return [
        ("x", x, quantize),
        ("x", x, fake_quantize),
        ("x", x, lambda t: rms_norm_quantize(t, column)),
        ("gate_up", x, silu_mul_quantize),
        ("weight", column, lambda t: rms_norm_quantize(x, t, normalized=True)),
        ("weight", row, lambda t: silu_mul_quantize(x, weight=t)),
        ("residual", residual, lambda t: rms_norm_quantize(x, column, residual=t)),
        ("normalized", residual, lambda t: rms_norm_quantize(x, column, normalized=t)),
        ("index", index, lambda t: quantize(x, index=t)),
        ("rows.m_indices", index, lambda t: quantize(x, rows=Indexed(t))),
        ("out q", q, lambda t: quantize(x, out=(t, None))),
        ("out", residual, lambda t: fake_quantize(x, out=t)),
        ("q", q, lambda t: dequantize(t, sf)),
        ("sf", sf, lambda t: dequantize(q, t)),
    ]


def test_vmap_is_refused():
    for name, t, call in calls_by_argument():
        message = rf"^{name}: expected a tensor outside of .* vmap is not supported; got one inside"
        with pytest.raises(RuntimeError, match=message):
            torch.vmap(call)(t.unsqueeze(0))


def test_vmap_of_operators_is_refused():
    """Also where an operator is called by its name, as in a graph."""
    x = torch.ones(2, 4, 128)
    with pytest.raises(RuntimeError, match="vmap is not supported: quantize the batch as leading"):
        torch.vmap(lambda t: operators.quantize(t, str(UE8M0)))(x)


def test_jit_trace_is_refused():
    for _, t, call in calls_by_argument():
        with pytest.raises(
            RuntimeError, match=r"^torch.jit.trace is not supported, it would recor"
        ):
            torch.jit.trace(call, (t,))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_rows_of_prologues(dynamic, device):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=dynamic)
    def routed(x, rows, index, weight, column):
        return (
            *silu_mul_quantize(x, DEEP_GEMM_32, rows=rows, index=index, weight=weight),
            *rms_norm_quantize(x, column, DEEP_GEMM_32, rows=rows, index=index),
        )

    for mn in (2, 5, 8):
        x, column = normal(3 * mn, 70, device=device), normal(70, device=device)
        index = torch.arange(2 * mn, device=device, dtype=torch.int32) - 1
        weight = torch.linspace(-1, 1, 2 * mn, device=device)
        rows = PrefixSum(int32([1, mn], device), 3)
        expected = (
            *silu_mul_quantize(x, DEEP_GEMM_32, rows=rows, index=index, weight=weight),
            *rms_norm_quantize(x, column, DEEP_GEMM_32, rows=rows, index=index),
        )
        for result, wanted in zip(routed(x, rows, index, weight, column), expected, strict=True):
            assert_same_bits(result, wanted)
            assert result.stride() == wanted.stride()


@pytest.mark.parametrize("dynamic", [False, True, None])
def test_compiled_numbers_are_rounded(dynamic, device):
    """Numbers that come into the graph, ints too, are what they are outside of it."""
    torch._dynamo.reset()
    x, _, column, _ = prologue_inputs(5, 70, device=device)

    def call(x, number):
        return (
            *silu_mul_quantize(x, clamp=number, alpha=number, beta=number),
            *rms_norm_quantize(x, column, eps=number, weight_offset=number),
        )

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic)
    for number in (7, 8, 0.1, 1.702):
        for result, wanted in zip(compiled(x, number), call(x, number), strict=True):
            assert_same_bits(result, wanted)


WRITERS = (
    "quantize_out",
    "silu_mul_quantize_out",
    "rms_norm_quantize_residual",
    "rms_norm_quantize_out",
)
"""Operators that write to arguments."""


def writer_arguments(name, device):
    """Tensors by name, and options, of an operator of `WRITERS`."""
    q, sf = poisoned_values(4, 128, device), poisoned_scales(UE8M0, 4, 128, device)
    if name.startswith("rms_norm"):
        x, _, column, residual = prologue_inputs(4, 128, device=device)
        tensors = {"x": x, "weight": column}
        if name.endswith("_out"):
            tensors |= {"q": q, "sf": sf, "row_scales": None}
        tensors |= {"residual": residual, "residual_out": torch.empty_like(x)}
        tensors |= {"normalized": torch.empty_like(x)}
        return tensors, {"eps": 1e-6, "weight_offset": 0.0, "rounding": "fused"}
    if name.startswith("silu_mul"):
        gate_up, row, *_ = prologue_inputs(4, 256, device=device)
        return {"gate_up": gate_up, "weight": row, "q": q, "sf": sf, "row_scales": None}, PLAIN
    return {"x": activations(4, device)[:, :128], "q": q, "sf": sf, "row_scales": None}, {}


@pytest.mark.parametrize("kind", ["real", "meta"])
@pytest.mark.parametrize("name", WRITERS)
def test_autograd_knows_what_operators_write(name, kind, device):
    tensors, options = writer_arguments(name, device)
    if kind == "meta":
        tensors = {argument: t if t is None else t.to("meta") for argument, t in tensors.items()}
    before = {argument: t._version for argument, t in tensors.items() if t is not None}
    getattr(operators, name)(*tensors.values(), str(UE8M0), **options)
    written = {argument for argument in before if tensors[argument]._version > before[argument]}
    assert written == before.keys() - {"x", "gate_up", "weight", "residual"}


def test_operators_take_a_residual_once(device):
    x, _, column, residual = prologue_inputs(4, 128, device=device)
    options = {"eps": 1e-6, "weight_offset": 0.0, "rounding": "fused"}
    with pytest.raises(ValueError, match="residual: expected None where residual_out is updated"):
        operators.rms_norm_quantize_residual(
            x, column, residual, residual, None, str(UE8M0), **options
        )


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_autograd_refuses_what_was_overwritten(backend, device):
    x, _, column, residual = prologue_inputs(4, 128, device=device)
    factor = torch.ones_like(residual, requires_grad=True)

    def call(x, residual, factor):
        saved = residual * factor
        rms_norm_quantize(x, column, residual=residual)
        return saved.sum()

    torch._dynamo.reset()
    compiled = call if backend is None else torch.compile(call, fullgraph=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        compiled(x, residual, factor).backward()


def test_autograd_knows_what_calls_write(device):
    x, _, column, residual = prologue_inputs(4, 128, device=device)
    out = torch.empty_like(x)
    for call in (
        lambda: fake_quantize(x, out=out),
        lambda: rms_norm_quantize(x, column, residual=residual, out=(None, None, out)),
        lambda: rms_norm_quantize(x, column, normalized=out),
    ):
        before = out._version
        call()
        assert out._version > before
    q, sf = quantize(x)
    before = q._version, sf._version
    quantize(x, out=(q, sf))
    assert q._version > before[0] and sf._version > before[1]


def test_dynamo_leaves_operators_alone(device):
    def call(x):
        # No graph goes through an open file: what is called in it is a frame of its own.
        with open("/dev/null"):
            return operators.quantize(x, str(UE8M0))

    torch._dynamo.reset()
    x = activations(6, device)
    for result, wanted in zip(torch.compile(call)(x), quantize(x), strict=True):
        assert_same_bits(result, wanted)


def test_there_are_no_tangents(device):
    x, _, column, residual = (t.float() for t in prologue_inputs(4, 128, device=device))
    q, sf = quantize(x, DEEP_GEMM_SM90)
    calls = {
        "x": (
            quantize,
            fake_quantize,
            lambda t: rms_norm_quantize(t, column),
            lambda t: operators.quantize(t, str(UE8M0)),
            lambda t: operators.fake_quantize(t, str(UE8M0)),
        ),
        "gate_up": (silu_mul_quantize,),
        "weight": (lambda t: rms_norm_quantize(x, t), lambda t: silu_mul_quantize(x, weight=t)),
        "residual": (lambda t: rms_norm_quantize(x, column, residual=t),),
        "sf": (
            lambda t: dequantize(q, t, DEEP_GEMM_SM90),
            lambda t: operators.dequantize(q, t, str(DEEP_GEMM_SM90), x.dtype),
        ),
        "out": (lambda t: fake_quantize(x, out=t),),
        "normalized": (lambda t: rms_norm_quantize(x, column, normalized=t),),
    }
    inputs = {"x": x, "gate_up": x, "weight": column, "residual": residual, "sf": sf}
    with torch.autograd.forward_ad.dual_level():
        for name, functions in calls.items():
            t = inputs.get(name, x.clone())
            dual = torch.autograd.forward_ad.make_dual(t, torch.ones_like(t))
            for function in functions:
                with pytest.raises(RuntimeError, match=f"^{name}: expected a tensor without a tan"):
                    function(dual)
        quantize(x)
        with pytest.raises(TypeError, match="x: expected a strided tensor"):
            quantize(x.to_sparse())
    with pytest.raises(RuntimeError, match=r"^x: expected a tensor without a tangent"):
        torch.func.jvp(quantize, (x,), (x,))


def test_compiled_calls_have_no_tangents(device):
    """From 2.14 on torch refuses a tangent itself, before the call is traced."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: t + fake_quantize(t), backend="eager", fullgraph=True)
    x = activations(4, device).float()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        message = "^x: expected a tensor without a tangent|forward-mode AD tangent"
        with pytest.raises(RuntimeError, match=message):
            compiled(dual)


def test_compiled_prologues_have_no_gradient(device):
    x, row, column, residual = prologue_inputs(4, 70, device=device)
    for call, t in (
        (lambda t: silu_mul_quantize(t), x),
        (lambda t: silu_mul_quantize(x, weight=t), row),
        (lambda t: rms_norm_quantize(t, column), x),
        (lambda t: rms_norm_quantize(x, t), column),
        (lambda t: rms_norm_quantize(x, column, residual=t), residual),
    ):
        torch._dynamo.reset()
        with pytest.raises(Exception, match="not differentiable"):
            torch.compile(call)(t.clone().requires_grad_())


def test_checks_need_real_tensors(device):
    torch._dynamo.reset()
    x = normal(4, 70, device=device)
    compiled = torch.compile(lambda x: quantize(x, check=True), fullgraph=True)
    with pytest.raises(Exception, match="check: expected False under a tracer"):
        compiled(x)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match="check: expected False"):
        quantize(mode.from_tensor(x), check=True)


def test_operators_check_their_rows(device):
    x = normal(4, 70, device=device)
    with pytest.raises(ValueError, match=r"rows: expected one of \('dense', 'masked', .*got 'no'"):
        operators.quantize(x, str(UE8M0), rows="no")
    with pytest.raises(ValueError, match=r"row_data: expected a tensor for rows='indexed', got N"):
        operators.quantize(x, str(UE8M0), rows="indexed")
    with pytest.raises(TypeError, match=r"rows.m_indices: expected a tensor of int32, got a tens"):
        operators.quantize(x, str(UE8M0), x[0], rows="indexed")


def test_operators_check_their_format(device):
    x = normal(4, 70, device=device)
    for text in ("", "ue8m0", "e4m3:128", "e4m3:127:e8m0:mn_major_packed", f"{UE8M0}:min_scale=x"):
        with pytest.raises(ValueError, match=r"fmt: expected one of DEEP_GEMM, .*, got '"):
            operators.quantize(x, text)
    for result, wanted in zip(operators.quantize(x, "INT8"), quantize(x, INT8), strict=True):
        assert_same_bits(result, wanted)


@pytest.mark.gpu
@every_format
def test_cuda_graph(fmt):
    x = activations(37, "cuda")
    expected = quantize(x, fmt)
    q = poisoned_values(40, 640, "cuda")
    sf = poisoned_scales(fmt, 37, 640, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        quantize(x, fmt, out=(q, sf))
        own = quantize(x, fmt)
    q.view(torch.uint8).fill_(1)
    graph.replay()
    for results in ((q[:37], sf), own):
        for result, wanted in zip(results, expected, strict=True):
            assert_same_bits(result, wanted)
    x.copy_(activations(37, "cuda", seed=1))
    graph.replay()
    for result, wanted in zip(own, quantize(x, fmt), strict=True):
        assert_same_bits(result, wanted)


@pytest.mark.gpu
def test_current_stream():
    """The kernel runs where torch would: after the slow work that its input waits for."""
    source = activations(4096, "cuda", k=7168)
    expected_q, expected_sf = quantize(source)
    x = torch.zeros_like(source)
    q, sf = quantize(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        x.copy_(source)
        quantize(x, out=(q, sf))
    stream.synchronize()
    assert_same_bits(q, expected_q)
    assert_same_bits(sf, expected_sf)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_index():
    x = activations(33, "cpu")
    expected = quantize(x)
    with torch.cuda.device(0):
        for index in (1, 0, 1):
            results = quantize(x.to(f"cuda:{index}"))
            for result, wanted in zip(results, expected, strict=True):
                assert result.device.index == index
                assert_same_bits(result, wanted)
        assert torch.cuda.current_device() == 0
        with pytest.raises(ValueError, match="out q: expected the device of x, cuda:1, got cuda:0"):
            quantize(x.to("cuda:1"), out=(poisoned_values(33, 640, "cuda:0"), None))


@pytest.mark.gpu
def test_many_threads_and_first_calls():
    """A fresh process in which every thread's first call compiles."""
    program = """
import threading, torch
from cute_quant import DEEP_GEMM, DEEP_GEMM_SM90, quantize
formats = [DEEP_GEMM, DEEP_GEMM_SM90, DEEP_GEMM_SM90.replace(round_scale=True)]
barrier, done = threading.Barrier(12), []
def content(t):
    return t.cpu().contiguous().view(torch.uint8)
def work(i):
    dtype = (torch.bfloat16, torch.float16)[i % 2]
    fmt = formats[i % 3]
    x = torch.randn(65 + i, 896, generator=torch.Generator().manual_seed(i)).to(dtype)
    expected = quantize(x, fmt)
    barrier.wait()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(50):
            results = quantize(x.cuda(), fmt)
            for result, wanted in zip(results, expected):
                assert torch.equal(content(result), content(wanted))
    done.append(i)
threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
[t.start() for t in threads]; [t.join() for t in threads]
assert len(done) == 12, done
print("ok")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "ok\n", result.stderr


@pytest.mark.slow
def test_compilation_from_many_threads():
    """Without a GPU: each of the threads gets the function of its own architecture."""
    program = """
import threading, torch
from cute_quant import DEEP_GEMM, DEEP_GEMM_SM90
from cute_quant.jit import lookup
from cute_quant.kernels.config import QuantizeSpec
host = "sm_100a"  # what the DSL takes for its host without a GPU, and so can be loaded
barrier, functions = threading.Barrier(8), {}
def work(i):
    fmt = (DEEP_GEMM, DEEP_GEMM_SM90)[i % 2]
    barrier.wait()
    functions[i] = lookup.function(QuantizeSpec(torch.bfloat16, fmt), host)
threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
assert len(functions) == 8
assert len(set(map(id, functions.values()))) == 2
assert functions[0] is functions[6] and functions[1] is functions[7]
print("ok")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "ok\n", result.stderr


def test_threads_on_the_cpu():
    x = activations(64, "cpu")
    expected = quantize(x)
    results = []
    threads = [threading.Thread(target=lambda: results.append(quantize(x))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    for q, sf in results:
        assert_same_bits(q, expected[0])
        assert_same_bits(sf, expected[1])
