"""Values and scales beside what was quantized."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cute_quant.contract import reference
from cute_quant.contract.calls import ResultShape
from cute_quant.contract.format_choices import ROW_MAJOR
from cute_quant.contract.formats import Format
from cute_quant.contract.reader_checks.padding import bytes_in_order
from cute_quant.contract.reader_checks.quantized import Finding, Quantized
from cute_quant.contract.reader_checks.upper_scale import decode_factors

ERROR = 0.25
"""Relative error from which on values and scales do not belong to x."""


def wrong_values(given: Quantized, shape: ResultShape, live: torch.Tensor) -> Iterator[Finding]:
    """Yield that dequantized values are not those that were quantized, where these are at hand."""
    if given.x is None:
        return
    error = _error(given, given.sf, given.fmt, shape, live)
    if error <= ERROR:
        return
    if given.fmt.blocked:
        count = shape.mn * given.fmt.groups(shape.k)
        row_major = given.fmt.replace(scale_layout=ROW_MAJOR)
        unswizzled = bytes_in_order(given.sf)[:, :count].reshape(row_major.scale_shape(*shape))
        unswizzled = unswizzled.view(given.fmt.scale_dtype)
        if _error(given, unswizzled, row_major, shape, live) <= ERROR:
            yield Finding(
                "swizzle",
                f"sf: expected blocks of {given.fmt.scale_layout}, got scales in row-major order: "
                "convert_scales from row_major makes blocks of them",
            )
            return
    yield Finding(
        "values",
        f"q, sf: expected the values of x, got a relative error of {error:.3g}: the scales belong "
        "to other groups, or to another x",
    )


def _error(
    given: Quantized, sf: torch.Tensor, fmt: Format, shape: ResultShape, live: torch.Tensor
) -> float:
    """Return the relative error of the rows that exist, of the finite values of x."""
    assert given.x is not None
    q = given.q.view(fmt.values)
    y = reference.dequantize(q, sf, fmt, torch.float32).view(*live.shape, shape.k)
    if given.upper is not None:
        y = y * decode_factors(given, live)
    x = given.x.float().reshape(y.shape)
    used = (live.unsqueeze(2) & x.isfinite() & y.isfinite()).expand_as(x)
    difference = (y - x).where(used, 0.0).double().norm()
    return float(difference / x.where(used, 0.0).double().norm().clamp(min=1e-300))
