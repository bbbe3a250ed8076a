"""Gradients of SwiGLU in front of the quantizer: to the bit on the CPU, within bounds on a GPU."""

from __future__ import annotations

import pytest
import torch

from cute_quant import (
    DEEP_GEMM,
    DEEP_GEMM_32,
    DEEP_GEMM_SM90,
    GROUPWISE_FP8,
    INT8,
    MXFP4,
    NVFP4,
    ROWWISE_FP8,
    Format,
    Indexed,
    Masked,
    PrefixSum,
    bind,
    dequantize,
    quantize,
    silu_mul_backward_quantize,
)
from cute_quant.contract.prologues import make_silu_mul_backward
from cute_quant.contract.reference.prologues import silu_mul_backward
from tests.contract.test_inputs import inputs, int32
from tests.helpers import (
    INPUT_DTYPES,
    as_arguments,
    assert_quantized_as,
    assert_same_bits,
    moved,
    on_device,
    poisoned_results,
    upper_scale,
)
from tests.prologues import silu_backward_bounds, split_halves

BF16 = torch.bfloat16
GPT_OSS = {"clamp": 7, "alpha": 1.702, "beta": 1, "interleaved": True}
OPTIONS = [
    {},
    GPT_OSS,
    {"interleaved": True},
    {"clamp": 0.3},
    {"alpha": -2.5, "beta": 0.25},
    {"alpha": 0, "beta": -1e-3, "clamp": 1e30},
]
every_option = pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: "-".join(f"{k}{v}" for k, v in o.items()) or "plain"
)
FORMATS = [
    (BF16, DEEP_GEMM, 256),
    (torch.float16, DEEP_GEMM_SM90.replace(values=torch.float8_e5m2), 264),
    (torch.float32, GROUPWISE_FP8, 100),
    (BF16, INT8, 24),
    (torch.float32, MXFP4, 70),
    (BF16, NVFP4, 96),
    (BF16, NVFP4.replace(row_scale=True), 40),
    (torch.float16, ROWWISE_FP8, 300),
]


def operands(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """A gradient (..., mn, k), and gates and ups (..., mn, 2 k), some of which are not finite."""
    *leading, k = shape
    return inputs(shape, dtype, seed + 1), inputs((*leading, 2 * k), dtype, seed)


def check(
    grad: torch.Tensor,
    gate_up: torch.Tensor,
    fmt: Format,
    device: str,
    *,
    rows: object = None,
    extra_rows: int = 0,
    last_padding: bool = True,
    **options: object,
) -> None:
    """Quantize into poisoned memory, and compare every byte; on a GPU a few may differ."""
    bounds = silu_backward_bounds(grad, gate_up, **options)
    *batch_shape, mn, columns = gate_up.shape
    out = poisoned_results(fmt, mn, columns, device, extra_rows, last_padding, tuple(batch_shape))
    upper = upper_scale(bounds.values.to(device), fmt)
    results = silu_mul_backward_quantize(
        moved(grad, device),
        moved(gate_up, device),
        fmt,
        rows=on_device(rows, device),
        out=out,
        **options,
        **as_arguments(upper),
    )
    assert all(result is own for result, own in zip(results, out, strict=True))
    q, sf, *row_scales = out
    row_scales = row_scales[0] if row_scales else None
    assert_quantized_as(q, sf, fmt, bounds, rows, upper=upper, row_scales=row_scales)


@every_option
def test_they_are_the_gradients_of_torch(options):
    generator = torch.Generator().manual_seed(3)
    gate_up = torch.randn(6, 80, generator=generator, dtype=torch.float64) * 3
    grad = torch.randn(6, 40, generator=generator, dtype=torch.float64)
    gate_up.requires_grad_()
    gate, up = split_halves(gate_up, options.get("interleaved", False))
    if "clamp" in options:
        gate = gate.clamp(max=options["clamp"])
        up = up.clamp(-options["clamp"], options["clamp"])
    alpha = torch.tensor(options.get("alpha", 1.0)).float().item()
    beta = torch.tensor(options.get("beta", 0.0)).float().item()
    ((up + beta) * gate * torch.sigmoid(alpha * gate)).backward(grad)
    given = {"interleaved": False, "clamp": None, "alpha": 1.0, "beta": 0.0} | options
    prologue = make_silu_mul_backward(grad[None], **given)
    (result,) = silu_mul_backward(gate_up.detach()[None], prologue)
    assert result.dtype is torch.float32
    # The bound of 0.3 is rounded to float32.
    torch.testing.assert_close(result, gate_up.grad.float(), rtol=1e-6, atol=1e-6)


@every_option
@pytest.mark.parametrize("dtype", INPUT_DTYPES, ids=str)
def test_options(dtype, options, device):
    for shape in ((5, 256), (2, 3, 40)):
        check(*operands(shape, dtype), DEEP_GEMM_SM90, device, extra_rows=3, **options)


@pytest.mark.parametrize(("dtype", "fmt", "k"), FORMATS, ids=str)
@pytest.mark.parametrize("options", [{}, GPT_OSS], ids=["plain", "gpt-oss"])
def test_formats(dtype, fmt, k, options, device):
    check(*operands((5, k), dtype), fmt, device, last_padding=False, **options)


def test_every_row_domain(device):
    grad, gate_up = operands((3, 12, 136), BF16)
    check(grad, gate_up, DEEP_GEMM, device, rows=Masked(int32([12, 0, 5])))
    check(grad[0], gate_up[0], DEEP_GEMM, device, rows=PrefixSum(int32([3, 10]), 4))
    check(grad[0], gate_up[0], DEEP_GEMM, device, rows=Indexed(int32([0, -1, 1] * 4)))


def test_strides(device):
    wide = inputs((4, 12, 300), BF16, 3)
    for grad, gate_up in (
        (wide[0, :, 7:77], wide[1, :, 5:145]),
        (wide[:, ::2, 16:56], wide[:, 1:7, :80]),
        (wide[:3, :4].transpose(0, 1)[..., :40], wide[:3, 4:8].transpose(0, 1)[..., 40:120]),
        (wide[:1, :, :40].expand(3, 12, 40), wide[1:, :, 100:180]),
        (wide[0, :1, :16].expand(5, 16), wide[0, :5, :32]),
    ):
        for options in ({}, GPT_OSS):
            check(grad, gate_up, DEEP_GEMM_32, device, **options)


def test_special_values(device):
    """NaN and Inf make their groups NaN; a gate of -Inf has the gradient 0, as has one beyond."""
    nan, inf = torch.nan, torch.inf
    grad = torch.tensor([1.0, 1, 1, 1, nan, inf, 0, -0.0], device=device).repeat_interleave(16)
    gate = torch.tensor([1.0, nan, -inf, 9, 9, 1, inf, 1], device=device).repeat_interleave(16)
    up = torch.tensor([1.0, 1, 1, 9, -9, 1, 1, 1], device=device).repeat_interleave(16)
    fmt = GROUPWISE_FP8.replace(group_size=16)
    gate_up = torch.cat([gate, up])[None]
    q, sf = silu_mul_backward_quantize(grad[None], gate_up, fmt, clamp=7)
    y = dequantize(q, sf, fmt, dtype=torch.float32).view(2, 8, 16)[..., 0].cpu()
    of_gates, of_ups = y.double()
    assert of_gates.isnan().tolist() == [False, True, False, False, False, True, False, False]
    assert of_ups.isnan().tolist() == [False, True, True, False, False, True, False, False]
    assert of_gates[[2, 3, 4, 6, 7]].tolist() == [0, 0, 0, 0, 0]
    assert of_ups[[3, 4, 6, 7]].tolist() == [0, 0, 0, 0]


def test_stochastic_rounding(device):
    """Random words belong to places in the result, gates and ups alike."""
    grad, gate_up = (t.nan_to_num(1, 2, 3).to(device) for t in operands((6, 128), BF16, 5))
    given = torch.tensor([1, 2], device=device)
    fmt = DEEP_GEMM_SM90
    q, _ = silu_mul_backward_quantize(grad, gate_up, fmt, rng_state=given)
    options = {"interleaved": False, "clamp": None, "alpha": 1.0, "beta": 0.0}
    exact = silu_mul_backward(
        gate_up.cpu()[None], make_silu_mul_backward(grad.cpu()[None], **options)
    )[0]
    expected = quantize(exact, fmt, rng_state=given.cpu())
    same = (q.cpu().view(torch.uint8) == expected[0].view(torch.uint8)).float().mean()
    assert same == 1 if device == "cpu" else same > 0.99
    plain, _ = silu_mul_backward_quantize(grad, gate_up, fmt)
    assert (plain.view(torch.uint8) != q.view(torch.uint8)).any()


def test_operators(device):
    grad, gate_up = (
        torch.randn(4, n, generator=torch.Generator().manual_seed(n)).to(BF16).to(device)
        for n in (128, 256)
    )
    fmt, keywords = DEEP_GEMM_SM90, {"interleaved": False, "clamp": 1.0, "alpha": 1.0, "beta": 0.0}
    operators = torch.ops.cute_quant
    torch.library.opcheck(
        operators.silu_mul_backward_quantize.default, (grad, gate_up, str(fmt)), keywords
    )
    expected = silu_mul_backward_quantize(grad, gate_up, fmt, clamp=1.0)
    q, sf = (torch.zeros_like(t) for t in expected)
    operators.silu_mul_backward_quantize_out(grad, gate_up, q, sf, None, str(fmt), **keywords)
    launch = bind(grad, gate_up, fmt, clamp=1.0, operation=silu_mul_backward_quantize)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(grad: torch.Tensor, gate_up: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return silu_mul_backward_quantize(grad, gate_up, fmt, clamp=1.0)

    for results in ((q, sf), launch(), compiled(grad, gate_up)):
        for result, wanted in zip(results, expected, strict=True):
            assert_same_bits(result, wanted)


@pytest.mark.parametrize(
    ("grad", "gate_up", "options", "message"),
    [
        ((4, 16), (4, 33), {}, "gate_up: expected an even number of columns"),
        ((4, 8), (4, 32), {}, r"grad: expected shape \(4, 16\)"),
        ((2, 4, 16), (4, 32), {}, "grad: expected shape"),
        ((4, 16), (4, 32), {"clamp": 0}, "clamp: expected None or a float32 above 0"),
        ((4, 16), (4, 32), {"alpha": 2.0**101}, "alpha: expected a magnitude up to"),
        ((4, 16), (4, 2**20 + 2), {}, "gate_up: expected up to"),
    ],
)
def test_wrong_shapes(grad, gate_up, options, message):
    with pytest.raises(ValueError, match=message):
        silu_mul_backward_quantize(
            torch.zeros(grad, dtype=BF16), torch.zeros(gate_up, dtype=BF16), **options
        )


def test_wrong_tensors():
    gate_up = torch.zeros(4, 32, dtype=BF16)
    with pytest.raises(TypeError, match="grad: expected a tensor of bfloat16"):
        silu_mul_backward_quantize(torch.zeros(4, 16), gate_up)
    with pytest.raises(TypeError, match=r"grad: expected a torch.Tensor"):
        silu_mul_backward_quantize(None, gate_up)
    with pytest.raises(ValueError, match="grad: expected rows contiguous along k"):
        silu_mul_backward_quantize(torch.zeros(16, 4, dtype=BF16).t(), gate_up)
    with pytest.raises(RuntimeError, match="silu_mul_backward_quantize is not differentiable"):
        silu_mul_backward_quantize(torch.zeros(4, 16, dtype=BF16, requires_grad=True), gate_up)
    memory = torch.zeros(4, 16, dtype=BF16)
    q = memory.view(torch.uint8).view(torch.float8_e4m3fn).view(4, 32)
    with pytest.raises(ValueError, match="overlap"):
        silu_mul_backward_quantize(memory, gate_up, DEEP_GEMM_SM90, out=(q, None))
