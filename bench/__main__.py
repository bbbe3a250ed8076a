"""Measure the quantizer beside its peers and the ceiling.

    python -m bench [--quick] [--vllm WHEEL_OR_DIRECTORY]... [--output DIR]

Prints a table as it goes, then the verdict on each target, and writes results.jsonl and
results.png. Every provider's output is compared with the reference to the bit before it is timed.
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

from bench import environment, host, report, shapes
from bench.names import CUTE_QUANT, LAUNCHES
from bench.problem import Problem
from bench.providers import NAMES, Provider, create, first_line
from bench.results import Result, Results, machine_lines
from bench.shapes import positive_numbers
from cute_quant.laboratory import timing

DEFAULT_OUTPUT = Path("build/bench")


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
    add("--output", type=Path, default=DEFAULT_OUTPUT, metavar="DIR", help="default: %(default)s")
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


class Benchmark:
    """A run: its providers, and what is known so far."""

    def __init__(self, options: argparse.Namespace):
        self.launches = LAUNCHES if options.launch == "both" else (options.launch,)
        self.rows = options.rows or (shapes.QUICK_ROWS if options.quick else shapes.ROWS)
        self.columns = options.columns or (
            shapes.QUICK_COLUMNS if options.quick else shapes.COLUMNS
        )
        self.everywhere = options.providers is not None or len(self.columns) == 1
        names = options.providers or NAMES
        self.providers, absent = create(names, self.launches, options.vllm)
        for line in absent:
            say(f"absent: {line}")
        machine = environment.describe()
        machine["command"] = " ".join(["python -m bench", *sys.argv[1:]])
        machine["commit"] = options.commit or machine["commit"]
        self.results = Results(machine)
        self.names = list(dict.fromkeys(provider.name for provider in self.providers))
        self.wrong = False

    def run(self, path: Path) -> None:
        """Measure every shape; results go to `path` as they come."""
        timing.warm_up()
        for k in self.columns:
            say("", report.header_line(self.names))
            for mn in self.rows:
                self.shape(mn, k)
                # The next shape fits none of the blocks of this one.
                torch.cuda.empty_cache()
                for launch in self.launches:
                    say(report.result_line(self.results, mn, k, launch, self.names))
                self.results.write(path)

    def shape(self, mn: int, k: int) -> None:
        problem = Problem(mn, k)
        launches = timing.launch_count(problem.bytes)
        graphs: dict[tuple[str, str], timing.Graph] = {}
        differences: dict[tuple[str, str], str] = {}
        for provider in list(self.providers):
            if not (provider.everywhere or self.everywhere or k == shapes.MAIN_COLUMN):
                continue
            try:
                difference = provider.difference(problem)
                if difference:
                    self.report_difference(provider, mn, k, difference)
                if difference and provider.name.startswith(CUTE_QUANT):
                    continue
                calls = [provider.bind(buffer) for buffer in problem.buffers]
                graphs[provider.key] = timing.capture(calls, launches)
                differences[provider.key] = difference
            except Exception as error:
                if provider.name.startswith(CUTE_QUANT):
                    raise
                say(f"dropped: {provider.name}, {provider.launch}: {first_line(error)}")
                self.providers.remove(provider)
        for (name, launch), measured in timing.measure(graphs).items():
            self.results.add(
                Result(
                    provider=name,
                    launch=launch,
                    mn=mn,
                    k=k,
                    seconds=measured.median,
                    quartiles=measured.quartiles,
                    bytes=problem.bytes,
                    buffers=len(problem.buffers),
                    launches=launches,
                    replays=len(measured.seconds),
                    difference=differences[name, launch],
                )
            )

    def report_difference(self, provider: Provider, mn: int, k: int, difference: str) -> None:
        ours = provider.name.startswith(CUTE_QUANT)
        self.wrong |= ours
        marked = "not timed" if ours else "marked !"
        say(
            f"{provider.name}, {provider.launch}, at {mn} x {k} differs from the reference, "
            f"{marked}: {difference}"
        )


def say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        sys.exit("bench: needs a CUDA GPU of compute capability 9.0, 10.0 or 10.3")
    start = time.perf_counter()
    say("compiling ...")
    try:
        benchmark = Benchmark(options)
    except RuntimeError as error:
        sys.exit(f"bench: {first_line(error)}")
    say(
        *machine_lines(benchmark.results.machine),
        "microseconds a call, and how many times those of the kernel that only moves the bytes "
        "(stream)",
    )
    path = options.output / "results.jsonl"
    benchmark.run(path)
    benchmark.results.host = host.measure()
    benchmark.results.write(path)
    say("", *host.lines(benchmark.results.host), "", *report.verdicts(benchmark.results))
    say("", f"{time.perf_counter() - start:.0f} s", str(path))
    columns = benchmark.results.columns()
    k = shapes.MAIN_COLUMN if shapes.MAIN_COLUMN in columns else columns[-1]
    try:
        report.draw(benchmark.results, path.with_suffix(".png"), k)
        say(str(path.with_suffix(".png")))
    except ImportError:
        say(f"no matplotlib here; draw the plot anywhere with python -m bench.report {path}")
    if benchmark.wrong:
        sys.exit("bench: cute_quant differs from the reference")


if __name__ == "__main__":
    main()
