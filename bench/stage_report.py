"""Report the results of the benchmark of the operations that end in the quantizer.

python -m bench.stage_report results.jsonl                # draws results.png
python -m bench.stage_report results.jsonl --markdown     # prints the tables instead
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from bench import report
from bench.names import (
    ALONE,
    COMPILED,
    CUTE_QUANT,
    LAUNCHES,
    PLAIN,
    RMS_NORM,
    SILU_MUL,
    STREAM,
    TRITON,
    TWO_KERNELS,
    of_operation,
)
from bench.results import Results
from bench.shapes import MAIN_COLUMN
from bench.targets import ANY, Target, verdicts

OPERATIONS = (SILU_MUL, RMS_NORM, ALONE)
PROVIDERS = (STREAM, CUTE_QUANT, TWO_KERNELS, COMPILED, TRITON)
LARGE, DECODING = (4096, ANY[1]), (1, 64)


def _target(
    operation: str,
    over: str,
    under: str,
    launches: tuple[str, ...],
    rows: tuple[int, int],
    bound: float,
    at_most: bool = True,
) -> Target:
    """Return a target for two providers of an operation."""
    names = of_operation(operation, over), of_operation(operation, under)
    return Target(*names, launches, rows, bound, at_most)


def _decoding(operation: str) -> Target:
    """Return a target relative to the quantizer alone."""
    over, under = of_operation(operation, CUTE_QUANT), of_operation(ALONE, CUTE_QUANT)
    return Target(over, under, LAUNCHES, DECODING, 1.3)


TARGETS = (
    _target(SILU_MUL, CUTE_QUANT, STREAM, LAUNCHES, LARGE, 1.04),
    _target(SILU_MUL, TWO_KERNELS, CUTE_QUANT, LAUNCHES, ANY, 2.0, at_most=False),
    _target(SILU_MUL, COMPILED, CUTE_QUANT, (PLAIN,), ANY, 2.0, at_most=False),
    _target(SILU_MUL, TRITON, CUTE_QUANT, (PLAIN,), ANY, 1.3, at_most=False),
    _target(RMS_NORM, CUTE_QUANT, STREAM, LAUNCHES, LARGE, 1.08),
    _target(RMS_NORM, TWO_KERNELS, CUTE_QUANT, LAUNCHES, DECODING, 2.0, at_most=False),
    _target(RMS_NORM, TWO_KERNELS, CUTE_QUANT, LAUNCHES, (65, ANY[1]), 1.5, at_most=False),
    _decoding(SILU_MUL),
    _decoding(RMS_NORM),
)


def of(results: Results, operation: str) -> Results:
    """Return the results of one operation, with its prefix removed from provider names."""
    prefix = of_operation(operation, "")
    found = (
        dataclasses.replace(r, provider=r.provider.removeprefix(prefix))
        for r in results
        if r.provider.startswith(prefix)
    )
    return Results(results.machine, tuple(found))


def header_line() -> str:
    return f"{'':{len(SILU_MUL)}} {report.header_line(PROVIDERS)}"


def shape_lines(results: Results, mn: int, k: int) -> list[str]:
    """Return a line for each operation and way to launch, as `report.result_line` has it."""
    lines = []
    for operation in OPERATIONS:
        part = of(results, operation)
        for launch in part.launches():
            line = report.result_line(part, mn, k, launch, PROVIDERS)
            lines.append(f"{operation:{len(SILU_MUL)}} {line}")
    return lines


def differing_lines(results: Results) -> list[str]:
    """Return a line for each provider: how much of its output is not the reference's to the bit."""
    largest: dict[str, float] = {}
    for r in results:
        largest[r.provider] = max(r.differing, largest.get(r.provider, 0.0))
    return [
        f"  {name:40} {share:.4%}" for name, share in largest.items() if not name.endswith(STREAM)
    ]


def judge(results: Results) -> list[str]:
    return verdicts(results, TARGETS)


def markdown(results: Results) -> str:
    """Return the machine, the command, and tables for each operation, for a document."""
    lines = report.origin_lines(results.machine)
    for operation in OPERATIONS:
        lines += [operation, "", *report.table_lines(of(results, operation))]
    return "\n".join(lines)


def draw(results: Results, path: Path, k: int) -> None:
    """Draw time and share of the ceiling's speed over M, for the fused operations.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    operations = (SILU_MUL, RMS_NORM)
    figure, axes = plt.subplots(len(operations), 2, figsize=(12, 9), layout="constrained")
    for (time, share), operation in zip(axes, operations, strict=True):
        report.panels(of(results, operation), k, time, share)
        time.set_title(f"{operation}: time, µs", loc="left")
    lines, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside right center", frameon=False)
    figure.suptitle(
        f"bf16 to e4m3 with packed UE8M0 scales, k = {k}: {report.origin(results.machine)}",
        fontsize=12,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main_column(results: Results) -> int:
    """Return the k to draw."""
    columns = results.columns()
    return MAIN_COLUMN if MAIN_COLUMN in columns else columns[-1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.stage_report")
    parser.add_argument("results", type=Path, help="JSON lines of a run")
    parser.add_argument("--markdown", action="store_true", help="print tables instead of drawing")
    parser.add_argument("-o", "--output", type=Path, help="default: beside the results")
    arguments = parser.parse_args()
    try:
        results = Results.read(arguments.results)
    except (OSError, ValueError, TypeError) as error:
        sys.exit(f"bench.stage_report: {arguments.results}: {error}")
    if not results.columns():
        sys.exit(f"bench.stage_report: {arguments.results}: no results")
    if arguments.markdown:
        print(markdown(results))
        print("\n".join(judge(results)))
        return
    output = arguments.output or arguments.results.with_suffix(".png")
    try:
        draw(results, output, main_column(results))
    except ImportError:
        sys.exit("bench.stage_report: drawing needs matplotlib: pip install matplotlib")
    print(output)


if __name__ == "__main__":
    main()
