"""Records that arrive, laid out in the rows of their experts, in one launch on a GPU."""

from __future__ import annotations

import math

import torch

from cute_quant.contract.dtypes import STORE_BYTES
from cute_quant.contract.format_choices import ROW_MAJOR
from cute_quant.contract.formats import Format
from cute_quant.contract.rows import Masked
from cute_quant.dispatch import launch
from cute_quant.dispatch.convert_scales import layout_format
from cute_quant.dispatch.plan import view_of_scales
from cute_quant.distributed.compilation import compiled
from cute_quant.distributed.records import Record
from cute_quant.distributed.routing import Plan
from cute_quant.jit import lookup
from cute_quant.kernels import architectures
from cute_quant.kernels.config import ArrivalSpec
from cute_quant.ops.scales import convert_scales, empty_scales

UNITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Elements that rows of bytes are gathered as."""


def lay_out(
    received: torch.Tensor, plan: Plan, record: Record, fmt: Format, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values and scales of records in the rows of an arrival.

    Args:
        received: (records + 1, bytes), the last of zeros.
        plan: with the record of each row.
        record: what a record holds.
        fmt: of the result.
        k: columns of the values.
    """
    shape = (*plan.batch_shape, plan.num_rows, k)
    # The bytes of a row in a row-major layout may end within a word.
    in_words = not (fmt.byte_scales and fmt.scale_layout == ROW_MAJOR)
    if in_words and record.value_bytes % STORE_BYTES == 0 and launch.has_kernels(received):
        return _launch(received, plan, record, fmt, shape)
    unit = math.gcd(record.value_bytes, 8)
    values = received.view(UNITS[unit])[:, : record.value_bytes // unit]
    q = values.index_select(0, plan.sources).view(fmt.values)
    _, scales = record.views(received)
    sf = scales.index_select(0, plan.sources)
    q, sf = q.view(*shape[:-1], q.shape[1]), sf.view(*shape[:-1], sf.shape[1])
    if record.fmt is not fmt:
        sf = convert_scales(sf, record.fmt, fmt, shape, rows=plan.rows)
    return q, sf


def _launch(
    received: torch.Tensor, plan: Plan, record: Record, fmt: Format, shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel on an arrival."""
    arch = lookup.architecture(received.get_device())
    masked = isinstance(plan.rows, Masked)
    spec = ArrivalSpec(layout_format(fmt), masked, architectures.named(arch).pdl)
    q = received.new_empty((*shape[:-1], record.value_bytes))
    sf = empty_scales(fmt, shape, device=received.device)
    if not q.numel():
        return q.view(fmt.values), sf
    function = compiled(spec, arch)
    scales = view_of_scales(sf, fmt.scale_dims).of(sf)
    assert scales is not None
    arguments = (
        received,
        plan.sources.view(-1, plan.num_rows),
        plan.rows.data if masked else None,
        q.view(-1, *q.shape[-2:]),
        scales.view(torch.uint8) if scales.element_size() == 1 else scales,
        fmt.groups(shape[-1]),
        record.scale_start,
    )
    launch.run(function, arguments, [q, sf])
    return q.view(fmt.values), sf
