"""One page that shows a layout and lets its reader try others: no network, no files beside it.

The page computes no address of its own. It holds the CuTe layouts of all tiles that can be chosen
in it, as text, and evaluates them. A tile that `make_layout` refuses comes with the reason.
"""

from __future__ import annotations

import html
import itertools
import json
import string
from importlib import resources
from typing import Any

from cute_quant.contract.dtypes import BLOCK_GROUPS, dtype_name
from cute_quant.contract.format_choices import WHOLE_ROW
from cute_quant.contract.formats import NAMED_FORMATS, Format
from cute_quant.kernels.config import DEFAULT_TILE, Tile
from cute_quant.lab import assignment, pictures
from cute_quant.lab.assignment import SECTOR_BYTES
from cute_quant.lab.drawing import style_sheet
from cute_quant.lab.layout import DTYPES, Layout, make_layout
from cute_quant.lab.machine_code import EXAMINED

CHOICES = {
    "values_per_thread": (4, 8, 16, 32, 64, 128),
    "rows_per_thread": (1, 2, 4, 8),
    "row_warps": (1, 2, 4, 8),
    "column_warps": (1, 2, 4, 8),
}
"""Numbers that a page offers, beside those of the layout that it starts with."""


def page(layout: Layout, mn: int | None = None, k: int | None = None, command: str = "") -> str:
    """Return an HTML page that draws a layout and others that the reader chooses.

    Args:
        layout: the layout that is shown first.
        mn: rows of the input whose scales are drawn, by default those of `pictures.pictures`.
        k: columns of that input.
        command: command line that made the page.
    """
    folder = resources.files(__package__)
    template = folder.joinpath("page.html").read_text(encoding="utf-8")
    return string.Template(template).substitute(
        title=html.escape(f"Layout: {layout.name}"),
        style=style_sheet(":root"),
        command=html.escape(command),
        # "</script>" would end the data.
        data=json.dumps(data(layout, mn, k), separators=(",", ":")).replace("<", "\\u003c"),
        script=folder.joinpath("page.js").read_text(encoding="utf-8"),
    )


def data(layout: Layout, mn: int | None = None, k: int | None = None) -> dict[str, Any]:
    """Return the data that the script of a page reads."""
    formats = _formats(layout.fmt)
    own = {name: getattr(layout.tile, name) for name in CHOICES}
    choices = {name: sorted({*CHOICES[name], own[name]}) for name in CHOICES}
    strings: dict[str, int] = {}

    def number(text: str) -> int:
        return strings.setdefault(text, len(strings))

    tiles: dict[str, int | list[int]] = {}
    layouts = _LayoutTexts()
    with assignment.evaluated():
        for (name, fmt), *numbers in itertools.product(formats.items(), *choices.values()):
            key = ",".join(map(str, (name, *numbers)))
            try:
                chosen = _replaced(layout, fmt, dict(zip(CHOICES, numbers, strict=True)))
            except ValueError as error:
                tiles[key] = number(str(error))
                continue
            rows = pictures.example_rows(chosen) if mn is None else mn
            columns = pictures.example_columns(chosen) if k is None else k
            texts = (pictures.summary(chosen), *layouts.of(chosen, rows, columns))
            access = chosen.access.load_bytes, chosen.access.store_bytes
            tiles[key] = [*map(number, texts), *access, rows, columns]
    return {
        "strings": list(strings),
        "tiles": tiles,
        "choices": {"format": list(formats), **choices},
        "start": {"format": _name(layout.fmt), **own},
        "formats": {name: _format(fmt) for name, fmt in formats.items()},
        "itemsize": layout.dtype.itemsize,
        "loads": {name: a.widest_load for name, a in EXAMINED.items()},
        "sector": SECTOR_BYTES,
        "fixed": _fixed(layout),
    }


class _LayoutTexts:
    """CuTe layouts as text, each built once, in a context of `assignment.evaluated`."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], str] = {}

    def of(self, layout: Layout, mn: int, k: int) -> tuple[str, ...]:
        """Return the CuTe layouts of threads and values, copy, warps, lanes and scales."""
        from cute_quant.kernels import layouts

        tile, fmt = layout.tile, layout.fmt
        size, rows = fmt.group_size, fmt.scale_rows(mn)
        groups = fmt.columns(k) * fmt.groups_per_column
        lanes = layout.lanes_per_group
        values = tile.values_per_thread, tile.rows_per_thread
        order = tile.row_warps, tile.column_warps, tile.rows_per_thread, tile.warp_order
        return (
            self._text(lambda: layouts.thread_value(tile, size), "values", size, *values),
            self._text(lambda: assignment.copy_layout(layout), "copy", layout.access, values[0]),
            self._text(lambda: layouts.warps(tile), "warps", *order),
            self._text(lambda: layouts.lanes(lanes), "lanes", lanes),
            self._text(lambda: layouts.scales(fmt, rows, groups), "scales", fmt, rows, groups),
        )

    def _text(self, build: Any, *key: object) -> str:
        if key not in self._known:
            self._known[key] = str(build())
        return self._known[key]


def _formats(own: Format) -> dict[str, Format]:
    """Return the named formats of groups, and the page's own."""
    named = {name: fmt for name, fmt in NAMED_FORMATS.items() if fmt.group_size != WHOLE_ROW}
    return named if own in named.values() else {_name(own): own, **named}


def _name(fmt: Format) -> str:
    return next((name for name, named in NAMED_FORMATS.items() if named == fmt), fmt.text)


def _replaced(layout: Layout, fmt: Format, numbers: dict[str, int]) -> Layout:
    """Return `layout` with another format and other numbers.

    Raises:
        ValueError: the choices break a rule of the contract, which the message names.
    """
    kept = {name: getattr(layout.tile, name) for name in Tile._fields if name not in CHOICES}
    own = make_layout(layout.fmt, layout.dtype, values_per_thread=layout.tile.values_per_thread)
    width = layout.access.load_bytes
    return make_layout(
        fmt,
        layout.dtype,
        load_bytes=None if width == own.access.load_bytes else width,
        load_hint=layout.access.load_hint,
        **kept,
        **numbers,
    )


def _format(fmt: Format) -> dict[str, Any]:
    """Return the properties of a format that a drawing needs."""
    named = fmt in NAMED_FORMATS.values()
    return {
        "python": f"cq.{_name(fmt)}" if named else f'cq.Format.parse("{fmt.text}")',
        "group": fmt.group_size,
        "valueBits": 8 * fmt.values.itemsize // fmt.value_type.per_byte,
        "scaleBytes": fmt.sf_dtype.itemsize,
        "packed": fmt.packed,
        "blocked": fmt.blocked,
        "perUnit": BLOCK_GROUPS if fmt.blocked else fmt.groups_per_column,
        "unit": "word" if fmt.packed else "block" if fmt.blocked else "column",
        "kind": pictures.scales_in_words(fmt),
        "mnMajor": fmt.mn_major,
    }


def _fixed(layout: Layout) -> str:
    """Return the arguments of `make_layout` that a page cannot change and that are not defaults."""
    words = []
    dtype = next(name for name, dtype in DTYPES.items() if dtype == layout.dtype)
    if dtype != "bf16":
        words.append(f"dtype=torch.{dtype_name(layout.dtype)}")
    for name in ("warp_order", "cta_order"):
        if getattr(layout.tile, name) != getattr(DEFAULT_TILE, name):
            words.append(f'{name}="{getattr(layout.tile, name)}"')
    own = make_layout(layout.fmt, layout.dtype, values_per_thread=layout.tile.values_per_thread)
    if layout.access.load_bytes != own.access.load_bytes:
        words.append(f"load_bytes={layout.access.load_bytes}")
    if layout.access.load_hint is not None:
        words.append(f'load_hint="{layout.access.load_hint}"')
    return "".join(f", {word}" for word in words)
