"""The contract in plain torch: quantize and dequantize without a kernel.

An oracle independent of the kernels: a scale exponent comes from a division in float64 and
`frexp`, not from bit arithmetic. CPU tensors are quantized by it, to the same bits.
"""

from __future__ import annotations

import torch

from cute_quant.formats import (
    BYTES_PER_WORD,
    E4M3_MAX,
    UE8M0_BIAS,
    UE8M0_MAX,
    UE8M0_NAN,
    VALUE_DTYPE,
    Format,
    last_column_rows,
)

E4M3_NAN = 0x7F


def ue8m0_to_float32(exponents: torch.Tensor) -> torch.Tensor:
    """2^(exponent - 127) for biased exponents 0 .. 254, NaN for 255."""
    bits = exponents.int() << 23
    scales = bits.where(exponents != 0, 0x400000).view(torch.float32)
    return scales.where(exponents != UE8M0_NAN, torch.nan)


def group_scales(x: torch.Tensor, fmt: Format, floor: int | float) -> torch.Tensor:
    """Scales of the groups of `x` (mn, k): (mn, k / group_size), int32 biased exponents where
    they are powers of two, else float32."""
    amax = x.unflatten(1, (-1, fmt.group_size)).abs().amax(2)
    if not fmt.power_of_two:
        largest = amax.new_full((), E4M3_MAX, dtype=torch.float32)
        scales = amax.float() * (1.0 / largest) if fmt.reciprocal else amax.float() / largest
        return scales.clamp(min=floor).where(amax.isfinite(), torch.nan)
    # In float64 no quotient of a 16-bit amax rounds onto a power of two that it is not.
    mantissa, exponent = torch.frexp(amax.double() / E4M3_MAX)
    exponent = (exponent - (mantissa == 0.5).int() + UE8M0_BIAS).where(amax > 0, 0)
    return exponent.clamp(min=floor).where(amax.isfinite(), UE8M0_NAN)


def quantize_into(
    x: torch.Tensor, q: torch.Tensor, sf: torch.Tensor, fmt: Format, floor: int | float
) -> None:
    """Quantize `x` into `q` and `sf` and define their padding, on the CPU.

    Args:
        x: (mn, k), bf16 or fp16, k a multiple of the group size.
        q: (rows, k), e4m3, rows >= mn. Rows past mn become 0.
        sf: (mn, columns), scales as `fmt` lays them out. Padding rows become 0 where the storage
            has them.
        floor: ``formats.scale_floor``.
    """
    mn, k = x.shape
    if k == 0:
        return
    scales = group_scales(x, fmt, floor)
    if fmt.power_of_two:
        finite = scales != UE8M0_NAN
        multipliers = ue8m0_to_float32((UE8M0_MAX - scales).where(finite, UE8M0_NAN))
    else:
        finite = scales.isfinite()
        multipliers = 1.0 / scales
    values = x.unflatten(1, (-1, fmt.group_size)).float() * multipliers.unsqueeze(2)
    q8 = values.to(VALUE_DTYPE).view(torch.uint8).where(finite.unsqueeze(2), E4M3_NAN)
    q[:mn].view(torch.uint8).copy_(q8.flatten(1))
    q[mn:].view(torch.uint8).zero_()

    if fmt.packed:
        padding = -scales.shape[1] % BYTES_PER_WORD
        exponents = torch.nn.functional.pad(scales.to(torch.uint8), (0, padding))
        sf.copy_(exponents.view(torch.int32))
    else:
        sf.copy_(ue8m0_to_float32(scales) if fmt.power_of_two else scales)
    columns = sf.shape[1]
    aligned = fmt.scale_strides(mn)[1]
    inner = sf.as_strided((aligned, columns - 1), (1, aligned))
    inner[mn:] = 0
    last = (columns - 1) * aligned + mn
    sf.as_strided((last_column_rows(sf) - mn,), (1,), sf.storage_offset() + last).zero_()


def dequantize(q: torch.Tensor, sf: torch.Tensor, fmt: Format, dtype: torch.dtype) -> torch.Tensor:
    """q · scale, multiplied in float32 and rounded to `dtype`.

    Args:
        q: (mn, k), e4m3.
        sf: (mn, columns), the scales of `fmt` for q's shape.
    """
    groups = q.shape[1] // fmt.group_size
    if fmt.packed:
        shifts = torch.arange(0, 32, 8, device=sf.device)
        exponents = (sf.unsqueeze(2) >> shifts & 0xFF).flatten(1)[:, :groups]
        scales = ue8m0_to_float32(exponents)
    else:
        scales = sf
    values = q.unflatten(1, (-1, fmt.group_size)).float() * scales.unsqueeze(2)
    return values.to(dtype).flatten(1).contiguous()
