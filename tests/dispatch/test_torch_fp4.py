"""FP4 under torch: values of two in a byte, scales above those of groups, and scales of rows."""

from __future__ import annotations

import io

import pytest
import torch
from torch._export.serde import serialize
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from cute_quant import (
    MXFP4,
    NVFP4,
    bind,
    dequantize,
    empty_scales,
    fake_quantize,
    quantize,
    rms_norm_quantize,
    silu_mul_quantize,
)
from tests.helpers import assert_same_bits

NVFP4_ROWS = NVFP4.replace(row_scale=True)
KINDS = ("encode_scale", "decode_scale", "amax")
CASES = [*((NVFP4, kind) for kind in KINDS), (NVFP4_ROWS, None), (MXFP4, None)]
every_case = pytest.mark.parametrize(("fmt", "kind"), CASES, ids=str)
every_fmt = pytest.mark.parametrize(
    ("fmt", "kind"), [(NVFP4, "encode_scale"), (NVFP4_ROWS, None), (MXFP4, None)], ids=str
)
BACKENDS = pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)

operators = torch.ops.cute_quant


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def scale_of(kind: str | None, value: float | list[float] = 300.0) -> dict[str, torch.Tensor]:
    """Return the keyword that gives an upper scale, none without one."""
    return {} if kind is None else {kind: torch.tensor(value)}


def assert_results(results, expected) -> None:
    assert len(results) == len(expected)
    for result, wanted in zip(results, expected, strict=True):
        assert_same_bits(result, wanted)
        assert result.stride() == wanted.stride()


def there_and_back(x, fmt, upper):
    """Quantize, multiply back with what was returned, and both in one."""
    results = quantize(x, fmt, **upper)
    if fmt.row_scale:
        back = dequantize(*results[:2], fmt, decode_scale=results[2])
    else:
        back = dequantize(*results, fmt, **upper)
    return *results, back, fake_quantize(x, fmt, **upper)


def fused(x, fmt, upper):
    """The operations that end in `quantize`; the norm with and without a residual."""
    weight = torch.ones(x.shape[-1], dtype=x.dtype)
    return (
        *silu_mul_quantize(x, fmt, **upper),
        *rms_norm_quantize(x, weight, fmt, **upper),
        *rms_norm_quantize(x, weight, fmt, residual=x * 2, normalized=True, **upper),
    )


# Compiled


@BACKENDS
@every_case
def test_compiled_calls_return_what_eager_ones_do(fmt, kind, backend):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, upper: there_and_back(x + 1, fmt, upper), fullgraph=True, backend=backend
    )
    for mn in (5, 8):
        x, upper = normal(mn, 96), scale_of(kind)
        assert_results(compiled(x, upper), there_and_back(x + 1, fmt, upper))


@BACKENDS
@every_fmt
def test_compiled_fused_operations(fmt, kind, backend):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, u: fused(x, fmt, u), fullgraph=True, backend=backend)
    for mn in (5, 8):
        x, upper = normal(2, mn, 96), scale_of(kind, [300.0, 200.0])
        assert_results(compiled(x, upper), fused(x, fmt, upper))


def test_upper_scales_computed_in_a_graph():
    """As a model does it: the amax of the tensor, reduced in front of the call."""

    def call(x):
        return quantize(x, NVFP4, amax=x.abs().amax().float())

    torch._dynamo.reset()
    x = normal(8, 96)
    assert_results(torch.compile(call, fullgraph=True)(x), call(x))


@pytest.mark.parametrize("layout", ["128x4", "mn_major_packed"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_formats_made_in_a_graph(layout, dynamic):
    """Also where the graph allocates results: scales of rows, and the other of two in `out`."""

    def calls(x, sf):
        per_row = NVFP4.replace(row_scale=True, scale_layout=layout)
        per_group = MXFP4.replace(min_scale="ocp", scale_layout=layout)
        return (
            *quantize(x, per_row),
            *silu_mul_quantize(x, per_row),
            *quantize(x, per_group, out=(None, sf)),
        )

    x = normal(7, 192)
    fmt = MXFP4.replace(scale_layout=layout)
    given, expected = (empty_scales(fmt, x.shape) for _ in range(2))
    compiled = torch.compile(calls, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert_results(compiled(x, given), calls(x, expected))


def memory(fmt, mn, k, names):
    """Return memory for some of q, sf and scales of rows, None for the rest."""
    sf = empty_scales(fmt, (mn, k))
    sf.view(torch.uint8).zero_()
    q = torch.zeros(mn + 2, k // 2, dtype=torch.uint8).view(fmt.values)
    tensors = {"q": q, "sf": sf, "row_scales": torch.zeros(mn)}
    return tuple(tensors[name] if name in names else None for name in tensors)[
        : 3 if fmt.row_scale else 2
    ]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(
    ("fmt", "kind", "names"),
    [
        (NVFP4, "encode_scale", ("q", "sf")),
        (NVFP4, "amax", ("q",)),
        (NVFP4, "amax", ("sf",)),
        (MXFP4, None, ("q",)),
        (NVFP4_ROWS, None, ("q", "sf", "row_scales")),
        (NVFP4_ROWS, None, ("row_scales",)),
    ],
    ids=str,
)
def test_compiled_with_out(fmt, kind, names, backend):
    """Inductor has no code that copies FP4 values: the operator writes to the caller's tensor."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, out, upper: quantize(x, fmt, out=out, **upper), fullgraph=True, backend=backend
    )
    for mn in (3, 4):
        x, upper = normal(mn, 96), scale_of(kind)
        out, other = memory(fmt, mn, 96, names), memory(fmt, mn, 96, names)
        results = compiled(x, out, upper)
        assert_results(results, quantize(x, fmt, out=other, **upper))
        for given, wanted in zip(out, other, strict=True):
            assert given is None or given.view(torch.uint8).equal(wanted.view(torch.uint8))


@BACKENDS
@every_fmt
def test_values_come_into_graphs(fmt, kind, backend):
    """FP4 values from outside of the graph are multiplied back inside."""
    upper = scale_of(kind)
    q, sf, *row_scales = quantize(normal(5, 96), fmt, **upper)
    if row_scales:
        upper = {"decode_scale": row_scales[0]}
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, sf, upper: dequantize(q, sf, fmt, **upper), fullgraph=True, backend=backend
    )
    assert_same_bits(compiled(q, sf, upper), dequantize(q, sf, fmt, **upper))


@every_fmt
def test_compiled_once_for_any_rows_and_columns(fmt, kind):
    """Half of k is no guard, nor are the sizes of a block of scales."""
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module

    torch._dynamo.reset()
    upper = scale_of(kind)
    compiled = torch.compile(
        lambda x: there_and_back(x, fmt, upper), fullgraph=True, backend=backend, dynamic=True
    )
    for mn, k in ((5, 64), (8, 128), (128, 160), (33, 96), (6, 66), (300, 34)):
        x = normal(mn, k)
        assert_results(compiled(x), there_and_back(x, fmt, upper))
    assert len(graphs) == 1
    with pytest.raises(ValueError, match="x: expected a multiple of 2 columns"):
        compiled(normal(4, 65))


# Exported and traced


class Module(torch.nn.Module):
    def __init__(self, fmt, kind):
        super().__init__()
        self.fmt, self.kind = fmt, kind

    def forward(self, x, scale):
        return there_and_back(x, self.fmt, {} if self.kind is None else {self.kind: scale})


@every_case
def test_export_with_any_rows_and_columns(fmt, kind):
    rows = torch.export.Dim("rows", min=2, max=999)
    half = torch.export.Dim("half", min=2, max=999)
    module, scale = Module(fmt, kind), torch.tensor(300.0)
    shapes = ({0: rows, 1: 2 * half}, {})
    program = torch.export.export(module, (normal(8, 64), scale), dynamic_shapes=shapes).module()
    for mn, k in ((4, 64), (129, 64), (5, 34)):
        x = normal(mn, k)
        assert_results(program(x, scale), module(x, scale))


@every_fmt
def test_export_with_rows_that_only_the_run_knows(fmt, kind):
    class Selected(Module):
        def forward(self, x, scale, mask):
            return super().forward(x[mask.nonzero().squeeze(1)], scale)

    module, scale = Selected(fmt, kind), torch.tensor(300.0)
    mask = torch.tensor([True, False, True, True, False])
    program = torch.export.export(module, (normal(5, 64), scale, mask)).module()
    for other in (~mask, mask, torch.zeros(5, dtype=torch.bool)):
        assert_results(program(normal(5, 64), scale, other), module(normal(5, 64), scale, other))


@pytest.mark.skipif(
    torch.float4_e2m1fn_x2 in serialize._TORCH_TO_SERIALIZE_DTYPE, reason="this torch saves it"
)
def test_programs_that_are_saved_keep_bytes():
    """A program that is saved calls operators, which return bytes: torch has no text for FP4."""
    x, scale = normal(5, 64), torch.tensor(300.0)

    class Bytes(torch.nn.Module):
        def forward(self, x, scale):
            q, sf = operators.quantize(x, str(NVFP4), None, None, scale, upper_kind="amax")
            y = operators.dequantize(q, sf, str(NVFP4), x.dtype, scale, "amax")
            return q, sf, y

    buffer = io.BytesIO()
    torch.export.save(torch.export.export(Bytes(), (x, scale)), buffer)
    buffer.seek(0)
    q, sf, y = torch.export.load(buffer).module()(x * 3, scale)
    expected = there_and_back(x * 3, NVFP4, {"amax": scale})
    assert_results((q.view(NVFP4.values), sf, y), expected[:3])
    with pytest.raises(Exception, match="float4_e2m1fn_x2"):
        torch.export.save(torch.export.export(Module(NVFP4, "amax"), (x, scale)), io.BytesIO())


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@every_fmt
def test_make_fx(fmt, kind, mode):
    upper = scale_of(kind)
    graph = make_fx(lambda x, u: there_and_back(x, fmt, u), tracing_mode=mode)(normal(5, 64), upper)
    assert_results(
        graph(normal(5, 64, seed=1), upper), there_and_back(normal(5, 64, seed=1), fmt, upper)
    )


@every_case
def test_fakes_have_the_shapes_dtypes_and_strides(fmt, kind):
    for shape in ((5, 70), (2, 3, 70), (0, 70), (3, 0)):
        x, upper = normal(*shape), scale_of(kind)
        real = there_and_back(x, fmt, upper)
        with FakeTensorMode() as mode:
            fakes = mode.from_tensor(x), {name: mode.from_tensor(t) for name, t in upper.items()}
            fake = there_and_back(fakes[0], fmt, fakes[1])
        on_meta = {name: t.to("meta") for name, t in upper.items()}
        meta = there_and_back(x.to("meta"), fmt, on_meta)
        for results in (fake, meta):
            assert len(results) == len(real)
            for result, wanted in zip(results, real, strict=True):
                assert result.shape == wanted.shape and result.dtype == wanted.dtype
                assert result.stride() == wanted.stride()


@every_fmt
def test_fakes_are_checked(fmt, kind):
    with FakeTensorMode():
        upper = {} if kind is None else {kind: torch.ones(3)}
        with pytest.raises(ValueError, match="x: expected a multiple of 2 columns"):
            quantize(torch.empty(4, 65), fmt, **{name: t[0] for name, t in upper.items()})
        if kind is not None:
            with pytest.raises(ValueError, match=f"{kind}: expected shape"):
                quantize(torch.empty(4, 64), fmt, **upper)
            with pytest.raises(ValueError, match="encode_scale: expected one of"):
                quantize(torch.empty(4, 64), fmt)


def test_compiled_calls_need_their_upper_scale():
    torch._dynamo.reset()
    x = normal(4, 64)
    for given in (
        {},
        {"amax": torch.ones(3)},
        {"amax": torch.ones(()), "decode_scale": torch.ones(())},
    ):
        with pytest.raises(Exception, match=r"(encode_scale|amax|decode_scale and amax): expected"):
            torch.compile(lambda x, u: quantize(x, NVFP4, **u), backend="eager", fullgraph=True)(
                x, given
            )


# opcheck compares what is written and returned with allclose, which float8 lacks.
UTILS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@every_case
def test_opcheck(fmt, kind):
    x = normal(5, 64)
    upper = None if kind is None else torch.tensor(300.0)
    keywords = {} if kind is None else {"upper_kind": kind}
    end = (str(fmt), None, None, upper)
    torch.library.opcheck(operators.fake_quantize.default, (x, str(fmt), upper, kind))
    if not fmt.row_scale:
        torch.library.opcheck(operators.quantize.default, (x, *end), keywords, test_utils=UTILS)
        q, sf = operators.quantize(x, *end, **keywords)
        arguments = q, sf, str(fmt), torch.float32, upper, kind
        torch.library.opcheck(operators.dequantize.default, arguments, test_utils=UTILS)
    q, sf, row_scales = (*memory(fmt, 5, 64, ("q", "sf", "row_scales")), None)[:3]
    for values in (q, q.view(torch.uint8)):
        stored = sf.view(torch.uint8) if fmt.ue8m0 else sf
        arguments = x, values, stored, row_scales, *end
        torch.library.opcheck(operators.quantize_out.default, arguments, keywords, test_utils=UTILS)


# Refused


def test_operators_check_their_upper_scale():
    x, one = torch.ones(4, 64), torch.tensor(1.0)
    for upper, kind in ((one, None), (None, "amax"), (one, "scale")):
        with pytest.raises(ValueError, match=r"^upper_kind: expected one of encode_scale, decode"):
            operators.quantize(x, str(NVFP4), None, None, upper, upper_kind=kind)
        with pytest.raises(ValueError, match=r"^upper_kind: expected one of encode_scale, decode"):
            operators.fake_quantize(x, str(NVFP4), upper, kind)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operators_that_return_have_no_scales_of_rows(device):
    x, weight = torch.ones(4, 64, device=device), torch.ones(64, device=device)
    numbers = {"eps": 1e-6, "weight_offset": 0.0, "rounding": "fused"}
    with pytest.raises(
        ValueError, match=r"^fmt: expected a format without row_scale.*quantize_out"
    ):
        operators.quantize(x, str(NVFP4_ROWS))
    with pytest.raises(
        ValueError, match=r"rms_norm_quantize_residual does.* rms_norm_quantize_out"
    ):
        operators.rms_norm_quantize_residual(
            x, weight, None, torch.ones_like(x), None, str(NVFP4_ROWS), **numbers
        )


def test_transforms_are_refused():
    x, one = torch.ones(4, 64), torch.ones(())
    q, sf = quantize(x, NVFP4, amax=one)
    rows = quantize(x, NVFP4_ROWS)[2]
    calls = [
        *((kind, one, lambda t, kind=kind: quantize(x, NVFP4, **{kind: t})) for kind in KINDS),
        ("x", x, lambda t: quantize(t, NVFP4, amax=one)),
        ("amax", one, lambda t: silu_mul_quantize(x, NVFP4, amax=t)),
        ("amax", one, lambda t: rms_norm_quantize(x, x[0], NVFP4, amax=t)),
        ("amax", one, lambda t: fake_quantize(x, NVFP4, amax=t)),
        ("amax", one, lambda t: dequantize(q, sf, NVFP4, amax=t)),
        ("decode_scale", rows, lambda t: dequantize(q, sf, NVFP4_ROWS, decode_scale=t)),
        ("out row scales", rows.clone(), lambda t: quantize(x, NVFP4_ROWS, out=(None, None, t))),
    ]
    for name, t, call in calls:
        with pytest.raises(RuntimeError, match=rf"^{name}: expected a tensor outside of .* vmap"):
            torch.vmap(call)(t.unsqueeze(0))
        with pytest.raises(RuntimeError, match=r"^torch.jit.trace is not supported"):
            torch.jit.trace(call, (t,))
        if name == "out row scales":
            continue
        with pytest.raises(RuntimeError, match=rf"^{name}: .*requires no gradient.*not diff"):
            call(t.clone().requires_grad_())
        torch._dynamo.reset()
        with pytest.raises(Exception, match="not differentiable"):
            torch.compile(call, backend="aot_eager")(t.clone().requires_grad_())
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(t, t)
            with pytest.raises(RuntimeError, match=rf"^{name}: expected a tensor without a tan"):
                call(dual)
        with torch.no_grad():
            call(t.clone().requires_grad_())


# Bound


@every_case
def test_launches_read_their_upper_scale_each_time(fmt, kind):
    x, upper = normal(5, 64), scale_of(kind)
    for operation in (quantize, silu_mul_quantize, fake_quantize):
        launch = bind(x, fmt, operation=operation, **upper)
        for factor in (1.0, 0.5):
            for t in (x, *upper.values()):
                t.mul_(factor)
            results, expected = launch(), operation(x, fmt, **upper)
            if operation is fake_quantize:
                results, expected = (results,), (expected,)
            assert results[0] is launch.results[0] if operation is not fake_quantize else True
            assert_results(results, expected)
    *stored, _, _ = there_and_back(x, fmt, upper)
    back = {"decode_scale": stored[2]} if fmt.row_scale else upper
    launch = bind(*stored[:2], fmt, operation=dequantize, **back)
    for t in back.values():
        t.mul_(2)
    assert_same_bits(launch(), dequantize(*stored[:2], fmt, **back))
