"""Which rows of a result exist, and which row of x each of them is: device functions.

What `cute_quant.rows` describes, read where a kernel runs. Nothing here trusts what it reads:
counts are clamped, and an index that names no row of x makes a row that does not exist.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Uint32

from cute_quant.kernels.layouts import LANES
from cute_quant.rows import DENSE, Indexed, Masked, PrefixSum

COUNTS_PER_LANE = 8
EXPERTS_PER_CHUNK = LANES * COUNTS_PER_LANE
"""Experts whose counts a warp reads at once."""


@dataclass(frozen=True)
class Domain:
    """Compile-time choices.

    Attributes:
        kind: of the rows, as `cute_quant.rows` names it.
        gathered: whether an index names the rows of x.
        batched: whether there are matrices, or more rows than one dimension of a grid counts;
            the results of masked experts always are.
    """

    kind: str = DENSE
    gathered: bool = False
    batched: bool = False

    @property
    def masked(self) -> bool:
        return self.kind == Masked.kind

    @property
    def prefix_sum(self) -> bool:
        return self.kind == PrefixSum.kind

    @property
    def counted(self) -> bool:
        """Whether there is something to read."""
        return self.kind != DENSE

    @property
    def indexed(self) -> bool:
        return self.kind == Indexed.kind


@cute.jit
def in_a_group(
    mEnds: cute.Tensor,  # (groups,)
    alignment: Int32,
    mn: Uint32,
    numbers: list,
) -> list:
    """Of each of some rows, whether ``start <= row < end`` for a group; asked by whole warps."""
    lane = cute.arch.lane_idx()
    groups = mEnds.shape[0]
    found = Uint32(0)
    for base in range(0, groups, LANES):
        group = base + lane
        start, end = Uint32(0), Uint32(0)
        if group < groups:
            end = clamp(mEnds[group], mn)
            if group > 0:
                start = next_multiple(clamp(mEnds[group - 1], mn), alignment)
        for i in cutlass.range_constexpr(len(numbers)):
            if start <= numbers[i] and numbers[i] < end:
                found = found | Uint32(1 << i)
    return [cute.arch.vote_any_sync((found & Uint32(1 << i)) != 0) for i in range(len(numbers))]


@cute.jit
def has_index(mIndices: cute.Tensor, row: Uint32, mn: Uint32) -> Boolean:
    """Whether a row belongs to anyone."""
    index = Int32(-1)
    if row < mn:
        index = mIndices[Int32(row)]
    return index >= 0


@cute.jit
def gather(mIndex: cute.Tensor, row: Uint32, mn: Uint32) -> Uint32:
    """The row of x that is a row of the result; past the last where there is none."""
    index = Int32(-1)
    if row < mn:
        index = mIndex[Int32(row)]
    return Uint32(index)


@cute.jit
def read_experts(
    mCounts: cute.Tensor,  # (experts,)
    chunk_start: Int32,
    first_tile: Int32,
    max_m: Int32,
    rows_per_tile: cutlass.Constexpr[int],
) -> tuple:
    """A lane's share of the experts from `chunk_start` on, whose tiles of rows are counted from
    `first_tile` on.

    Returns:
        The counts of the lane's experts and how many tiles each has; the number of the first of
        these, and that after the last of the chunk.
    """
    lane = cute.arch.lane_idx()
    counts, tiles = [], []
    total = Int32(0)
    for i in cutlass.range_constexpr(COUNTS_PER_LANE):
        expert = chunk_start + lane * COUNTS_PER_LANE + i
        count = Int32(0)
        if expert < mCounts.shape[0]:
            count = Int32(clamp(mCounts[expert], Uint32(max_m)))
        counts.append(count)
        tiles.append((count + (rows_per_tile - 1)) // rows_per_tile)
        total += tiles[i]
    before = total
    for i in cutlass.range_constexpr(LANES.bit_length() - 1):
        below = cute.arch.shuffle_sync_up(before, offset=1 << i, mask_and_clamp=0)
        before += below if lane >= 1 << i else 0
    end = first_tile + cute.arch.shuffle_sync(before, LANES - 1)
    return counts, tiles, first_tile + before - total, end


@cute.jit
def find_tile(counts: list, tiles: list, first: Int32, tile: Int32) -> tuple:
    """Of a tile of the chunk: its expert, counted in the chunk, its number there, the count.

    Args:
        counts, tiles, first: as `read_experts` has them.
    """
    lane = cute.arch.lane_idx()
    expert, local, count = Int32(0), Int32(0), Int32(0)
    mine = Boolean(False)
    for i in cutlass.range_constexpr(COUNTS_PER_LANE):
        here = first <= tile and tile < first + tiles[i]
        if here:
            expert = lane * COUNTS_PER_LANE + i
            local = tile - first
            count = counts[i]
            mine = Boolean(True)
        first = first + tiles[i]
    owner = Int32(cute.arch.popc(lanes_before(cute.arch.vote_ballot_sync(mine))))
    return tuple(cute.arch.shuffle_sync(value, owner) for value in (expert, local, count))


@cute.jit
def lanes_before(only: Uint32) -> Uint32:
    """Bits of the lanes before the one whose bit alone is set."""
    return Uint32(only) - 1


@cute.jit
def clamp(count: Int32, limit: Uint32) -> Uint32:
    return cutlass.min(Uint32(cutlass.max(count, Int32(0))), limit)


@cute.jit
def next_multiple(row: Uint32, alignment: Int32) -> Uint32:
    """`row` rounded up to a multiple of `alignment`, both below 2^31."""
    step = Uint32(alignment)
    return (row + step - 1) // step * step
