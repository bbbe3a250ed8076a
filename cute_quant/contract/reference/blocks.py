"""Blocks of weights in plain torch: quantize, dequantize and requantize without a kernel."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from cute_quant.contract.blocks import block_size, quantized_by_row, stored_once
from cute_quant.contract.calls import Call
from cute_quant.contract.dtypes import ceil_div
from cute_quant.contract.formats import Format
from cute_quant.contract.reference.quantize import quantize_into as quantize_rows_into
from cute_quant.contract.reference.quantize import store_scales
from cute_quant.contract.reference.scales import scales_of_amax
from cute_quant.contract.reference.values import group_values, multiply_back, ue8m0_to_float32
from cute_quant.contract.upper_scales import UpperScale


def quantize_into(w: torch.Tensor, fmt: Format, q: torch.Tensor, sf: torch.Tensor) -> None:
    """Quantize weights (..., n, k) in blocks into `q` and `sf`, and define the padding of scales.

    Args:
        w: (..., n, k), of any strides.
        fmt: the format of the result.
        q: (..., n, k), or bytes of two values.
        sf: scales as `blocks.scale_shape` has them.
    """
    if w.numel() == 0:
        return
    n, k = w.shape[-2:]
    w = w.reshape(-1, n, k)
    scales = scales_of_amax(block_amax(w, fmt.group_size), fmt)
    by_row = rows_of_blocks(scales, fmt.group_size, n)
    codes = group_values(w, by_row, fmt)
    q.view(torch.uint8).copy_(codes.view(torch.uint8).view(q.shape))
    if stored_once(fmt):
        floats = ue8m0_to_float32(scales) if fmt.power_of_two else scales
        sf.copy_(floats.view(sf.shape))
    else:
        written = torch.ones(len(w), fmt.scale_rows(n), dtype=torch.bool, device=w.device)
        store_scales(by_row, written, sf, fmt, k)


def block_amax(w: torch.Tensor, size: int) -> torch.Tensor:
    """Return the largest magnitude of each block of `w` (batch, n, k), NaN where one is.

    Returns:
        (batch, ceil(n / size), ceil(k / size)), w's dtype.
    """
    batch, n, k = w.shape
    padded = pad(w, (0, -k % size, 0, -n % size))
    of_blocks = padded.view(batch, ceil_div(n, size), size, ceil_div(k, size), size)
    return of_blocks.abs().amax((2, 4))


def rows_of_blocks(scales: torch.Tensor, size: int, n: int) -> torch.Tensor:
    """Return the scales (..., blocks, groups) of blocks for each of `n` rows, (..., n, groups)."""
    return scales.repeat_interleave(size, -2)[..., :n, :]


def dequantize_into(q: torch.Tensor, sf: torch.Tensor, fmt: Format, y: torch.Tensor) -> None:
    """Write values times the float32 scales of their blocks to `y`, (..., n, k)."""
    if y.numel() == 0:
        return
    scales = rows_of_blocks(sf, fmt.group_size, y.shape[-2])
    y.copy_(multiply_back(q, scales, fmt, y.dtype))


def requantize_into(
    w8: torch.Tensor,
    w_sf: torch.Tensor,
    fmt: Format,
    upper: UpperScale | None,
    q: torch.Tensor,
    sf: torch.Tensor,
) -> None:
    """Quantize the float32 products of values and scales of blocks into `q` and `sf`.

    Args:
        w8: (..., n, k), e4m3.
        w_sf: (..., ceil(n / b), ceil(k / b)), float32, of blocks of 128 or 32.
        fmt: the format of the result.
        upper: the scale over e4m3 scales.
        q: (..., n, k), or bytes of two values.
        sf: scales of blocks, or of groups of rows for FP4.
    """
    if w8.numel() == 0:
        return
    size = block_size(w8, w_sf)
    scales = rows_of_blocks(w_sf, size, w8.shape[-2])
    by_column = scales.repeat_interleave(size, -1)[..., : w8.shape[-1]]
    w = w8.float() * by_column
    if quantized_by_row(fmt):
        quantize_rows_into(Call(w, fmt, upper=upper), q, sf)
    else:
        quantize_into(w, fmt, q, sf)
