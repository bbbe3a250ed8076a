"""The quantizer as a stage of any kernel.

Registers with a segment of a row come in. Registers with quantized values go out, and the scales of
the segment's groups go to memory, padding included:

    stage = Stage(Float32, DEEP_GEMM)   # compile-time choices

    scales = stage.scales(mS, mn, k, missing_rows)             # before the launch
    bound = stage.scale_bound(floor)

    tXrQ, scale = stage.quantize(tXrX, bound)                  # in the kernel, by whole warps
    stage.store_scales(scales, Rows([row], mn), [scale], segment, k)

`config.Tile` has the thread-value layout: a lane of a warp holds ``tile.values_per_thread``
values of a row that are contiguous along k, the lanes of a warp follow each other, and a warp has
one tile of its row. `copy.load` and `copy.store` move such segments. No shared memory, no barrier.

Rows and groups past the input are quantized as if they were there and held nothing: values 0 and
scales 0. The same stores so define all padding. A word of packed scales has a byte for each group
of a tile, so groups past the row own one; a float32 column they do not have.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Float32, Int32, Int64, Uint8, Uint32, const_expr

from cute_quant.contract.dtypes import BLOCK_GROUPS, BYTES_PER_WORD, SCALE_ROW_ALIGNMENT
from cute_quant.contract.format_choices import DEEPGEMM, VLLM_EMULATION, WHOLE_ROW
from cute_quant.contract.formats import Format
from cute_quant.kernels import copy, encodings, layouts, ptx
from cute_quant.kernels import scales as scaling
from cute_quant.kernels.config import DEFAULT_TILE, Tile
from cute_quant.kernels.copy import Segment
from cute_quant.kernels.params import Params
from cute_quant.kernels.scales import GroupScale
from cute_quant.kernels.upper_scales import Factors


class Scales(Params):
    """Where scales go, as an argument of a kernel.

    Attributes:
        start: of the scales of one matrix.
        rows: of a matrix, with padding.
        elements: of the last MN-major matrix that have storage, the first ones.
        groups: of a row, with the padding of blocks.
        stride: elements from a matrix to the next.
        written_rows: to be written, those that do not exist as 0; None for all.
        row_stride: elements from a row to the next; None where the format says it.
    """

    def __init__(
        self, start: cute.Pointer, rows: Uint32, elements: Uint32, groups: Int32, stride: Int64
    ):
        self.start = start
        self.rows = rows
        self.elements = elements
        self.groups = groups
        self.stride = stride
        self.written_rows = None
        self.row_stride = None

    def slice_batch(self, batch: Int32, last: Boolean) -> Scales:
        """Return the scales of one matrix of a batch."""
        start = self.start + Int64(batch) * self.stride
        elements = cutlass.select_(last, self.elements, Uint32(2**32 - 1))
        return self.replace(start=start, elements=elements)

    def slice_rows(self, count: Int32) -> Scales:
        """Return the scales of the first rows, with their padding."""
        return self.replace(written_rows=self.rows_to_write(count))

    def rows_to_write(self, count: Int32) -> Uint32:
        """Return how many scale rows `count` rows have, with padding up to a multiple of 4."""
        return cutlass.min(round_up(count, SCALE_ROW_ALIGNMENT), self.rows)


class Rows(NamedTuple):
    """Rows of the results that follow each other.

    Attributes:
        indices: of the rows in their matrix.
        num_rows: how many rows of the matrix exist, the first ones.
        exist: whether each of `indices` exists, where those are not just the first ones.
        of_lanes: whether each lane of a group has a row of its own, anywhere, rather than the
            thread several.
    """

    indices: list[Uint32]
    num_rows: Uint32
    exist: list[Boolean] | None = None
    of_lanes: bool = False


class Origin(NamedTuple):
    """The first of the tiles that a thread has a part of.

    Attributes:
        segment: of the thread in the first tile.
        tiles: how many tiles later another one is.
    """

    segment: Segment
    tiles: int


class Base(NamedTuple):
    """A row and a tile whose scales have an address from which those of others are constants away.

    Attributes:
        row: the first row of the thread.
        segment: of the thread in its first tile.
        rows, tiles: how many rows and tiles later another one is.
    """

    row: Uint32
    segment: Segment
    rows: int
    tiles: int


class Stage:
    """Quantizes segments of rows in registers, and stores the scales of their groups.

    Its arguments are compile-time choices.

    Args:
        dtype: of the values that come in: BFloat16, Float16 or Float32.
        fmt: of the results.
        tile: of a CTA's threads.
        keeps_gaps: whether scales of rows that do not exist are not written, but for padding.

    Raises:
        TypeError: `dtype` or `fmt` is something else.
        ValueError: `tile` does not fit them, with the rule that it breaks.
    """

    def __init__(
        self,
        dtype: type[cutlass.Numeric],
        fmt: Format,
        tile: Tile = DEFAULT_TILE,
        keeps_gaps: bool = False,
    ):
        if dtype not in encodings.INPUT_TYPES:
            expected = tuple(encodings.INPUT_TYPES)
            raise TypeError(f"dtype: expected one of {expected}, got {dtype!r}")
        if not isinstance(fmt, Format):
            raise TypeError(f"fmt: expected a Format, got {fmt!r}")
        tile.check(fmt, encodings.INPUT_TYPES[dtype])
        self.dtype = dtype
        self.fmt = fmt
        self.tile = tile
        self.keeps_gaps = keeps_gaps
        self.whole_row = fmt.group_size == WHOLE_ROW
        self.lanes_per_group = tile.lanes_per_group(fmt.group_size)
        self.groups_per_tile = tile.groups(fmt.group_size)
        self.groups_per_unit = fmt.groups_per_unit
        # Each unit of scales in a tile is written if its first group exists.
        self.tiles_have_units = not self.whole_row and (
            self.groups_per_unit == 1 or self.groups_per_tile > self.groups_per_unit
        )
        self.rows_at_once = min(tile.rows_per_thread, self.lanes_per_group)

    def scales(
        self,
        mS: cute.Tensor,
        mn: Int32 | Uint32,
        k: Int32,
        missing_rows: Int32 | int = 0,
        dense: bool = False,
    ) -> Scales:
        """Return where the scales of (mn, k) values, or of a batch of such, go.

        Args:
            mS: the scales, of the dtype, shape and strides of the format.
            mn: rows of a matrix.
            k: columns of a matrix.
            missing_rows: padding rows of the last MN-major column that have no storage.
            dense: whether MN-major columns have no padding rows.
        """
        fmt = self.fmt
        mn = Uint32(mn)
        groups = 1 if const_expr(self.whole_row) else cute.ceil_div(k, fmt.group_size)
        columns = cute.ceil_div(groups, fmt.groups_per_column)
        rows, elements = mn, Uint32(0)
        if const_expr(fmt.mn_major):
            rows = mn if const_expr(dense) else round_up(mn, SCALE_ROW_ALIGNMENT)
            elements = layouts.unsigned(columns) * rows - Uint32(missing_rows)
        elif const_expr(fmt.blocked):
            rows = round_up(mn, fmt.block_rows)
            groups = cute.round_up(groups, BLOCK_GROUPS)
        stride = Int64(rows) * (columns if const_expr(fmt.packed) else groups)
        start = mS.iterator
        if const_expr(fmt.byte_scales and not fmt.packed):
            start = cute.recast_ptr(start, dtype=Uint8)
        return Scales(start, rows, elements, Int32(groups), stride)

    def scale_registers(self, count: int) -> cute.Tensor:
        """Return registers for so many stored scales, (count,), zeros."""
        scales = cute.make_rmem_tensor(count, Uint32 if self.fmt.byte_scales else Float32)
        scales.fill(0)
        return scales

    def may_write(self, in_bounds: Boolean) -> Boolean | bool:
        """Return whether a row has more to store than the padding of scales.

        A block has up to 127 rows of padding, which need no arithmetic. `in_bounds` is whether q
        has the row, or the first of some that follow each other. That one may lie in a gap that is
        kept, before others that do not.
        """
        if self.keeps_gaps:
            return True
        if self.fmt.blocked and self.fmt.block_rows > SCALE_ROW_ALIGNMENT * self.tile.rows:
            return in_bounds
        return True

    def scale_bound(self, floor: Int32 | Float32) -> Float32:
        """Return the bound on scales: the largest multiplier (UE8M0) or the smallest scale.

        Args:
            floor: the smallest scale, a UE8M0 exponent where scales are powers of two, as
                `Format.floor` has it.
        """
        return scaling.scale_bound(floor, self.fmt)

    def tiles(self, k: Int32) -> Int32:
        """Return how many tiles of a warp a row has, with the padding of its scales."""
        if const_expr(not self.whole_row and self.groups_per_tile < self.groups_per_unit):
            groups = cute.ceil_div(k, self.fmt.group_size)
            padded = cute.round_up(groups, self.groups_per_unit)
            return cute.ceil_div(padded, self.groups_per_tile)
        return cute.ceil_div(k, self.tile.columns)

    def has_tile(self, tile: Int32, k: Int32) -> Boolean:
        """Return whether a row has so many tiles of a warp; without `tiles`, if it can."""
        if const_expr(not self.whole_row and self.groups_per_tile < self.groups_per_unit):
            return tile < self.tiles(k)
        # A quotient rounded up takes eight instructions.
        return tile * self.tile.columns < k

    def quantize(
        self, tXrX: cute.Tensor, bound: Float32 | Factors
    ) -> tuple[cute.Tensor, GroupScale]:
        """Return a segment's quantized values, and the scale of its group.

        The values are (values,), or (values / 2,) bytes of two in FP4. `bound` is what
        `scale_bound` returns, or what `upper_scales.UpperScale` loads for e4m3 scales.

        All lanes of a group take part. Where a row is one group, take the largest
        `thread_amax` of all of its segments to `group_amax`, that to `scale`, and each
        segment to `encode`.

        Raises:
            ValueError: a row is one group.
        """
        if self.whole_row:
            raise ValueError("fmt: expected groups, which a warp has whole, got whole rows")
        scale = self.scale(self.group_amax(self.thread_amax(tXrX)), bound)
        scale = self.refine(tXrX, scale, bound)
        return self.encode(tXrX, scale), scale

    @property
    def amax_dtype(self) -> type[cutlass.Numeric]:
        """Return the type that magnitudes are compared in.

        float32 where all values are widened anyway, and three of them compared at once.
        """
        widened = not self.fmt.power_of_two and self.fmt.value_type.per_byte > 1
        return Float32 if widened and ptx.target().three_input_max else self.dtype

    def thread_amax(self, tXrX: cute.Tensor) -> Uint32:
        """Return the largest magnitude of a thread's segment, as `group_amax` takes it."""
        narrow = self.amax_dtype is self.dtype
        return scaling.thread_amax(tXrX if narrow else encodings.widen(tXrX))

    def larger(self, a: Uint32, b: Uint32) -> Uint32:
        """Return the larger of two of `thread_amax`."""
        return scaling.larger(self.amax_dtype)(a, b)

    def group_amax(self, thread_amax: Uint32) -> Uint32:
        """Return the largest `thread_amax` of the lanes of a group, as `scale` takes it."""
        return scaling.group_amax(thread_amax, self.amax_dtype, self.lanes_per_group)

    def scale(self, amax: Uint32, bound: Float32 | Factors) -> GroupScale:
        """Return multiplier and scale of the group of a `group_amax`."""
        return scaling.group_scale(amax, self.amax_dtype, bound, self.fmt)

    @cute.jit
    def refine(self, tXrX: cute.Tensor, scale: GroupScale, bound: Float32 | Factors) -> GroupScale:
        """Return the better of two scales of a group, in formats that are `four_over_six`.

        One maps amax to 6, the other to 4, where values lie closer together: it is taken if its sum
        of absolute errors is smaller. A thread has the whole group.
        """
        if const_expr(not self.fmt.four_over_six):
            return scale
        larger = scaling.rounded_e4m3_scale(
            Float32(1.5) * scale.unrounded, bound, self.fmt.numerics
        )
        better = self.error(tXrX, larger, bound) < self.error(tXrX, scale, bound)
        return GroupScale(
            larger.multiplier if better else scale.multiplier,
            larger.scale if better else scale.scale,
            larger.unrounded if better else scale.unrounded,
        )

    def error(self, tXrX: cute.Tensor, scale: GroupScale, bound: Factors) -> Float32:
        """Return the sum of absolute errors of a thread's values, added in order."""
        decoded, tXrV = self.decode(tXrX, scale, bound), encodings.widen(tXrX)
        total = Float32(0.0)
        for i in range(cute.size(tXrV)):
            bits = (decoded[i] - tXrV[i]).bitcast(Uint32) & Uint32(scaling.MAGNITUDE_MASK)
            total = total + bits.bitcast(Float32)
        return total

    def encode(
        self, tXrX: cute.Tensor, scale: GroupScale, random: list[Uint32] | None = None
    ) -> cute.Tensor:
        """Return a segment times its multiplier, quantized: (values,), or bytes of two.

        With `random`, a word for each value, values are rounded stochastically.
        """
        fmt = self.fmt
        if random is not None:
            return encodings.encode_stochastically(
                self.products(tXrX, scale),
                random,
                encodings.value_type_of(fmt),
                scaling.is_number(scale, fmt),
            )
        if fmt.value_type.per_byte > 1:
            if const_expr(fmt.upper_scale and fmt.numerics == DEEPGEMM):
                quotients = encodings.divide(tXrX, scale.multiplier)
                tXrQ = encodings.encode_e2m1(quotients)
            elif const_expr(fmt.numerics == VLLM_EMULATION):
                tXrQ = encodings.encode_e2m1(self.products(tXrX, scale))
            else:
                tXrQ = encodings.products_e2m1(tXrX, scale.multiplier, fmt.power_of_two)
            if const_expr(fmt.positive_zero):
                encodings.drop_signs_of_zeros(tXrQ)
            # There is no NaN of 4 bits.
            encodings.clear_unless(scaling.is_number(scale, fmt), tXrQ)
            return tXrQ
        tXrV = self.products(tXrX, scale)
        if fmt.adds_half:
            encodings.add_half(tXrV)
        return encodings.encode(tXrV, encodings.value_type_of(fmt), fmt.truncates)

    def products(self, tXrX: cute.Tensor, scale: GroupScale) -> cute.Tensor:
        """Return a segment times its multiplier as float32, (values,)."""
        if self.fmt.divides:
            return encodings.divide_by(tXrX, scale.scale, scale.multiplier)
        power_of_two = self.fmt.power_of_two
        multiply = encodings.multiply_power_of_two if power_of_two else encodings.multiply
        tXrV = multiply(tXrX, scale.multiplier)
        if self.fmt.in_bf16 and not power_of_two:
            tXrV = encodings.registers(encodings.round_to(tXrV.load(), BFloat16))
        if self.fmt.numerics == VLLM_EMULATION:
            encodings.drop_signs_of_zero_products(tXrV)
        return tXrV

    def rounded(self, tXrX: cute.Tensor, scale: GroupScale) -> cute.Tensor:
        """Return a segment's quantized values as float32, (values,).

        Where arithmetic rounds to e2m1 it needs no codes. Then values under a scale of NaN are any.
        """
        fmt = self.fmt
        if fmt.value_type.per_byte == 1 or ptx.target().e2m1 or fmt.positive_zero:
            return encodings.decode(self.encode(tXrX, scale), fmt)
        return encodings.round_to_e2m1(self.products(tXrX, scale))

    def results(
        self,
        tXrX: cute.Tensor,
        scale: GroupScale,
        bound: Float32 | Factors,
        fake: bool,
        random: list[Uint32] | None,
    ) -> cute.Tensor:
        """Return what is stored of a segment: quantized values, or their products if `fake`.

        `random` is as of `encode`.
        """
        if fake:
            return self.encode_and_decode(tXrX, scale, bound)
        return self.encode(tXrX, scale, random)

    def encode_and_decode(
        self, tXrX: cute.Tensor, scale: GroupScale, bound: Float32 | Factors
    ) -> cute.Tensor:
        """Return the products of quantized values and their scale in x's dtype, (values,)."""
        return encodings.encode(self.decode(tXrX, scale, bound), self.dtype)

    def decode(self, tXrX: cute.Tensor, scale: GroupScale, bound: Float32 | Factors) -> cute.Tensor:
        """Return the products of quantized values and their scale as float32, (values,)."""
        fmt = self.fmt
        if fmt.power_of_two and not fmt.flushes:
            factor = scaling.float32_of_multiplier(scale.multiplier, fmt.ue8m0)
        else:
            factor = scaling.float32_of_scale(scale.scale, fmt)
        if fmt.upper_scale:
            factor = factor * bound.decode
        return encodings.multiply(self.rounded(tXrX, scale), factor)

    def store_scales(
        self,
        scales: Scales,
        rows: Rows,
        row_scales: list[GroupScale],
        segment: Segment,
        k: Int32,
        origin: Origin | None = None,
    ):
        """Store the scales of a warp's groups: of each row another lane of the group.

        Where a group has fewer lanes than the thread has rows, its lanes store several.

        Args:
            scales: where scales go, as `scales` returns it.
            rows: the thread's rows.
            row_scales: of a lane's group in each of the rows.
            segment: of the thread, the same in each of the rows.
            k: columns of a matrix.
            origin: the first of the thread's tiles, where it has several.
        """
        origin = Origin(segment, 0) if origin is None else origin
        several = len(row_scales) > self.lanes_per_group or self.tile.tiles_per_thread > 1
        for first in range(0, len(row_scales), self.lanes_per_group):
            some = slice(first, first + self.lanes_per_group)
            exist = None if rows.exist is None else rows.exist[some]
            some_rows = Rows(rows.indices[some], rows.num_rows, exist, rows.of_lanes)
            base = None
            if several and self.scales_are_linear(len(row_scales)):
                base = Base(rows.indices[0], origin.segment, first, origin.tiles)
            self._store_scale_of_lane(scales, some_rows, row_scales[some], segment, k, base)

    def scales_are_linear(self, rows: int) -> bool:
        """Return whether scales of rows, and of tiles, of a thread are a constant distance apart.

        No block ends between the rows, and tiles have whole blocks or words.
        """
        lanes = layouts.block_lanes(self.fmt) if self.fmt.blocked else rows
        return lanes % rows == 0 and self.groups_per_tile % self.groups_per_unit == 0

    @cute.jit
    def _store_scale_of_lane(
        self,
        scales: Scales,
        rows: Rows,
        row_scales: list[GroupScale],
        segment: Segment,
        k: Int32,
        base: Base | None,
    ):
        """Store the scale of a lane's group in one of as many rows as the group has lanes."""
        fmt, tile = self.fmt, self.tile
        num_rows, groups_per_tile = len(row_scales), self.groups_per_tile
        row, scale = rows.indices[0], row_scales[0].scale
        if const_expr(self.whole_row):
            # The other groups of a word, or of a block, have to become 0.
            lane_row, group, groups_per_tile = Int32(0), segment.lane, self.groups_per_unit
        else:
            lane_row, group = layouts.lanes(self.lanes_per_group)(segment.lane)
            if const_expr(rows.of_lanes):
                # The last group may have fewer columns than lanes: its first lane tells.
                first_lane = Segment(segment.tile, group * self.lanes_per_group)
        layout = layouts.scales(fmt, Int32(scales.rows), scales.groups, scales.row_stride)
        group = layouts.groups_by_tile(layout, groups_per_tile)((group, segment.tile))
        if const_expr(self.whole_row):
            group_exists, predicate = segment.lane == 0, segment.lane < self.groups_per_unit
        else:
            if const_expr(num_rows > 1):
                # The lane's own column tells too: k is a multiple of all that these lanes hold.
                row = row + layouts.unsigned(lane_row)
                scale = pick([scale.scale for scale in row_scales], lane_row)
            teller = first_lane if const_expr(rows.of_lanes) else segment
            group_exists = copy.column_coordinates(k, teller, tile.values_per_thread)[0] < k
            predicate = Boolean(True) if const_expr(rows.of_lanes) else lane_row < num_rows
            if const_expr(self.groups_per_unit == 1):
                predicate = predicate and group_exists
            elif const_expr(self.tiles_have_units):
                _, unit = group
                unit_columns = fmt.group_size * self.groups_per_unit
                predicate = predicate and copy.tile_coordinates(k, unit, unit_columns)[0] < k
        written_rows = scales.rows
        if const_expr(scales.written_rows is not None):
            written_rows = scales.written_rows
        predicate = predicate and row < written_rows
        coordinate = (Int32 if const_expr(fmt.mn_major or fmt.blocked) else Int64)(row), group
        if const_expr(fmt.mn_major):
            predicate = predicate and layouts.unsigned(layout(coordinate)[1]) < scales.elements
        row_exists = row < rows.num_rows
        if const_expr(rows.exist is not None):
            row_exists = pick(rows.exist, lane_row)
        if const_expr(self.keeps_gaps):
            predicate = predicate and (row_exists or row >= rows.num_rows)
        if const_expr(base is not None):
            base_row = base.row
            if const_expr(num_rows > 1):
                base_row = base_row + layouts.unsigned(lane_row)
            groups = layouts.groups_by_tile(layout, groups_per_tile)
            _, base_group = layouts.lanes(self.lanes_per_group)(base.segment.lane)
            base_coordinate = type(coordinate[0])(base_row), groups((base_group, base.segment.tile))
            byte, element = layout(base_coordinate)
            _, distance = layout((base.rows, groups((0, base.tiles))))
            address = scales.start + Int64(self.index(element)) + Int64(self.index(distance))
            if predicate:
                scale = scale if row_exists and group_exists else type(scale)(0)
                store_scale(scale, address, byte)
        elif predicate:
            scale = scale if row_exists and group_exists else type(scale)(0)
            byte, element = layout(coordinate)
            carried = scales.written_rows is not None and self.dtype is Float32
            if const_expr(fmt.packed and not self.whole_row and carried):
                # Read the lane anew: the loop over experts would carry the byte of the lane that
                # came in, and with it 5 to 22 registers where float32 values fill most of them.
                _, group = layouts.lanes(self.lanes_per_group)(cute.arch.lane_idx())
                group = layouts.groups_by_tile(layout, groups_per_tile)((group, segment.tile))
                byte, _ = layout((Int32(row), group))
            store_scale(scale, scales.start + Int64(self.index(element)), byte)

    @cute.jit
    def store_scale_of_row(
        self,
        scales: Scales,
        scale: Uint32 | Float32,
        row: Uint32,
        row_exists: Boolean,
        group: Int32,
        k: Int32,
    ):
        """Store the scale of one group, by a thread that need not hold any of it.

        It is 0 in the padding past rows and groups.
        """
        fmt = self.fmt
        groups = cute.ceil_div(k, fmt.group_size)
        layout = layouts.scales(fmt, Int32(scales.rows), scales.groups)
        coordinate = (Int32 if const_expr(fmt.mn_major or fmt.blocked) else Int64)(row), group
        byte, element = layout(coordinate)
        predicate = row < scales.rows and group < cute.round_up(groups, fmt.groups_per_unit)
        if const_expr(fmt.mn_major):
            predicate = predicate and layouts.unsigned(element) < scales.elements
        if predicate:
            scale = scale if row_exists and group < groups else type(scale)(0)
            store_scale(scale, scales.start + Int64(self.index(element)), byte)

    def index(self, element: Int32 | Int64) -> Uint32 | Int64:
        """Return the index of an element of a matrix's scales; 32 bits hold all but row-major."""
        narrow = self.fmt.mn_major or self.fmt.blocked
        return layouts.unsigned(element) if narrow else element


def store_scale(scale: Uint32 | Float32, element: cute.Pointer, byte: Int32):
    """Store a float32, or a byte of an element."""
    if isinstance(scale, Float32):
        cute.make_tensor(element, 1)[0] = scale
    else:
        bytes_of_element = cute.make_tensor(cute.recast_ptr(element, dtype=Uint8), BYTES_PER_WORD)
        bytes_of_element[byte] = scale.to(Uint8)


@cute.jit
def pick(choices: list, index: Int32) -> Boolean | Uint32 | Float32:
    """Return the choice of this index; the first if there is none."""
    result = choices[0]
    for i in cutlass.range_constexpr(1, len(choices)):
        result = choices[i] if index == i else result
    return result


def round_up(rows: Int32 | Uint32, multiple: int) -> Uint32:
    """Return up to 2^31 - 1 rows rounded up, which may make 2^31."""
    return (Uint32(rows) + (multiple - 1)) // multiple * multiple
