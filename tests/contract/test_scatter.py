"""Rows that are scattered: every byte, the same as a gather by the inverse, and what is refused."""

import itertools
import re

import pytest
import torch

from cute_quant import (
    DEEP_GEMM,
    DEEP_GEMM_SM90,
    GROUPWISE_FP8,
    MXFP8,
    NVFP4,
    ROWWISE_FP8,
    Indexed,
    Masked,
    PrefixSum,
    quantize,
    rms_norm_quantize,
    silu_mul_quantize,
    warm_up,
)
from cute_quant.contract.calls import Call
from cute_quant.contract.prologues import make_silu_mul_backward
from cute_quant.dispatch import launch
from tests import oracle
from tests.helpers import (
    as_arguments,
    assert_same_bits,
    expect,
    moved,
    on_device,
    poisoned_results,
    random_bits,
    storage_bits,
    upper_scale,
)
from tests.places import DOMAINS, in_records, places, row_domain

BF16 = torch.bfloat16
FORMATS = (
    (DEEP_GEMM, 640),
    (DEEP_GEMM_SM90, 130),
    (DEEP_GEMM.replace(scale_layout="row_major_packed"), 520),
    (MXFP8, 288),
    (MXFP8.replace(scale_layout="8x4"), 96),
    (NVFP4, 544),
    (NVFP4.replace(row_scale=True), 1040),
    (GROUPWISE_FP8, 600),
    (ROWWISE_FP8, 520),
)

every_domain = pytest.mark.parametrize("kind", DOMAINS)


def int32(*values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def normal(*shape: int, device: str, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, BF16)


def memory(fmt, kind: str, seed: int, k: int):
    """Return a domain, places, and functions that make poisoned results on a device."""
    rows, matrices, mn = row_domain(kind, seed)
    batch_shape = (matrices,) if kind == "masked" else ()

    def results(device: str):
        made = poisoned_results(fmt, mn, k, "cpu", batch_shape=batch_shape)
        return tuple(moved(t, device) for t in made)

    return rows, matrices, mn, results


def assert_same_memory(actual, expected) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(storage_bits(a), storage_bits(b))


EVERY_BYTE = [
    # Each format and each domain is in what is not slow.
    pytest.param(kind, *fmt, marks=() if (i + j) % 3 == 0 else pytest.mark.slow)
    for (i, kind), (j, fmt) in itertools.product(enumerate(DOMAINS), enumerate(FORMATS))
]


@pytest.mark.parametrize(("kind", "fmt", "k"), EVERY_BYTE, ids=str)
def test_every_byte(kind, fmt, k, device):
    for seed, width, unnamed in ((1, 8, 0), (2, 1, 3), (3, 32, 0)):
        rows, matrices, mn, results = memory(fmt, kind, seed, k)
        scatter = places(rows, matrices, mn, seed, width, unnamed)
        x = random_bits((len(scatter), k), BF16, seed)
        upper = upper_scale(x, fmt)
        expected, out = results("cpu"), results(device)
        expect(expected, x, fmt, rows, upper=upper, scatter=scatter)
        arguments = {name: t.to(device) for name, t in as_arguments(upper).items()}
        returned = quantize(
            x.to(device),
            fmt,
            scatter=scatter.to(device),
            rows=on_device(rows, device),
            out=out,
            **arguments,
        )
        assert all(a is b for a, b in zip(returned, out, strict=True))
        assert_same_memory(out, expected)


@pytest.mark.parametrize("fmt", [DEEP_GEMM, ROWWISE_FP8, NVFP4.replace(row_scale=True)], ids=str)
def test_gaps_that_are_kept(fmt, device):
    rows, matrices, mn, results = memory(fmt, "prefix_sum_with_gaps", 2, 640)
    scatter = places(rows, matrices, mn, 2, 3, unnamed=2)
    x = random_bits((len(scatter), 640), BF16, 2)
    expected, out = results("cpu"), results(device)
    expect(expected, x, fmt, rows, scatter=scatter)
    moves = {"rows": on_device(rows, device), "scatter": scatter.to(device)}
    quantize(x.to(device), fmt, **moves, out=out)
    assert_same_memory(out, expected)


@every_domain
@pytest.mark.parametrize("fmt", [DEEP_GEMM_SM90, ROWWISE_FP8], ids=str)
def test_stochastic_rounding(kind, fmt, device):
    """All places of a row have the same bytes, drawn for its place in x."""
    rows, matrices, mn, results = memory(fmt, kind, 3, 640)
    scatter = places(rows, matrices, mn, 3, 2)
    x, state = random_bits((len(scatter), 640), BF16, 3), torch.tensor([2**40 + 3, 5])
    expected, out = results("cpu"), results(device)
    expect(expected, x, fmt, rows, scatter=scatter, rng_state=state)
    moves = {"rows": on_device(rows, device), "scatter": scatter.to(device)}
    quantize(x.to(device), fmt, **moves, rng_state=state.to(device), out=out)
    assert_same_memory(out, expected)


def test_gradients_are_not_scattered(device):
    gate_up, grad = normal(4, 512, device=device), normal(4, 256, device=device)
    prologue = make_silu_mul_backward(grad, interleaved=False, clamp=None, alpha=1.0, beta=0.0)
    places_of_rows = int32([0], [1], [2], [3]).to(device)
    call = Call(gate_up, DEEP_GEMM, prologue=prologue, scatter=places_of_rows, num_rows=4)
    with pytest.raises(ValueError, match="scatter: expected None for gradients"):
        launch.quantize(call)


def inverse(scatter: torch.Tensor, matrices: int, mn: int, masked: bool) -> torch.Tensor:
    """Return the index that gathers what is scattered."""
    sources = torch.from_numpy(oracle.tokens_of_scatter(scatter, matrices, mn)).int()
    return sources if masked else sources[0]


@every_domain
@pytest.mark.parametrize("operation", [silu_mul_quantize, rms_norm_quantize])
@pytest.mark.parametrize(("fmt", "k"), FORMATS[::3], ids=str)
def test_it_is_a_gather_by_the_inverse(operation, kind, fmt, k, device):
    rows, matrices, mn, results = memory(fmt, kind, 5, k)
    scatter = places(rows, matrices, mn, 5)
    rows = on_device(rows, device)
    index = inverse(scatter, matrices, mn, kind == "masked").to(device)
    norm = operation is rms_norm_quantize
    x = normal(len(scatter), k if norm else 2 * k, device=device)
    weight = normal(k, device=device).float() + 1
    gathered_options = scattered_options = {}
    if not norm:
        of_tokens = normal(len(scatter), device=device, seed=2).float()
        scattered_options = {"weight": of_tokens}
        of_rows = torch.cat([of_tokens, of_tokens.new_zeros(1)])[index.long()]
        gathered_options = {"weight": of_rows}
    inputs = (x, weight) if norm else (x,)
    expected, out = results(device), results(device)
    operation(*inputs, fmt, rows=rows, index=index, out=expected, **gathered_options)
    options = {"rows": rows, "scatter": scatter.to(device), **scattered_options}
    operation(*inputs, fmt, out=out, **options)
    assert_same_memory(out, expected)


@every_domain
def test_residual_and_normalized_rows_are_those_of_x(kind, device):
    rows, matrices, mn, results = memory(DEEP_GEMM, kind, 6, 640)
    scatter = places(rows, matrices, mn, 6).to(device)
    x, weight = normal(len(scatter), 640, device=device), normal(640, device=device) + 1
    residuals = [normal(len(scatter), 640, device=device, seed=3) for _ in range(2)]
    q, sf, residual, normalized = rms_norm_quantize(
        x, weight, residual=residuals[0], normalized=True
    )
    out = results(device)
    written = rms_norm_quantize(
        x,
        weight,
        residual=residuals[1],
        normalized=True,
        rows=on_device(rows, device),
        scatter=scatter,
        out=out,
    )
    assert_same_bits(written[2], residual)
    assert_same_bits(written[3], normalized)
    exist = oracle.live_rows(on_device(rows, "cpu"), None, matrices, mn, matrices * mn) >= 0
    exist = torch.from_numpy(exist.flatten()).to(device)
    token = inverse(scatter.cpu(), matrices, mn, kind == "masked").to(device).flatten()[exist]
    for placed, plain in zip(out, (q, sf), strict=True):
        assert_same_bits(placed.flatten(0, -2)[exist], plain[token.long()])


def test_shapes_of_new_results(device):
    x, scatter = normal(4, 256, device=device), int32([0], [1], [2], [3]).to(device)
    q, sf = quantize(x, scatter=scatter, num_rows=6)
    assert q.shape == (6, 256) and sf.shape == (6, 1) and sf.stride() == (1, 8)
    q, sf = quantize(x, rows=Masked(int32(2, 1, 0).to(device)), scatter=scatter, num_rows=5)
    assert q.shape == (3, 5, 256) and sf.shape == (3, 5, 1)
    q, _ = quantize(x, rows=Indexed(int32(0, 0, -1, 1, 1, -1).to(device)), scatter=scatter)
    assert q.shape == (6, 256)


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("width", [0, 2])
@pytest.mark.parametrize("mn", [0, 5])
@pytest.mark.parametrize("k", [0, 128])
def test_empty_sizes(tokens, width, mn, k, device):
    x = torch.ones(tokens, k, dtype=BF16, device=device)
    scatter = torch.full((tokens, width), -1, dtype=torch.int32, device=device)
    rows = PrefixSum(int32(0).to(device))
    q, sf = quantize(x, rows=rows, scatter=scatter, num_rows=mn)
    assert q.shape == (mn, k)
    assert q.view(torch.uint8).eq(0).all() and sf.eq(0).all()


def test_calls_that_differ_in_the_rows_of_the_result(device):
    x, scatter = normal(4, 128, device=device), int32([0], [1], [2], [3]).to(device)
    expected, _ = quantize(x)
    for mn in (4, 9, 4, 6):
        rows = PrefixSum(int32(4).to(device))
        q, sf = quantize(x, rows=rows, scatter=scatter, num_rows=mn)
        assert q.shape == (mn, 128) and sf.shape[0] == mn
        assert_same_bits(q[:4], expected)
        assert q.view(torch.uint8)[4:].eq(0).all()


@pytest.mark.parametrize(
    ("rows", "scatter", "words"),
    [
        (None, ([0, 1], [2, 3]), None),
        (None, ([0, 1], [2, 4]), "scatter: expected -1 to 3, got 4 at (1, 1)"),
        (None, ([0, -2], [2, 3]), "scatter: expected -1 to 3, got -2 at (0, 1)"),
        (None, ([0, 1], [1, 3]), "scatter: expected each row once, got row 1 2 times, first at"),
        (
            None,
            ([0, 0, 2], [2, 2, 1]),
            "scatter: expected each row once, got row 0 2 times, first at",
        ),
        (None, ([0, 1], [-1, 3]), "got none for row 2"),
        (PrefixSum(int32(1, 4), 2), ([0, -1], [2, 3]), None),
        (PrefixSum(int32(1, 4), 2), ([0, 1], [2, 3]), "got row 1, which does not, at (0, 1)"),
        (PrefixSum(int32(1, 3, 2), 2), ([0, 1], [2, 3]), "rows.ends: expected group 2 to end"),
        (Indexed(int32(1, -1, 0, 0)), ([0, -1], [2, 3]), None),
        (Masked(int32(1, 2)), ([0, 4], [5, -1]), None),
        (Masked(int32(1, 2)), ([0, 4], [6, -1]), "got row 6, which does not"),
        (Masked(int32(1, 5)), ([0, 4], [6, -1]), "rows.masked_m: expected 0 to 4"),
    ],
)
def test_check_reads_places(rows, scatter, words, device):
    x, scatter = normal(2, 128, device=device), int32(*scatter).to(device)
    rows = on_device(rows, device)
    call = {"rows": rows, "scatter": scatter, "num_rows": 4, "check": True}
    if words is None:
        quantize(x, **call)
    else:
        with pytest.raises(ValueError, match=re.escape(words)):
            quantize(x, **call)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"num_rows": None}, ValueError, "num_rows: expected the rows of the result"),
        ({"num_rows": -1}, ValueError, "num_rows: expected 0 to 2147483647, got -1"),
        ({"num_rows": 2**31}, ValueError, "num_rows: expected 0 to 2147483647"),
        ({"num_rows": 4.0}, TypeError, "num_rows: expected an int or None, got"),
        ({"num_rows": True}, TypeError, "num_rows: expected an int or None"),
        ({"scatter": None}, ValueError, "num_rows: expected None without a scatter, got 4"),
        ({"scatter": [[0]]}, TypeError, "scatter: expected a tensor"),
        ({"scatter": torch.zeros(2, 2)}, TypeError, "scatter: expected a tensor of int32"),
        ({"scatter": int32(0, 1)}, ValueError, "scatter: expected shape (2, places)"),
        ({"scatter": int32([0], [1], [2])}, ValueError, "scatter: expected shape (2, places)"),
        ({"scatter": int32([0, 1], [2, 3]).t()}, ValueError, "scatter: expected a contiguous"),
        ({"scatter": torch.zeros(2, 33, dtype=torch.int32)}, ValueError, "up to 32 places"),
        ({"index": int32(0, 1)}, ValueError, "index: expected None with a scatter"),
        ({"x": torch.zeros(1, 2, 128, dtype=BF16)}, ValueError, "x: expected 2 dimensions (T, k)"),
        ({"rows": Indexed(int32(0, 1, 2))}, ValueError, "rows.m_indices: expected shape (4,)"),
        ({"rows": PrefixSum(int32([1]))}, ValueError, "rows.ends: expected 1 dimension, got"),
        ({"rows": Masked([1])}, TypeError, "rows.masked_m: expected a tensor of int32"),
        ({"rows": 3}, TypeError, "rows: expected None or one of"),
        (
            {"fmt": NVFP4, "encode_scale": torch.ones(2), "rows": PrefixSum(int32(1, 2))},
            ValueError,
            "encode_scale: expected shape () or (1,), got (2,)",
        ),
        (
            {"out": (torch.zeros(5, 128, dtype=torch.float8_e4m3fn), None)},
            ValueError,
            "out q: expected shape (4, 128), got (5, 128)",
        ),
        (
            {"out": (torch.zeros(128, dtype=torch.float8_e4m3fn), None), "num_rows": None},
            ValueError,
            "out q: expected 2 or more dimensions",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_errors(options, error, words):
    scatter = int32([0, 1], [2, 3])
    call = {"x": torch.zeros(2, 128, dtype=BF16), "scatter": scatter, "num_rows": 4} | options
    with pytest.raises(error, match=re.escape(words)):
        quantize(call.pop("x"), **call)


def test_places_may_not_lie_in_the_result():
    storage = torch.zeros(1024, dtype=torch.uint8)
    q = storage[:512].view(torch.float8_e4m3fn).view(4, 128)
    scatter = storage[496:512].view(torch.int32).view(2, 2)
    with pytest.raises(ValueError, match="memory that overlaps scatter"):
        quantize(torch.zeros(2, 128, dtype=BF16), scatter=scatter, out=(q, None))


@pytest.mark.parametrize(
    "kind",
    ["masked", "prefix_sum", *(pytest.param(k, marks=pytest.mark.slow) for k in DOMAINS[::3])],
)
def test_compiled_and_exported(kind, device):
    rows, matrices, mn, _ = memory(DEEP_GEMM, kind, 7, 256)
    scatter = places(rows, matrices, mn, 7).to(device)
    rows, x = on_device(rows, device), normal(len(scatter), 256, device=device)

    class Module(torch.nn.Module):
        def forward(self, x, scatter):
            q, sf = quantize(x, GROUPWISE_FP8, rows=rows, scatter=scatter, num_rows=mn)
            return q.view(torch.uint8) + 0, sf + 0

    exist = defined_rows(rows, mn, matrices).to(device)
    expected = Module()(x, scatter)
    torch._dynamo.reset()
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")(x, scatter)
    exported = torch.export.export(Module(), (x, scatter)).module()(x, scatter)
    for results in (compiled, exported):
        for a, b in zip(results, expected, strict=True):
            a, b = (t.flatten(0, -2)[exist] for t in (a, b))
            assert_same_bits(a, b)


def defined_rows(rows, mn: int, matrices: int) -> torch.Tensor:
    """Return which rows of the result, of all matrices, do not keep what memory held."""
    if not isinstance(rows, Masked):
        return torch.ones(mn, dtype=torch.bool)
    live = oracle.live_rows(on_device(rows, "cpu"), None, matrices, mn, matrices * mn)
    return torch.from_numpy(live.flatten() >= 0)


def test_one_graph_for_all_sizes():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def call(x, scatter, mn):
        return quantize(x, GROUPWISE_FP8, scatter=scatter, num_rows=mn)

    for tokens, mn in ((4, 12), (5, 13), (7, 30)):
        x = normal(tokens, 256, device="cpu")
        scatter = torch.arange(2 * tokens, dtype=torch.int32).view(tokens, 2)
        q, _ = call(x, scatter, mn)
        assert q.shape == (mn, 256)
        assert_same_bits(q[: 2 * tokens : 2], quantize(x, GROUPWISE_FP8)[0])
    assert counter.frame_count == 1


@pytest.mark.gpu
@every_domain
def test_in_a_graph_after_a_warm_up(kind):
    rows, matrices, mn, results = memory(DEEP_GEMM, kind, 9, 7168)
    scatter = places(rows, matrices, mn, 9, 8).cuda()
    rows, x = on_device(rows, "cuda"), normal(len(scatter), 7168, device="cuda")
    warm_up(DEEP_GEMM, k=7168, max_rows=200, rows=(kind,), scattered=True)
    out, expected = results("cuda"), results("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        quantize(x, rows=rows, scatter=scatter, out=out)
    x.copy_(normal(len(scatter), 7168, device="cuda", seed=4))
    graph.replay()
    quantize(x, rows=rows, scatter=scatter, out=expected)
    assert_same_memory(out, expected)


@pytest.mark.gpu
def test_many_rows_in_one_call():
    """More tiles than one dimension of a grid counts, and every row of them once."""
    tokens, width, k = 300_000, 2, 128
    x = torch.randn(tokens, k, device="cuda", dtype=BF16)
    scatter = torch.randperm(tokens * width, device="cuda").int().view(tokens, width)
    q, sf = quantize(x, DEEP_GEMM, scatter=scatter, num_rows=tokens * width, check=True)
    expected_q, expected_sf = quantize(x, DEEP_GEMM)
    for i in range(width):
        row = scatter[:, i].long()
        assert torch.equal(q.view(torch.uint8)[row], expected_q.view(torch.uint8))
        assert torch.equal(sf[row], expected_sf)


def test_records(device):
    """Values and scales in one buffer; what overlaps is refused."""
    fmt, k = DEEP_GEMM.replace(scale_layout="row_major_packed"), 640
    rows, matrices, mn = row_domain("prefix_sum", 4)
    scatter = places(rows, matrices, mn, 4).to(device)
    x = normal(len(scatter), k, device=device)
    q, sf = (moved(t, device) for t in in_records(fmt, mn, k))
    call = {"rows": on_device(rows, device), "scatter": scatter, "num_rows": mn}
    quantize(x, fmt, **call, out=(q, sf))
    storage = torch.full((mn, 672), 0xA5, dtype=torch.uint8, device=device)
    q, sf = storage[:, :640].view(fmt.values), storage[:, 640:648].view(torch.int32)
    quantize(x, fmt, **call, out=(q, sf))
    for a, b in zip((q, sf), quantize(x, fmt, **call), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    assert storage[:, 648:].eq(0xA5).all()
    overlapping = storage[:, 636:644].view(torch.int32)
    with pytest.raises(ValueError, match="out sf: expected memory of its own"):
        quantize(x, fmt, **call, out=(q, overlapping))
    with pytest.raises(ValueError, match=r"out sf: expected strides \(2, 1\), got \(168, 1\)"):
        quantize(x[:mn], fmt, out=(q[: len(x)], sf[: len(x)]))
    twice = storage.flatten()[:8].view(torch.int32).expand(mn, 2)
    with pytest.raises(ValueError, match="out sf: expected strides"):
        quantize(x, fmt, **call, out=(q, twice))
