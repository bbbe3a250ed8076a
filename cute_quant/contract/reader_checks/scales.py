"""Scales one by one: powers of two, NaN."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cute_quant.contract.dtypes import E4M3_NAN, SMALLEST_UE8M0, UE8M0_NAN
from cute_quant.contract.formats import Format
from cute_quant.contract.reader_checks.quantized import Finding
from cute_quant.contract.readers import Reader
from cute_quant.contract.scale_conversion import exponents


def wrong_powers_of_two(scales: torch.Tensor, reader: Reader) -> Iterator[Finding]:
    """Yield that float32 scales are no powers of two, on which the device traps."""
    # +Inf has the bits of a power of two, NaN has not.
    bits = scales.view(torch.int32)
    wrong = ((exponents(scales) == UE8M0_NAN) & ~scales.isposinf()) | (bits == SMALLEST_UE8M0)
    if wrong.any():
        batch, row, group = wrong.nonzero()[0].tolist()
        yield Finding(
            "powers of two",
            f"sf: expected powers of two in every row, on others {reader.name} traps, got "
            f"{scales[batch, row, group].item()} at ({batch}, {row}, {group}), and "
            f"{int(wrong.sum())} of {wrong.numel()} such scales",
        )


def wrong_nan(scales: torch.Tensor, live: torch.Tensor, fmt: Format) -> Iterator[Finding]:
    """Yield that scales of rows that exist are not finite."""
    if not fmt.byte_scales:
        nan = ~scales.isfinite()
    elif fmt.ue8m0:
        nan = scales == UE8M0_NAN
    else:
        nan = (scales & E4M3_NAN) == E4M3_NAN
    nan &= live.unsqueeze(2)
    if nan.any():
        batch, row, group = nan.nonzero()[0].tolist()
        got = "NaN" if fmt.byte_scales else scales[batch, row, group].item()
        yield Finding(
            "nan",
            f"sf: expected finite scales, got {got} at ({batch}, {row}, {group}) and such in "
            f"{int(nan.sum())} of {nan.numel()} places: x held NaN or Inf there, or this is no "
            "scale",
        )
