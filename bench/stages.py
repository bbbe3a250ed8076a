"""Measure the operations that end with the quantizer beside their peers and ceilings.

    python -m bench.stages [--quick] [--rows M,...] [--columns K,...] [--output FILE]

Each operation has a ceiling, stream, a kernel that only moves its bytes. "two kernels" is what
torch.compile makes of the prologue, followed by the quantizer's kernel,
which the column launch concerns; "compile" is torch.compile of everything; Triton is a fused
kernel, in the best shape of a tile for each problem. In this order: microseconds a call, and how
many times those of the ceiling.

Every provider's output is compared with the reference before it is timed, ours within what float32
allows. Times are taken as by python -m bench.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import stage_providers, stage_report
from bench.results import machine_lines
from bench.run import Run, first_line, say
from bench.shapes import (
    GROUP_SIZE,
    QUICK_STAGE_ROWS,
    STAGE_COLUMNS,
    STAGE_ROWS,
    positive_numbers,
)
from bench.stage_problem import StageProblem
from cute_quant.lab import timing

DEFAULT_OUTPUT = Path("build/bench-stages.jsonl")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.stages",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    rows, columns = (",".join(map(str, numbers)) for numbers in (STAGE_ROWS, STAGE_COLUMNS))
    add("--rows", type=positive_numbers, metavar="M,...", help=f"default: {rows}")
    add(
        "--columns",
        type=positive_numbers,
        default=STAGE_COLUMNS,
        metavar="K,...",
        help=f"of the results; default: {columns}",
    )
    add("--quick", action="store_true", help="fewer rows, unless they are given")
    add("--output", type=Path, default=DEFAULT_OUTPUT, metavar="FILE", help="default: %(default)s")
    add("--commit", help="name of the measured version, where there is no git to ask")
    options = parser.parse_args(arguments)
    options.rows = options.rows or (QUICK_STAGE_ROWS if options.quick else STAGE_ROWS)
    bad = [k for k in options.columns if k % GROUP_SIZE]
    if bad:
        parser.error(f"--columns: expected multiples of {GROUP_SIZE}, got {bad}")
    return options


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        sys.exit("bench.stages: needs a CUDA GPU of compute capability 9.0, 10.0 or 10.3")
    torch.manual_seed(0)
    start = time.perf_counter()
    say("compiling ...")
    try:
        providers, absent = stage_providers.create()
        run = Run("python -m bench.stages", StageProblem, providers, options.commit)
    except RuntimeError as error:
        sys.exit(f"bench.stages: {first_line(error)}")
    say(*(f"absent: {line}" for line in absent))
    results = run.results
    say(*machine_lines(results.machine))
    path = options.output
    timing.warm_up()
    for k in options.columns:
        say("", stage_report.header_line())
        for mn in options.rows:
            run.measure(mn, k, run.providers)
            say(*stage_report.shape_lines(results, mn, k))
            results.write(path)
    say("", "values and scales that differ from the reference's, at most")
    say(*stage_report.differing_lines(results))
    say("", *stage_report.judge(results))
    say("", f"{time.perf_counter() - start:.0f} s", str(path))
    if run.wrong:
        sys.exit("bench.stages: cute_quant differs from the reference")


if __name__ == "__main__":
    main()
