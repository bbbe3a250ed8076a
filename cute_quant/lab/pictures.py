"""Draw a layout: elements of a CTA, memory accesses of a warp, scales in memory."""

from __future__ import annotations

from collections.abc import Iterable

from cute_quant.contract.dtypes import dtype_name
from cute_quant.contract.formats import Format
from cute_quant.kernels.config import LANES
from cute_quant.lab import assignment
from cute_quant.lab.assignment import SECTOR_BYTES, Request, ScaleByte, Thread
from cute_quant.lab.drawing import Box, Drawing, Words
from cute_quant.lab.layout import Layout
from cute_quant.lab.machine_code import EXAMINED

COLOURED_GROUPS = 4
"""Colours of groups, as many as a packed word has bytes."""

LINE_COLUMNS = 128
MARGIN, LABEL, LINE, NOTE = 16, 170, 896, 150
WIDTH = MARGIN + LABEL + LINE + NOTE
ROW, STRIP, GAP = 24, 22, 10
HEADER = 66
MAX_BYTES = 16
"""Maximum of drawn bytes of two values."""
NIBBLE_ORDER = "two a byte, the earlier one in its low four bits"
MAX_STRIPS = 16
"""Maximum of drawn requests: those after them look alike."""


def example_rows(layout: Layout) -> int:
    """Return the rows of an input that show a CTA, some rows of the next, and padding."""
    return layout.tile.rows + 2


def example_columns(layout: Layout) -> int:
    """Return the columns of an input that show a CTA, a group of the next, and unused bytes."""
    multiple = max(layout.column_multiple, layout.fmt.group_size)
    return layout.cta_columns + multiple


def summary(layout: Layout) -> str:
    """Return a sentence about the thread-value layout."""
    tile, lanes = layout.tile, layout.lanes_per_group
    values, rows = tile.values_per_thread, tile.rows_per_thread
    nbytes = values * layout.dtype.itemsize
    offsets = [1 << i for i in range(lanes.bit_length() - 1)]
    size = layout.fmt.group_size
    of_group = f"{lanes} threads hold a group of {size} and reduce its amax by shuffles of "
    of_group += ", ".join(map(str, offsets))
    if not offsets:
        of_group = f"it holds all of a group of {size} and shuffles nothing"
    of_rows = "" if rows == 1 else f" of each of {rows} rows"
    return (
        f"A thread holds {values} values contiguous along k ({nbytes} bytes){of_rows}; {of_group}. "
        f"A warp has {tile.columns} columns."
    )


def tile_picture(layout: Layout, threads: list[Thread]) -> Drawing:
    """Draw the elements of a CTA by thread, a line for each 128 columns of a row."""
    columns = max(LINE_COLUMNS, layout.tile.values_per_thread)
    cell = LINE / columns
    drawing = Drawing(f"Elements of a CTA by thread: {summary(layout)}", WIDTH)
    drawing.add(
        Words(MARGIN, 26, "Elements of a CTA by thread", 16, bold=True),
        Words(MARGIN, 46, summary(layout), 12, colour="muted"),
        Words(
            MARGIN,
            62,
            f"Warps along M: {layout.tile.row_warps}, N: {layout.tile.column_warps}. In a box: "
            f"warp and lane. Ticks: {layout.access.load_bytes} bytes, one load where the GPU has "
            "it.",
            12,
            colour="muted",
        ),
    )
    lines = sorted({(s.row, s.column // columns) for t in threads for s in t.segments})
    tops, y, last = {}, HEADER + 16.0, lines[0][0]
    for row, line in lines:
        y += GAP if row != last else 0
        tops[row, line], last = y, row
        first = line * columns
        drawing.add(
            Words(MARGIN, y + 16, f"row {row}", 12, bold=True),
            Words(MARGIN + 60, y + 16, f"{first} … {first + columns - 1}", 11, colour="muted"),
        )
        y += ROW
    for t in threads:
        for s, (row, group) in zip(t.segments, t.groups, strict=True):
            x, top = MARGIN + LABEL + s.column % columns * cell, tops[row, s.column // columns]
            width = s.values * cell
            data = {"t": t.number, "row": row, "col": s.column, "n": s.values}
            drawing.add(Box(x, top, width, ROW - 2, _colour(group, t.lane), "line", data))
            step = layout.access.load_bytes // layout.dtype.itemsize
            for tick in range(step, s.values, step):
                drawing.add(Box(x + tick * cell - 0.5, top + ROW - 6, 1, 4, "ink"))
            label = f"{t.warp}:{t.lane}" if width > 26 else str(t.lane)
            size = 11 if width > 18 else 8
            drawing.add(Words(x + width / 2, top + 15, label, size, "middle"))
    for (row, line), top in tops.items():
        here = sorted(
            {
                group
                for t in threads
                for s, (of, group) in zip(t.segments, t.groups, strict=True)
                if of == row and s.column // columns == line
            }
        )
        drawing.add(Words(MARGIN + LABEL + LINE + 10, top + 15, _groups(here), 11, colour="muted"))
    drawing.height = y + MARGIN
    return drawing


def access_picture(layout: Layout) -> Drawing:
    """Draw the bytes that each instruction of a warp accesses, sector by sector."""
    drawing = Drawing("Memory accesses of a warp: sectors of 32 bytes of each instruction", WIDTH)
    drawing.add(
        Words(MARGIN, 26, "Memory accesses of a warp", 16, bold=True),
        Words(
            MARGIN,
            46,
            "A strip is an instruction of a warp, a frame a sector of 32 bytes, a box the bytes of "
            "a lane. Bytes of a sector that an instruction leaves are requested by another one.",
            12,
            colour="muted",
        ),
    )
    y = float(HEADER)
    for title, requests in _accesses(layout):
        y += GAP
        drawing.add(Words(MARGIN, y + 12, title, 12, bold=True))
        y += 20
        y = _strips(drawing, requests, layout.lanes_per_group, y)
    if layout.fmt.value_type.per_byte > 1:
        y = _nibble_boxes(drawing, layout, y)
    drawing.height = y + MARGIN
    return drawing


def _nibble_boxes(drawing: Drawing, layout: Layout, y: float) -> float:
    """Draw the bytes that lane 0 stores, each with its high four bits on the left."""
    title = f"values of lane 0 in q: {NIBBLE_ORDER}"
    drawing.add(Words(MARGIN, y + GAP + 12, title, 12, bold=True))
    y += GAP + 20
    shown = assignment.nibbles(layout)[: 2 * MAX_BYTES]
    left, width = MARGIN + LABEL, LINE / (2 * MAX_BYTES)
    for nibble in shown:
        x = left + (2 * nibble.byte + (not nibble.high)) * width
        data = {"nibble": nibble.column}
        drawing.add(Box(x, y, width, STRIP - 4, _colour(0, nibble.high), "line", data))
        drawing.add(Words(x + width / 2, y + 13, str(nibble.column), 9, "middle"))
    for byte in range(shown[-1].byte + 1):
        x = left + 2 * byte * width
        drawing.add(Box(x, y, 2 * width, STRIP - 4, None, "ink"))
        drawing.add(Words(x + width, y + STRIP + 8, f"byte {byte}", 9, "middle", "muted"))
    return y + STRIP + 12


def _accesses(layout: Layout) -> list[tuple[str, list[Request]]]:
    """Return loads and stores with a title, architectures merged where they are the same."""
    accesses: dict[tuple[str, tuple[Request, ...]], list[str]] = {}
    for kind, of in (("loads of x", assignment.loads), ("stores of q", assignment.stores)):
        for arch in EXAMINED:
            accesses.setdefault((kind, tuple(of(layout, arch))), []).append(arch)
    return [(f"{kind}, {' and '.join(a)}", list(r)) for (kind, r), a in accesses.items()]


def _strips(drawing: Drawing, requests: list[Request], lanes_per_group: int, y: float) -> float:
    end = max(last for r in requests for _, last in r.ranges)
    sectors = -(-end // SECTOR_BYTES)
    scale = LINE / (sectors * SECTOR_BYTES)
    left = MARGIN + LABEL
    for number, request in enumerate(requests[:MAX_STRIPS]):
        drawing.add(Words(MARGIN, y + 15, f"instruction {number}", 11, colour="muted"))
        for sector in range(sectors):
            x = left + sector * SECTOR_BYTES * scale
            drawing.add(Box(x, y, SECTOR_BYTES * scale, STRIP - 4, "faint", "line"))
        for lane, (first, last) in enumerate(request.ranges):
            x, width = left + first * scale, (last - first) * scale
            fill = _colour(lane // lanes_per_group, lane)
            stroke = "line" if width > 6 else None
            drawing.add(Box(x, y, width, STRIP - 4, fill, stroke, {"l": lane}))
            if width > 12:
                drawing.add(Words(x + width / 2, y + 13, str(lane), 9, "middle"))
        note = f"{len(request.sectors)} sectors, {request.efficiency:.0%} used"
        drawing.add(Words(left + LINE + 10, y + 14, note, 11, colour="muted"))
        y += STRIP
    if len(requests) > MAX_STRIPS:
        more = f"… and {len(requests) - MAX_STRIPS} more like these"
        drawing.add(Words(left, y + 13, more, 11, colour="muted"))
        y += STRIP
    drawing.add(Words(left, y + 11, "byte 0 of the warp's columns", 10, colour="muted"))
    drawing.add(Words(left + LINE, y + 11, f"byte {end - 1}", 10, "end", "muted"))
    return y + 16


def scale_picture(layout: Layout, scales: list[ScaleByte], mn: int, k: int) -> Drawing:
    """Draw the scales of an (mn, k) input in memory, padding included, the first CTA's framed."""
    fmt = layout.fmt
    rows = sorted({s.row for s in scales})
    units = max(s.unit for s in scales) + 1
    per_unit = -(-(max(s.group for s in scales) + 1) // units)
    shown_rows = rows[: max(layout.tile.rows, 8) + 4]
    top, label, gap = float(HEADER + 34), 84, 74
    cell = max(26.0, min(44.0, (WIDTH - 2 * MARGIN - label - units * gap) / (units * per_unit)))
    width = max(WIDTH, 2 * MARGIN + label + units * (per_unit * cell + gap))
    drawing = Drawing(f"Scales of an ({mn}, {k}) input in memory", width)
    what = scales_in_words(fmt)
    drawing.add(
        Words(MARGIN, 26, "Scales in memory", 16, bold=True),
        Words(
            MARGIN,
            46,
            f"sf of an ({mn}, {k}) input: {fmt.groups(k)} groups of {fmt.group_size} a row, {what}"
            f"{', columns of ' + str(fmt.scale_rows(mn)) + ' rows' if fmt.mn_major else ''}. "
            "Grey: padding, stored as 0.",
            12,
            colour="muted",
        ),
        Words(
            MARGIN,
            62,
            f"The first CTA stores rows 0 … {layout.tile.rows - 1}, groups 0 … "
            f"{layout.cta_columns // fmt.group_size - 1}: framed. Left of each: its byte of sf.",
            12,
            colour="muted",
        ),
    )
    for unit in range(units):
        x = MARGIN + label + unit * (per_unit * cell + gap) + gap - 14
        name = "word" if fmt.packed else "block" if fmt.blocked else "column"
        drawing.add(Words(x, top - 8, f"{name} {unit}", 11, bold=True))
    first_of_unit = {(s.row, s.unit): s for s in reversed(scales)}
    own_groups = layout.cta_columns // fmt.group_size
    for s in scales:
        if s.row not in shown_rows:
            continue
        y = top + s.row * ROW
        x = MARGIN + label + s.unit * (per_unit * cell + gap) + gap - 14
        if s is first_of_unit[s.row, s.unit]:
            drawing.add(Words(x - 6, y + 15, str(s.offset), 10, "end", "muted"))
        x += s.group % per_unit * cell
        fill = "faint" if s.padding else f"a{s.group % COLOURED_GROUPS}"
        own = s.row < layout.tile.rows and s.group < own_groups
        data = {"scale": f"{s.row},{s.group}"}
        drawing.add(Box(x, y, cell, ROW - 3, fill, "ink" if own else "line", data))
        word = "0" if s.padding else f"g{s.group}"
        colour = "muted" if s.padding else "ink"
        drawing.add(Words(x + cell / 2, y + 15, word, 11, "middle", colour))
    for row in shown_rows:
        text = f"row {row}" if row < mn else f"row {row}, none"
        drawing.add(Words(MARGIN, top + row * ROW + 15, text, 11, bold=row < mn))
    drawing.height = top + len(shown_rows) * ROW + MARGIN
    if len(rows) > len(shown_rows):
        more = f"… and rows up to {rows[-1]}"
        drawing.add(Words(MARGIN, drawing.height - 4, more, 11, colour="muted"))
        drawing.height += ROW
    return drawing


def scales_in_words(fmt: Format) -> str:
    """Describe the scales of a format."""
    if fmt.packed:
        kind = "UE8M0" if fmt.ue8m0 else "e4m3"
        return f"packed words of four {kind} bytes{'' if fmt.mn_major else ', row-major'}"
    return f"{dtype_name(fmt.scale_dtype)} scales, {fmt.scale_layout}"


def pictures(layout: Layout, mn: int | None = None, k: int | None = None) -> list[Drawing]:
    """Draw elements, memory accesses and scales of a layout.

    Args:
        layout: the layout.
        mn: rows of the input whose scales are drawn, by default a few more than a CTA's.
        k: columns of that input, by default a group more than a CTA's.
    """
    mn = example_rows(layout) if mn is None else mn
    k = example_columns(layout) if k is None else k
    return [
        tile_picture(layout, assignment.threads(layout)),
        access_picture(layout),
        scale_picture(layout, assignment.scales(layout, mn, k), mn, k),
    ]


def text(layout: Layout, mn: int | None = None, k: int | None = None) -> str:
    """Return the facts of `pictures` as lines for a terminal."""
    mn = example_rows(layout) if mn is None else mn
    k = example_columns(layout) if k is None else k
    return "\n\n".join(
        [
            summary(layout),
            "\n".join(_tile_lines(layout, assignment.threads(layout))),
            "\n".join(_access_lines(layout)),
            "\n".join(_scale_lines(assignment.scales(layout, mn, k), mn, k)),
        ]
    )


def _tile_lines(layout: Layout, threads: list[Thread]) -> list[str]:
    """Return a line for each group of a row: its columns, and the lanes that hold it."""
    size = layout.fmt.group_size
    lines = [f"{'row':>4} {'columns':>13} {'group':>6} {'warp':>5}  lanes"]
    held: dict[tuple[int, int], list[Thread]] = {}
    for t in threads:
        for place in t.groups:
            held.setdefault(place, []).append(t)
    for (row, group), owners in sorted(held.items()):
        columns = f"{group * size} … {(group + 1) * size - 1}"
        lanes = " ".join(f"{t.lane:2}" for t in owners)
        lines.append(f"{row:>4} {columns:>13} {group:>6} {owners[0].warp:>5}  {lanes}")
    return lines


def _access_lines(layout: Layout) -> list[str]:
    lines = []
    for title, requests in _accesses(layout):
        lines.append(title)
        for number, r in enumerate(requests):
            (first, second), (next_lane, _) = r.ranges[0], r.ranges[1]
            lines.append(
                f"  instruction {number}: lane 0 bytes {first} … {second - 1}, "
                f"lane 1 from {next_lane}, lane {LANES - 1} to {r.ranges[-1][1] - 1}: "
                f"{len(r.sectors)} sectors, {r.efficiency:.0%} used"
            )
    nibbles = assignment.nibbles(layout)
    if nibbles:
        lines.append(f"values of lane 0 in q, {NIBBLE_ORDER}: high and low columns at byte of q")
        pairs = zip(nibbles[0::2], nibbles[1::2], strict=True)
        lines.append(
            "  " + " ".join(f"{high.column},{low.column}@{low.byte}" for low, high in pairs)
        )
    return lines


def _scale_lines(scales: Iterable[ScaleByte], mn: int, k: int) -> list[str]:
    lines = [f"scales of an ({mn}, {k}) input: group at byte of sf, - for padding"]
    rows: dict[int, list[str]] = {}
    for s in scales:
        rows.setdefault(s.row, []).append(f"{'-' if s.padding else f'g{s.group}'}@{s.offset}")
    lines += [
        f"{row:>4}  " + " ".join(f"{cell:>7}" for cell in cells) for row, cells in rows.items()
    ]
    return lines


def _colour(group: int, lane: int) -> str:
    return f"{'ab'[lane % 2]}{group % COLOURED_GROUPS}"


def _groups(groups: list[int]) -> str:
    if len(groups) == 1:
        return f"group {groups[0]}"
    return f"groups {groups[0]} … {groups[-1]}"
