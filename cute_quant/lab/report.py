"""Report trials as a table for a terminal or for Markdown, and as a plot."""

from __future__ import annotations

from collections.abc import Sequence

from cute_quant.lab.drawing import Box, Drawing, Words
from cute_quant.lab.machine_code import EXAMINED
from cute_quant.lab.sweep import Trial

SHORT = {name: f"SM{10 * a.capability[0] + a.capability[1]}" for name, a in EXAMINED.items()}
BAR = 24
FAILED, UNKNOWN = "failed", "-"
WORST = 2.0
"""Largest ratio of the plot; larger ones end at its edge."""

PLOT_WIDTH, PLOT_LABEL, PLOT_ROW, PLOT_HEADER = 1000, 330, 28, 108


def columns(trials: Sequence[Trial]) -> tuple[list[str], list[list[str]]]:
    """Return the headings of the table, and a row of cells for each trial."""
    architectures = [arch for arch in SHORT if any(arch in t.code for t in trials)]
    shapes = shapes_of(trials)
    headings = ["layout", "rows x packs a CTA"]
    for arch in architectures:
        name = SHORT[arch]
        headings += [f"{name} regs", f"{name} issue slots", f"{name} sectors a load"]
    if architectures:
        headings.append("spills")
        headings.append(f"{SHORT[architectures[0]]} KiB in flight")
    headings += [f"{mn} x {k}" for mn, k in shapes]
    table = []
    for t in trials:
        cells = [t.layout.name, f"{t.layout.tile.rows} x {t.layout.packs:g}"]
        cells += _code_cells(t, architectures)
        cells += [_value(t, t.ratios.get(shape)) for shape in shapes]
        table.append(cells)
    return headings, table


def _code_cells(trial: Trial, architectures: Sequence[str]) -> list[str]:
    if not architectures:
        return []
    if not all(arch in trial.code for arch in architectures):
        return [UNKNOWN] * (3 * len(architectures) + 2)
    codes = [trial.code[arch] for arch in architectures]
    cells = []
    for code in codes:
        cells += [
            str(code.registers),
            f"{code.issue_slots:.0f} ({code.budget_share:.0%})",
            f"{code.load_sectors:g} ({code.load_efficiency:.0%})",
        ]
    spills = max(code.spills for code in codes)
    return [*cells, str(spills), f"{codes[0].bytes_in_flight / 1024:.0f}"]


def shapes_of(trials: Sequence[Trial]) -> list[tuple[int, int]]:
    """Return the shapes with which a trial was timed, in order."""
    return list(dict.fromkeys(shape for t in trials for shape in t.ratios))


def legend(trials: Sequence[Trial]) -> str:
    """Return the meaning of the table's columns."""
    parts = [
        "Layouts by what differs from the default. Issue slots: instructions for 512 elements, in "
        "brackets their share of what the GPU issues while memory moves these. Sectors: of 32 "
        "bytes that a load of a warp asks for, in brackets the part that it takes."
    ]
    if shapes_of(trials):
        parts.append("Times by shape of the input, as ratios to the default's.")
    return " ".join(parts)


def text_table(trials: Sequence[Trial]) -> str:
    """Return the table with aligned columns, followed by a line for each failure."""
    headings, table = columns(trials)
    widths = [max(map(len, column)) for column in zip(headings, *table, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in (headings, *table)
    ]
    lines += [f"{t.layout.name}: {t.failure}" for t in trials if t.failure]
    return "\n".join(lines)


def markdown_table(trials: Sequence[Trial]) -> str:
    """Return the table in Markdown."""
    headings, table = columns(trials)
    rule = ["---", *("---:" for _ in headings[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, rule, *table))


def text_plot(trials: Sequence[Trial]) -> str:
    """Return bars of the times of the last shape, or of the issue slots on SM100 without times."""
    title, values = _plotted(trials)
    width = max(len(t.layout.name) for t in trials)
    top = max((value for value in values if value), default=1.0)
    lines = [title]
    for t, value in zip(trials, values, strict=True):
        bar = "█" * round(BAR * (value or 0.0) / top)
        lines.append(f"{t.layout.name:<{width}}  {bar} {_value(t, value)}")
    return "\n".join(lines)


def _value(trial: Trial, value: float | None) -> str:
    if value is not None:
        return f"{value:.3f}"
    return FAILED if trial.failure else UNKNOWN


def _plotted(trials: Sequence[Trial]) -> tuple[str, list[float | None]]:
    """Return the plotted quantities and their values, None where a trial has none."""
    shapes = shapes_of(trials)
    if shapes:
        mn, k = shapes[-1]
        return f"time over the default's, {mn} x {k}", [t.ratios.get((mn, k)) for t in trials]
    *_, last = SHORT
    codes = [t.code.get(last) for t in trials]
    shares = [None if code is None else code.budget_share for code in codes]
    return f"issue slots on {SHORT[last]} over the budget", shares


def plot(trials: Sequence[Trial], source: str) -> Drawing:
    """Draw a dot for each layout and shape: time over the default's.

    Args:
        trials: the trials, some of them timed.
        source: GPU, date and commit of the measurement.

    Raises:
        ValueError: no trial was timed.
    """
    shapes = shapes_of(trials)
    if not shapes:
        raise ValueError("plot: expected trials with times, which take a GPU, got none")
    drawing = Drawing("Time of layouts over the default's", PLOT_WIDTH)
    highest = min(max([1.1, *(r for t in trials for r in t.ratios.values())]), WORST)
    lowest = min([0.9, *(r for t in trials for r in t.ratios.values())])
    span = PLOT_WIDTH - PLOT_LABEL - 40

    def place(ratio: float) -> float:
        return PLOT_LABEL + span * (min(ratio, highest) - lowest) / (highest - lowest)

    drawing.height = PLOT_HEADER + PLOT_ROW * len(trials) + 16
    drawing.add(
        Words(16, 26, "Time over the default's", 16, bold=True),
        Words(16, 46, source, 12, colour="muted"),
    )
    x = float(PLOT_LABEL)
    for i, (mn, k) in enumerate(shapes):
        drawing.add(Box(x, 61, 10, 10, f"b{i % 4}", "ink"), Words(x + 16, 70, f"{mn} x {k}", 12))
        x += 120
    for row in range(1, len(trials), 2):
        drawing.add(Box(8, PLOT_HEADER + row * PLOT_ROW, PLOT_WIDTH - 16, PLOT_ROW, "faint"))
    tick = -(-lowest // 0.1) * 0.1
    while tick <= highest + 1e-9:
        colour = "ink" if abs(tick - 1) < 1e-9 else "b0"
        drawing.add(
            Box(place(tick), PLOT_HEADER, 1, PLOT_ROW * len(trials), colour),
            Words(place(tick), PLOT_HEADER - 8, f"{tick:.1f}", 11, "middle", "muted"),
        )
        tick += 0.1
    for row, t in enumerate(trials):
        middle = PLOT_HEADER + (row + 0.5) * PLOT_ROW
        drawing.add(Words(PLOT_LABEL - 14, middle + 4, t.layout.name, 12, "end"))
        for i, shape in enumerate(shapes):
            if shape in t.ratios:
                at, y = place(t.ratios[shape]), middle + 7 * (i - (len(shapes) - 1) / 2)
                drawing.add(Box(at - 3.5, y - 3.5, 7, 7, f"b{i % 4}", "ink"))
                if t.ratios[shape] > highest:
                    side = (at - 8, "end") if i % 2 else (at + 8, "start")
                    drawing.add(Words(side[0], y + 3.5, f"{t.ratios[shape]:.1f}", 9, side[1]))
    return drawing
