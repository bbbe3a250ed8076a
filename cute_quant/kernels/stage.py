"""The quantizer as a stage of any kernel.

Registers with a segment of a row come in; registers with 8-bit values go out, and the scales of
the segment's groups go to their places in memory, padding included:

    stage = Stage(Float32, make_format(128, "ue8m0", False))   # compile-time choices

    scales = stage.scales(mS, mn, k, missing_rows)             # before the launch
    limit = stage.limit(floor)

    tXrQ, scale = stage.quantize(tXrX, limit)                  # in the kernel, by whole warps
    stage.store_scales(scales, [scale], [row], mn, tile, lane, k)

Who holds what is said by `specs.Tile`: a lane of a warp has ``tile.values_per_thread`` neighbours
of a row, the lanes of a warp follow each other, and a warp has tile number ``tile`` of its row.
`copy.load` and `copy.store` move such segments. No shared memory, no barrier.

Rows and groups past the input are quantized as if they were there and held nothing: values 0 and
scales 0. That is how all padding gets defined, by the same stores. A word of packed scales has a
byte for each group of a tile, so groups past the row own one; a float32 column they do not have.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint8, Uint32, const_expr

from cute_quant.contract.formats import (
    BLOCK_GROUPS,
    BLOCK_ROWS,
    SCALE_ROW_ALIGNMENT,
    WHOLE_ROW,
    Format,
)
from cute_quant.kernels import copy, layouts, numerics
from cute_quant.kernels.config import DEFAULT_TILE, Tile
from cute_quant.kernels.params import Params
from cute_quant.kernels.types import ELEMENT_TYPES, INPUT_TYPES


class Scales(Params):
    """Where scales go, as an argument of a kernel.

    Attributes:
        tensor: (rows, columns) if MN-major, else (rows, groups), of one matrix.
        rows: of a matrix, with padding.
        elements: of the last MN-major matrix that have storage, the first ones.
        stride: elements from a matrix to the next.
    """

    def __init__(self, tensor: cute.Tensor, rows: Uint32, elements: Uint32, stride: Int64):
        self.tensor = tensor
        self.rows = rows
        self.elements = elements
        self.stride = stride

    def of(self, batch: Int32, last: Boolean) -> Scales:
        """Those of one of a batch."""
        start = self.tensor.iterator + Int64(batch) * self.stride
        elements = cutlass.select_(last, self.elements, Uint32(2**32 - 1))
        tensor = cute.make_tensor(start, self.tensor.layout)
        return Scales(tensor, self.rows, elements, self.stride)


class Stage:
    """Compile-time choices.

    Args:
        dtype: of the values that come in: BFloat16, Float16 or Float32.
        fmt: of the results.
        tile: of a CTA's threads.

    Raises:
        TypeError: `dtype` or `fmt` is something else.
        ValueError: `tile` does not fit them, with the rule that it breaks.
    """

    def __init__(self, dtype: type[cutlass.Numeric], fmt: Format, tile: Tile = DEFAULT_TILE):
        if dtype not in INPUT_TYPES:
            raise TypeError(f"dtype: expected one of {tuple(INPUT_TYPES)}, got {dtype!r}")
        if not isinstance(fmt, Format):
            raise TypeError(f"fmt: expected a Format, got {fmt!r}")
        tile.check(fmt, INPUT_TYPES[dtype])
        self.dtype = dtype
        self.fmt = fmt
        self.tile = tile
        self.whole_row = fmt.group_size == WHOLE_ROW
        self.lanes_per_group = tile.lanes_per_group(fmt.group_size)
        self.groups_per_tile = tile.groups(fmt.group_size)
        self.groups_per_unit = fmt.groups_per_unit

    def scales(
        self, mS: cute.Tensor, mn: Int32 | Uint32, k: Int32, missing_rows: Int32 | int = 0
    ) -> Scales:
        """Where the scales of (mn, k) values, or of a batch of such, go.

        Args:
            mS: as the format allocates it.
            missing_rows: padding rows of the last MN-major column that have no storage.
        """
        fmt = self.fmt
        mn = Uint32(mn)
        groups = 1 if const_expr(self.whole_row) else cute.ceil_div(k, fmt.group_size)
        columns = cute.ceil_div(groups, fmt.groups_per_column)
        rows, elements = mn, Uint32(0)
        if const_expr(fmt.mn_major):
            rows = round_up(mn, SCALE_ROW_ALIGNMENT)
            elements = layouts.unsigned(columns) * rows - Uint32(missing_rows)
            layout = layouts.scales_by_column(Int32(rows), columns)
        elif const_expr(fmt.blocked):
            rows = round_up(mn, BLOCK_ROWS)
            groups = cute.round_up(groups, BLOCK_GROUPS)
            layout = layouts.scales_by_block(Int32(rows), groups)
        else:
            layout = layouts.scales_by_row(Int32(rows), groups)
        stride = Int64(rows) * (columns if const_expr(fmt.packed) else groups)
        start = mS.iterator
        if const_expr(fmt.ue8m0 and not fmt.packed):
            start = cute.recast_ptr(start, dtype=Uint8)
        return Scales(cute.make_tensor(start, layout), rows, elements, stride)

    def limit(self, floor: Int32 | Float32) -> Uint32 | Float32:
        """What `quantize` takes for the smallest scale `floor`, a UE8M0 exponent where scales are
        powers of two, as ``formats.scale_floor`` gives it."""
        return numerics.max_multiplier(floor) if const_expr(self.fmt.power_of_two) else floor

    def tiles(self, k: Int32) -> Int32:
        """Of a row of k: as many as its values, and the scales of its padding, take."""
        if const_expr(not self.whole_row and self.groups_per_tile < self.groups_per_unit):
            groups = cute.ceil_div(k, self.fmt.group_size)
            padded = cute.round_up(groups, self.groups_per_unit)
            return cute.ceil_div(padded, self.groups_per_tile)
        return cute.ceil_div(k, self.tile.columns)

    def quantize(self, tXrX: cute.Tensor, limit: Uint32 | Float32) -> tuple:
        """The values of a lane's segment, (values,), and the scale of its group, as `store_scales`
        takes it. A group lies in neighbouring lanes, all of which take part.

        Where a row is one group it takes all of its segments: the largest `numerics.amax` of these
        to `group_amax`, that to `scale`, and each segment to `values`.

        Raises:
            ValueError: a row is one group.
        """
        if self.whole_row:
            raise ValueError("fmt: expected groups, which a warp has whole, got whole rows")
        scale = self.scale(self.group_amax(numerics.amax(tXrX)), limit)
        return self.values(tXrX, scale), scale

    def group_amax(self, amax: Uint32) -> Uint32:
        """The largest `numerics.amax` of the lanes of a group."""
        return numerics.group_amax(amax, self.dtype, self.lanes_per_group)

    def scale(self, amax: Uint32, limit: Uint32 | Float32) -> Uint32 | Float32:
        """The scale of a group of this `group_amax`."""
        return numerics.group_scale(amax, self.dtype, limit, self.fmt)

    def values(self, tXrX: cute.Tensor, scale: Uint32 | Float32) -> cute.Tensor:
        """A segment over its scale, rounded."""
        scaled = numerics.scaled(tXrX, scale, self.fmt)
        return numerics.round_to(scaled, ELEMENT_TYPES[self.fmt.dtype])

    @cute.jit
    def store_scales(
        self,
        scales: Scales,
        row_scales: list,  # of a lane's group in each of some rows that follow each other
        rows: list,  # their numbers
        live_rows: Uint32,
        tile: Int32,
        lane: Int32,
        k: Int32,
        live: list | None = None,
        written: Uint32 | None = None,
    ):
        """Write the scales of a warp's groups: of each row another lane of the group.

        Args:
            live_rows: the first rows exist; those after get scales 0.
            live: of each row whether it exists, if those are not just the first ones.
            written: rows of scales to be written, with padding; all of them by default.
        """
        fmt = self.fmt
        count = len(rows)
        written = scales.rows if const_expr(written is None) else written
        row, scale = rows[0], row_scales[0]
        if const_expr(self.whole_row):
            # The other groups of a word, or of a block, which have to become 0.
            group, in_group = lane, Int32(0)
            group_live, exists = lane == 0, lane < self.groups_per_unit
        else:
            in_group, group = layouts.place_in_group(lane, self.lanes_per_group)
            column = copy.first_column(tile, lane, self.tile.values_per_thread)
            if const_expr(count > 1):
                # The lane's own column tells too: k is a multiple of all that these lanes hold.
                row = row + in_group
                scale = pick(row_scales, in_group)
            group_live = column < k
            exists = in_group < count
            if const_expr(self.groups_per_unit == 1):
                exists = exists and group_live
            elif const_expr(self.groups_per_tile > self.groups_per_unit):
                unit = group // self.groups_per_unit * self.groups_per_unit
                first = unit * self.lanes_per_group
                first = copy.first_column(tile, first, self.tile.values_per_thread)
                exists = exists and first < k
        exists = exists and row < written
        if const_expr(fmt.mn_major):
            per_tile, per_column = self.groups_per_tile, fmt.groups_per_column
            column, byte = layouts.scale_unit(tile, group, per_tile, per_column)
            element = layouts.scale_element(scales.rows, row, column)
            exists = exists and element < scales.elements
        row_live = row < live_rows if const_expr(live is None) else pick(live, in_group)
        if exists:
            stored = numerics.stored_scale(scale, fmt)
            stored = stored if row_live and group_live else type(stored)(0)
            if const_expr(fmt.packed):
                layouts.scale_bytes(scales.tensor, element)[byte] = stored.to(Uint8)
            elif const_expr(fmt.mn_major):
                cute.recast_tensor(layouts.scale_bytes(scales.tensor, element), Float32)[0] = stored
            else:
                group = tile * self.groups_per_tile + group
                scales.tensor[Int32(row), group] = stored.to(scales.tensor.element_type)


@cute.jit
def pick(choices: list, number: Int32) -> Boolean | Uint32 | Float32:
    """The choice of this number; the first if there is none."""
    result = choices[0]
    for i in cutlass.range_constexpr(1, len(choices)):
        result = choices[i] if number == i else result
    return result


def round_up(rows: Int32 | Uint32, multiple: int) -> Uint32:
    """Of up to 2^31 - 1 rows, which may make 2^31."""
    return (Uint32(rows) + (multiple - 1)) // multiple * multiple
