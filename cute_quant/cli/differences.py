"""Compare the results of two numerics of a format, and find the reason of each difference."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from cute_quant.contract.formats import Format
from cute_quant.contract.reference.values import ue8m0_to_float32
from cute_quant.ops.rows import dequantize, quantize

BLOCK_ELEMENTS = 1 << 21
"""Elements that are compared at a time, so that a weight of gigabytes needs little more memory."""
PLACES = 3
"""Places that are shown of each reason."""
FP4_SIGN, FP8_SIGN = 0x8, 0x80

QUOTIENT = "rounding of amax / M"
SMALLEST = "smallest scale"
HALF_UP = "power of two rounded half up, or up"
SCALE_REASONS = {
    QUOTIENT: "steps of the quotient are rounded in another order",
    SMALLEST: "one of the two bounds the scale from below",
    HALF_UP: "one goes to the next power of two from 7/4 of one on, the other above 3/2",
}
"""Why bytes of scales differ."""

OTHER_SCALE = "another scale"
ZERO_SIGN = "sign of zero"
UNDERFLOW = "scale of zero"
MULTIPLIER = "last bit of the multiplier"
CODE_REASONS = {
    OTHER_SCALE: "the group has another scale",
    ZERO_SIGN: "one keeps the sign of what rounds to zero",
    UNDERFLOW: "the scale is 0, or 2^-127, under which one multiplies by 0",
    MULTIPLIER: "the multiplier is rounded otherwise, or approximate, or x is divided",
}
"""Why codes differ."""


class Quantized(NamedTuple):
    """Rows in a format.

    Attributes:
        codes: (rows, k), uint8, a byte for each value.
        scales: (rows, groups), the bits of scales.
        scale_values, values: scales and values as float32.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    scale_values: torch.Tensor
    values: torch.Tensor


class Place(NamedTuple):
    """A scale or a code in which two results differ.

    Attributes:
        column: that of the code, or of the first code that differs under a scale; None if none
            does.
        scales: both scales of the group as they are stored, without an upper scale.
        codes: both codes of the column.
        x: the input there.
    """

    row: int
    group: int
    column: int | None
    scales: tuple[float, float]
    codes: tuple[int, int] | None
    x: float | None
    reason: str


@dataclass
class Comparison:
    """How the results of two numerics differ.

    Attributes:
        groups, elements: how many were compared.
        scale_reasons, code_reasons: differing scales and codes by their reason.
        largest_difference: of dequantized values, both of them finite.
        places: the first ``PLACES`` of each reason.
    """

    groups: int = 0
    elements: int = 0
    scale_reasons: Counter[str] = field(default_factory=Counter)
    code_reasons: Counter[str] = field(default_factory=Counter)
    largest_difference: float = 0.0
    places: list[Place] = field(default_factory=list)


def compare(x: torch.Tensor, a: Format, b: Format, amax: torch.Tensor | None) -> Comparison:
    """Quantize `x` (..., mn, k) to two formats, which differ in numerics alone, and compare.

    Args:
        x: rows, at least one.
        a: one format, its scales row-major.
        b: the other.
        amax: of the tensor, for formats that take one.
    """
    found = Comparison()
    rows = x.reshape(-1, x.shape[-1])
    first = 0
    for block in rows.split(max(BLOCK_ELEMENTS // rows.shape[1], 1)):
        _compare_rows(block.contiguous(), a, b, amax, first, found)
        first += len(block)
    found.places.sort(key=lambda place: (place.row, place.group))
    return found


def _compare_rows(
    x: torch.Tensor, a: Format, b: Format, amax: torch.Tensor | None, first: int, to: Comparison
) -> None:
    """Add what differs in some rows, of which `first` is the number of the first."""
    pair = _quantized(x, a, amax), _quantized(x, b, amax)
    to.groups += pair[0].scales.numel()
    to.elements += pair[0].codes.numel()
    difference = (pair[0].values - pair[1].values).abs().nan_to_num(0.0, 0.0)
    to.largest_difference = max(to.largest_difference, difference.max().item())
    by_group = _scale_reasons(*pair, a, b)
    by_value = _code_reasons(*pair, a)
    places = Counter(place.reason for place in to.places)
    for counts, reasons in ((to.scale_reasons, by_group), (to.code_reasons, by_value)):
        for reason, where in reasons.items():
            count = int(where.sum())
            counts.update({reason: count} if count else {})
            # Where scales differ, places of scales show a code as well.
            if reason != OTHER_SCALE:
                left = where.nonzero()[: PLACES - places[reason]].tolist()
                to.places += [_place(x, pair, a, row, i, reason, first) for row, i in left]


def _place(
    x: torch.Tensor,
    pair: tuple[Quantized, Quantized],
    fmt: Format,
    row: int,
    index: int,
    reason: str,
    first: int,
) -> Place:
    """Return the place of the group or value `index` of a row, whichever the reason is of."""
    of_a, of_b = pair
    size = _group_size(fmt, x.shape[1])
    group, column = index, None
    if reason in CODE_REASONS:
        group, column = index // size, index
    else:
        own = slice(group * size, (group + 1) * size)
        differing = (of_a.codes[row, own] != of_b.codes[row, own]).nonzero()
        column = group * size + int(differing[0]) if len(differing) else None
    scales = of_a.scale_values[row, group].item(), of_b.scale_values[row, group].item()
    codes, value = None, None
    if column is not None:
        codes = int(of_a.codes[row, column]), int(of_b.codes[row, column])
        value = x[row, column].item()
    return Place(first + row, group, column, scales, codes, value, reason)


def _quantized(x: torch.Tensor, fmt: Format, amax: torch.Tensor | None) -> Quantized:
    """Quantize rows, and return the results on the CPU."""
    decode_scale = None
    if fmt.row_scale:
        q, sf, decode_scale = quantize(x, fmt)
    else:
        q, sf = quantize(x, fmt, amax=amax)
    upper = {"amax": amax, "decode_scale": decode_scale}
    values = dequantize(q, sf, fmt, dtype=torch.float32, **upper).cpu()
    codes, sf = q.view(torch.uint8).cpu(), sf.cpu()
    if fmt.value_type.per_byte == 2:
        codes = torch.stack([codes & 0xF, codes >> 4], -1).flatten(-2)
    bits = sf.view(torch.int32) if sf.dtype is torch.float32 else sf.view(torch.uint8)
    return Quantized(codes, bits, sf.float(), values)


def _scale_reasons(
    of_a: Quantized, of_b: Quantized, a: Format, b: Format
) -> dict[str, torch.Tensor]:
    """Return by reason where scales differ for it."""
    differ = of_a.scales != of_b.scales
    bounded = torch.zeros_like(differ)
    for one, other, fmt in ((of_a, of_b, a), (of_b, of_a, b)):
        floor = fmt.floor
        if fmt.power_of_two:
            floor = ue8m0_to_float32(torch.tensor(fmt.floor)).item()
        bounded |= (one.scale_values == floor) & (other.scale_values < floor)
    rest = HALF_UP if a.rounds_half_up != b.rounds_half_up else QUOTIENT
    return {SMALLEST: differ & bounded, rest: differ & ~bounded}


def _code_reasons(of_a: Quantized, of_b: Quantized, fmt: Format) -> dict[str, torch.Tensor]:
    """Return by reason where codes differ for it, and for none before it; `fmt` is of either."""
    k, sign = of_a.codes.shape[1], FP4_SIGN if fmt.value_type.per_byte == 2 else FP8_SIGN
    left, found = of_a.codes != of_b.codes, {}
    for reason, where in (
        (OTHER_SCALE, _of_values(of_a.scales != of_b.scales, fmt, k)),
        (ZERO_SIGN, (of_a.codes | of_b.codes) == sign),
        (UNDERFLOW, _of_values(of_a.scales == 0, fmt, k)),
        (MULTIPLIER, left),
    ):
        found[reason] = left & where
        left = left & ~where
    return found


def _group_size(fmt: Format, k: int) -> int:
    return k if fmt.whole_row else fmt.group_size


def _of_values(of_groups: torch.Tensor, fmt: Format, k: int) -> torch.Tensor:
    """Return what holds of groups (rows, groups) for each of their values (rows, k)."""
    return of_groups.repeat_interleave(_group_size(fmt, k), 1)[:, :k]
