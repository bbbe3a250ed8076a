"""Groups along rows in plain torch: quantize without a kernel."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from cute_quant.contract import scale_storage
from cute_quant.contract.calls import Call
from cute_quant.contract.columns import ColumnCall, Pair
from cute_quant.contract.formats import Format
from cute_quant.contract.philox import COLUMN_DRAWS, random_of_elements
from cute_quant.contract.reference.prologues import computed
from cute_quant.contract.reference.quantize import quantize_into as quantize_rows_into
from cute_quant.contract.reference.quantize import stored_scales
from cute_quant.contract.reference.rows import live_rows
from cute_quant.contract.reference.scales import group_scales
from cute_quant.contract.reference.values import group_values


def quantize_into(call: ColumnCall, columns: Pair, along_k: Pair | None) -> None:
    """Quantize what a call asks for.

    Args:
        call: a call that was checked.
        columns: values and scales of groups along rows.
        along_k: those of groups along k, if the call has them.
    """
    if call.along_k is not None and along_k is not None:
        of_rows = Call(call.x, call.along_k.fmt, rows=call.rows, prologue=call.prologue)
        quantize_rows_into(of_rows._replace(rng_state=call.rng_state), *along_k)
    if call.x.numel():
        _quantize_columns_into(call, *columns)


def _quantize_columns_into(call: ColumnCall, q: torch.Tensor, sf: torch.Tensor) -> None:
    fmt = call.columns.fmt
    live, source = live_rows(call.x, call.rows, None)
    source = computed(source, call.prologue)
    of_columns = source.where(live.unsqueeze(2), 0.0).mT  # (batch, k, mn)
    scales = group_scales(of_columns, fmt)
    random = None
    if call.rng_state is not None:
        batch, mn, k = source.shape
        random = random_of_elements(call.rng_state, batch, mn, k, COLUMN_DRAWS).mT
    codes = group_values(of_columns, scales, fmt, random=random).view(torch.uint8)
    codes = codes.where(live.unsqueeze(1), 0)
    q.view(torch.uint8).copy_((codes if call.transposed else codes.mT).reshape(q.shape))

    scales = scales.where(_groups_with_rows(live, fmt).unsqueeze(1), 0)
    stored = stored_scales(scales, fmt)
    batch, k, _ = scales.shape
    written = live.new_ones(batch, fmt.scale_rows(k))
    scale_storage.write_in_tensor(
        stored, written, sf if fmt.blocked else sf.mT, fmt, call.x.shape[-2]
    )


def _groups_with_rows(live: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Return which groups of rows, (batch, groups), have one of those that exist, (batch, mn)."""
    batch, mn = live.shape
    return pad(live, (0, -mn % fmt.group_size)).view(batch, -1, fmt.group_size).any(2)
