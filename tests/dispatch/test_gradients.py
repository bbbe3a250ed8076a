"""Operators say that they have no gradient, whoever calls them."""

import importlib

import pytest
import torch

from cute_quant import DEEP_GEMM, GROUPWISE_FP8, quantize, quantize_blocks
from cute_quant.dispatch import block_ops

operators = torch.ops.cute_quant


def call(name: str, x: torch.Tensor) -> object:
    """Call an operator with an argument that may require a gradient."""
    text = DEEP_GEMM.text
    match name:
        case "quantize":
            return operators.quantize(x, text)
        case "silu_mul_quantize":
            options = dict.fromkeys(("clamp", "alpha", "beta"), 1.0)
            return operators.silu_mul_quantize(
                x, None, text, interleaved=False, rounding="fused", **options
            )
        case "silu_mul_backward_quantize":
            options = dict.fromkeys(("clamp", "alpha", "beta"), 1.0)
            return operators.silu_mul_backward_quantize(
                x, torch.ones(4, 512), text, interleaved=False, **options
            )
        case "rms_norm_quantize":
            options = {"eps": 1e-6, "weight_offset": 0.0, "rounding": "fused"}
            return operators.rms_norm_quantize(x, x[0].detach(), text, **options)
        case "fake_quantize":
            return operators.fake_quantize(x, text)
    q = torch.ones(4, 256).to(torch.float8_e4m3fn)
    return operators.dequantize(q, x[:, :2].contiguous(), GROUPWISE_FP8.text, torch.bfloat16)


@pytest.mark.parametrize(
    "name",
    [
        "quantize",
        "silu_mul_quantize",
        "silu_mul_backward_quantize",
        "rms_norm_quantize",
        "dequantize",
        "fake_quantize",
    ],
)
def test_operators_have_no_gradient(name):
    x = torch.ones(4, 256)
    call(name, x)
    with pytest.raises(RuntimeError, match=f"{name} is not differentiable"):
        call(name, x.requires_grad_())


WRITERS = {
    "quantize_out": ("x",),
    "rms_norm_quantize_residual": ("x", "weight", "residual"),
    "rms_norm_quantize_out": ("x", "weight", "residual"),
    "quantize_blocks_out": ("x",),
}


def write(name: str, tensors: dict[str, torch.Tensor]) -> object:
    """Call an operator that writes to memory, with new memory for q and sf."""
    x, text = tensors["x"], GROUPWISE_FP8.text
    results = quantize(x.detach(), GROUPWISE_FP8)
    norm = {"eps": 1e-6, "weight_offset": 0.0, "rounding": "fused"}
    match name:
        case "quantize_out":
            return operators.quantize_out(x, *results, None, text)
        case "quantize_blocks_out":
            results = quantize_blocks(x.detach(), GROUPWISE_FP8)
            return operators.quantize_blocks_out(x, *results, text)
        case "rms_norm_quantize_residual":
            given = (*tensors.values(),)[:4]
            return operators.rms_norm_quantize_residual(*given, None, text, **norm)
    x, weight, *others = tensors.values()
    return operators.rms_norm_quantize_out(x, weight, *results, None, *others, text, **norm)


@pytest.mark.parametrize(("name", "which"), [(n, t) for n in WRITERS for t in WRITERS[n]])
def test_operators_that_write_have_no_gradient(name, which):
    names = ("x", "weight", "residual", "residual_out", "normalized")
    tensors = {n: torch.ones(256) if n == "weight" else torch.ones(4, 256) for n in names}
    write(name, tensors)
    assert not any(t.requires_grad for t in tensors.values())
    tensors[which].requires_grad_()
    with pytest.raises(RuntimeError, match=f"{name} is not differentiable"):
        write(name, tensors)
    with torch.no_grad():
        write(name, tensors)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_operators_that_write_have_no_gradient(backend):
    x, weight, residual = torch.ones(4, 256), torch.ones(256), torch.ones(4, 256)

    def call(x):
        new_sum = torch.empty_like(x)
        write("rms_norm_quantize_residual", dict(x=x, weight=weight, a=residual, b=new_sum))
        return new_sum * 2

    torch._dynamo.reset()
    with pytest.raises(Exception, match="rms_norm_quantize_residual is not differentiable"):
        torch.compile(call, fullgraph=True, backend=backend)(x.requires_grad_())


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="torch 2.11 loses schemas defined again")
def test_modules_of_operators_can_be_loaded_again():
    importlib.reload(block_ops)
    w = torch.ones(128, 128)
    q, sf = operators.quantize_blocks(w, GROUPWISE_FP8.text)
    assert torch.equal(operators.dequantize_blocks(q, sf, GROUPWISE_FP8.text, w.dtype), w)
