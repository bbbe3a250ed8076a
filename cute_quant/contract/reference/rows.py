"""Which rows of a result exist, and where they come from."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import pad

from cute_quant.contract.calls import Call
from cute_quant.contract.dtypes import align
from cute_quant.contract.rows import Indexed, Masked, PrefixSum, Rows
from cute_quant.contract.tensors import flat_batch


def live_rows(
    x: torch.Tensor, rows: Rows | None, index: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which rows of the result exist, and their values in `x`.

    Returns:
        live: (batch, mn), bool.
        source: (batch, mn, k), the rows of x in their places; where none is live, anything.
    """
    if index is None:
        source = x.view(flat_batch("x", x.shape, x.stride())[0], *x.shape[-2:])
        live = torch.ones(source.shape[:2], dtype=torch.bool, device=x.device)
    else:
        index = index if index.ndim == 2 else index.unsqueeze(0)
        tokens = x.shape[0]
        live = (index >= 0) & (index < tokens)
        # A row of zeros for those that have none, also where x has no rows at all.
        source = torch.cat([x, x.new_zeros(1, x.shape[1])])[index.long().where(live, tokens)]
    return (live if rows is None else live & existing_rows(rows, live.shape[1])), source


def existing_rows(rows: Rows, mn: int) -> torch.Tensor:
    """Return which rows of a domain exist: (E, mn), or (mn,) where there are no experts."""
    match rows:
        case Masked():
            return below_count(rows, mn, mn)
        case PrefixSum():
            return rows_of_groups(rows, mn).any(0)
        case Indexed():
            return rows.m_indices >= 0


def below_count(masked: Masked, mn: int, rows: int, alignment: int = 1) -> torch.Tensor:
    """Return which rows lie below an expert's count, rounded up to `alignment`: (E, rows)."""
    counts = align(masked.masked_m.long().clamp(0, mn), alignment)
    return torch.arange(rows, device=counts.device) < counts[:, None]


def groups_of_rows(rows: Rows | None, mn: int) -> torch.Tensor:
    """Return the group of each row stacked along M, the first where there are several, -1 of none.

    Returns:
        (mn,), int64.
    """
    if isinstance(rows, Indexed):
        return rows.m_indices.long()
    assert isinstance(rows, PrefixSum)
    # A last group of all rows, for those that belong to none.
    belongs = pad(rows_of_groups(rows, mn), (0, 0, 0, 1), value=True)
    group = belongs.int().argmax(0)
    return group.where(group < len(rows.ends), -1)


def rows_of_groups(rows: PrefixSum, mn: int) -> torch.Tensor:
    """Return which rows, (G, mn), each group has."""
    row = torch.arange(mn, device=rows.ends.device)
    ends = rows.ends.long().clamp(0, mn)
    starts = pad(align(ends, rows.alignment)[:-1], (1, 0))[: ends.shape[0]]
    return (starts[:, None] <= row) & (row < ends[:, None])


def scattered_rows(call: Call, scatter: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which rows of the result of a scatter exist, and the row of x that each of them is.

    Returns:
        exist: (batch, mn), bool.
        source: (batch, mn), -1 of those that do not exist or that no place names.
    """
    batch_shape, mn, _ = call.result_shape
    batch = math.prod(batch_shape)
    count = batch * mn
    source = scatter.new_full((count + 1,), -1, dtype=torch.int64)
    row = torch.arange(scatter.shape[0], device=scatter.device).unsqueeze(1).expand_as(scatter)
    source[scatter.long().where((scatter >= 0) & (scatter < count), count)] = row
    source = source[:count].view(batch, mn)
    exist = torch.ones_like(source, dtype=torch.bool)
    if call.rows is not None:
        exist = exist & existing_rows(call.rows, mn)
    return exist, source.where(exist, -1)
