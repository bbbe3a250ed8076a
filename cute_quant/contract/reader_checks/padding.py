"""Padding of scales, and scales in blocks that are none."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cute_quant.contract import scale_storage
from cute_quant.contract.calls import ResultShape
from cute_quant.contract.dtypes import SCALE_ROW_ALIGNMENT
from cute_quant.contract.reader_checks.placement import has_strides
from cute_quant.contract.reader_checks.quantized import Finding, Quantized
from cute_quant.contract.reference.rows import below_count
from cute_quant.contract.rows import Masked
from cute_quant.contract.tensors import last_column_rows


def wrong_padding(given: Quantized, shape: ResultShape) -> Iterator[Finding]:
    """Yield what is wrong in the padding of scales."""
    sf, fmt = given.sf, given.fmt
    modes = scale_storage.view(sf, fmt, shape.mn, shape.k)
    stored = scale_storage.stored_matrix(modes, fmt, shape.mn, shape.k)
    groups = fmt.groups(shape.k)
    padding = torch.ones_like(stored, dtype=torch.bool)
    padding[:, : shape.mn, :groups] = False
    padding &= _written(given, stored.shape[1]).unsqueeze(2)
    wrong = (stored != 0) & padding
    if wrong.any():
        batch, row, group = wrong.nonzero()[0].tolist()
        yield Finding(
            "padding",
            f"sf: expected 0 where there is no row or group, got {stored[wrong][0].item()} at "
            f"({batch}, {row}, {group}), and {int(wrong.sum())} such places of "
            f"{int(padding.sum())}",
        )
        if fmt.blocked and not bytes_in_order(sf)[:, shape.mn * groups :].any():
            yield Finding(
                "swizzle",
                f"sf: expected blocks of {fmt.scale_layout}, got scales up to place "
                f"{shape.mn * groups} and zeros after it, as row-major scales have them: "
                "convert_scales from row_major makes blocks of them",
            )
    if fmt.mn_major and fmt.scale_rows(shape.mn) > shape.mn:
        yield from _padding_rows(given, shape)


def bytes_in_order(sf: torch.Tensor) -> torch.Tensor:
    """Return the bytes of scales in blocks, (batch, bytes), in the order of memory."""
    return sf.view(torch.uint8).reshape(-1, sf.shape[-1])


def _padding_rows(given: Quantized, shape: ResultShape) -> Iterator[Finding]:
    """Look at the rows past mn of MN-major scales that have storage."""
    sf, fmt, mn = given.sf, given.fmt, shape.mn
    aligned = fmt.scale_rows(mn)
    own = has_strides(sf, fmt.scale_strides(*shape))
    if not own or sf.stride()[-2:] != (1, aligned):
        return
    columns = sf.numel() // mn
    start = sf.storage_offset() + mn
    inner = sf.as_strided((columns - 1, aligned - mn), (aligned, 1), start)
    last = sf.as_strided((last_column_rows(sf) - mn,), (1,), start + (columns - 1) * aligned)
    written = _written(given, aligned)[:, mn:].expand(columns // sf.shape[-1], -1)
    written = written.repeat_interleave(sf.shape[-1], 0)
    wrong = int(((inner != 0) & written[:-1]).sum())
    wrong += int(((last != 0) & written[-1, : len(last)]).sum())
    if wrong:
        yield Finding(
            "padding", f"sf: expected 0 in rows {mn} to {aligned - 1}, got {wrong} other elements"
        )


def _written(given: Quantized, rows: int) -> torch.Tensor:
    """Return which of the stored rows of scales are defined, (batch or 1, rows)."""
    if isinstance(given.rows, Masked):
        mn = given.shape.mn
        return below_count(given.rows, mn, rows, SCALE_ROW_ALIGNMENT)
    return torch.ones(1, rows, dtype=torch.bool, device=given.sf.device)
