"""Groups of rows stacked along M, for grouped GEMMs."""

from __future__ import annotations

import torch

from cute_quant.contract.dtypes import align
from cute_quant.contract.reference import rows as row_domains
from cute_quant.contract.rows import PrefixSum

GROUP_ALIGNMENT = 128
"""Rows, to a multiple of which each group is padded: those of a tile of DeepGEMM's, and of a group
that shares a scale."""


def groups_of_rows(rows: PrefixSum, m: int) -> torch.Tensor:
    """Return the group of each of m rows, int32, -1 of none."""
    return row_domains.groups_of_rows(rows, m).int()


def group_sizes(rows: PrefixSum, m: int) -> list[int]:
    """Read the ends of groups of m rows, and return the rows of each with its padding.

    Raises:
        ValueError: ends, rounded up, decrease or are past the last row, which other kernels clamp.
    """
    sizes, start = [], 0
    for group, end in enumerate(rows.ends.tolist()):
        stop = align(end, GROUP_ALIGNMENT)
        if end < 0 or end > m or stop < start:
            raise ValueError(
                f"ends: expected group {group} to end at {start} to {m}, or before without rows, "
                f"got {end}"
            )
        sizes.append(stop - start)
        start = stop
    return sizes
