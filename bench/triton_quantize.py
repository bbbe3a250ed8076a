"""The packed quantizer in Triton, written the ordinary way: a tile of rows and groups a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bench.shapes import GROUP_SIZE

ROWS_PER_PROGRAM = 4
WARPS = 4


@triton.jit
def quantize_kernel(
    x,  # (mn, k) bf16 or fp16, contiguous
    q,  # (mn, k) e4m3, contiguous
    sf,  # (mn, words) int32, strides (1, sf_stride)
    mn,
    k,
    sf_stride,
    min_exponent,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(1)
    group = word * 4 + tl.arange(0, 4)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    offset = row.to(tl.int64)[:, None, None] * k + column[None, :, :]
    live = (row < mn)[:, None, None] & (column < k)[None, :, :]

    values = tl.load(x + offset, mask=live, other=0.0).to(tl.float32)
    amax = tl.max(tl.abs(values), axis=2)
    # amax / 448 rounded up to a power of two. Triton's division and log2 are approximate and miss
    # where the quotient is one already; the carry of this addition does not.
    exponent = ((amax.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23) - 8
    exponent = tl.maximum(exponent, min_exponent)
    multiplier = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(q + offset, (values * multiplier[:, :, None]).to(q.dtype.element_ty), mask=live)

    exponent = tl.where((group * GROUP < k)[None, :], exponent, 0)
    packed = tl.sum(exponent << (tl.arange(0, 4) * 8)[None, :], axis=1)
    tl.store(sf + word * sf_stride + row, packed, mask=row < mn)


def quantize(x: torch.Tensor, q: torch.Tensor, sf: torch.Tensor, min_exponent: int) -> None:
    """Quantize contiguous `x` (mn, k) into `q` (mn, k) and packed, MN-major `sf`."""
    mn, k = x.shape
    grid = (triton.cdiv(mn, ROWS_PER_PROGRAM), sf.shape[1])
    quantize_kernel[grid](
        x,
        q,
        sf,
        mn,
        k,
        sf.stride(1),
        min_exponent,
        ROWS=ROWS_PER_PROGRAM,
        GROUP=GROUP_SIZE,
        num_warps=WARPS,
    )
