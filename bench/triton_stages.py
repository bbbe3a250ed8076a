"""Activation or norm and packed quantizer in one Triton kernel each, written the ordinary way.

A program has a tile of rows and groups, all groups of its rows where these are normalized. How
large a tile, and of how many warps, is for the caller to try.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from bench.shapes import GROUP_SIZE
from cute_quant.contract.dtypes import BYTES_PER_WORD
from cute_quant.kernels.config import LANES

MAX_VALUES_PER_THREAD = 64
"""Beyond which registers spill."""


class Config(NamedTuple):
    """Rows and groups of a program, and its warps."""

    rows: int
    groups: int
    warps: int


SILU_MUL_CONFIGS = tuple(
    Config(*numbers)
    for numbers in (
        (1, 4, 1),
        (1, 8, 2),
        (1, 16, 4),
        (2, 4, 1),
        (4, 4, 2),
        (4, 4, 4),
        (8, 4, 4),
        (8, 4, 8),
    )
)


def rms_norm_configs(k: int) -> tuple[Config, ...]:
    """Return the configurations to try for rows of k."""
    groups = max(BYTES_PER_WORD, triton.next_power_of_2(triton.cdiv(k, GROUP_SIZE)))
    return tuple(
        Config(rows, groups, warps)
        for rows, warps in ((1, 2), (1, 4), (1, 8), (1, 16), (2, 4), (2, 8), (4, 8))
        if rows * groups * GROUP_SIZE <= MAX_VALUES_PER_THREAD * LANES * warps
    )


@triton.jit
def store_quantized(
    values,  # (ROWS, GROUPS, GROUP) float32
    q,  # (mn, k) e4m3, contiguous
    sf,  # (mn, words) int32, strides (1, sf_stride)
    row,  # (ROWS,)
    group,  # (GROUPS,)
    column,  # (GROUPS, GROUP)
    live,  # (ROWS, GROUPS, GROUP)
    mn,
    k,
    sf_stride,
    min_exponent,
    first_word,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    amax = tl.max(tl.abs(values), axis=2)
    # amax / 448 rounded up to a power of two. Triton's division and log2 are approximate and miss
    # where the quotient is one already; the carry of this addition does not.
    exponent = ((amax.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23) - 8
    exponent = tl.maximum(exponent, min_exponent)
    multiplier = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    offset = row.to(tl.int64)[:, None, None] * k + column[None, :, :]
    tl.store(q + offset, (values * multiplier[:, :, None]).to(q.dtype.element_ty), mask=live)

    exponent = tl.where((group * GROUP < k)[None, :], exponent, 0)
    bytes_ = exponent << (group % 4 * 8)[None, :]
    packed = tl.sum(tl.reshape(bytes_, (ROWS, GROUPS // 4, 4)), axis=2)
    word = first_word + tl.arange(0, GROUPS // 4)
    written = (row < mn)[:, None] & (word * 4 * GROUP < k)[None, :]
    tl.store(sf + word.to(tl.int64)[None, :] * sf_stride + row[:, None], packed, mask=written)


@triton.jit
def silu_mul_quantize_kernel(
    gate_up,  # (mn, 2 k) bf16 or fp16, contiguous
    q,
    sf,
    mn,
    k,
    sf_stride,
    min_exponent,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    live = (row < mn)[:, None, None] & (column < k)[None, :, :]
    offset = row.to(tl.int64)[:, None, None] * (2 * k) + column[None, :, :]
    gate = tl.load(gate_up + offset, mask=live, other=0.0).to(tl.float32)
    up = tl.load(gate_up + offset + k, mask=live, other=0.0).to(tl.float32)
    values = gate * tl.sigmoid(gate) * up
    first_word = tl.program_id(1) * (GROUPS // 4)
    store_quantized(
        values,
        q,
        sf,
        row,
        group,
        column,
        live,
        mn,
        k,
        sf_stride,
        min_exponent,
        first_word,
        ROWS,
        GROUPS,
        GROUP,
    )


@triton.jit
def rms_norm_quantize_kernel(
    x,  # (mn, k) bf16 or fp16, contiguous, as residual and residual_out
    residual,
    residual_out,
    weight,  # (k,)
    q,
    sf,
    mn,
    k,
    sf_stride,
    min_exponent,
    eps,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    live = (row < mn)[:, None, None] & (column < k)[None, :, :]
    offset = row.to(tl.int64)[:, None, None] * k + column[None, :, :]
    total = tl.load(x + offset, mask=live, other=0.0).to(tl.float32)
    total += tl.load(residual + offset, mask=live, other=0.0).to(tl.float32)
    factors = tl.load(weight + column, mask=column < k, other=0.0).to(tl.float32)
    tl.store(residual_out + offset, total.to(residual_out.dtype.element_ty), mask=live)
    mean = tl.sum(tl.sum(total * total, axis=2), axis=1) / k
    values = total * tl.rsqrt(mean + eps)[:, None, None] * factors[None, :, :]
    store_quantized(
        values,
        q,
        sf,
        row,
        group,
        column,
        live,
        mn,
        k,
        sf_stride,
        min_exponent,
        0,
        ROWS,
        GROUPS,
        GROUP,
    )


def silu_mul_quantize(
    gate_up: torch.Tensor, q: torch.Tensor, sf: torch.Tensor, min_exponent: int, config: Config
) -> None:
    """Quantize SiLU(gate) * up.

    Args:
        gate_up: (mn, 2 k), contiguous, the gates first.
        q: (mn, k), receives the values.
        sf: receives the scales, packed and MN-major.
        min_exponent: UE8M0 byte of the smallest scale.
        config: tile of a program.
    """
    mn, k = q.shape
    grid = triton.cdiv(mn, config.rows), triton.cdiv(k, config.groups * GROUP_SIZE)
    silu_mul_quantize_kernel[grid](
        gate_up,
        q,
        sf,
        mn,
        k,
        sf.stride(1),
        min_exponent,
        ROWS=config.rows,
        GROUPS=config.groups,
        GROUP=GROUP_SIZE,
        num_warps=config.warps,
    )


def rms_norm_quantize(
    x: torch.Tensor,
    residual: torch.Tensor,
    residual_out: torch.Tensor,
    weight: torch.Tensor,
    q: torch.Tensor,
    sf: torch.Tensor,
    min_exponent: int,
    eps: float,
    config: Config,
) -> None:
    """Add a residual, and quantize the normalized rows of the sum.

    Args:
        x: (mn, k), contiguous.
        residual: (mn, k), contiguous.
        residual_out: (mn, k), contiguous, receives the sum.
        weight: (k,), factors of the normalized rows.
        q: (mn, k), receives the values.
        sf: receives the scales, packed and MN-major.
        min_exponent: UE8M0 byte of the smallest scale.
        eps: number that is added to the mean of squares.
        config: tile of a program.
    """
    mn, k = q.shape
    rms_norm_quantize_kernel[triton.cdiv(mn, config.rows),](
        x,
        residual,
        residual_out,
        weight,
        q,
        sf,
        mn,
        k,
        sf.stride(1),
        min_exponent,
        eps,
        ROWS=config.rows,
        GROUPS=config.groups,
        GROUP=GROUP_SIZE,
        num_warps=config.warps,
    )
