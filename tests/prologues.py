"""What prologues hand to the quantizer, and the bounds of what a GPU computes for it.

The exact values are those of numpy's long double, or of torch's operations where results are
rounded after each. The bounds allow for approximate exponentials, reciprocals and roots of kernels.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

SILU_ERROR = 13 * 2.0**-24
"""Relative error of an approximate exponential, 2^-22, a reciprocal, 2^-23, and 7 roundings."""
NORM_ERROR = 15 * 2.0**-24
"""Relative error of the root of a sum 16 additions deep, an approximation and 5 roundings."""
LARGEST = np.finfo(np.float32).max


class Bounds(NamedTuple):
    """Values to be quantized, on the CPU, and the bounds of what a GPU computes for them."""

    values: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor


def in_order(values: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> Bounds:
    return Bounds(values, torch.minimum(one, other), torch.maximum(one, other))


def split_halves(gate_up: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if interleaved:
        return gate_up[..., ::2], gate_up[..., 1::2]
    k = gate_up.shape[-1] // 2
    return gate_up[..., :k], gate_up[..., k:]


def _silu_fused(
    gate_up, weight, interleaved=False, clamp=None, alpha=1.0, beta=0.0, shifted_dtype=None
) -> Bounds:
    """Compute in numpy's long double: float64 rounds one in hundreds of millions differently.

    With a `shifted_dtype` sums of ups and beta are rounded to it.
    """
    gate, up = (
        t.double().numpy().astype(np.longdouble) for t in split_halves(gate_up, interleaved)
    )
    with np.errstate(all="ignore"):
        if clamp is not None:
            limit = np.longdouble(np.float32(clamp))
            gate, up = np.minimum(gate, limit), np.maximum(np.minimum(up, limit), -limit)
        up = up + np.longdouble(np.float32(beta)) if beta else up
        if beta and shifted_dtype is not None:
            sums = torch.from_numpy(up.astype(np.float32)).to(shifted_dtype)
            up = sums.double().numpy().astype(np.longdouble)
        argument = np.longdouble(np.float32(alpha)) * gate
        small = np.exp(-np.abs(argument))
        exact = up * gate * (np.where(argument >= 0, 1, small) / (1 + small))
        error = np.abs(exact) * SILU_ERROR
        # A sigmoid below the normal floats may be 0 on a GPU.
        error += np.abs(up * gate) * 2.0**-125 + 2.0**-126
        values = torch.from_numpy(exact.astype(np.float32))
        low, high = (torch.from_numpy((exact + e).astype(np.float64)) for e in (-error, error))
    if weight is not None:
        # Rounded before, and beyond float32 already Inf then.
        values, low, high = (t.float() * weight.unsqueeze(-1) for t in (values, low, high))
    return in_order(values, low, high)


def silu_backward_bounds(
    grad: torch.Tensor,
    gate_up: torch.Tensor,
    *,
    interleaved: bool = False,
    clamp: float | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
) -> Bounds:
    """Return the gradients of (..., mn, 2 k), with the options of ``silu_mul_backward_quantize``.

    Its two parts nearly cancel where gates are about -1.28: errors are those of their magnitudes.
    """
    gate, up, grad = (
        t.double().numpy().astype(np.longdouble)
        for t in (*split_halves(gate_up, interleaved), grad)
    )
    with np.errstate(all="ignore"):
        limit = np.inf if clamp is None else np.longdouble(np.float32(clamp))
        beyond = gate > limit, np.abs(up) > limit
        gate, up = np.minimum(gate, limit), np.maximum(np.minimum(up, limit), -limit)
        up = up + np.longdouble(np.float32(beta)) if beta else up
        argument = np.clip(np.longdouble(np.float32(alpha)) * gate, -1000, 1000)
        small = np.exp(-np.abs(argument))
        sigmoid = np.where(argument >= 0, 1, small) / (1 + small)
        rest = np.where(argument >= 0, small, 1) / (1 + small)
        factors = grad * up, grad * gate
        exact = factors[0] * sigmoid * (1 + argument * rest), factors[1] * sigmoid
        # A sigmoid below the normal floats may be 0 on a GPU, times at most 89 in the sum.
        errors = (
            2 * SILU_ERROR * np.abs(factors[0] * sigmoid) * (1 + np.abs(argument))
            + np.abs(factors[0]) * 89 * 2.0**-125,
            np.abs(exact[1]) * SILU_ERROR + np.abs(factors[1]) * 2.0**-125,
        )
        parts = []
        for out, value, error in zip(beyond, exact, errors, strict=True):
            value, error = np.where(out, 0, value), np.where(out, 0, error) + 2.0**-126
            error = np.where(np.isfinite(value), error, 0)
            parts.append((value.astype(np.float32), value - error, value + error))
        joined = [
            np.stack(pair, -1).reshape(*pair[0].shape[:-1], -1)
            if interleaved
            else np.concatenate(pair, -1)
            for pair in zip(*parts, strict=True)
        ]
    values, low, high = (torch.from_numpy(t.astype(np.float64)) for t in joined)
    return in_order(values.float(), low, high)


def _silu_unfused(gate_up, weight, interleaved=False, clamp=None, alpha=1.0, beta=0.0) -> Bounds:
    """Compute in torch's operations, of which only the sigmoid is inexact on a GPU."""
    gate, up = split_halves(gate_up, interleaved)
    dtype = gate.dtype
    alpha, beta = torch.tensor(alpha).float().item(), torch.tensor(beta).float().item()
    if clamp is not None:
        limit = torch.tensor(clamp).float().to(dtype).item()
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    up = (up.float() + beta).to(dtype) if beta else up
    argument = alpha * gate
    exact = torch.sigmoid(argument.double())
    error = exact * SILU_ERROR + 2.0**-126
    if alpha == 1:
        activation = functional.silu(gate)
        ends = [(gate * (exact + e)).to(dtype) for e in (-error, error)]
    else:
        activation = gate * torch.sigmoid(argument)
        ends = [gate * (exact + e).to(dtype) for e in (-error, error)]
    values = [a * up for a in (activation, *ends)]
    if weight is not None:
        values = [(t.float() * weight.unsqueeze(-1)).to(dtype) for t in values]
    return in_order(*values)


def _silu_vllm(gate_up, weight, interleaved=False, clamp=None, alpha=1.0, beta=0.0) -> Bounds:
    """Compute in torch's operations on float32, and round the product."""
    bounds = _silu_fused(gate_up, None, interleaved, clamp, alpha, beta)
    gate, up = (t.float() for t in split_halves(gate_up, interleaved))
    alpha, beta = torch.tensor(alpha).float(), torch.tensor(beta).float()
    if clamp is not None:
        limit = torch.tensor(clamp).float()
        gate, up = torch.minimum(gate, limit), torch.maximum(torch.minimum(up, limit), -limit)
    up = up + beta if beta else up
    activation = functional.silu(gate) if alpha == 1 else gate * torch.sigmoid(alpha * gate)
    values = [t.to(gate_up.dtype) for t in (activation * up, bounds.low, bounds.high)]
    if weight is not None:
        values = [(t.float() * weight.unsqueeze(-1)).to(t.dtype) for t in values]
    return in_order(*values)


def _silu_triton(gate_up, weight, interleaved=False, clamp=None, alpha=1.0, beta=0.0) -> Bounds:
    """Compute the activation in float32, and round it, its up plus beta and the product."""
    dtype = gate_up.dtype
    gate, up = split_halves(gate_up, interleaved)
    if clamp is not None:
        limit = torch.tensor(clamp, dtype=torch.float64).to(dtype)
        gate, up = torch.minimum(gate, limit), torch.maximum(torch.minimum(up, limit), -limit)
    ones = torch.cat([gate, torch.ones_like(gate)], -1)
    activations = [t.to(dtype) for t in _silu_fused(ones, None, alpha=alpha)]
    up = (up.float() + torch.tensor(beta).float()).to(dtype) if beta else up
    values = [(t.float() * up.float()).to(dtype) for t in activations]
    if weight is not None:
        values = [(t.float() * weight.unsqueeze(-1)).to(dtype) for t in values]
    return in_order(*values)


def _norm_fused(total, weight, eps, offset) -> Bounds:
    """Normalize the float32 sum in numpy's long double.

    In float64 one in hundreds of millions is rounded differently.
    """
    with np.errstate(all="ignore"):
        r = total.numpy().astype(np.longdouble)
        squares = (r * r).sum(-1, keepdims=True)
        squares = np.where(squares > LARGEST, np.inf, squares)
        mean = squares / r.shape[-1] + np.longdouble(np.float32(eps))
        mean = np.where(mean < np.finfo(np.float32).tiny, 0, mean)
        factor = weight.float().numpy()
        factor = factor + np.float32(offset) if offset else factor
        products = r * factor.astype(np.longdouble)
        products = np.where(np.abs(products) > LARGEST, np.sign(products) * np.inf, products)
        exact = products / np.sqrt(mean)
        # A product below the normal numbers is rounded to a multiple of the smallest.
        error = np.abs(exact) * NORM_ERROR + 2.0**-149 / np.sqrt(mean) + 2.0**-126
        error = np.where(np.isfinite(exact), error, 0)
        values = torch.from_numpy(exact.astype(np.float32))
        low, high = (torch.from_numpy((exact + e).astype(np.float64)) for e in (-error, error))
    return in_order(values, low, high)


def _norm_unfused(total, weight, eps, offset, dtype) -> Bounds:
    """Normalize the sum, rounded to `dtype`, in torch's operations."""
    total = total.to(dtype).float()
    bounds = _norm_fused(total, weight, eps, offset)
    factor = weight.float() + offset if offset else weight.float()
    eps = torch.tensor(eps).float().item()
    values = functional.rms_norm(total, total.shape[-1:], factor, eps)
    values = values.where(bounds.values.isfinite(), bounds.values)
    return in_order(*(t.to(dtype) for t in (values, bounds.low, bounds.high)))


def _norm_of_rounded_rows(total, weight, eps, dtype, row_dtype) -> Bounds:
    """Normalize float32 rows as Hugging Face and vLLM write it: rounded, times the weight."""
    bounds = _norm_fused(total, torch.ones_like(weight), eps, 0.0)
    eps = torch.tensor(eps).float()
    rows = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    rows = rows.where(bounds.values.isfinite(), bounds.values)
    rounded = [t.to(row_dtype).float() for t in (rows, bounds.low, bounds.high)]
    return in_order(*((t * weight.float()).to(dtype) for t in rounded))


def silu_bounds(
    gate_up: torch.Tensor,
    weight: torch.Tensor | None = None,
    rounding: str = "fused",
    **options: object,
) -> Bounds:
    """Return the gated activation of (..., mn, 2 k), with the options of ``silu_mul_quantize``."""
    functions = {
        "fused": _silu_fused,
        "unfused": _silu_unfused,
        "vllm": _silu_vllm,
        "vllm_triton": _silu_triton,
        "vllm_cuda": _silu_fused,
        "vllm_bf16": _silu_triton,
        "sglang": functools.partial(_silu_fused, shifted_dtype=gate_up.dtype),
    }
    return functions[rounding](gate_up, weight, **options)


def norm_bounds(
    total: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    rounding: str,
    dtype: torch.dtype,
) -> Bounds:
    """Return the norm of the rows of `total`, (..., mn, k), float32, for an input of `dtype`."""
    if rounding == "fused":
        return _norm_fused(total, weight, eps, weight_offset)
    if rounding == "huggingface":
        return _norm_of_rounded_rows(total.to(dtype).float(), weight, eps, dtype, dtype)
    if rounding == "vllm":
        return _norm_of_rounded_rows(total, weight, eps, dtype, weight.dtype)
    return _norm_unfused(total, weight, eps, weight_offset, dtype)


class Gathered(NamedTuple):
    """Rows of an input in the places that an index gives them.

    Attributes:
        rows: (..., mn, k), 0 where there is none.
        index: the rows of those, flattened, for each row of the result, or -1.
    """

    rows: torch.Tensor
    index: torch.Tensor | None


def gathered(x: torch.Tensor, index: torch.Tensor | None) -> Gathered:
    """Return the rows of x that an index names, x itself without one."""
    if index is None:
        return Gathered(x, None)
    valid = (index >= 0) & (index < len(x))
    rows = torch.cat([x, x.new_zeros(1, x.shape[1])])[index.long().where(valid, len(x))]
    own = torch.arange(index.numel(), dtype=torch.int32).view(index.shape)
    return Gathered(rows, own.where(valid, -1))
