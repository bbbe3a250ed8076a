"""Multiply values with their scales."""

from __future__ import annotations

import torch

from cute_quant.contract import scale_storage
from cute_quant.contract.formats import Format
from cute_quant.contract.reference.values import multiply_back, ue8m0_to_float32
from cute_quant.contract.upper_scales import UpperScale, decode_scale


def dequantize(
    q: torch.Tensor,
    sf: torch.Tensor,
    fmt: Format,
    dtype: torch.dtype,
    upper: UpperScale | None = None,
) -> torch.Tensor:
    """Return q times scale, multiplied in float32 and rounded to `dtype`; contiguous.

    Args:
        q: (..., mn, k), values of `fmt`, or (..., mn, k / 2) bytes of two.
        sf: the scales of `fmt` for q's shape.
        fmt: the format of both.
        dtype: of the result.
        upper: the scale over e4m3 scales.
    """
    *leading, columns = q.shape
    y = torch.empty((*leading, columns * fmt.value_type.per_byte), dtype=dtype, device=q.device)
    dequantize_into(q, sf, fmt, y, upper)
    return y


def dequantize_into(
    q: torch.Tensor,
    sf: torch.Tensor,
    fmt: Format,
    y: torch.Tensor,
    upper: UpperScale | None = None,
) -> None:
    """Write what :func:`dequantize` returns to `y`, of its shape."""
    mn, k = y.shape[-2:]
    if y.numel() == 0:
        return
    scales = scale_storage.read(sf, fmt, mn, k)
    if fmt.byte_scales:
        scales = _scale_floats(scales, fmt)
    if upper is not None:
        upper_scales = decode_scale(upper).reshape(-1, mn if fmt.row_scale else 1, 1)
        scales = scales * upper_scales
    scales = scales.reshape(*y.shape[:-1], scales.shape[-1])
    y.copy_(multiply_back(q, scales, fmt, y.dtype))


def _scale_floats(stored: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Return bytes of scales as float32."""
    if fmt.ue8m0:
        return ue8m0_to_float32(stored)
    return stored.to(torch.uint8).view(fmt.scale_dtype).float()
