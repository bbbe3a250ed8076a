"""Quantized rows as they travel: values and scales of a row, one after the other."""

from __future__ import annotations

from typing import NamedTuple

import torch

from cute_quant.contract.dtypes import align
from cute_quant.contract.format_choices import ROW_MAJOR, ROW_MAJOR_PACKED
from cute_quant.contract.formats import Format

ALIGNMENT = 32
"""Bytes that a record starts at a multiple of: the widest store of a thread."""
SCALE_ALIGNMENT = 16


class Record(NamedTuple):
    """Where values and scales of a row lie in a record, in bytes.

    Attributes:
        fmt: of the record: the scales of a row are contiguous.
        value_bytes: of the values, from the first byte on.
        scale_start, scale_bytes: of the scales.
        nbytes: of a record.
    """

    fmt: Format
    value_bytes: int
    scale_start: int
    scale_bytes: int
    nbytes: int

    @staticmethod
    def of(fmt: Format, k: int) -> Record:
        """Return the record of a row of k columns."""
        own = fmt.replace(scale_layout=ROW_MAJOR_PACKED if fmt.byte_scales else ROW_MAJOR)
        value_bytes = own.value_columns(k) * own.values.itemsize
        scale_start = align(value_bytes, SCALE_ALIGNMENT)
        scale_bytes = own.columns(k) * own.sf_dtype.itemsize
        nbytes = align(scale_start + scale_bytes, ALIGNMENT)
        return Record(own, value_bytes, scale_start, scale_bytes, nbytes)

    def views(self, records: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return values and scales of records, (records, bytes)."""
        end = self.scale_start + self.scale_bytes
        scales = records[:, self.scale_start : end].view(self.fmt.sf_dtype)
        return records[:, : self.value_bytes].view(self.fmt.values), scales
