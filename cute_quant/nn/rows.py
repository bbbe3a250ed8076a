"""Groups of rows stacked along M, for grouped GEMMs."""

from __future__ import annotations

import torch

from cute_quant.contract.dtypes import align
from cute_quant.contract.reference import rows as row_domains
from cute_quant.contract.rows import PrefixSum

GROUP_ALIGNMENT = 128
"""Rows, to a multiple of which each group is padded: those of a tile of DeepGEMM's, and of a group
that shares a scale."""


def groups_of_rows(ends: torch.Tensor, m: int) -> torch.Tensor:
    """Return the group of each of m rows, int32, -1 of none; m is a multiple of 128.

    Groups start at multiples of 128, so that all rows of a tile have the same one, or none.
    """
    ends = ends.long().clamp(0, m)
    tiles = PrefixSum(align(ends, GROUP_ALIGNMENT) // GROUP_ALIGNMENT, 1)
    group = row_domains.groups_of_rows(tiles, m // GROUP_ALIGNMENT)
    # Past the last group's end there is none: -1 takes the end appended here.
    end = torch.cat([ends, ends.new_zeros(1)])[group]
    row = torch.arange(m, device=ends.device).view(-1, GROUP_ALIGNMENT)
    return group[:, None].where(row < end[:, None], -1).flatten().int()


def group_sizes(ends: torch.Tensor, m: int) -> list[int]:
    """Read the ends of groups of m rows, and return the rows of each with its padding.

    Raises:
        ValueError: ends, rounded up, decrease or are past the last row, which other kernels clamp.
    """
    sizes, start = [], 0
    for group, end in enumerate(ends.tolist()):
        stop = align(end, GROUP_ALIGNMENT)
        if end < 0 or end > m or stop < start:
            raise ValueError(
                f"ends: expected that of group {group}, rounded up to {GROUP_ALIGNMENT}, between "
                f"{start}, where the group starts, and {m}, got {end}"
            )
        sizes.append(stop - start)
        start = stop
    return sizes
