"""Computations in front of the quantizer: gated activations, their gradients, and RMSNorm."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from cute_quant.contract.dtypes import FLOAT32_MAX, SMALLEST_NORMAL
from cute_quant.contract.prologues import (
    FUSED,
    UNFUSED,
    Prologue,
    RmsNorm,
    SiluMul,
    SiluMulBackward,
    clamp_limit,
    rounds_activation,
    rounds_product,
    rounds_row,
    rounds_shifted,
    rounds_sum,
)

MAX_ARGUMENT = 1000.0
"""Magnitude from which on the sigmoid of a float64 is 0 or 1."""


def computed(x: torch.Tensor, prologue: Prologue | None) -> torch.Tensor:
    """Return what a prologue makes of x (batch, mn, columns), and write what else it writes."""
    match prologue:
        case SiluMul():
            return silu_mul(x, prologue)
        case SiluMulBackward():
            return silu_mul_backward(x, prologue)
        case RmsNorm():
            return rms_norm(x, prologue)
    return x


def silu_mul(gate_up: torch.Tensor, prologue: SiluMul) -> torch.Tensor:
    """Return the gated activation of `gate_up` (batch, mn, 2k).

    Returns:
        (batch, mn, k): float32 if it is fused, else the dtype of `gate_up`.
    """
    gate, up = _gates_and_ups(gate_up, prologue.interleaved)
    alpha, beta, weight = prologue.alpha, prologue.beta, prologue.weight
    if weight is not None:
        weight = weight.view(*gate.shape[:-1], 1)
    # Adding 0 would make 0 of -0.
    limit = clamp_limit(prologue, gate.dtype)
    if not rounds_product(prologue.rounding):
        dtype = up.dtype
        gate, up = _clamp(gate.double(), up.double(), limit)
        up = up if beta == 0 else up + beta
        if rounds_shifted(prologue.rounding):
            up = up.float().to(dtype).double()
        values = (up * gate * torch.sigmoid(alpha * gate)).float()
        return values if weight is None else values * weight
    dtype = gate.dtype
    if prologue.rounding != UNFUSED:
        gate, up = gate.float(), up.float()
    gate, up = _clamp(gate, up, limit)
    activation = functional.silu(gate) if alpha == 1 else gate * torch.sigmoid(alpha * gate)
    if rounds_activation(prologue.rounding):
        activation = activation.to(dtype)
    if beta != 0:
        # On the CPU, and there alone, torch rounds a number that it adds to the dtype first.
        up = up.float() + beta
        up = up.to(dtype) if rounds_shifted(prologue.rounding) else up
    values = (activation * up).to(dtype)
    return values if weight is None else (values.float() * weight).to(values.dtype)


def silu_mul_backward(gate_up: torch.Tensor, prologue: SiluMulBackward) -> torch.Tensor:
    """Return the gradients of gates and ups of `gate_up` (batch, mn, 2k).

    Returns:
        (batch, mn, 2k), float32, in the places of gates and ups.
    """
    gate, up = _gates_and_ups(gate_up.double(), prologue.interleaved)
    grad = prologue.grad.reshape(gate.shape).double()
    limit = math.inf if prologue.clamp is None else prologue.clamp
    bounded_gate, bounded_up = _clamp(gate, up, limit)
    # Further out a sigmoid, or what it lacks of 1, is 0 and has to stay so in a product with Inf.
    argument = (prologue.alpha * bounded_gate).clamp(-MAX_ARGUMENT, MAX_ARGUMENT)
    sigmoid = torch.sigmoid(argument)
    slope = sigmoid * (1 + argument * torch.sigmoid(-argument))
    bounded_up = bounded_up if prologue.beta == 0 else bounded_up + prologue.beta
    of_gates = (grad * (bounded_up * slope)).masked_fill(gate > limit, 0.0)
    of_ups = (grad * (bounded_gate * sigmoid)).masked_fill(up.abs() > limit, 0.0)
    if prologue.interleaved:
        return torch.stack((of_gates, of_ups), -1).flatten(-2).float()
    return torch.cat((of_gates, of_ups), -1).float()


def _gates_and_ups(gate_up: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if interleaved:
        return gate_up[..., 0::2], gate_up[..., 1::2]
    gate, up = gate_up.chunk(2, -1)
    return gate, up


def _clamp(gate: torch.Tensor, up: torch.Tensor, limit: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return gates up to `limit`, and ups from minus that to that."""
    if limit == math.inf:
        return gate, up
    return gate.clamp(max=limit), up.clamp(-limit, limit)


def rms_norm(x: torch.Tensor, prologue: RmsNorm) -> torch.Tensor:
    """Normalize `x` (batch, mn, k) plus the residual, by the root mean square of each row.

    The updated residual and the normalized rows are written to the tensors of `prologue`.

    Returns:
        (batch, mn, k): float32 if it is fused, else x's dtype.
    """
    total = x.float()
    if prologue.residual is not None:
        total = total + prologue.residual.view(x.shape).float()
    if prologue.residual_out is not None:
        prologue.residual_out.view(x.shape).copy_(total)
    weight = prologue.weight.float()
    if prologue.weight_offset != 0:
        weight = weight + prologue.weight_offset
    if rounds_sum(prologue.rounding):
        total = total.to(x.dtype).float()
    if prologue.rounding == FUSED:
        values = _normalized(total, weight, prologue.eps).float()
    elif prologue.rounding != UNFUSED:
        row = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + prologue.eps)
        exact = _normalized(total, torch.ones_like(weight), prologue.eps).float()
        row = row.where(exact.isfinite(), exact)
        if rounds_row(prologue.rounding, prologue.weight.dtype):
            row = row.to(x.dtype).float()
        values = (row * weight).to(x.dtype)
    else:
        exact = _normalized(total, weight, prologue.eps).float()
        values = functional.rms_norm(total, x.shape[-1:], weight, prologue.eps)
        values = values.where(exact.isfinite(), exact).to(x.dtype)
    if prologue.normalized is not None:
        prologue.normalized.view(x.shape).copy_(values)
    return values


def _normalized(r: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return rows over the root of their mean square plus `eps`, times `weight`.

    The precision is that of float64, the range that of float32: products with the weight and sums
    of squares beyond it are Inf, and a mean square below its normal numbers is 0.
    """
    products = (r * weight).double()
    products = products.where(products.isinf(), r.double() * weight)
    squares = r.double().square().sum(-1, keepdim=True)
    # As a tensor, since torch multiplies a CUDA tensor with the reciprocal of a number.
    count = squares.new_full((), r.shape[-1])
    square = squares.masked_fill(squares > FLOAT32_MAX, torch.inf) / count + eps
    return products / square.masked_fill(square < SMALLEST_NORMAL, 0.0).sqrt()
