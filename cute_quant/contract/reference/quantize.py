"""Quantize rows into memory that is there, and store their scales."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from cute_quant.contract import scale_storage
from cute_quant.contract.calls import Call
from cute_quant.contract.dtypes import E4M3_NAN, SCALE_ROW_ALIGNMENT
from cute_quant.contract.formats import Format
from cute_quant.contract.philox import random_of_elements
from cute_quant.contract.reference.prologues import computed
from cute_quant.contract.reference.rows import below_count, live_rows, scattered_rows
from cute_quant.contract.reference.scales import group_scales, upper_factors
from cute_quant.contract.reference.values import group_values, multiply_back, ue8m0_to_float32
from cute_quant.contract.rows import Masked, PrefixSumWithGaps


def quantize_into(
    call: Call, q: torch.Tensor, sf: torch.Tensor, row_scales: torch.Tensor | None = None
) -> None:
    """Quantize what `call` asks for into `q` and `sf`, and define their padding.

    Rows of a scatter that exist and that no place names keep what memory held.

    Args:
        call: a call that was checked. What else its prologue writes is written too.
        q: (..., q_rows, k), q_rows >= mn, or bytes of two values. Rows past mn become 0.
        sf: scales as the format lays them out. Padding rows become 0 if the storage has them.
        row_scales: (..., mn), for the decode scales of rows, 0 of those that do not exist, 1 where
            rows have no columns; None without.
    """
    x, fmt, rows, prologue = call.x, call.fmt, call.rows, call.prologue
    if x.shape[-1] == 0:
        if row_scales is not None:
            row_scales.fill_(1.0)
        return
    live, source = live_rows(x, rows if call.scatter is None else None, call.index)
    source = computed(source, prologue)
    upper = upper_factors(source, call)
    scales = group_scales(source, fmt, upper)
    random = None
    if call.rng_state is not None:
        random = random_of_elements(call.rng_state, *source.shape)
    codes = group_values(source, scales, fmt, upper, random).view(torch.uint8)
    decode_scales = None if row_scales is None or upper is None else upper.decode
    named = None
    if call.scatter is not None:
        exist, token = scattered_rows(call, call.scatter)
        live, named = token >= 0, (token >= 0) | ~exist
        scales, codes = _taken(scales, token), _taken(codes, token)
        decode_scales = None if decode_scales is None else _taken(decode_scales, token)
    batch, mn = live.shape
    written, written_scales = torch.ones_like(live), live.new_ones(batch, fmt.scale_rows(mn))
    if isinstance(rows, Masked):
        written = below_count(rows, mn, mn)
        written_scales = below_count(rows, mn, fmt.scale_rows(mn), SCALE_ROW_ALIGNMENT)
    elif isinstance(rows, PrefixSumWithGaps):
        written = live
        written_scales[:, :mn] = live
    if named is not None:
        written = written & named
        written_scales = written_scales & pad(named, (0, fmt.scale_rows(mn) - mn), value=True)

    codes = codes.where(live.unsqueeze(2), 0)
    bytes_ = q.view(torch.uint8).view(batch, *q.shape[-2:])
    bytes_[:, :mn].copy_(codes.where(written.unsqueeze(2), bytes_[:, :mn]))
    if not isinstance(rows, Masked):
        bytes_[:, mn:].zero_()
    if row_scales is not None and decode_scales is not None:
        new = decode_scales.squeeze(-1).where(live, 0.0)
        row_scales.copy_(new.where(written, row_scales.view_as(live)).view(row_scales.shape))
    store_scales(scales.where(live.unsqueeze(2), 0), written_scales, sf, fmt, call.result_shape.k)


def fake_quantize_into(call: Call, out: torch.Tensor) -> None:
    """Write the x of `call`, quantized and multiplied back, to `out`, of x's shape."""
    if call.x.numel() == 0:
        return
    fmt = call.fmt
    x = call.x.reshape(-1, *call.x.shape[-2:])
    upper = upper_factors(x, call)
    scales = group_scales(x, fmt, upper)
    q = group_values(x, scales, fmt, upper)
    scales = ue8m0_to_float32(scales) if fmt.power_of_two else scales
    if upper is not None:
        scales = scales * upper.decode
    out.copy_(multiply_back(q, scales, fmt, out.dtype).view(out.shape))


def _taken(t: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return rows of `t` (1, tokens, columns) as (*rows.shape, columns), zeros for -1."""
    return torch.cat([t[0], t.new_zeros(1, t.shape[2])])[rows]


def store_scales(
    scales: torch.Tensor, written: torch.Tensor, sf: torch.Tensor, fmt: Format, k: int
) -> None:
    """Write scales to the rows of `sf` that `written` names.

    Rows past mn and groups past the last become 0.

    Args:
        scales: (batch, mn, groups), exponents or floats.
        written: (batch, stored rows), bool.
        sf: as the format lays it out.
        fmt: the format.
        k: columns of the values.
    """
    scale_storage.write(stored_scales(scales, fmt), written, sf, fmt, k)


def stored_scales(scales: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Return exponents or floats as they are stored, uint8 or float32."""
    if fmt.byte_scales:
        return _scale_bytes(scales, fmt)
    if fmt.power_of_two:
        # Exponent 0 is that of a row that does not exist: float32 scales are normal numbers.
        return ue8m0_to_float32(scales).where(scales > 0, 0.0)
    return scales


def _scale_bytes(scales: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Return the bytes of exponents, or of the float32 values of e4m3 scales."""
    if fmt.ue8m0:
        return scales.to(torch.uint8)
    codes = scales.to(fmt.scale_dtype).view(torch.uint8)
    return codes.where(scales.isfinite(), E4M3_NAN)
