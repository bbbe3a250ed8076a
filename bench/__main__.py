"""Measure the quantizer beside its peers and the ceiling.

    python -m bench [--quick] [--vllm WHEEL_OR_DIRECTORY]... [--output FILE]

Prints a table as it goes, then the verdict on each target, and writes the results as JSON lines.
`make figures` draws those of bench/results and renews the tables of the documents. Every provider's
output is compared with the reference to the bit before it is timed.
A time is that of one call in a CUDA graph of calls over rotating buffers, the median over replays
that alternate between providers; spread is the widest interquartile range in the row.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import report, shapes
from bench.names import LAUNCHES
from bench.problem import Problem
from bench.providers import NAMES, create
from bench.results import machine_lines
from bench.run import Run, first_line, say
from bench.shapes import positive_numbers
from cute_quant.lab import timing

DEFAULT_OUTPUT = Path("build/bench.jsonl")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--rows",
        type=positive_numbers,
        metavar="M,...",
        help=f"default: {_text(shapes.ROWS)}",
    )
    add(
        "--columns",
        type=positive_numbers,
        metavar="K,...",
        help=f"default: {_text(shapes.COLUMNS)}",
    )
    add("--quick", action="store_true", help="fewer shapes, unless they are given")
    add(
        "--providers",
        type=lambda text: text.split(","),
        metavar="NAME,...",
        help=f"of {', '.join(NAMES)}; by default all, those that only give context at "
        f"k = {shapes.MAIN_COLUMN}",
    )
    add("--launch", choices=(*LAUNCHES, "both"), default="both", help="how kernels are launched")
    add(
        "--vllm",
        type=Path,
        action="append",
        default=[],
        metavar="WHEEL_OR_DIRECTORY",
        help="a vLLM wheel, a site-packages that has it, or what bench.vllm_wheel extracted; "
        "may be repeated",
    )
    add("--output", type=Path, default=DEFAULT_OUTPUT, metavar="FILE", help="default: %(default)s")
    add("--commit", help="name of the measured version, where there is no git to ask")
    options = parser.parse_args(arguments)
    unknown = set(options.providers or ()) - set(NAMES)
    if unknown:
        parser.error(f"--providers: {', '.join(sorted(unknown))}: expected some of {_text(NAMES)}")
    bad = [k for k in options.columns or () if k % shapes.GROUP_SIZE]
    if bad:
        parser.error(f"--columns: expected multiples of {shapes.GROUP_SIZE}, got {_text(bad)}")
    return options


def _text(values: Sequence[object]) -> str:
    return ",".join(map(str, values))


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        sys.exit("bench: needs a CUDA GPU of compute capability 9.0, 10.0 or 10.3")
    start = time.perf_counter()
    say("compiling ...")
    launches = LAUNCHES if options.launch == "both" else (options.launch,)
    rows = options.rows or (shapes.QUICK_ROWS if options.quick else shapes.ROWS)
    columns = options.columns or (shapes.QUICK_COLUMNS if options.quick else shapes.COLUMNS)
    try:
        providers, absent = create(options.providers or NAMES, launches, options.vllm)
        run = Run("python -m bench", Problem, providers, options.commit)
    except RuntimeError as error:
        sys.exit(f"bench: {first_line(error)}")
    say(*(f"absent: {line}" for line in absent))
    results = run.results
    say(
        *machine_lines(results.machine),
        "microseconds a call, and how many times those of the kernel that only moves the bytes "
        "(stream)",
    )
    path = options.output
    names = list(dict.fromkeys(provider.name for provider in providers))
    everywhere = options.providers is not None or len(columns) == 1
    timing.warm_up()
    for k in columns:
        say("", report.header_line(names))
        all_of_them = everywhere or k == shapes.MAIN_COLUMN
        for mn in rows:
            run.measure(mn, k, [p for p in run.providers if all_of_them or p.everywhere])
            say(*(report.result_line(results, mn, k, launch, names) for launch in launches))
            results.write(path)
    say("", *report.verdicts(results))
    say("", f"{time.perf_counter() - start:.0f} s", str(path))
    if run.wrong:
        sys.exit("bench: cute_quant differs from the reference")


if __name__ == "__main__":
    main()
