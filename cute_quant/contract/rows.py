"""Row domains: which rows of a result exist, as in the grouped GEMMs of a mixture of experts.

Counts and indices are int32 tensors on the device; a call does not synchronize. Out-of-range
entries are clamped. With ``check=True`` the call synchronizes and raises on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

DENSE = "dense"


@dataclass(frozen=True, eq=False)
class Masked:
    """The first rows of each expert exist, as in DeepGEMM's masked grouped GEMM.

    Rows of q (E, max_m, k) below ``clamp(masked_m[e], 0, max_m)`` are written. Scale rows from the
    count to the next multiple of 4 become 0, if the format has them. Rows past these keep what
    their memory held, also in results that the call allocates: these are uninitialized, or as
    ``torch.utils.deterministic.fill_uninitialized_memory`` fills them.

    Attributes:
        masked_m: (E,), int32, contiguous, on the device of x: rows of each expert.
    """

    masked_m: torch.Tensor

    kind: ClassVar[str] = "masked"
    alignment: ClassVar[int] = 1
    dimensions: ClassVar[tuple[str, ...]] = ("E", "max_m")
    data_name: ClassVar[str] = "masked_m"

    @property
    def data(self) -> torch.Tensor:
        """Return the counts, as every domain calls its tensor."""
        return self.masked_m


@dataclass(frozen=True, eq=False)
class PrefixSum:
    """Groups of rows stacked along M, each from an aligned start to an end of its own.

    A row exists where ``start[g] <= row < end[g]`` for some g, with ``end = clamp(ends, 0, M)``,
    ``start[0] = 0`` and ``start[g] = align(end[g - 1], alignment)``. All others, those between a
    group's end and the next start and those past the last end, get values 0 and scales 0.

    Attributes:
        ends: (G,), int32, contiguous, on the device of x: the row past the last of each group.
        alignment: rows; each group but the first starts at the next multiple of it.
    """

    ends: torch.Tensor
    alignment: int = 128

    kind: ClassVar[str] = "prefix_sum"
    dimensions: ClassVar[tuple[str, ...]] = ("M",)
    data_name: ClassVar[str] = "ends"

    @property
    def data(self) -> torch.Tensor:
        """Return the ends, as every domain calls its tensor."""
        return self.ends


@dataclass(frozen=True, eq=False)
class PrefixSumWithGaps(PrefixSum):
    """As :class:`PrefixSum`, but rows that belong to no group keep what their memory held.

    Neither their values nor their scales are written, as vLLM leaves them. Padding rows past M
    become 0 as always. Not with an index, and not for ``convert_scales``.
    """

    kind: ClassVar[str] = "prefix_sum_with_gaps"


@dataclass(frozen=True, eq=False)
class Indexed:
    """Each row carries the index of its group, as in DeepGEMM's contiguous grouped GEMM.

    Rows whose index is negative are padding: values 0 and scales 0. Any other index is accepted.

    Attributes:
        m_indices: (M,), int32, contiguous, on the device of x: the group of each row.
    """

    m_indices: torch.Tensor

    kind: ClassVar[str] = "indexed"
    alignment: ClassVar[int] = 1
    dimensions: ClassVar[tuple[str, ...]] = ("M",)
    data_name: ClassVar[str] = "m_indices"

    @property
    def data(self) -> torch.Tensor:
        """Return the indices, as every domain calls its tensor."""
        return self.m_indices


Rows = Masked | PrefixSum | Indexed
KINDS: dict[str, type[Rows]] = {
    Masked.kind: Masked,
    PrefixSum.kind: PrefixSum,
    PrefixSumWithGaps.kind: PrefixSumWithGaps,
    Indexed.kind: Indexed,
}


PREFIX_SUMS = (PrefixSum.kind, PrefixSumWithGaps.kind)
"""Kinds of rows in groups that are stacked along M."""


class RowOperands(NamedTuple):
    """A row domain as arguments of a torch operator."""

    rows: str = DENSE
    row_data: torch.Tensor | None = None
    alignment: int = 1


def to_operands(rows: Rows | None) -> RowOperands:
    """Return a row domain as arguments of a torch operator."""
    return RowOperands() if rows is None else RowOperands(rows.kind, rows.data, rows.alignment)


def from_operands(operands: RowOperands) -> Rows | None:
    """Invert :func:`to_operands`.

    Raises:
        ValueError: there is no such domain, or it has no use for an argument.
    """
    kind, data, alignment = operands
    if kind not in (DENSE, *KINDS):
        raise ValueError(f"rows: expected one of {(DENSE, *KINDS)}, got {kind!r}")
    if kind not in PREFIX_SUMS and alignment != 1:
        raise ValueError(f"alignment: expected 1 for rows={kind!r}, got {alignment}")
    if (data is None) != (kind == DENSE):
        expected = "None" if kind == DENSE else "a tensor"
        got = "None" if data is None else "one"
        raise ValueError(f"row_data: expected {expected} for rows={kind!r}, got {got}")
    if data is None:
        return None
    if kind == PrefixSumWithGaps.kind:
        return PrefixSumWithGaps(data, alignment)
    return PrefixSum(data, alignment) if kind == PrefixSum.kind else KINDS[kind](data)
