"""Which rows of a result exist, and which row of x each of them is: device functions.

What `contract.rows` describes, read where a kernel runs. Nothing here trusts what it reads:
counts are clamped, and an index that names no row of x makes a row that does not exist.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Uint32

from cute_quant.kernels.config import LANES

EXPERTS_PER_LANE = 8
EXPERTS_PER_CHUNK = LANES * EXPERTS_PER_LANE
"""Experts whose counts a warp reads at once."""


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
    chunk: Int32,
    first_tile: Int32,
    max_m: Uint32,
    slots: Int32,
    rows_per_tile: cutlass.Constexpr[int],
) -> tuple:
    """How many tiles of rows past the first `slots` the experts from `chunk` on have, as a warp
    reads them.

    Returns:
        The first tile of the lane's ``EXPERTS_PER_LANE`` experts, counted over all experts; that
        after their last; and that after the last of the chunk.
    """
    lane = cute.arch.lane_idx()
    total = Int32(0)
    for i in cutlass.range_constexpr(EXPERTS_PER_LANE):
        expert = chunk + lane * EXPERTS_PER_LANE + i
        total += tiles_past(slots, read_count(mCounts, expert, max_m), rows_per_tile)
    end = first_tile + running_sum(total, LANES)
    return end - total, end, cute.arch.shuffle_sync(end, LANES - 1)


@cute.jit
def find_tile(
    mCounts: cute.Tensor,  # (experts,)
    chunk: Int32,
    first: Int32,
    end: Int32,
    tile: Int32,
    max_m: Uint32,
    slots: Int32,
    rows_per_tile: cutlass.Constexpr[int],
) -> tuple:
    """Of a tile of the chunk: its expert, its number among the expert's tiles, the expert's count.

    Args:
        first, end: of the lane's experts, as `read_experts` has them.
    """
    lane = cute.arch.lane_idx()
    owner = lane_of(first <= tile and tile < end)
    expert = chunk + owner * EXPERTS_PER_LANE + lane % EXPERTS_PER_LANE
    count = read_count(mCounts, expert, max_m)
    tiles = tiles_past(slots, count, rows_per_tile)
    begin = cute.arch.shuffle_sync(first, owner) + running_sum(tiles, EXPERTS_PER_LANE) - tiles
    here = lane_of(lane < EXPERTS_PER_LANE and begin <= tile and tile < begin + tiles)
    number = tile - begin + slots
    return tuple(cute.arch.shuffle_sync(value, here) for value in (expert, number, count))


@cute.jit
def read_count(mCounts: cute.Tensor, expert: Int32, max_m: Uint32) -> Int32:
    count = Int32(0)
    if expert < mCounts.shape[0]:
        count = Int32(clamp(mCounts[expert], max_m))
    return count


def tiles_past(slots: Int32, rows: Int32, rows_per_tile: int) -> Int32:
    tiles = Int32((Uint32(rows) + (rows_per_tile - 1)) // rows_per_tile)
    return cutlass.max(tiles - slots, Int32(0))


@cute.jit
def running_sum(value: Int32, lanes: cutlass.Constexpr[int]) -> Int32:
    """The sum of a lane's value and those before it, in each of so many neighbours."""
    lane = cute.arch.lane_idx() % lanes
    for i in cutlass.range_constexpr(lanes.bit_length() - 1):
        below = cute.arch.shuffle_sync_up(value, offset=1 << i, mask_and_clamp=0)
        value += below if lane >= 1 << i else 0
    return value


def lane_of(only: Boolean) -> Int32:
    """The lane for which this holds, which is one."""
    lanes_before = Uint32(cute.arch.vote_ballot_sync(only)) - 1
    return Int32(cute.arch.popc(lanes_before))


@cute.jit
def clamp(count: Int32, limit: Uint32) -> Uint32:
    return cutlass.min(Uint32(cutlass.max(count, Int32(0))), limit)


@cute.jit
def next_multiple(row: Uint32, alignment: Int32) -> Uint32:
    """`row` rounded up to a multiple of `alignment`, both below 2^31."""
    step = Uint32(alignment)
    return (row + step - 1) // step * step
