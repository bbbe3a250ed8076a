"""Checks of what the tensors of calls that quantize hold. They read it, which waits for a GPU."""

from __future__ import annotations

import torch

from cute_quant.contract.blocks import block_size
from cute_quant.contract.calls import Call
from cute_quant.contract.dtypes import E4M3_NAN, MAX_UPPER_SCALE, UPPER_MAX, align
from cute_quant.contract.formats import Format
from cute_quant.contract.reference.blocks import block_amax
from cute_quant.contract.reference.rows import groups_of_rows, live_rows, scattered_rows
from cute_quant.contract.rows import Masked, PrefixSum, Rows
from cute_quant.contract.upper_scales import AMAX, UpperScale, factors


def check_contents(call: Call, mn: int) -> None:
    """Read the counts, indices, places and the upper scale of a call of `mn` rows, and check them.

    Raises:
        ValueError: as the checks of each.
    """
    check_counts(call.rows, call.index, call.x.shape[-2], mn)
    _check_scatter(call)
    _check_upper_scale(call)


def check_counts(rows: Rows | None, index: torch.Tensor | None, tokens: int, mn: int) -> None:
    """Read the counts and indices of a call, which synchronizes, and check them.

    Args:
        rows: the row domain of a ``Call``.
        index: the index of a ``Call``.
        tokens: rows of x, which `index` points to.
        mn: rows of the result.

    Raises:
        ValueError: an entry is out of range, or a group ends before its start.
    """
    if index is not None:
        _check_range("index", index, -1, tokens - 1)
    if isinstance(rows, Masked):
        _check_range("rows.masked_m", rows.masked_m, 0, mn)
    if isinstance(rows, PrefixSum):
        _check_range("rows.ends", rows.ends, 0, mn)
        start = 0
        for group, end in enumerate(rows.ends.tolist()):
            if end < start:
                raise ValueError(
                    f"rows.ends: expected group {group} to end at its start {start} or later, "
                    f"got {end}"
                )
            start = align(end, rows.alignment)


def _check_range(name: str, t: torch.Tensor, lowest: int, highest: int) -> None:
    outside = ((t < lowest) | (t > highest)).nonzero().tolist()
    if outside:
        at = tuple(outside[0]) if t.ndim > 1 else outside[0][0]
        raise ValueError(f"{name}: expected {lowest} to {highest}, got {t[at].item()} at {at}")


def _check_scatter(call: Call) -> None:
    """Read the places of a scatter, which synchronizes, and check that each row is named once.

    Raises:
        ValueError: a place is no row that exists, or a row is named twice or by none.
    """
    scatter = call.scatter
    if scatter is None:
        return
    exist, source = scattered_rows(call, scatter)
    count = exist.numel()
    named, times = torch.unique(scatter[scatter != -1].long(), return_counts=True)
    outside = named[(named < 0) | (named >= count)]
    if len(outside):
        bad = int(outside[0])
        raise ValueError(
            f"scatter: expected -1 to {count - 1}, got {bad} at {_where(scatter, bad)}"
        )
    dead = named[~exist.flatten()[named]]
    if len(dead):
        bad = int(dead[0])
        raise ValueError(
            f"scatter: expected rows that exist, got row {bad}, which does not, at "
            f"{_where(scatter, bad)}"
        )
    if (times > 1).any():
        bad = int(named[times > 1][0])
        count = int(times[named == bad])
        raise ValueError(
            f"scatter: expected each row once, got row {bad} {count} times, first at "
            f"{_where(scatter, bad)}"
        )
    unnamed = (exist & (source < 0)).flatten().nonzero()
    if len(unnamed):
        raise ValueError(
            f"scatter: expected a place for each row that exists, got none for row "
            f"{int(unnamed[0])}"
        )


def _where(scatter: torch.Tensor, place: int) -> tuple[int, ...]:
    """Return the first index of a place."""
    return tuple((scatter == place).nonzero()[0].tolist())


def _check_upper_scale(call: Call) -> None:
    """Read the upper scale of a call, which synchronizes, and check that it fits the input.

    The amax of x times the encode scale has to lie within 2^20 of 2688, and within 2^8 if its
    reciprocal lies within 2^4, x being what is quantized: of other calls the upper scale alone is
    checked.

    Raises:
        ValueError: a scale is out of range, or is the other of the two conventions.
    """
    if call.upper is None:
        return
    kind, given = call.upper
    encode = factors(call.upper).encode.reshape(-1)
    if not encode.isfinite().all():
        bad = given.reshape(-1)[~encode.isfinite()][0].item()
        numbers = "finite numbers, 0 or above" if kind == AMAX else "numbers from 2^-117 to 2^117"
        raise ValueError(f"{kind}: expected {numbers}, got {bad}")
    count = encode.numel()
    if call.upper_of_groups:
        last = int(groups_of_rows(call.rows, call.result_shape.mn).max()) if call.x.numel() else -1
        if last >= count:
            raise ValueError(
                f"{kind}: expected a scale for each group of rows, {last + 1} or more, got {count}"
            )
    if call.prologue is not None:
        return
    amax = _amax_under_each(call, count)
    # As near as scales come to the amax of tiny numbers.
    fitting = (UPPER_MAX / amax).clamp(max=MAX_UPPER_SCALE)
    off = (encode / fitting).log2().abs()
    outside = off > 20
    if kind == AMAX:
        # All values have to fit under it, up to the rounding of who computed it.
        outside |= encode > 2 * fitting
    else:
        outside |= (off > 8) & ((encode * fitting).log2().abs() < 4)
    outside &= (amax > 0) & amax.isfinite()
    if outside.any():
        i = int(outside.nonzero()[0])
        got = given.reshape(-1)[i].item()
        if kind == AMAX:
            raise ValueError(
                f"amax: expected about {amax[i]:.3g}, that of what is quantized, got {got:.3g}"
            )
        raise ValueError(
            f"{kind}: expected about 2688 / amax = {UPPER_MAX / amax[i]:.3g} as an encode scale, "
            f"or amax / 2688 = {amax[i] / UPPER_MAX:.3g} as a decode scale, got {got:.3g}: were "
            "the two mixed up?"
        )


def _amax_under_each(call: Call, count: int) -> torch.Tensor:
    """Return the largest magnitudes that lie under each of the `count` upper scales of a call."""
    live, source = live_rows(call.x, call.rows if call.scatter is None else None, call.index)
    if source.numel() == 0:
        return torch.zeros(count, dtype=torch.float64, device=source.device)
    of_rows = source.abs().amax(-1).where(live, 0).double()
    if call.upper_of_groups:
        group = groups_of_rows(call.rows, of_rows.shape[1])
        inside = (group >= 0) & (group < count)
        of_groups = of_rows.new_zeros(count + 1)
        return of_groups.scatter_reduce(0, group.where(inside, count), of_rows[0], "amax")[:count]
    return of_rows.flatten().amax(0, keepdim=True) if count == 1 else of_rows.amax(1)


def check_source_blocks(
    w8: torch.Tensor, w_sf: torch.Tensor, fmt: Format, upper: UpperScale | None
) -> None:
    """Read the values and scales of a checkpoint, which synchronizes, and check that they fit.

    Raises:
        ValueError: a scale is negative or not finite, a value is NaN, a product is Inf, or the
            scale over e4m3 scales does not fit the products.
    """
    if w8.numel() == 0:
        return
    _refuse("w_sf: expected finite scales, 0 or above", w_sf, ~(w_sf.isfinite() & (w_sf >= 0)))
    # The codes of magnitudes are in their order, NaN the largest.
    codes = (w8.view(torch.uint8) & E4M3_NAN).reshape(-1, *w8.shape[-2:])
    codes = block_amax(codes, block_size(w8, w_sf)).view(w_sf.shape)
    amaxes = codes.view(w8.dtype).float()
    _refuse("w8: expected numbers, of which a block has the amax", amaxes, amaxes.isnan())
    products = amaxes * w_sf
    _refuse("w_sf: expected products with the amax of a block below 2^128", w_sf, products.isinf())
    _check_upper_scale(Call(products, fmt, upper=upper))


def _refuse(expected: str, t: torch.Tensor, wrong: torch.Tensor) -> None:
    """Raise for the first block of which something is wrong, if there is one."""
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"{expected}, got {t[at].item():.6g} at block {at}, and such in {int(wrong.sum())} of "
            f"{wrong.numel()} blocks"
        )
