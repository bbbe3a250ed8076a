"""Values and scales beside what was quantized."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.nn.functional import pad

from cute_quant.contract.calls import Call, ResultShape
from cute_quant.contract.formats import Format
from cute_quant.contract.reader_checks.operands import block_orders
from cute_quant.contract.reader_checks.padding import bytes_in_order
from cute_quant.contract.reader_checks.quantized import Finding, Quantized
from cute_quant.contract.reader_checks.upper_scale import decode_factors
from cute_quant.contract.reference.dequantize import dequantize
from cute_quant.contract.reference.quantize import fake_quantize_into

ERROR = 0.25
"""Relative error from which on values and scales do not belong to x, where these are not tiny."""
ROUNDED = 2.5
"""Bound of what rounding to a power of two multiplies a scale by, as far as values tell."""


def wrong_values(given: Quantized, shape: ResultShape, live: torch.Tensor) -> Iterator[Finding]:
    """Yield that dequantized values are not those that were quantized, where these are at hand."""
    if given.x is None:
        return
    error, bound = _error(given, given.sf, given.fmt, shape, live), _error_bound(given)
    if error <= bound:
        return
    for fmt in block_orders(given.fmt) if given.fmt.blocked else ():
        count = math.prod(fmt.scale_shape((), shape.mn, shape.k))
        stored = bytes_in_order(given.sf)
        if count > stored.shape[-1]:
            continue
        sf = stored[:, :count].reshape(fmt.scale_shape(*shape)).view(fmt.scale_dtype)
        if _error(given, sf, fmt, shape, live) <= bound:
            yield Finding(
                "swizzle",
                f"sf: expected blocks of {given.fmt.scale_layout}, got scales in the order of "
                f"{fmt.scale_layout}: convert_scales from {fmt.scale_layout} makes blocks of them",
            )
            return
    x, y = _finite(given, given.sf, given.fmt, shape, live)
    factors = _group_factors(x, y, given.fmt)
    low, high = (float(bound) for bound in (1 / factors).aminmax())
    if low > 1 / ROUNDED and high < ROUNDED and _relative(y * factors, x) <= bound:
        yield Finding(
            "values",
            f"sf: expected the scales that q was quantized with, got scales {low:.2g} to "
            f"{high:.2g} times as large: were they rounded after the values were quantized?",
        )
        return
    yield Finding(
        "values",
        f"q, sf: expected the values of x, got a relative error of {error:.3g}: the scales belong "
        "to other groups, or to another x",
    )


def _error_bound(given: Quantized) -> float:
    """Return the relative error from which on values and scales do not belong to x.

    Values under the least scale, such as 1e-14 under that of DeepGEMM's formats, round to 0.
    """
    if given.upper is not None:
        return ERROR
    assert given.x is not None
    x = given.x.where(given.x.isfinite(), 0.0)
    nearest = torch.empty_like(x)
    fake_quantize_into(Call(x, given.fmt), nearest)
    return max(ERROR, 2 * _relative(nearest.float(), x.float()))


def _error(
    given: Quantized, sf: torch.Tensor, fmt: Format, shape: ResultShape, live: torch.Tensor
) -> float:
    """Return the relative error of the rows that exist, of the finite values of x."""
    x, y = _finite(given, sf, fmt, shape, live)
    return _relative(y, x)


def _finite(
    given: Quantized, sf: torch.Tensor, fmt: Format, shape: ResultShape, live: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x and the dequantized values, (batch, mn, k), 0 where one is not finite, or no row."""
    assert given.x is not None
    q = given.q.view(fmt.values)
    y = dequantize(q, sf, fmt, torch.float32).view(*live.shape, shape.k)
    if given.upper is not None:
        y = y * decode_factors(given, live)
    x = given.x.float().reshape(y.shape)
    used = (live.unsqueeze(2) & x.isfinite() & y.isfinite()).expand_as(x)
    return x.where(used, 0.0), y.where(used, 0.0)


def _relative(y: torch.Tensor, x: torch.Tensor) -> float:
    """Return the norm of the difference over that of x."""
    return float((y - x).double().norm() / x.double().norm().clamp(min=1e-300))


def _group_factors(x: torch.Tensor, y: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Return by what each value has to be multiplied, so that its group is nearest to x; 1 of 0."""
    k = x.shape[-1]
    size = k if fmt.whole_row else fmt.group_size
    padded = [pad(t.double(), (0, -k % size)) for t in (x, y)]
    groups = [t.view(*t.shape[:-1], t.shape[-1] // size, size) for t in padded]
    products, squares = (groups[0] * groups[1]).sum(-1), groups[1].square().sum(-1)
    factors: torch.Tensor = (products / squares).where((products > 0) & (squares > 0), 1.0)
    return factors.repeat_interleave(size, -1)[..., :k]
