"""Operators say that they have no gradient, whoever calls them."""

import pytest
import torch

from cute_quant import DEEP_GEMM, GROUPWISE_FP8

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
