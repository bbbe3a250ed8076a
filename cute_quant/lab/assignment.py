"""Evaluate the layouts of `kernels.layouts` on the host, for one CTA.

Nothing here computes an address of its own. Columns come from the tiled copy that moves a row. Rows
and groups come from the thread-value layout and the layout of the warps. Scales come from the
layout of their format in memory.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cute_quant.contract.dtypes import BLOCK_GROUPS
from cute_quant.kernels import architectures
from cute_quant.kernels.config import LANES
from cute_quant.lab.layout import Layout

SECTOR_BYTES = 32
"""Bytes of a sector, the smallest unit that memory and the caches move."""


@dataclass(frozen=True)
class Segment:
    """Values of a row that a thread holds, contiguous along k.

    Attributes:
        row, column: coordinates of the first value in the CTA's tile.
        values: number of values.
    """

    row: int
    column: int
    values: int


@dataclass(frozen=True)
class ScaleByte:
    """The scale of a group of a row, in memory.

    Attributes:
        row, group: coordinates in the input.
        unit: index, in a row, of the scales that lie together: a packed word, or four bytes of a
            block.
        offset: bytes from the start of sf to the scale.
        nbytes: bytes of the scale: 1, or 4 of a float32.
        padding: whether the input has no such row or group. The scale is 0 then.
    """

    row: int
    group: int
    unit: int
    offset: int
    nbytes: int
    padding: bool


@dataclass(frozen=True)
class Thread:
    """Values, groups and scales of a thread of a CTA.

    Attributes:
        number: index in the CTA.
        warp, lane: index of the warp in the CTA, and of the thread in the warp.
        segments: its values, one segment for each of its rows.
        partners: threads with which it shuffles, in order.
        groups: (row, group) of each segment.
        writes: (row, group) of each scale that it stores.
    """

    number: int
    warp: int
    lane: int
    segments: tuple[Segment, ...]
    partners: tuple[int, ...]
    groups: tuple[tuple[int, int], ...]
    writes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Request:
    """Bytes that one instruction of a warp moves, from the start of the warp's columns.

    Attributes:
        ranges: first byte of each lane, and the byte after its last.
    """

    ranges: tuple[tuple[int, int], ...]

    @property
    def sectors(self) -> tuple[int, ...]:
        """Return the sectors that the instruction accesses, ascending."""
        touched = {
            sector
            for first, end in self.ranges
            for sector in range(first // SECTOR_BYTES, -(-end // SECTOR_BYTES))
        }
        return tuple(sorted(touched))

    @property
    def nbytes(self) -> int:
        """Return the bytes that the instruction requests."""
        return sum(end - first for first, end in self.ranges)

    @property
    def efficiency(self) -> float:
        """Return the share of the sectors' bytes that is requested."""
        return self.nbytes / (SECTOR_BYTES * len(self.sectors))


@dataclass(frozen=True)
class Nibble:
    """A four-bit value in a row of q.

    Attributes:
        column: of the value.
        byte: of the row of q.
        high: whether it has the high four bits of the byte.
    """

    column: int
    byte: int
    high: bool


@contextlib.contextmanager
def evaluated() -> Iterator[None]:
    """Enter a context in which layouts can be built and evaluated, without a kernel."""
    # The import takes a second, which the help of the command line can do without.
    ir: Any = importlib.import_module("cutlass._mlir.ir")
    with ir.Context(), ir.Location.unknown():
        module = ir.Module.create()
        with ir.InsertionPoint(module.body):
            yield


def columns_of_lanes(layout: Layout) -> list[list[int]]:
    """Return the map (lane, value) -> column of the tiled copy that loads a warp's tile."""
    with evaluated():
        columns, values = copy_layout(layout), layout.tile.values_per_thread
        return [[columns((lane, v)) for v in range(values)] for lane in range(LANES)]


def copy_layout(layout: Layout) -> Any:
    """Return the CuTe layout of `columns_of_lanes`, in a context of `evaluated`."""
    import cutlass.cute as cute

    from cute_quant.kernels import layouts
    from cute_quant.kernels.encodings import ELEMENT_TYPES

    op, bits = cute.nvgpu.CopyUniversalOp(), 8 * layout.access.load_bytes
    atom = cute.make_copy_atom(op, ELEMENT_TYPES[layout.dtype], num_bits_per_copy=bits)
    return layouts.tiled_copy(atom, layout.tile.values_per_thread).layout_tv_tiled


def places_of_warps(layout: Layout) -> list[tuple[int, int]]:
    """Return the map warp -> (first row, tile of columns) of the CTA."""
    from cute_quant.kernels import layouts

    with evaluated():
        order: Any = layouts.warps(layout.tile)
        first, second = order.shape
        return [order((i, j)) for j in range(second) for i in range(first)]


def threads(layout: Layout) -> list[Thread]:
    """Return the threads of a CTA, in order."""
    tile, lanes = layout.tile, layout.lanes_per_group
    groups = tile.groups(layout.fmt.group_size)
    held, writers = rows_and_columns(layout), scale_writers(layout)
    found = []
    for warp, (first_row, column_tile) in enumerate(places_of_warps(layout)):
        for lane in range(LANES):
            writer, group = writers[lane]
            group += column_tile * groups
            places = [(first_row + row, column_tile * tile.columns + c) for row, c in held[lane]]
            rows = [row for row, _ in places]
            found.append(
                Thread(
                    number=LANES * warp + lane,
                    warp=warp,
                    lane=lane,
                    segments=tuple(Segment(*place, tile.values_per_thread) for place in places),
                    partners=tuple(
                        LANES * warp + (lane ^ 1 << i) for i in range(lanes.bit_length() - 1)
                    ),
                    groups=tuple((row, group) for row in rows),
                    writes=tuple((row, group) for row in rows[writer::lanes]),
                )
            )
    return found


def rows_and_columns(layout: Layout) -> list[list[tuple[int, int]]]:
    """Return the map lane -> (row, column) of the first value of each segment, in a warp's tile."""
    from cute_quant.kernels import layouts

    with evaluated():
        thread_value = layouts.thread_value(layout.tile, layout.fmt.group_size)
        rows = range(layout.tile.rows_per_thread)
        return [[thread_value((lane, (0, row))) for row in rows] for lane in range(LANES)]


def scale_writers(layout: Layout) -> list[tuple[int, int]]:
    """Return the map lane -> (row of the thread, group) of the first scale that the lane stores.

    A lane stores no scale where the thread has no such row, and further ones where the thread has
    more rows than a group has lanes.
    """
    from cute_quant.kernels import layouts

    with evaluated():
        lanes = layouts.lanes(layout.lanes_per_group)
        return [lanes(lane) for lane in range(LANES)]


def scales(layout: Layout, mn: int, k: int) -> list[ScaleByte]:
    """Return every scale of an (mn, k) input in memory, padding included, by row and group."""
    from cute_quant.kernels import layouts

    fmt = layout.fmt
    rows, groups = fmt.scale_rows(mn), fmt.groups(k)
    per_unit = BLOCK_GROUPS if fmt.blocked else fmt.groups_per_column
    padded = fmt.columns(k) * fmt.groups_per_column
    size = fmt.sf_dtype.itemsize
    found = []
    with evaluated():
        layout_of_sf = layouts.scales(fmt, rows, padded)
        for row in range(rows):
            for group in range(padded):
                byte, element = layout_of_sf((row, group))
                found.append(
                    ScaleByte(
                        row=row,
                        group=group,
                        unit=group // per_unit,
                        offset=element * size + byte,
                        nbytes=1 if fmt.packed else size,
                        padding=row >= mn or group >= groups,
                    )
                )
    return found


def loads(layout: Layout, arch: str) -> list[Request]:
    """Return the loads of a row of a warp's tile, one for each instruction of an architecture."""
    widest = min(layout.access.load_bytes, architectures.named(arch).widest_load)
    return _requests(layout, 8 * layout.dtype.itemsize, widest)


def stores(layout: Layout, arch: str) -> list[Request]:
    """Return the stores of a row of values of a warp's tile, as `loads` does."""
    widest = min(layout.access.store_bytes, architectures.named(arch).widest_load)
    return _requests(layout, value_bits(layout), widest)


def value_bits(layout: Layout) -> int:
    """Return the bits of a value of q."""
    return 8 * layout.fmt.values.itemsize // layout.fmt.value_type.per_byte


def nibbles(layout: Layout) -> list[Nibble]:
    """Return the four-bit values of lane 0 in a row of q, in memory order; none of wider values."""
    per_byte = layout.fmt.value_type.per_byte
    if per_byte == 1:
        return []
    columns = columns_of_lanes(layout)[0]
    return [Nibble(c, c // per_byte, c % per_byte > 0) for c in sorted(columns)]


def _requests(layout: Layout, bits: int, nbytes: int) -> list[Request]:
    columns, count = columns_of_lanes(layout), 8 * nbytes // bits
    starts = range(0, layout.tile.values_per_thread, count)
    return [
        Request(
            tuple((lane[v] * bits // 8, (lane[v + count - 1] + 1) * bits // 8) for lane in columns)
        )
        for v in starts
    ]
