"""Linear layers in FP8: results and gradients against the same in float64, and what they keep."""

from __future__ import annotations

import math
import re
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import cute_quant as cq
from cute_quant.contract.reference import rows as row_domains
from cute_quant.nn import SM90, SM100, Fp8GroupedLinear, Fp8Linear, Recipe
from cute_quant.nn.rows import group_sizes, groups_of_rows

BF16 = torch.bfloat16
E4M3_ERROR, BF16_ERROR = (2.0**-bits / 12**0.5 for bits in (3, 7))
"""Root mean square of the relative error of rounding to so many bits, at the start of a binade,
where it is largest: rounding to a grid is off by its step over the root of 12."""
NOISE = math.hypot(E4M3_ERROR, E4M3_ERROR, BF16_ERROR)
"""Bound on the relative error of a product, 0.051: of both operands, and of the result. Errors of
different elements are independent, so sums over k have the same relative error."""
RECIPES = {"sm90": SM90, "sm100": SM100}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def on(device: str, recipe: Recipe) -> Recipe | None:
    """The recipe itself on the CPU; on a GPU the one that it has GEMMs for."""
    return recipe if device == "cpu" else None


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference = actual.detach().double() - expected.detach().double()
    return (difference.norm() / expected.detach().double().norm()).item()


def exact(layer: Fp8Linear, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """Result and gradients of the layer in float64."""
    x, weight, bias = (t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias))
    y = torch.nn.functional.linear(x, weight, bias)
    y.backward(grad.double())
    return [y, x.grad, weight.grad, bias.grad]


def activations(*shape: int, dtype: torch.dtype = BF16, device: str = "cpu") -> torch.Tensor:
    """Columns of different magnitudes, so that scales matter."""
    factors = 2.0 ** torch.randint(-3, 3, shape[-1:])
    return (torch.randn(shape) * factors).to(dtype).to(device)


@every_recipe
@pytest.mark.parametrize("shape", [(160,), (3, 48), (1, 7), (133,)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_gradients(shape, dtype, recipe, device):
    """Also of rows that are no multiple of TMA's 16 bytes, and of groups that are short."""
    layer = Fp8Linear(208, 304, device=device, dtype=dtype, recipe=on(device, recipe))
    x = activations(*shape, 208, dtype=dtype, device=device).requires_grad_()
    grad = activations(*shape, 304, dtype=dtype, device=device)
    y = layer(x)
    assert y.shape == (*shape, 304) and y.dtype is dtype
    y.backward(grad)
    expected = exact(layer, x, grad)
    for actual, wanted in zip(
        (y, x.grad, layer.weight.grad, layer.bias.grad), expected, strict=True
    ):
        assert actual.dtype is dtype and relative_error(actual, wanted) < NOISE


@every_recipe
@pytest.mark.parametrize("grouped", [False, True], ids=["linear", "grouped"])
def test_gradients_are_those_of_bf16_within_the_noise(grouped, recipe, device):
    """In place of gradcheck, whose finite differences see the steps of a quantizer.

    Bias and its gradient are not quantized. All else is off by more than bf16 rounds.
    """
    ends = [200, 256, 500]
    x, grad = (activations(512, k, device=device) for k in (208, 160))
    made = {"device": device, "dtype": BF16, "recipe": on(device, recipe)}
    if grouped:
        layer = Fp8GroupedLinear(3, 208, 160, **made)
        given = [torch.tensor(ends, dtype=torch.int32, device=device)]
    else:
        layer, given = Fp8Linear(208, 160, **made), []

    def in_bf16(x: torch.Tensor) -> torch.Tensor:
        if not grouped:
            return torch.nn.functional.linear(x, layer.weight, layer.bias)
        starts = [0, 256, 256]
        parts = [x[a:b] @ w.mT for a, b, w in zip(starts, ends, layer.weight, strict=True)]
        gap, rest = (x.new_zeros(rows, 160) for rows in (56, 12))
        return torch.cat([parts[0], gap, *parts[1:], rest])

    found = []
    for call in (lambda x: layer(x, *given), in_bf16):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        y.backward(grad)
        found.append({"y": y.detach(), "x": leaf.grad})
        found[-1] |= {name: p.grad.clone() for name, p in layer.named_parameters()}
    for name, actual in found[0].items():
        error = relative_error(actual, found[1][name])
        assert error < BF16_ERROR if name == "bias" else 10 * BF16_ERROR < error < NOISE, name


@pytest.mark.parametrize("autocast", [False, True])
@every_recipe
def test_operands(recipe, autocast):
    """On the CPU each product is that of the dequantized operands, rounded to bfloat16 once."""
    layer = Fp8Linear(256, 128, bias=False, dtype=BF16, recipe=recipe)
    x = activations(96, 256).requires_grad_()
    grad = activations(96, 128)
    with torch.autocast("cpu", BF16, enabled=autocast):
        y = layer(x)
        y.backward(grad)

    def rows(t: torch.Tensor) -> torch.Tensor:
        return cq.dequantize(*cq.quantize(t, recipe.fmt), recipe.fmt, dtype=torch.float32)

    def columns(t: torch.Tensor) -> torch.Tensor:
        fmt = recipe.column_fmt
        q, sf = cq.quantize(t.mT.contiguous(), fmt)
        return cq.dequantize(q, sf, fmt, dtype=torch.float32)

    with torch.no_grad():
        w8, w_sf = cq.quantize_blocks(layer.weight, recipe.fmt)
        w = cq.dequantize_blocks(w8, w_sf, recipe.fmt, dtype=torch.float32)
        pairs = (
            (y, rows(x) @ w.mT),
            (x.grad, rows(grad) @ w),
            (layer.weight.grad, columns(grad) @ columns(x).mT),
        )
    for actual, wanted in pairs:
        assert relative_error(actual, wanted) < 1.01 * relative_error(wanted.to(BF16), wanted)


def test_what_is_kept_is_fp8(device):
    layer = Fp8Linear(256, 128, device=device, dtype=BF16)
    x = activations(512, 256, device=device).requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    of_input = [t for t in kept if t.data_ptr() != layer.weight.data_ptr()]
    assert sum(t.nbytes for t in of_input) < 1.2 * x.numel()
    assert any(t.dtype is torch.float8_e4m3fn and t.numel() == x.numel() for t in of_input)


def test_what_needs_no_gradient_is_not_kept(device):
    layer = Fp8Linear(64, 32, device=device, dtype=BF16)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer.weight.requires_grad_(False)
        layer.bias.requires_grad_(False)
        x = activations(16, 64, device=device).requires_grad_()
        y = layer(x)
        assert [t.data_ptr() for t in kept] == [layer.weight.data_ptr()]
        y.backward(torch.ones_like(y))
        assert layer.weight.grad is None and x.grad.isfinite().all()
        kept.clear()
        layer.weight.requires_grad_(True)
        y = layer(x.detach())
        assert all(t.data_ptr() != layer.weight.data_ptr() for t in kept)
        y.backward(torch.ones_like(y))
        assert layer.weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert not layer(x).requires_grad


def test_a_weight_that_changes_before_backward_is_refused():
    layer = Fp8Linear(64, 32)
    y = layer(torch.randn(4, 64, requires_grad=True))
    with torch.no_grad():
        layer.weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("grouped", [False, True])
def test_second_derivatives_are_refused(grouped):
    x = torch.randn(128, 64, requires_grad=True)
    name = "Fp8GroupedLinear" if grouped else "Fp8Linear"
    if grouped:
        y = Fp8GroupedLinear(1, 64, 32)(x, torch.tensor([128], dtype=torch.int32))
    else:
        y = Fp8Linear(64, 32)(x)
    with pytest.raises(RuntimeError, match=f"{name} has no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_autocast(device):
    """The output has its dtype, gradients that of the parameters."""
    layer = Fp8Linear(64, 32, device=device)
    x = activations(16, 64, dtype=torch.float32, device=device).requires_grad_()
    with torch.autocast(device, dtype=BF16):
        y = layer(x)
    assert y.dtype is BF16
    y.float().square().sum().backward()
    for t in (x, layer.weight, layer.bias):
        assert t.grad.dtype is torch.float32 and t.grad.isfinite().all()
    expected = exact(layer, x, 2 * y.detach().float())
    assert relative_error(layer.weight.grad, expected[2]) < NOISE


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant, device):
    """What is computed again is the same to the bit."""
    layers = torch.nn.Sequential(
        Fp8Linear(64, 96, device=device), torch.nn.SiLU(), Fp8Linear(96, 32, device=device)
    )
    x = activations(40, 64, dtype=torch.float32, device=device).requires_grad_()
    gradients = []
    for run in (layers, lambda x: checkpoint(layers, x, use_reentrant=use_reentrant)):
        layers.zero_grad()
        x.grad = None
        run(x).square().sum().backward()
        gradients.append([x.grad.clone(), *(p.grad.clone() for p in layers.parameters())])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_it_takes_the_place_of_a_linear_layer(device):
    plain = torch.nn.Linear(64, 32, device=device)
    layer = Fp8Linear(64, 32, device=device)
    layer.load_state_dict(plain.state_dict())
    x = activations(8, 64, dtype=torch.float32, device=device)
    assert relative_error(layer(x), plain(x)) < NOISE
    assert isinstance(layer, torch.nn.Linear) and "in_features=64" in repr(layer)


@every_recipe
def test_small_gradients(recipe, device):
    """They have the bits of large ones: no scale is held from below before float32 ends."""
    layer = Fp8Linear(64, 32, bias=False, device=device, recipe=on(device, recipe))
    x = activations(40, 64, dtype=torch.float32, device=device).requires_grad_()
    grad = activations(40, 32, dtype=torch.float32, device=device)
    gradients = []
    for factor in (1.0, 2.0**-80):
        layer.zero_grad()
        x.grad = None
        layer(x).backward(grad * factor)
        gradients.append([x.grad / factor, layer.weight.grad / factor])
    for large, small in zip(*gradients, strict=True):
        assert large.any() and torch.equal(small, large)


def test_weights_that_do_not_fit(device):
    """As they may after an assignment, and with experts that the layer does not have."""
    linear, x = Fp8Linear(64, 32, device=device), torch.zeros(128, 64, device=device)
    experts = Fp8GroupedLinear(2, 64, 32, device=device)
    ends = torch.tensor([5, 128], dtype=torch.int32, device=device)
    for layer, inputs, shape in ((linear, (x,), (32, 64)), (experts, (x, ends), (2, 32, 64))):
        first, *others = shape
        for wrong in ((first + 1, *others), (*shape[:-1], 48), shape[1:]):
            layer.weight = torch.nn.Parameter(torch.zeros(wrong, device=device))
            message = f"weight: expected shape {shape}, got {wrong}"
            with pytest.raises(ValueError, match=re.escape(message)):
                layer(*inputs)
        layer.weight = torch.nn.Parameter(torch.zeros(shape, device="meta"))
        with pytest.raises(ValueError, match=f"weight: expected on {x.device}, as input, got meta"):
            layer(*inputs)
        layer.weight = torch.nn.Parameter(torch.zeros(shape, device=device).double())
        with pytest.raises(TypeError, match="weight: expected a tensor of"):
            layer(*inputs)


def test_no_rows(device):
    layer = Fp8Linear(64, 32, device=device)
    x = torch.zeros(0, 64, device=device, requires_grad=True)
    y = layer(x)
    assert y.shape == (0, 32)
    y.sum().backward()
    assert x.grad.shape == (0, 64) and not layer.weight.grad.any()


def test_wrong_arguments():
    with pytest.raises(ValueError, match="in_features: expected a multiple of 16"):
        Fp8Linear(63, 32)
    with pytest.raises(ValueError, match="out_features: expected a multiple of 16"):
        Fp8GroupedLinear(2, 64, 30)
    with pytest.raises(ValueError, match="input: expected a tensor on a CPU"):
        Fp8Linear(64, 32)(torch.zeros(4, 64, device="meta"))
    with pytest.raises(ValueError, match="recipe: expected None, SM90 or SM100, got Recipe"):
        Fp8Linear(64, 32, recipe=SM90._replace(name="SM120"))
    with pytest.raises(ValueError, match="ends: expected a contiguous tensor"):
        Fp8GroupedLinear(2, 64, 32)(torch.zeros(128, 64), torch.zeros(4, dtype=torch.int32)[::2])
    with pytest.raises(ValueError, match="groups: expected at least 1"):
        Fp8GroupedLinear(0, 64, 32)
    with pytest.raises(ValueError, match=r"input: expected shape \(\.\.\., 64\)"):
        Fp8Linear(64, 32)(torch.zeros(4, 32))
    layer, ends = Fp8GroupedLinear(2, 64, 32), torch.zeros(2, dtype=torch.int32)
    for x, groups in ((torch.zeros(100, 64), ends), (torch.zeros(128, 64), ends[:1])):
        with pytest.raises(ValueError, match="input, ends: expected shapes"):
            layer(x, groups)
    x = torch.zeros(128, 64)
    for call, words in (
        (lambda: Fp8Linear("64", 32), "in_features: expected an int"),
        (lambda: Fp8GroupedLinear(2.0, 64, 32), "groups: expected an int"),
        (lambda: Fp8Linear(64, 32, recipe="SM90"), "recipe: expected None, SM90 or SM100"),
        (
            lambda: Fp8Linear(64, 32, dtype=torch.float64),
            "dtype: expected bfloat16 or float16 or float32",
        ),
        (lambda: Fp8Linear(64, 32)([1]), "input: expected a tensor of"),
        (lambda: Fp8Linear(64, 32)(x.double()), "input: expected a tensor of"),
        (lambda: layer(x, [64, 128]), "ends: expected a tensor of int32"),
        (lambda: layer(x, ends.long()), "ends: expected a tensor of int32"),
    ):
        with pytest.raises(TypeError, match=words):
            call()


def exact_groups(
    layer: Fp8GroupedLinear, x: torch.Tensor, grad: torch.Tensor, spans: list[tuple[int, int]]
) -> list[torch.Tensor]:
    """Result and gradients of the grouped layer in float64; 0 for rows of no group."""
    x, weight = (t.detach().double().requires_grad_() for t in (x, layer.weight))
    y = x.new_zeros(len(x), layer.out_features)
    for group, (start, end) in enumerate(spans):
        y = y.index_add(
            0, torch.arange(start, end, device=x.device), x[start:end] @ weight[group].mT
        )
    y.backward(grad.double())
    return [y, x.grad, weight.grad]


@every_recipe
@pytest.mark.parametrize("counts", [(130, 0, 128, 5), (1, 127, 300, 64)], ids=str)
def test_groups(counts, recipe, device):
    """Rows between groups, and past the last, hold NaN, of which nothing is to be seen."""
    layer = Fp8GroupedLinear(4, 208, 160, device=device, dtype=BF16, recipe=on(device, recipe))
    spans, start = [], 0
    for count in counts:
        spans.append((start, start + count))
        start = -(-(start + count) // 128) * 128
    m = start + 128
    dead = torch.ones(m, dtype=torch.bool)
    for first, end in spans:
        dead[first:end] = False
    x, grad = (activations(m, k) for k in (208, 160))
    clean = [t.masked_fill(dead[:, None], 0).to(device) for t in (x, grad)]
    x, grad = (t.masked_fill(dead[:, None], torch.nan).to(device) for t in (x, grad))
    x.requires_grad_()
    ends = torch.tensor([end for _, end in spans], dtype=torch.int32, device=device)
    y = layer(x, ends)
    y.backward(grad)
    assert not y[dead].any() and not x.grad[dead].any()
    expected = exact_groups(layer, *clean, spans)
    for actual, wanted in zip((y, x.grad, layer.weight.grad), expected, strict=True):
        assert actual.dtype is BF16 and relative_error(actual, wanted) < NOISE
    for group, count in enumerate(counts):
        assert bool(layer.weight.grad[group].any()) == (count > 0)


@every_recipe
def test_groups_that_are_frozen(recipe, device):
    """Without a gradient of the weight rows alone are quantized, those that exist."""
    layer = Fp8GroupedLinear(2, 64, 32, device=device, recipe=on(device, recipe))
    layer.weight.requires_grad_(False)
    ends = torch.tensor([100, 128], dtype=torch.int32, device=device)
    x = activations(256, 64, device=device)
    x[100:] = torch.nan
    x.requires_grad_()
    y = layer(x, ends)
    assert y.isfinite().all() and not y[100:].any()
    y.backward(torch.full_like(y, torch.nan).index_fill(0, torch.arange(100, device=device), 1.0))
    assert layer.weight.grad is None and x.grad.isfinite().all() and x.grad[:100].any()


def test_sizes_of_groups():
    """With padding; an empty group may end where the one before does, or where it begins."""
    ends = torch.tensor([5, 5, 128, 130, 400, 512], dtype=torch.int32)
    assert group_sizes(ends, 512) == [128, 0, 0, 128, 256, 0]
    for wrong, group, start, end in (
        ([130, 5, 200], 1, 256, 5),
        ([130, 256, 385], 2, 256, 385),
        ([-1, 256, 384], 0, 0, -1),
    ):
        words = (
            f"ends: expected that of group {group}, rounded up to 128, between {start}, where the "
            f"group starts, and 384, got {end}"
        )
        with pytest.raises(ValueError, match=words):
            group_sizes(torch.tensor(wrong, dtype=torch.int32), 384)


@pytest.mark.parametrize(
    "ends", [[5, 5, 128, 130, 400, 512], [0], [384], [512, 512], [200, 600], [-3, 7]], ids=str
)
def test_groups_of_rows(ends, device):
    """As the definition has it, whose memory is that of all groups times all rows."""
    ends = torch.tensor(ends, dtype=torch.int32, device=device)
    for m in (0, 128, 512):
        expected = row_domains.groups_of_rows(cq.PrefixSum(ends, 128), m).int()
        assert torch.equal(groups_of_rows(ends, m), expected)


@every_recipe
@pytest.mark.parametrize("grouped", [False, True])
def test_evaluation_quantizes_rows_alone(grouped, recipe, monkeypatch):
    """Under no_grad and in inference mode, and where the weight is frozen."""
    of_rows = []
    for module in ("linear", "grouped"):
        place = f"cute_quant.nn.{module}.quantize_both"
        monkeypatch.setattr(place, lambda *_, **options: of_rows.append(None))
    make = Fp8GroupedLinear if grouped else Fp8Linear
    layer = make(*([1] if grouped else []), 64, 32, recipe=recipe)
    inputs = [torch.randn(128, 64), *([torch.tensor([128]).int()] if grouped else [])]
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            layer(*inputs)
    layer.requires_grad_(False)
    layer(inputs[0].requires_grad_(), *inputs[1:]).sum().backward()
    assert not of_rows


@every_recipe
@pytest.mark.parametrize("m", [40, 48])
def test_compile(m, recipe):
    torch._dynamo.reset()
    layer = Fp8Linear(64, 32, dtype=BF16, recipe=recipe)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = activations(m, 64).requires_grad_()
    results = []
    for call in (layer, compiled):
        layer.zero_grad()
        x.grad = None
        y = call(x)
        y.sum().backward()
        of_parameters = [p.grad.clone() for p in layer.parameters()]
        results.append([y.detach(), x.grad.clone(), *of_parameters])
    for eager, graph in zip(*results, strict=True):
        assert torch.equal(eager, graph)


@pytest.mark.gpu
def test_compile_under_autocast_and_checkpointing():
    """By inductor, as the page on training has it."""
    torch._dynamo.reset()
    layers = torch.nn.Sequential(
        Fp8Linear(256, 512), torch.nn.SiLU(), Fp8Linear(512, 256, bias=False)
    ).cuda()
    x = activations(200, 256, dtype=torch.float32, device="cuda").requires_grad_()
    results = []
    for call in (layers, torch.compile(layers, fullgraph=True)):
        layers.zero_grad()
        x.grad = None
        with torch.autocast("cuda", dtype=BF16):
            y = checkpoint(call, x, use_reentrant=False)
        y.float().square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in layers.parameters())])
    for eager, graph in zip(*results, strict=True):
        # Inductor rounds SiLU to bf16 elsewhere, which moves some codes of FP8.
        assert relative_error(graph, eager) < NOISE


def test_groups_under_autocast_and_checkpointing(device):
    layer = Fp8GroupedLinear(2, 64, 32, device=device)
    ends = torch.tensor([100, 200], dtype=torch.int32, device=device)
    x = activations(256, 64, dtype=torch.float32, device=device).requires_grad_()
    gradients = []
    for run in (layer, lambda *given: checkpoint(layer, *given, use_reentrant=False)):
        layer.zero_grad()
        x.grad = None
        with torch.autocast(device, dtype=BF16):
            y = run(x, ends)
        assert y.dtype is BF16
        y.float().square().sum().backward()
        gradients.append([x.grad, layer.weight.grad])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.dtype is torch.float32 and plain.isfinite().all() and plain.any()
        assert torch.equal(plain, recomputed)
    assert "groups=2" in repr(layer)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_current_one():
    """In a process of its own: DeepGEMM's kernels stay on the GPU of their first call."""
    code = """
import torch
from cute_quant.nn import Fp8GroupedLinear, Fp8Linear

ends = torch.tensor([100, 200], dtype=torch.int32)
for layer, inputs in ((Fp8Linear(256, 128), ()), (Fp8GroupedLinear(2, 256, 128), (ends,))):
    x = torch.randn(256, 256)
    results = []
    for device in ("cuda:1", "cpu"):
        layer.to(device).zero_grad()
        leaf = x.to(device).requires_grad_()
        y = layer(leaf, *(t.to(device) for t in inputs))
        y.square().sum().backward()
        results.append([t.cpu() for t in (y.detach(), leaf.grad, layer.weight.grad)])
    assert torch.cuda.current_device() == 0
    for on_gpu, on_cpu in zip(*results):
        assert (on_gpu - on_cpu).norm() < 0.01 * on_cpu.norm() != 0
print("equal")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "equal", run.stderr
