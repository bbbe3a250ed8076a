"""Operations on weights in square blocks."""

from __future__ import annotations

import torch

from cute_quant.contract import checks
from cute_quant.contract.blocks import check_block_format, stored_once
from cute_quant.contract.formats import DEEP_GEMM, Format
from cute_quant.contract.upper_scales import make_upper_scale
from cute_quant.dispatch import block_ops
from cute_quant.dispatch import blocks as block_launches
from cute_quant.ops.arguments import (
    Out,
    check_bool,
    check_input,
    goes_to_tracer,
    is_traced,
    outputs_of,
)
from cute_quant.ops.rows import dequantize


def quantize_blocks(
    w: torch.Tensor, fmt: Format = DEEP_GEMM, *, out: Out | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize weights in square blocks that share a scale.

    A block is ``fmt.group_size`` rows and as many columns, 128 or 32, short ones at both ends. Its
    scale is that of its largest magnitude, by the rules of :func:`quantize`: the same smallest
    scale, numerics and rounding, NaN for a block that is not finite. Values are those of
    :func:`quantize` under it. w is read once.

    Args:
        w: (..., N, K), bfloat16, float16 or float32, contiguous along k or along n. Other strides
            are free, as long as one of them walks the leading dimensions. K is at most 2^20; for
            FP4 it is even.
        fmt: what the result looks like. Its scales are float32 or UE8M0: NVFP4 has groups of rows,
            so `quantize` them. Where scales are float32 its layout has no say.
        out: q and sf to write into, each of them None to have it allocated; as for
            :func:`quantize`, but q has no more rows than w.

    Returns:
        q: that of `out`, or (..., N, K), ``fmt.values``, contiguous, also where w is contiguous
            along n. FP4 has two values in an element, so K / 2 of them.
        sf: that of `out`, or a new one. Where scales are float32: a scale for each block,
            (..., ceil(N / b), ceil(K / b)), contiguous. Where they are UE8M0: a scale for each row
            of a block, in shape, strides and padding as :func:`quantize` lays out those of
            (..., N, K). DeepGEMM and cuBLAS read them so, and :func:`dequantize` does.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`quantize`.
    """
    check_input("quantize_blocks", "w", w)
    outputs = outputs_of(out, fmt)
    run = block_ops.quantize if is_traced(w) else block_launches.quantize
    return run(w, fmt, outputs.q, outputs.sf)


def dequantize_blocks(
    q: torch.Tensor,
    sf: torch.Tensor,
    fmt: Format = DEEP_GEMM,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Multiply weights that were quantized in square blocks by their scales.

    Args:
        q: (..., N, K), ``fmt.values``, with strides as for :func:`dequantize`.
        sf: the scales that :func:`quantize_blocks` returned with it. Strides of float32 scales are
            free, as long as one of them walks the leading dimensions.
        fmt: the format that they were quantized to.
        dtype: of the result, as for :func:`dequantize`.

    Returns:
        (..., N, K), `dtype`, contiguous.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`dequantize`.
    """
    checks.check_format(fmt)
    if not stored_once(fmt):
        check_block_format(fmt)
        return dequantize(q, sf, fmt, dtype=dtype)
    check_input("dequantize_blocks", "q", q)
    check_input("dequantize_blocks", "sf", sf)
    traced = is_traced(q) or is_traced(sf)
    run = block_ops.dequantize if traced else block_launches.dequantize
    return run(q, sf, fmt, dtype)


def requantize_blocks(
    w8: torch.Tensor,
    w_sf: torch.Tensor,
    fmt: Format = DEEP_GEMM,
    *,
    encode_scale: torch.Tensor | None = None,
    decode_scale: torch.Tensor | None = None,
    amax: torch.Tensor | None = None,
    check: bool = False,
    out: Out | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize the weights of an FP8 checkpoint anew, in another format.

    The products of values and scales are float32, as if they were stored, and are quantized: in
    square blocks as by :func:`quantize_blocks`, or, to FP4, in groups of rows as by
    :func:`quantize`. They stay in registers: a GPU reads the 8-bit values once, and holds no copy
    in a wider type.

    Args:
        w8: (..., N, K), float8_e4m3fn, with strides as for :func:`quantize_blocks`. For FP4 it is
            contiguous along k, as its groups are.
        w_sf: float32, the scales of blocks, which checkpoints call ``weight_scale_inv``:
            (..., ceil(N / b), ceil(K / b)) for blocks of b x b, b being 128 or 32. Strides are
            free, as long as one of them walks the leading dimensions.
        fmt: what the result looks like: for 8-bit values as for :func:`quantize_blocks`, for FP4 as
            for :func:`quantize`, without `row_scale`.
        encode_scale: as for :func:`quantize`.
        decode_scale: as for :func:`quantize`.
        amax: as for :func:`quantize`, of the products.
        check: whether to read `w8`, `w_sf` and the scale over e4m3 scales, which synchronizes, and
            raise on NaN among the values, on scales that are negative or not finite, on products
            that are Inf, and on a scale that does not fit the products.
        out: as for :func:`quantize_blocks`.

    Returns:
        q, sf: as :func:`quantize_blocks` or, for FP4, :func:`quantize` returns them.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`quantize`.
    """
    check_input("requantize_blocks", "w8", w8)
    check_input("requantize_blocks", "w_sf", w_sf)
    upper = make_upper_scale(encode_scale=encode_scale, decode_scale=decode_scale, amax=amax)
    if upper is not None:
        check_input("requantize_blocks", *upper)
    check_bool("check", check)
    outputs = outputs_of(out, fmt)
    call = w8, w_sf, fmt, upper, outputs.q, outputs.sf
    if goes_to_tracer([w8], check, "values"):
        return block_ops.requantize(*call)
    return block_launches.requantize(*call, check=check)
