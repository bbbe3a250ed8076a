"""The examples: a layer on DeepGEMM or on an emulation of its calls, and a user's kernel."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cute_quant import DEEP_GEMM, DEEP_GEMM_SM90, Format, deep_gemm_format
from cute_quant.contract.dtypes import SCALE_ROW_ALIGNMENT
from cute_quant.emulator.host import C_COMPILER
from cute_quant.jit import lookup
from examples import moe_layer, relu_squared, rope_quantize, train
from examples.moe_layer import DeepGemmCasts, Fused, Unfused, relative_error
from tests.c_compiler import needs_c_compiler
from tests.helpers import (
    DIFFERING_SHARE,
    UE8M0,
    assert_quantized_within,
    assert_same_bits,
    bits,
    random_bits,
)
from tests.integrations.test_deep_gemm import with_deep_gemm

# A layer on DeepGEMM

BLOCK = 128
LAYERS = (moe_layer.contiguous, moe_layer.masked)
both_layers = pytest.mark.parametrize("forward", LAYERS, ids=lambda layer: layer.__name__)
both_formats = pytest.mark.parametrize(
    "fmt", [DEEP_GEMM_SM90, DEEP_GEMM], ids=["DEEP_GEMM_SM90", "DEEP_GEMM"]
)
every_quantizer = pytest.mark.parametrize(
    "quantizers",
    [Fused(), Fused("unfused"), Unfused(), DeepGemmCasts()],
    ids=["fused", "rounded", "unfused", "casts"],
)


class CheckedDeepGemm(moe_layer.TorchDeepGemm):
    """Checks what the GEMMs are given, and keeps it.

    Attributes:
        calls: the activations of each GEMM, and the layout of its rows.
    """

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def m_grouped_fp8_gemm_nt_contiguous(self, a, b, d, m_indices):
        self.calls.append((*a, m_indices))
        q, _ = a
        assert m_indices.shape == q.shape[:1] and len(q) % BLOCK == 0
        for indices in m_indices.split(BLOCK):
            expert = indices[0]
            assert ((indices == expert) | ((indices == -1) & (expert >= 0))).all()
        super().m_grouped_fp8_gemm_nt_contiguous(a, b, d, m_indices)

    def m_grouped_fp8_gemm_nt_masked(self, a, b, d, masked_m, expected_m):
        self.calls.append((*a, masked_m))
        experts, max_m, _ = a[0].shape
        # A block that crosses into the next expert would be written there too.
        assert max_m % BLOCK == 0 and masked_m.shape == (experts,) and masked_m.max() <= max_m
        assert expected_m > 0
        super().m_grouped_fp8_gemm_nt_masked(a, b, d, masked_m, expected_m)


@pytest.fixture
def deep_gemm(monkeypatch) -> CheckedDeepGemm:
    emulated = CheckedDeepGemm()
    monkeypatch.setattr(moe_layer, "deep_gemm", emulated)
    return emulated


EXPERTS = 6
ROUTINGS = [(1, 1), (3, 2), (33, 4), (150, 3), (300, 2)]
every_routing = pytest.mark.parametrize(("tokens", "top_k"), ROUTINGS)


@functools.cache
def layer_of(size: int, experts: int, fmt: Format, device: str) -> moe_layer.MoeLayer:
    torch.manual_seed(size)
    return moe_layer.random_layer(2 * size, size, experts, fmt, device)


def inputs(tokens: int, top_k: int, fmt: Format, experts: int = EXPERTS):
    """A small layer, tokens, and their routing."""
    return inputs_of(layer_of(128, experts, fmt, "cpu"), tokens, top_k)


def inputs_of(layer: moe_layer.MoeLayer, tokens: int, top_k: int):
    """The layer, tokens, and a routing that prefers some experts, and leaves out others.

    Those at either end are among them.
    """
    torch.manual_seed(tokens)
    experts, hidden, _ = layer.down.shape
    x = torch.randn(tokens, hidden).to(layer.norm)
    scores = torch.randn(tokens, experts) + torch.arange(experts) / 4
    scores[:, [0, 4] if tokens % 2 else [1, experts - 1]] = -torch.inf
    return layer, x, moe_layer.route(scores.to(x.device), top_k)


def error_of_a_token(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, so that no token hides among the others."""
    return max(map(relative_error, actual, expected))


@pytest.mark.slow
@both_layers
@both_formats
@every_quantizer
@every_routing
def test_layer_is_that_in_bf16(tokens, top_k, quantizers, fmt, forward, deep_gemm):
    layer, x, routing = inputs(tokens, top_k, fmt)
    with moe_layer.poisoned_memory():
        result = forward(layer, x, routing, quantizers)
    expected = moe_layer.bf16(layer, x, routing)
    assert result.dtype == x.dtype and result.shape == x.shape
    print(f"{relative_error(result, expected):.4f}, {error_of_a_token(result, expected):.4f}")
    assert relative_error(result, expected) < 0.09
    assert error_of_a_token(result, expected) < 0.13


@pytest.mark.slow
@both_formats
@every_routing
def test_layouts_differ_in_nothing(tokens, top_k, fmt, deep_gemm):
    layer, x, routing = inputs(tokens, top_k, fmt)
    for quantizers in (Fused(), DeepGemmCasts()):
        contiguous, masked = (forward(layer, x, routing, quantizers) for forward in LAYERS)
        # The same products, in matrices of other shapes, may be added in another order.
        assert relative_error(contiguous, masked) < 0.005


@both_layers
@every_routing
def test_rounding_as_torch_is_torch(tokens, top_k, forward, deep_gemm):
    layer, x, routing = inputs(tokens, top_k, DEEP_GEMM_SM90)
    rounded, unfused = (forward(layer, x, routing, q) for q in (Fused("unfused"), Unfused()))
    assert_same_bits(rounded, unfused)


@both_formats
@pytest.mark.parametrize("quantizers", [Fused(), Unfused()], ids=["fused", "unfused"])
@every_routing
def test_padding(tokens, top_k, quantizers, fmt, deep_gemm):
    """Padding rows that the GEMMs read are zeros in one matrix.

    In masked experts only the scales up to the next multiple of 4 are written.
    """
    layer, x, routing = inputs(tokens, top_k, fmt)
    with moe_layer.poisoned_memory():
        moe_layer.contiguous(layer, x, routing, quantizers)
        moe_layer.masked(layer, x, routing, quantizers)
        poison = {t.dtype: torch.empty(1, dtype=t.dtype) for t in deep_gemm.calls[0][:2]}
    assert len(deep_gemm.calls) == 4
    for q, sf, m_indices in deep_gemm.calls[:2]:
        padding = m_indices < 0
        assert padding.sum() == len(m_indices) - routing.ids.numel()
        assert not bits(q[padding]).any() and not bits(sf[padding]).any()
    for q, sf, masked_m in deep_gemm.calls[2:]:
        row = torch.arange(q.shape[1])
        padding = row >= masked_m[:, None]
        with_scales = row < align_up(masked_m[:, None])
        assert_same_bits(q[padding], poison[q.dtype].expand(q[padding].shape))
        assert not bits(sf[padding & with_scales]).any()
        untouched = sf[padding & ~with_scales]
        assert_same_bits(untouched, poison[sf.dtype].expand(untouched.shape))


@both_formats
@every_routing
def test_casts_see_no_poison(tokens, top_k, fmt, deep_gemm):
    layer, x, routing = inputs(tokens, top_k, fmt)
    with moe_layer.poisoned_memory():
        for forward in LAYERS:
            forward(layer, x, routing, DeepGemmCasts())
    assert not any(t.float().isnan().any() for q, sf, _ in deep_gemm.calls for t in (q, sf))


def align_up(counts: torch.Tensor) -> torch.Tensor:
    return (counts + SCALE_ROW_ALIGNMENT - 1) // SCALE_ROW_ALIGNMENT * SCALE_ROW_ALIGNMENT


@every_routing
@pytest.mark.parametrize("experts", [6, 37])
def test_placement(tokens, top_k, experts, deep_gemm):
    """Each routed token has a row of its own, among those of its expert."""
    *_, routing = inputs(tokens, top_k, DEEP_GEMM_SM90, experts)
    ids = routing.ids
    counts = torch.bincount(ids.flatten(), minlength=experts)
    one = moe_layer.place_contiguous(ids, experts)
    assert one.index.numel() % BLOCK == 0
    assert one.index.numel() < ids.numel() + BLOCK * min(experts, ids.numel())
    live = one.layout[one.layout >= 0]
    assert torch.equal(live, live.sort()[0])
    many = moe_layer.place_masked(ids, experts)
    assert torch.equal(many.layout.long(), counts) and many.index.shape[1] % BLOCK == 0
    live = torch.arange(many.index.shape[1]) < counts[:, None]
    assert torch.equal(many.index >= 0, live)
    experts_of_rows = torch.arange(experts)[:, None].expand_as(many.index)
    for placement, expert in ((one, one.layout), (many, experts_of_rows)):
        assert placement.places.unique().numel() == ids.numel()
        assert (placement.index >= 0).sum() == ids.numel()
        token = torch.arange(tokens)[:, None].expand_as(ids)
        assert torch.equal(placement.index.flatten()[placement.places].long(), token)
        assert torch.equal(expert.flatten()[placement.places].long(), ids)


def test_one_expert_takes_all(deep_gemm):
    """The largest number of rows, with tokens of each expert, and of one."""
    layer, x, _ = inputs(257, 1, DEEP_GEMM_SM90)
    for ids in (torch.full((257, 1), 3), torch.arange(257)[:, None] % EXPERTS):
        routing = moe_layer.Routing(ids, torch.ones(257, 1))
        for forward in LAYERS:
            result = forward(layer, x, routing, Fused())
            assert error_of_a_token(result, moe_layer.bf16(layer, x, routing)) < 0.13


@both_layers
@pytest.mark.parametrize("quantizers", [Fused(), Unfused()], ids=["fused", "unfused"])
def test_sizes_are_known_before(quantizers, forward, deep_gemm, monkeypatch):
    """A CUDA graph captures calls that read no values on the host: fake tensors have none."""
    layer, x, routing = inputs(33, 4, DEEP_GEMM_SM90)
    for gemm in ("m_grouped_fp8_gemm_nt_contiguous", "m_grouped_fp8_gemm_nt_masked"):
        monkeypatch.setattr(deep_gemm, gemm, lambda a, b, d, *_: None)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fake = moe_layer.Routing(*map(mode.from_tensor, routing))
        result = forward(layer, mode.from_tensor(x), fake, quantizers)
    assert result.shape == x.shape


def test_what_is_missing_is_said(monkeypatch, capsys):
    """The example then prints errors of a layer on the CPU."""
    monkeypatch.setattr(moe_layer, "deep_gemm", None)
    for there, capability, said in [
        (False, None, "There is no GPU"),
        (True, (8, 0), "DeepGEMM has no GEMMs for a GPU"),
        (True, (9, 0), "DeepGEMM (github.com/deepseek-ai/DeepGEMM) is not installed"),
    ]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert moe_layer.missing() == said
    moe_layer.main()
    shown = capsys.readouterr().out
    assert shown.startswith(said)
    errors = [float(error) for error in re.findall(r"(\S+) %", shown)]
    assert len(errors) == 8 and all(0 < error < 9 for error in errors)


@with_deep_gemm
@both_layers
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 2), (33, 4), (300, 3)])
def test_layer_on_deep_gemm(tokens, top_k, forward):
    """Errors are those of DeepGEMM's casts. A graph gives the same in clean and poisoned memory."""
    layer = layer_of(512, EXPERTS, deep_gemm_format(), "cuda")
    _, x, routing = inputs_of(layer, tokens, top_k)
    expected = moe_layer.bf16(layer, x, routing)
    with moe_layer.poisoned_memory():
        fused, casts = (forward(layer, x, routing, q) for q in (Fused(), DeepGemmCasts()))
        rounded, unfused = (forward(layer, x, routing, q) for q in (Fused("unfused"), Unfused()))
    errors = [relative_error(result, expected) for result in (fused, rounded, unfused, casts)]
    print(f"{forward.__name__}, {tokens} tokens: {errors}")
    assert all(error < 0.09 and error < errors[-1] * 1.1 for error in errors)
    assert error_of_a_token(fused, expected) < 0.13
    for quantizers, result in ((Fused(), fused), (Unfused(), unfused)):
        graph, replayed = moe_layer.capture(lambda q=quantizers: forward(layer, x, routing, q))
        assert_same_bits(replayed, result)
        # Other tokens, other experts, the same graph.
        replayed.zero_()
        x.copy_(x.flip(0))
        routing.ids.copy_((routing.ids + 1) % EXPERTS)
        graph.replay()
        assert_same_bits(replayed, forward(layer, x, routing, quantizers))
        routing.ids.copy_((routing.ids - 1) % EXPERTS)
        x.copy_(x.flip(0))


# Kernels of a user

EMULATED_ARCHITECTURES = ["sm_90a", "sm_100a"]


def test_rope_is_short():
    text = Path(rope_quantize.__file__).read_text()
    kernel = text[text.index("class RopeQuantize") : text.index("@functools.cache")]
    assert len(kernel.splitlines()) < 50


@pytest.mark.slow
@pytest.mark.parametrize("arch", lookup.ARCHITECTURES.values())
def test_rope_compiles(arch, tmp_path):
    options = "--keep-ptx", f"--dump-dir {tmp_path}"
    built = lookup.build(rope_quantize.RopeQuantize(), arch, *options)
    assert f".target {arch}" in built.__ptx__


@pytest.fixture(scope="module", params=EMULATED_ARCHITECTURES)
def emulated(request) -> Callable[..., None]:
    if C_COMPILER is None:
        pytest.skip("needs a C compiler")
    return rope_quantize.emulated(request.param)


def rope_inputs(tokens: int, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries of all magnitudes, heads of zeros and with a NaN among them, and angles."""
    generator = torch.Generator().manual_seed(tokens * heads)
    x = torch.randn(tokens, heads, rope_quantize.HEAD, generator=generator)
    x *= torch.exp2(torch.randint(-40, 40, (tokens, heads, 1), generator=generator))
    flat = x.flatten(0, 1)
    flat[3::7] = 0
    flat[5::7, 77] = torch.nan
    angles = torch.rand(tokens, rope_quantize.HALF, generator=generator) * 2 * torch.pi
    return x.flatten(1).to(torch.bfloat16), angles.cos(), angles.sin()


def check_rope(q: torch.Tensor, sf: torch.Tensor, x, cos, sin) -> None:
    """Hold results against the rotation in float64, within 4 float32 ulps of the two products."""
    exact = rope_quantize.rotated(x, cos, sin)
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    first, second = x.double().unflatten(1, (-1, rope_quantize.HEAD)).chunk(2, -1)
    products = first * cos, -second * sin, second * cos, first * sin
    sizes = [product.abs() for product in products]
    error = 2.0**-22 * torch.cat((sizes[0] + sizes[1], sizes[2] + sizes[3]), -1).flatten(1)
    differing = assert_quantized_within(q, sf, UE8M0, exact, exact - error, exact + error)
    assert differing <= 2 + DIFFERING_SHARE * q.numel()


every_size = pytest.mark.parametrize(
    ("tokens", "heads"), [(tokens, heads) for tokens in (1, 3, 5, 33) for heads in (1, 8)]
)


@every_size
def test_rope_in_the_emulator(tokens, heads, emulated):
    operands = rope_inputs(tokens, heads)
    check_rope(*rope_quantize.rope_quantize(*operands, emulated), *operands)


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "heads"), [(1, 1), (3, 8), (33, 1), (4099, 16)])
def test_rope(tokens, heads):
    operands = rope_inputs(tokens, heads)
    with moe_layer.poisoned_memory():
        q, sf = rope_quantize.rope_quantize(*(t.cuda() for t in operands))
    check_rope(q, sf, *operands)


def relu_inputs(mn: int, k: int) -> torch.Tensor:
    x = random_bits((mn, k), torch.bfloat16, seed=mn + k)
    x[0, :7] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, -1.0, 3e38])
    return x


@needs_c_compiler
@pytest.mark.parametrize("arch", EMULATED_ARCHITECTURES)
def test_relu_squared_in_the_emulator(arch):
    for x in (relu_inputs(7, 1296), torch.randn(7, 1296).to(torch.bfloat16)):
        for ours, theirs in zip(
            relu_squared.emulated(x, arch), relu_squared.expected(x), strict=True
        ):
            assert_same_bits(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize(("mn", "k"), [(1, 16), (7, 1296), (4099, 7168)])
def test_relu_squared(mn, k):
    x = relu_inputs(mn, k)
    results = relu_squared.relu_squared_quantize(x.cuda())
    for ours, theirs in zip(results, relu_squared.expected(x), strict=True):
        assert_same_bits(ours, theirs)


@needs_c_compiler
@pytest.mark.parametrize(
    ("example", "last_line"),
    [
        (relu_squared, r"sm_100a, emulated: 0 of 9072 values and 0 of 21 words differ"),
        (rope_quantize, r"quantize after it: error 2\.\d\d %"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_examples_run_without_a_gpu(example, last_line, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    example.main()
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "emulated" in line]) == 2
    assert re.fullmatch(last_line, lines[-1])


# A transformer, trained


@pytest.mark.slow
def test_training(monkeypatch, tmp_path, capsys):
    """Losses fall alike in both; the picture has a curve for each."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train, "TINY", train.Size(32, 2, 1, 80, 24, 4, 1e-2))
    monkeypatch.setattr(train, "LAST", 5)
    path = tmp_path / "losses.svg"
    bf16, fp8 = train.main(["--steps", "25", "--plot", str(path)])
    for run in (bf16, fp8):
        assert len(run.losses) == 25 and run.milliseconds > 0
        assert run.losses[0] > 5.3 and run.last < 4.6
    assert 0 < abs(fp8.last - bf16.last) < 0.05
    printed = capsys.readouterr().out
    assert f"{fp8.last:.4f}" in printed and "difference" in printed
    picture = path.read_text()
    assert picture.count("<rect") > 50 and f"FP8, {fp8.last:.4f} at the end" in picture


def test_moving_averages_of_losses():
    assert train.smoothed([2.0] * 3) == pytest.approx([2.0] * 3)
    assert train.smoothed([1.0, 2.0], weight=0.5) == pytest.approx([1.0, 5 / 3])
