"""Scales in the memory of tensors: viewed by the modes of their layouts, read and written."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from cute_quant.contract.formats import Format
from cute_quant.contract.scale_layouts import blocks, in_memory
from cute_quant.contract.tensors import (
    flat_batch,
    has_dense_columns,
    last_column_rows,
    span,
)


def view(sf: torch.Tensor, fmt: Format, mn: int, k: int) -> torch.Tensor:
    """Return a view of scales with a dimension for each mode of their layout.

    Args:
        sf: (..., mn, columns) of any strides, or (..., bytes) in blocks; none of its sizes is 0.
        fmt: their format.
        mn: rows of a matrix.
        k: columns of its values.

    Returns:
        (batch, *rows, *groups), uint8 or float32, the slowest mode of rows and of groups first.
        Padding groups are there, padding rows in blocks alone.
    """
    batch, batch_stride = flat_batch("sf", sf.shape, sf.stride(), fmt.scale_dims)
    if fmt.blocked:
        layout = blocks(fmt.scale_rows(mn), fmt.columns(k), fmt.block_rows)
    else:
        layout = in_memory(fmt, mn, fmt.columns(k), *sf.stride()[-2:])
    flat = sf.as_strided((span(sf) // sf.element_size(),), (1,))
    flat = flat.view(torch.uint8 if fmt.byte_scales else torch.float32)
    per_element = fmt.groups_per_column
    shape, strides = ((*rows[::-1], *groups[::-1]) for rows, groups in layout)
    return flat.as_strided(
        (batch, *shape),
        (batch_stride * per_element, *strides),
        sf.storage_offset() * per_element,
    )


def read(sf: torch.Tensor, fmt: Format, mn: int, k: int) -> torch.Tensor:
    """Return the scales of a tensor as :func:`view` takes it, without padding.

    Returns:
        (batch, mn, groups), uint8 or float32.
    """
    return stored_matrix(view(sf, fmt, mn, k), fmt, mn, k)[:, :mn, : fmt.groups(k)]


def stored_matrix(modes: torch.Tensor, fmt: Format, mn: int, k: int) -> torch.Tensor:
    """Return what :func:`view` returns as (batch, rows, groups), its padding included."""
    rows = fmt.scale_rows(mn) if fmt.blocked else mn
    return modes.reshape(modes.shape[0], rows, fmt.columns(k) * fmt.groups_per_column)


def write(
    scales: torch.Tensor, written: torch.Tensor, sf: torch.Tensor, fmt: Format, k: int
) -> None:
    """Write scales to the rows of `sf` that `written` names.

    Rows past mn and groups past the last become 0.

    Args:
        scales: (batch, mn, groups), uint8 or float32.
        written: (batch, stored rows), bool.
        sf: as :func:`view` takes it; MN-major scales have the format's own strides, or columns
            without padding.
        fmt: the format.
        k: columns of the values.
    """
    batch, mn, groups = scales.shape
    if batch == 0 or mn == 0 or groups == 0:
        return
    write_in_tensor(scales, written, sf, fmt, k)
    if fmt.mn_major and fmt.scale_rows(mn) > mn and not has_dense_columns(sf):
        columns = fmt.columns(k)
        _clear_padding_rows(sf, written[:, mn:].repeat_interleave(columns, 0), mn)


def write_in_tensor(
    scales: torch.Tensor, written: torch.Tensor, sf: torch.Tensor, fmt: Format, k: int
) -> None:
    """Write scales as :func:`write` does, but no padding rows of MN-major ones.

    `sf` has any strides, as :func:`view` takes it, and none of the sizes is 0.
    """
    _, mn, groups = scales.shape
    modes = view(sf, fmt, mn, k)
    stored = stored_matrix(modes, fmt, mn, k)
    rows = stored.shape[1]
    padded = pad(scales, (0, stored.shape[2] - groups, 0, rows - mn))
    modes.copy_(padded.where(written[:, :rows].unsqueeze(2), stored).view(modes.shape))


def _clear_padding_rows(sf: torch.Tensor, written: torch.Tensor, mn: int) -> None:
    """Write 0 to the rows past `mn` of MN-major scales, as far as their storage goes.

    Args:
        sf: (..., mn, columns).
        written: (columns, padding rows), which of them, for the columns of all matrices in turn.
        mn: rows of a matrix.
    """
    columns, padding = written.shape
    aligned = mn + padding
    start = sf.storage_offset() + mn
    inner = sf.as_strided((columns - 1, padding), (aligned, 1), start)
    inner.masked_fill_(written[:-1], 0)
    last_padding = last_column_rows(sf) - mn
    last = sf.as_strided((last_padding,), (1,), start + (columns - 1) * aligned)
    last.masked_fill_(written[-1, :last_padding], 0)
