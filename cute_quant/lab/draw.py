"""Draw a layout to a file or as text."""

from __future__ import annotations

from pathlib import Path

from cute_quant.lab import pictures
from cute_quant.lab.drawing import stacked
from cute_quant.lab.layout import Layout
from cute_quant.lab.page import page

SUFFIXES = (".txt", ".svg", ".png", ".html")
MAX_SCALES = 1 << 15
"""Maximum of drawn scales: more take seconds, and slow a browser down."""


def draw(
    layout: Layout,
    path: str | Path | None = None,
    mn: int | None = None,
    k: int | None = None,
    command: str = "",
) -> str:
    """Draw the thread-value layout, the memory accesses of a warp, and the scales in memory.

    Args:
        layout: the layout.
        path: a file to write, whose name ends in one of ``SUFFIXES``. By default none is written.
        mn: rows of the input whose scales are drawn, by default a few more than a CTA's.
        k: columns of that input, by default a group more than a CTA's.
        command: command line that an HTML page names as its source.

    Returns:
        The drawing as text.

    Raises:
        ModuleNotFoundError: `path` is a PNG, and matplotlib is not installed.
        ValueError: `path` has another suffix, `mn` or `k` is below 1, or the input has more than
            ``MAX_SCALES`` scales.
    """
    for name, size in (("mn", mn), ("k", k)):
        if size is not None and size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    if mn is not None or k is not None:
        _check_scales(layout, mn, k)
    text = pictures.text(layout, mn, k)
    if path is None:
        return text
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"path: expected a name that ends in one of {SUFFIXES}, got {path}")
    if path.suffix == ".txt":
        path.write_text(text + "\n", encoding="utf-8")
    elif path.suffix == ".html":
        path.write_text(page(layout, mn, k, command), encoding="utf-8")
    else:
        drawing = stacked(pictures.summary(layout), pictures.pictures(layout, mn, k))
        if path.suffix == ".svg":
            path.write_text(drawing.svg(), encoding="utf-8")
        else:
            path.write_bytes(drawing.png())
    return text


def _check_scales(layout: Layout, mn: int | None, k: int | None) -> None:
    fmt = layout.fmt
    mn = pictures.example_rows(layout) if mn is None else mn
    k = pictures.example_columns(layout) if k is None else k
    count = fmt.scale_rows(mn) * fmt.columns(k) * fmt.groups_per_column
    if count > MAX_SCALES:
        raise ValueError(
            f"mn, k: expected at most {MAX_SCALES} scales to draw, padding included, got {count} "
            f"of an ({mn}, {k}) input"
        )
