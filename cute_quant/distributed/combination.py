"""Sums of rows that lie in different places, in one launch on a GPU."""

from __future__ import annotations

import torch

from cute_quant.contract.tensors import MAX_SIZE
from cute_quant.dispatch import launch
from cute_quant.dispatch.plan import alignment, matrix_view
from cute_quant.distributed.compilation import compiled
from cute_quant.jit import lookup
from cute_quant.kernels import architectures
from cute_quant.kernels.config import COMBINE_ROWS, Access, CombineSpec


def add_up(
    rows: torch.Tensor, places: torch.Tensor, factors: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the sums of rows, in float32 and in the order of their places, rounded once.

    Args:
        rows: (M, n).
        places: (records, choices), int32: the rows of each record, -1 for none, which is not read.
        factors: (records, choices), float32: of the rows, 1 by default. Products are rounded.

    Returns:
        (records, n), the dtype of the rows.
    """
    if not (rows.numel() and places.numel()):
        return rows.new_zeros((len(places), rows.shape[1]))
    if _takes(rows) and launch.has_kernels(rows):
        return _launch(rows, places, factors)
    total = rows.new_zeros((len(places), rows.shape[1]), dtype=torch.float32)
    for choice in range(places.shape[1]):
        place = places[:, choice]
        row = rows.index_select(0, place.clamp(min=0)).float()
        if factors is not None:
            row = row * factors[:, choice].unsqueeze(1)
        total += row.where((place >= 0).unsqueeze(1), 0.0)
    return total.to(rows.dtype)


def _takes(rows: torch.Tensor) -> bool:
    """Return whether the kernel takes rows of these strides."""
    (_, row_stride), strides = matrix_view(rows, batched=False).strides, rows.stride()
    contiguous = rows.shape[1] == 1 or strides[1] == 1
    return contiguous and row_stride * rows.element_size() <= MAX_SIZE


def _launch(rows: torch.Tensor, places: torch.Tensor, factors: torch.Tensor | None) -> torch.Tensor:
    """Launch the kernel on rows and places of which there are some.

    A thread has one vector of columns, and loads those of several choices at once.
    """
    arch = lookup.architecture(rows.get_device())
    architecture, itemsize = architectures.named(arch), rows.element_size()
    out = rows.new_empty((len(places), rows.shape[1]))
    views = [matrix_view(t, batched=False) for t in (rows, out)]
    load_bytes, store_bytes = (
        alignment(t.data_ptr(), view, itemsize, architecture.widest_load)
        for t, view in zip((rows, out), views, strict=True)
    )
    values = architecture.widest_load // itemsize
    access = Access(load_bytes, store_bytes, ragged=rows.shape[1] % values != 0)
    in_flight = min(1 << (places.shape[1] - 1).bit_length(), COMBINE_ROWS)
    weighted = factors is not None
    spec = CombineSpec(rows.dtype, in_flight, values, access, weighted, architecture.pdl)
    arguments = views[0].of(rows), places, factors, views[1].of(out)
    launch.run(compiled(spec, arch), arguments, [out])
    return out
