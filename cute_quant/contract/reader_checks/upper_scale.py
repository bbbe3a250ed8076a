"""The scale over e4m3 scales: encode and decode scale mixed up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from cute_quant.contract.dtypes import UPPER_MAX
from cute_quant.contract.formats import Format
from cute_quant.contract.reader_checks.quantized import Finding, Quantized
from cute_quant.contract.reference.rows import groups_of_rows
from cute_quant.contract.reference.values import multiply_back
from cute_quant.contract.upper_scales import decode_scale

LEAST_PRODUCT = UPPER_MAX / 2**8
"""Least of the largest products of a value and an e4m3 scale under an encode scale that fits."""
MOST_SATURATED, LEAST_SCALES = 0.5, 16
"""Share of e4m3 scales at their largest, from which on the encode scale was too large, and the
scales under it that tell."""
PLAUSIBLE_AMAX = 2.0**-16, 2.0**16
"""Bounds of the largest magnitude of activations and weights, half's range on both sides."""
AMAX_FACTOR = 2.0
"""By how much the dequantized amax may differ from that of x."""
LEAST_AMAX = 0.9
"""The part of the amax of x that values which are not clipped have at least."""


class _Units(NamedTuple):
    """Which upper scale each row is under.

    Attributes:
        word: for what has an upper scale of its own.
        number: of upper scales.
        of_rows: (batch, mn), int64: the upper scale of each row, `number` where it has none.
    """

    word: str
    number: int
    of_rows: torch.Tensor

    def sum(self, t: torch.Tensor) -> torch.Tensor:
        """Return sums of t (batch, mn) for each upper scale."""
        sums = t.new_zeros(self.number + 1, dtype=torch.float32)
        return sums.index_add(0, self.of_rows.flatten(), t.float().flatten())[: self.number]

    def amax(self, t: torch.Tensor) -> torch.Tensor:
        """Return the largest of non-negative t (batch, mn) for each upper scale."""
        largest = t.new_zeros(self.number + 1)
        index = self.of_rows.flatten()
        return largest.scatter_reduce(0, index, t.flatten(), "amax")[: self.number]

    def where(self, wrong: torch.Tensor) -> str:
        """Return words for where something is wrong, none where there is one upper scale."""
        if self.number == 1:
            return ""
        first, total = int(wrong.nonzero()[0]), int(wrong.sum())
        return f" in {self.word} {first}, and such in {total} of {self.number}"


def _units(given: Quantized, live: torch.Tensor) -> _Units:
    """Return which upper scale each row is under."""
    assert given.upper is not None
    count = given.upper.tensor.numel()
    if given.upper_of_groups:
        assert given.rows is not None
        group = groups_of_rows(given.rows, live.shape[1])
        of_rows = group.where((group >= 0) & (group < count), count)
        return _Units("group", count, of_rows.expand(live.shape))
    if given.fmt.row_scale or count == 1:
        return _Units("tensor", 1, torch.zeros_like(live, dtype=torch.int64))
    matrix = torch.arange(count, device=live.device)
    return _Units("matrix", count, matrix.unsqueeze(1).expand(live.shape))


def decode_factors(given: Quantized, live: torch.Tensor) -> torch.Tensor:
    """Return what each row is multiplied back with above its scales, (batch or 1, mn or 1, 1)."""
    assert given.upper is not None
    decode = decode_scale(given.upper)
    if given.upper_of_groups:
        units = _units(given, live)
        return pad(decode, (0, 1), value=torch.nan)[units.of_rows].unsqueeze(2)
    return decode.reshape(-1, live.shape[1] if given.fmt.row_scale else 1, 1)


def wrong_upper_scale(
    given: Quantized, scales: torch.Tensor, live: torch.Tensor
) -> Iterator[Finding]:
    """Yield that producer or reader mixed up encode and decode scale."""
    fmt, upper = given.fmt, given.upper
    if upper is None:
        text = f"decode_scale: expected the scale over the e4m3 scales of {fmt}, got none"
        yield Finding("upper scale", text)
        return
    units = _units(given, live)
    decoded = scales.view(fmt.scale_dtype).float()
    finite = decoded.isfinite() & live.unsqueeze(2)
    decoded = decoded.where(finite, 0.0)
    q = given.q.view(torch.uint8).reshape(*live.shape, -1)
    by_row = multiply_back(q, decoded, fmt, torch.float32).abs().amax(2)
    largest = units.amax(by_row)
    dequantized = by_row * decode_factors(given, live).squeeze(2)
    amax = units.amax(dequantized.where(by_row > 0, 0.0))
    expected = None if given.x is None else units.amax(_row_amax(given.x, finite, fmt))
    # Nothing tells where all is 0.
    tells = largest > 0 if expected is None else (largest > 0) | (expected > 0)
    top = torch.finfo(fmt.scale_dtype).max
    saturated = units.sum((decoded == top).sum(2)) / units.sum(finite.sum(2)).clamp(min=1)
    enough = units.sum(finite.sum(2)) >= LEAST_SCALES
    small = tells & (largest < LEAST_PRODUCT) & (not fmt.row_scale)
    many = tells & enough & (saturated > MOST_SATURATED) & (not fmt.row_scale)
    many &= _are_clipped(q, units) if expected is None else amax < expected * LEAST_AMAX
    if small.any():
        yield Finding(
            "upper scale",
            f"sf: expected a largest product of value and scale near {UPPER_MAX:.0f}, got "
            f"{largest[small][0]:.3g}{units.where(small)}: was a decode scale taken for the encode "
            "scale?",
        )
    elif many.any():
        yield Finding(
            "upper scale",
            f"sf: expected few scales of {top:.0f}, the largest, got "
            f"{saturated[many][0]:.0%}{units.where(many)}: was a decode scale taken for the encode "
            "scale?",
        )
    if expected is None:
        low, high = (torch.full_like(amax, bound) for bound in PLAUSIBLE_AMAX)
    else:
        low, high = expected / AMAX_FACTOR, expected * AMAX_FACTOR
    wrong = tells & ~((low <= amax) & (amax <= high))
    if wrong.any():
        words = f"from {low[wrong][0]:.3g} to {high[wrong][0]:.3g}"
        if expected is not None:
            words = f"the amax of x, {expected[wrong][0]:.3g}"
        yield Finding(
            "upper scale",
            f"{upper.kind}: expected a dequantized amax of {words}, got {amax[wrong][0]:.3g}"
            f"{units.where(wrong)}: were encode and decode scale mixed up?",
        )


def _are_clipped(q: torch.Tensor, units: _Units) -> torch.Tensor:
    """Return which upper scales have values besides 0 and 6: all groups of a constant have 6."""
    magnitudes = torch.stack((q & 0x7, q >> 4 & 0x7))
    between = (magnitudes != 0) & (magnitudes != 0x7)
    return units.amax(between.any(0).any(-1).float()) > 0


def _row_amax(x: torch.Tensor, finite: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Return the amax of each row of x, (batch, mn), where its groups have a finite scale."""
    x = x.float().reshape(*finite.shape[:2], -1).abs()
    used = finite.repeat_interleave(fmt.group_size, 2)[..., : x.shape[2]]
    return x.where(used & x.isfinite(), 0.0).amax(2)
