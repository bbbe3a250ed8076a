"""Which rows of a result exist: what the GEMMs of a mixture of experts leave to a tensor to say.

Each kind reads its counts on the device, so that nothing waits for them. Counts that make no sense
are clamped; ``quantize(check=True)`` names them instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

DENSE = "dense"


@dataclass(frozen=True, eq=False)
class Masked:
    """The first rows of each expert exist, as DeepGEMM's masked grouped GEMM has them.

    Of q (E, max_m, k) the rows below ``clamp(masked_m[e], 0, max_m)`` are written; the others keep
    what they held. Scale rows from the count to the next multiple of 4 become 0, as far as the
    format has them; those after keep what they held.

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
        return self.masked_m


@dataclass(frozen=True, eq=False)
class PrefixSum:
    """Groups of rows follow each other, each from an aligned start to an end of its own.

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
        return self.ends


@dataclass(frozen=True, eq=False)
class Indexed:
    """Each row says whom it belongs to, as DeepGEMM's contiguous grouped GEMM has them.

    Rows whose index is negative are padding: values 0 and scales 0. Which group a row belongs to
    does not matter here, so any other index goes.

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
        return self.m_indices


Rows = Masked | PrefixSum | Indexed
KINDS = {Masked.kind: Masked, PrefixSum.kind: PrefixSum, Indexed.kind: Indexed}


def to_operands(rows: Rows | None) -> tuple[str, torch.Tensor | None, int]:
    """`rows` as the arguments of an operator: kind, tensor, alignment."""
    if rows is None:
        return DENSE, None, 1
    return rows.kind, rows.data, rows.alignment


def from_operands(kind: str, data: torch.Tensor | None, alignment: int) -> Rows | None:
    """The inverse of :func:`to_operands`.

    Raises:
        ValueError: there is no such kind, or it has no use for an argument.
    """
    if kind == DENSE and data is not None:
        raise ValueError(f"row_data: expected None for rows={DENSE!r}, got {type(data).__name__}")
    if kind != PrefixSum.kind and alignment != 1:
        raise ValueError(f"alignment: expected 1 for rows={kind!r}, got {alignment}")
    if kind == DENSE:
        return None
    if kind not in KINDS:
        raise ValueError(f"rows: expected one of {(DENSE, *KINDS)}, got {kind!r}")
    return PrefixSum(data, alignment) if kind == PrefixSum.kind else KINDS[kind](data)
