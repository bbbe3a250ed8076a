"""Boxes and words at places, and their SVG and PNG.

Colours go by names, so that a drawing is legible on light and on dark paper.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from xml.sax.saxutils import escape, quoteattr

LIGHT = {
    "paper": "#ffffff",
    "ink": "#1c2128",
    "muted": "#5b6570",
    "line": "#8b949e",
    "faint": "#eceff2",
    "a0": "#cfe2ff",
    "b0": "#b2d0fb",
    "a1": "#ffe3c4",
    "b1": "#fcd0a1",
    "a2": "#cdeed2",
    "b2": "#aedfb6",
    "a3": "#e7dafc",
    "b3": "#d5c1f5",
    "mark": "#d1242f",
}
DARK = {
    "paper": "#0f141a",
    "ink": "#e8edf2",
    "muted": "#9aa5b1",
    "line": "#5d6772",
    "faint": "#1c232b",
    "a0": "#1d3a63",
    "b0": "#28508a",
    "a1": "#60401a",
    "b1": "#835824",
    "a2": "#1e4a2c",
    "b2": "#2a683e",
    "a3": "#443069",
    "b3": "#5c418f",
    "mark": "#ff7b72",
}

FONT = "ui-sans-serif, system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif"
PNG_DPI = 144
POINTS_PER_PIXEL = 0.75


@dataclass(frozen=True)
class Box:
    """A rectangle.

    Attributes:
        x, y, width, height: in pixels, from the upper left corner.
        fill, stroke: names of colours; None for none.
        data: attributes ``data-...`` of what the box stands for.
    """

    x: float
    y: float
    width: float
    height: float
    fill: str | None = None
    stroke: str | None = None
    data: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Words:
    """A line of text.

    Attributes:
        x, y: of its anchor, on the baseline.
        size: in pixels.
        anchor: "start", "middle" or "end".
        bold: whether it is a title.
    """

    x: float
    y: float
    text: str
    size: float = 12
    anchor: str = "start"
    colour: str = "ink"
    bold: bool = False


@dataclass
class Drawing:
    """Shapes of a picture, in the order of drawing.

    Attributes:
        title: text for a screen reader.
        width, height: in pixels.
    """

    title: str
    width: float
    height: float = 0.0
    parts: list[Box | Words] = field(default_factory=list)

    def add(self, *parts: Box | Words) -> None:
        """Add shapes on top of the others."""
        self.parts.extend(parts)

    def svg(self) -> str:
        """Return the drawing as SVG, which defines its colours."""
        size = f'width="{self.width:g}" height="{self.height:g}"'
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {self.width:g} '
            f'{self.height:g}" role="img" aria-label={quoteattr(self.title)} class="drawing">',
            f"<style>{style_sheet('svg')}</style>",
            _svg_box(Box(0, 0, self.width, self.height, "paper")),
            *(_svg_box(p) if isinstance(p, Box) else _svg_words(p) for p in self.parts),
            "</svg>",
        ]
        return "\n".join(lines) + "\n"

    def png(self) -> bytes:
        """Return the drawing as PNG, on light paper.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle

        inches = (self.width * POINTS_PER_PIXEL / 72, self.height * POINTS_PER_PIXEL / 72)
        figure = Figure(inches, dpi=PNG_DPI, facecolor=LIGHT["paper"])
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, self.width), ylim=(self.height, 0))
        axes.set_axis_off()
        for p in self.parts:
            if isinstance(p, Box):
                face = LIGHT[p.fill] if p.fill else "none"
                edge = LIGHT[p.stroke] if p.stroke else "none"
                axes.add_patch(
                    Rectangle((p.x, p.y), p.width, p.height, fc=face, ec=edge, lw=POINTS_PER_PIXEL)
                )
            else:
                axes.text(
                    p.x,
                    p.y,
                    p.text.replace("$", r"\$"),
                    size=p.size * POINTS_PER_PIXEL,
                    color=LIGHT[p.colour],
                    ha={"start": "left", "middle": "center", "end": "right"}[p.anchor],
                    va="baseline",
                    weight="bold" if p.bold else "normal",
                )
        file = io.BytesIO()
        FigureCanvasAgg(figure).print_png(file)
        return file.getvalue()


def stacked(title: str, drawings: Iterable[Drawing], gap: float = 18) -> Drawing:
    """Return a drawing of several, one below the other."""
    drawings = list(drawings)
    result = Drawing(title, max(d.width for d in drawings))
    for d in drawings:
        for p in d.parts:
            moved = vars(p) | {"y": p.y + result.height}
            result.add(type(p)(**moved))
        result.height += d.height + gap
    result.height -= gap
    return result


def style_sheet(scope: str) -> str:
    """Return CSS that defines the colours in `scope`, light or dark as the reader prefers."""
    light, dark = (
        "".join(f"--{name}:{value};" for name, value in colours.items())
        for colours in (LIGHT, DARK)
    )
    classes = "".join(
        f".f-{name}{{fill:var(--{name})}}.s-{name}{{stroke:var(--{name})}}" for name in LIGHT
    )
    return (
        f"{scope}{{{light}}}@media (prefers-color-scheme:dark){{{scope}{{{dark}}}}}"
        f"{classes}.drawing text{{font-family:{FONT}}}.drawing .bold{{font-weight:600}}"
    )


def _svg_box(p: Box) -> str:
    names = f"f-{p.fill}" if p.fill else ""
    if p.stroke:
        names = f"{names} s-{p.stroke}".strip()
    paint = "" if p.fill else ' fill="none"'
    data = "".join(f" data-{key}={quoteattr(str(value))}" for key, value in p.data.items())
    return (
        f'<rect x="{p.x:g}" y="{p.y:g}" width="{p.width:g}" height="{p.height:g}" '
        f'class="{names}"{paint}{data}/>'
    )


def _svg_words(p: Words) -> str:
    names = f"f-{p.colour}" + (" bold" if p.bold else "")
    anchor = "" if p.anchor == "start" else f' text-anchor="{p.anchor}"'
    return (
        f'<text x="{p.x:g}" y="{p.y:g}" font-size="{p.size:g}"{anchor} class="{names}">'
        f"{escape(p.text)}</text>"
    )
