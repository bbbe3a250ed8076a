"""Where scales lie in memory, as text: the layout of a format, a drawing of it, and its readers."""

from __future__ import annotations

import math
from typing import Any

from cute_quant.contract.checks import check_whole_bytes
from cute_quant.contract.dtypes import dtype_name
from cute_quant.contract.format_choices import MAX_COLUMNS
from cute_quant.contract.formats import Format
from cute_quant.contract.readers import readers_of
from cute_quant.contract.scale_layouts import ScaleLayout, scale_layout
from cute_quant.contract.tensors import MAX_SIZE

DRAWN = 8
"""First rows and groups that are drawn, besides those where a mode ends."""
LISTED = 16
"""First scales in memory that are listed."""
SEARCHED_ROWS, SEARCHED_GROUPS = 128, 16
"""Rows and groups that hold the first scales in memory, in every layout."""


def explain(fmt: Format, mn: int, k: int) -> dict[str, Any]:
    """Return facts about the scales of (mn, k) values.

    Args:
        fmt: the format.
        mn: rows of the values, 1 or more.
        k: columns of the values, 1 or more; even for FP4.

    Raises:
        ValueError: there are no such values.
    """
    for name, size, largest in (("mn", mn, MAX_SIZE), ("k", k, MAX_COLUMNS)):
        if size < 1:
            raise ValueError(f"{name}: expected 1 or more, got {size}")
        if size > largest:
            raise ValueError(f"{name}: expected up to {largest}, got {size}")
    check_whole_bytes("k", fmt, k)
    layout = scale_layout(fmt, mn, k)
    rows, groups = layout.sizes
    return {
        "format": str(fmt),
        "readers": fmt.readers,
        "check_scales": readers_of(fmt),
        "dtype": dtype_name(fmt.sf_dtype),
        "shape": list(fmt.scale_shape((), mn, k)),
        "strides": list(fmt.scale_strides((), mn, k)),
        "rows": mn,
        "groups": fmt.groups(k),
        "stored_rows": rows,
        "stored_groups": groups,
        "unit": _unit(fmt),
        "layout_shape": layout.shape,
        "layout_strides": layout.strides,
        "storage_bytes": rows * groups * _unit_bytes(fmt),
    }


def place(fmt: Format, mn: int, k: int, row: int, group: int) -> dict[str, Any]:
    """Return where the scale of a row and a group lies.

    Raises:
        ValueError: there is no such row or group, padding included.
    """
    offset = scale_layout(fmt, mn, k).offset(row, group)
    element, byte = divmod(offset, fmt.groups_per_column)
    size = k if fmt.whole_row else fmt.group_size
    columns = [group * size, min((group + 1) * size, k) - 1]
    padding = row >= mn or group >= fmt.groups(k)
    return {
        "row": row,
        "group": group,
        "columns": None if padding else columns,
        "padding": padding,
        "byte": offset * _unit_bytes(fmt),
        "element": element,
        "byte_of_element": byte if fmt.packed else None,
    }


def describe(fmt: Format, mn: int, k: int) -> str:
    """Return the facts and a drawing of the scales of (mn, k) values."""
    facts, layout = explain(fmt, mn, k), scale_layout(fmt, mn, k)
    rows, groups = layout.sizes
    shape, strides = tuple(facts["shape"]), tuple(facts["strides"])
    lines = [
        f"{fmt}, values ({mn}, {k})",
        f"read by   {facts['readers']}",
        f"checked   by check_scales for {', '.join(facts['check_scales']) or 'no reader'}",
        f"sf        {facts['dtype']} {shape}, strides {strides}",
        f"layout    {layout}, in {facts['unit']}",
        f"scales    {mn} rows of {facts['groups']} groups; stored {rows} rows of {groups}, "
        f"{facts['storage_bytes']} bytes",
        "",
        f"Place of the scale of a row and a group, in {facts['unit']}; [padding] is 0:",
        *_drawing(layout, mn, fmt.groups(k)),
        "",
        "The first scales in memory, as row.group:",
        *_in_memory_order(layout),
    ]
    return "\n".join(lines)


def describe_place(found: dict[str, Any]) -> str:
    """Return a sentence about what :func:`place` found."""
    words = f"row {found['row']}, group {found['group']}"
    if found["padding"]:
        words += " (padding)"
    else:
        first, last = found["columns"]
        words += f" (columns {first} to {last})"
    where = f"element {found['element']}"
    if found["byte_of_element"] is not None:
        where = f"byte {found['byte_of_element']} of word {found['element']}"
    return f"{words}: {where}, {found['byte']} bytes from the first"


def _unit(fmt: Format) -> str:
    return "bytes" if fmt.byte_scales else "float32"


def _unit_bytes(fmt: Format) -> int:
    return 1 if fmt.byte_scales else 4


def _drawn(count: int, modes: tuple[int, ...]) -> list[int]:
    """Return which rows or groups are drawn: the first, those around ends of modes, the last."""
    ends = [math.prod(modes[: i + 1]) for i in range(len(modes))]
    around = {end + step for end in ends for step in (-1, 0, 1)}
    wanted = {*range(DRAWN), *around, count - 1}
    return sorted(index for index in wanted if 0 <= index < count)


def _drawing(layout: ScaleLayout, mn: int, groups: int) -> list[str]:
    """Return a table of places, with a row for each drawn row of scales."""
    row_modes, group_modes = layout.shape
    stored_rows, stored_groups = layout.sizes
    drawn_groups = _drawn(stored_groups, group_modes)
    table = [["row"] + [f"g{group}" for group in drawn_groups]]
    for row in _drawn(stored_rows, row_modes):
        places = []
        for group in drawn_groups:
            text = str(layout.offset(row, group))
            places.append(text if row < mn and group < groups else f"[{text}]")
        table.append([str(row), *places])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(map(str.rjust, cells, widths)).rstrip() for cells in table]


def _in_memory_order(layout: ScaleLayout) -> list[str]:
    """Return lines of 16 places and the scales that lie there."""
    rows, groups = layout.sizes
    found = {}
    for row in range(min(rows, SEARCHED_ROWS)):
        for group in range(min(groups, SEARCHED_GROUPS)):
            found[layout.offset(row, group)] = f"{row}.{group}"
    return [" ".join(found[offset] for offset in range(LISTED) if offset in found)]
