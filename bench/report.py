"""Report the results of the benchmark: a table, the verdict on each target, a plot.

python -m bench.report results.jsonl                # draws results.png, here or anywhere
python -m bench.report results.jsonl --markdown     # prints the tables instead
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.names import (
    COMPILED,
    COPY,
    CUTE_QUANT,
    FLOAT16_INPUT,
    FLOAT32_SCALES,
    LAUNCH,
    LAUNCHES,
    NEG,
    PDL,
    PLAIN,
    QUANTIZE,
    QUANTIZE_OUT,
    STREAM,
    TRITON,
    TWO_KERNELS,
)
from bench.results import Result, Results, machine_lines
from bench.shapes import MAIN_COLUMN
from bench.targets import ANY, Target, verdict
from bench.targets import verdicts as target_verdicts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CELL = 12
DASHES = (0, (3, 1.5))
"""Line style of launches with PDL."""

TARGETS = (
    Target(CUTE_QUANT, STREAM, LAUNCHES, (4096, ANY[1]), 1.02),
    Target(CUTE_QUANT, STREAM, LAUNCHES, (512, 4095), 1.04),
    Target(CUTE_QUANT, STREAM, LAUNCHES, (1, 256), 1.10),
    Target("vLLM 0.33", CUTE_QUANT, LAUNCHES, ANY, 1.3, at_most=False),
    Target("vLLM 0.33", CUTE_QUANT, LAUNCHES, (1, 512), 1.5, at_most=False),
    Target("vLLM 0.33", CUTE_QUANT, (PDL,), (1, 64), 1.8, at_most=False),
    Target("vLLM 0.20", CUTE_QUANT, (PLAIN,), (4096, ANY[1]), 1.9, at_most=False),
    Target("vLLM 0.20", CUTE_QUANT, (PLAIN,), (1, 4095), 1.6, at_most=False),
    Target(FLOAT16_INPUT, CUTE_QUANT, (PLAIN,), (4096, ANY[1]), 1.03),
    Target(FLOAT32_SCALES, CUTE_QUANT, (PLAIN,), (4096, ANY[1]), 1.03),
)
HOST_TARGETS = (
    (QUANTIZE_OUT, NEG, 1.05),
    (QUANTIZE, NEG, 1.6),
    (LAUNCH, NEG, 0.65),
)


def verdicts(results: Results) -> list[str]:
    """Return a line for each target that the results can judge, those of the host too."""
    lines = target_verdicts(results, TARGETS)
    for name, base, bound in HOST_TARGETS:
        if name in results.host and base in results.host:
            ratio = results.host[name] / results.host[base]
            lines.append(verdict(f"host time, {name} / {base}", ratio, bound, True))
    return lines


def header_line(providers: Sequence[str]) -> str:
    short = (name.replace("cute_quant ", "+ ").removeprefix("torch.") for name in providers)
    names = "".join(f"{name:>{CELL}}" for name in short)
    return f"{'M':>6} {'K':>5} launch{names}   GB/s  spread"


def result_line(results: Results, mn: int, k: int, launch: str, providers: Sequence[str]) -> str:
    """Return a line of the table for a shape.

    It has the microseconds of each provider with their ratio to the ceiling's, and the bandwidth
    of cute_quant.
    """
    found = [results.get(name, launch, mn, k) for name in providers]
    cells = "".join(f"{_cell(results, r):>{CELL}}" for r in found)
    spread = max((r.spread for r in found if r), default=0)
    ours = results.get(CUTE_QUANT, launch, mn, k)
    bandwidth = f"{ours.bytes / ours.seconds / 1e9:.0f}" if ours else "-"
    return f"{mn:6} {k:5} {launch:6}{cells}  {bandwidth:>5}  {spread:6.1%}"


def _cell(results: Results, result: Result | None) -> str:
    if result is None:
        return "-"
    time = ("!" if result.difference else "") + microseconds(result.seconds)
    ratio = results.ratio(result.provider, STREAM, result.launch, result.mn, result.k)
    if result.provider == STREAM or ratio is None:
        return time
    return f"{time} {ratio:4.2f}" if ratio < 10 else f"{time} {ratio:4.1f}"


def microseconds(seconds: float) -> str:
    """Return a time with three significant digits."""
    us = seconds * 1e6
    return f"{us:.2f}" if us < 9.995 else f"{us:.1f}" if us < 99.95 else f"{us:.0f}"


def markdown(results: Results) -> str:
    """Return the machine, the command and the tables, for a document."""
    return "\n".join((*origin_lines(results.machine), *table_lines(results)))


def origin_lines(machine: dict[str, Any]) -> list[str]:
    """Return where and how results were measured, for a document."""
    return [*machine_lines(machine), f"`{machine.get('command')}`", ""]


def table_lines(results: Results, columns: Sequence[int] | None = None) -> list[str]:
    """Return tables of microseconds and ratios, one for each k.

    Times with programmatic dependent launch stand in brackets.
    """
    names = _quantizers(results)
    lines = []
    for k in results.columns() if columns is None else columns:
        present = [n for n in names if any(r.provider == n and r.k == k for r in results)]
        titles = [f"M, k = {k}", *(f"{n} µs" for n in present), f"{CUTE_QUANT} / {STREAM}"]
        lines += [f"| {' | '.join(titles)} |", "| ---: " * len(titles) + "|"]
        for mn in results.rows(k):
            cells = [str(mn)]
            for name in present:
                found = [results.get(name, launch, mn, k) for launch in LAUNCHES]
                cells.append(_with_pdl(*(microseconds(r.seconds) if r else "" for r in found)))
            ratios = [results.ratio(CUTE_QUANT, STREAM, launch, mn, k) for launch in LAUNCHES]
            cells.append(_with_pdl(*(f"{r:.2f}" if r else "" for r in ratios)))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return lines


def _quantizers(results: Results) -> list[str]:
    """Return providers of the packed bf16 quantizer, and the ceiling."""
    return [n for n in results.providers() if n not in (FLOAT16_INPUT, FLOAT32_SCALES)]


def _with_pdl(plain: str, pdl: str) -> str:
    return f"{plain} ({pdl})" if pdl else plain


VLLM_COLORS = ("#1f5fa8", "#6ba3d6", "#9cc3e6")
"""Colors of versions of vLLM, in their order."""
COLORS = {
    STREAM: "#8a8a8a",
    CUTE_QUANT: "#c4314b",
    TRITON: "#2e8b57",
    COPY: "#5c5c5c",
    COMPILED: "#e08a1e",
    "DeepGEMM": "#7a4fa3",
    TWO_KERNELS: "#1f5fa8",
}


def draw(results: Results, path: Path, k: int) -> None:
    """Draw `panels` of one k.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    panels(results, k, *axes)
    figure.legend(loc="outside right center", frameon=False)
    figure.suptitle(
        f"bf16 to e4m3 with packed UE8M0 scales, k = {k}: {origin(results.machine)}", fontsize=12
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def origin(machine: dict[str, Any]) -> str:
    """Return where and when a plot's results were measured."""
    date = str(machine.get("date")).split(" ")[0]
    return f"{machine.get('gpu')}, {date}, commit {machine.get('commit') or 'unknown'}"


def panels(results: Results, k: int, time: Axes, share: Axes) -> None:
    """Draw microseconds, and percent of the ceiling's speed, over M, one line per provider.

    The ceiling is one for all lines of a panel: the stream kernel with PDL, which is the fastest,
    or without where that was not measured.
    """
    names = [n for n in _quantizers(results) if any(r.provider == n and r.k == k for r in results)]
    colors = _colors(names)
    rows = results.rows(k)
    ceiling = PDL if any(r.provider == STREAM and r.launch == PDL for r in results) else PLAIN
    for name in names:
        for launch in LAUNCHES:
            found = [r for mn in rows if (r := results.get(name, launch, mn, k))]
            if not found:
                continue
            x = [r.mn for r in found]
            style: dict[str, Any] = {
                "color": colors[name],
                "linestyle": "-" if launch == PLAIN else DASHES,
                "linewidth": 2.2 if name == CUTE_QUANT else 1.4,
                "marker": "o" if launch == PLAIN else None,
                "markersize": 3.5,
                "zorder": 3 if name == CUTE_QUANT else 2,
            }
            label = name + (", PDL" if launch == PDL else "")
            time.plot(x, [r.seconds * 1e6 for r in found], label=label, **style)
            if (name, launch) == (STREAM, ceiling):
                continue
            streams = (results.get(STREAM, ceiling, r.mn, k) for r in found)
            shares = [
                100 * stream.seconds / r.seconds if stream else float("nan")
                for r, stream in zip(found, streams, strict=True)
            ]
            share.plot(x, shares, **style)
    time.set_yscale("log")
    time.yaxis.set_major_formatter("{x:g}")
    time.set_title("time, µs", loc="left")
    dashes = "-" if ceiling == PLAIN else DASHES
    share.axhline(100, color=colors.get(STREAM, "gray"), linestyle=dashes, linewidth=1.4)
    share.set_ylim(0, 108)
    with_pdl = " with PDL" if ceiling == PDL else ""
    share.set_title(f"speed, % of {STREAM}{with_pdl}, which only moves the bytes", loc="left")
    ticks = _sparse(rows)
    for axes in (time, share):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(mn) for mn in ticks])
        axes.minorticks_off()
        axes.set_xlabel("M, rows")
        axes.grid(color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)


def _sparse(rows: Sequence[int]) -> list[int]:
    """Return rows far enough from each other that their labels do not touch."""
    kept: list[int] = []
    for mn in rows:
        if not kept or mn >= 4 * kept[-1]:
            kept.append(mn)
    return kept


def _colors(names: Sequence[str]) -> dict[str, str]:
    shades = itertools.cycle(VLLM_COLORS)
    return {n: next(shades) if n.startswith("vLLM") else COLORS.get(n, "black") for n in names}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report")
    parser.add_argument("results", type=Path, help="JSON lines of a run")
    parser.add_argument("--markdown", action="store_true", help="print tables instead of drawing")
    parser.add_argument("--column", type=int, help=f"k to draw; default: {MAIN_COLUMN}")
    parser.add_argument("-o", "--output", type=Path, help="default: beside the results")
    arguments = parser.parse_args()
    try:
        results = Results.read(arguments.results)
    except (OSError, ValueError, TypeError) as error:
        sys.exit(f"bench.report: {arguments.results}: {error}")
    if arguments.markdown:
        print(markdown(results))
        print("\n".join(verdicts(results)))
        return
    columns = results.columns()
    if not columns:
        sys.exit(f"bench.report: {arguments.results}: no results")
    k = arguments.column or (MAIN_COLUMN if MAIN_COLUMN in columns else columns[-1])
    output = arguments.output or arguments.results.with_suffix(".png")
    try:
        draw(results, output, k)
    except ImportError:
        sys.exit("bench.report: drawing needs matplotlib: pip install matplotlib")
    print(output)


if __name__ == "__main__":
    main()
