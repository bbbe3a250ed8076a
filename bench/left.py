"""Measure the calls that are furthest from their ceilings, in this tree and in others.

    python -m bench.left [--against DIRECTORY_OR_FILE]... [--rounds N] [--only PATTERN]
                         [--output FILE]

A row of the table is a call: microseconds with their quartiles, and times those of the fastest
kernel that moves its bytes, here and in each other tree. That ratio is asked to be below what
stands beside it; a star marks one that is not. A directory is another checkout: its `cute_quant` is
measured by this one's benchmark, in processes of their own that take turns. A file is what
``--output`` wrote.

Launches are programmatic dependents of each other, in CUDA graphs over rotating buffers. Outputs
are compared with the reference before they are timed. The first process finds which streaming
kernel is the fastest for each call; all others time the same one.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import calls, environment
from bench.calls import Case
from bench.shapes import MAIN_COLUMN, RMS_NORM_QUANTIZE, SILU_MUL_QUANTIZE
from cute_quant import DEEP_GEMM, DEEP_GEMM_SM90, MXFP8, NVFP4, ROWWISE_FP8, ROWWISE_INT8
from cute_quant.lab import timing

LONG = 65536
"""Columns of a row that no CTA holds."""

ROOT = Path(__file__).resolve().parent.parent
HERE = "here"
WIDTH = 34
BOOT = """
import runpy, sys
tree, root, *arguments = sys.argv[1:]
sys.path[0] = tree
import cute_quant
if not cute_quant.__file__.startswith(tree):
    sys.exit(f"{tree}: expected a checkout with cute_quant")
sys.path[0] = root
sys.argv[1:] = arguments
runpy.run_module("bench.left", run_name="__main__", alter_sys=True)
"""
"""Runs this module with the `cute_quant` of another tree."""


class Measured(NamedTuple):
    """Seconds of a call and of its ceiling.

    Attributes:
        seconds, low, high: of the call, the median and the quartiles of the replays.
        kernel: of the ceiling, as its place in `bench.stream.family`.
        stream: its compile-time choices.
    """

    name: str
    seconds: float
    low: float
    high: float
    ceiling_seconds: float
    kernel: int
    stream: str

    @property
    def ratio(self) -> float:
        return self.seconds / self.ceiling_seconds


def every_case() -> Iterator[tuple[Case, float | None]]:
    """Yield the calls, and the most times of the ceiling that each is asked to take."""
    k = MAIN_COLUMN
    for m, columns, asked in (
        (1, k, 1.06),
        (16, k, 1.06),
        (64, k, 1.12),
        (128, 4096, 1.12),
        (256, k, None),
        (1024, k, None),
        (2048, k, None),
        (16384, k, None),
    ):
        yield calls.quantizing_case(DEEP_GEMM, m, columns), asked
    for fmt in (ROWWISE_FP8, ROWWISE_INT8, NVFP4.replace(row_scale=True)):
        for m, asked in ((64, 1.35), (1024, None), (16384, 1.05)):
            yield calls.quantizing_case(fmt, m, k), asked
    for fmt in (DEEP_GEMM_SM90, MXFP8):
        yield calls.quantizing_case(fmt, 4096, k), 1.02
    for m, asked in ((64, 1.3), (1024, 1.06), (16384, 1.04)):
        yield calls.dequantizing_case(m, k), asked
    yield calls.quantizing_case(ROWWISE_FP8, 1024, LONG), None
    for m, asked in ((1, 1.2), (16, 1.2), (64, 1.2), (4096, None)):
        yield calls.stage_case(SILU_MUL_QUANTIZE, m, k), asked
    for m, asked in ((1, 1.5), (16, None), (64, 1.25), (4096, None)):
        yield calls.stage_case(RMS_NORM_QUANTIZE, m, k), asked
    for experts, max_m, live, asked in ((32, 1024, 8, 1.3), (256, 4096, 512, 1.06)):
        yield calls.masked_case(experts, max_m, live, k), asked


def measure(case: Case, kernel: int | None) -> Measured:
    """Time a call beside its ceiling, which is found first unless it is given."""
    torch.cuda.empty_cache()
    ceiling = case.ceiling(kernel)
    graphs = {"call": case.capture(), "ceiling": case.captured(ceiling.calls())}
    measured = timing.measure(graphs)
    return Measured(
        case.name,
        measured["call"].median,
        *measured["call"].quartiles,
        measured["ceiling"].median,
        ceiling.kernel,
        str(ceiling.spec),
    )


# Trees.


def run_tree(tree: Path, only: str, kernels: Mapping[str, int]) -> list[Measured]:
    """Measure the `cute_quant` of a tree in a process of its own.

    Args:
        tree: a checkout.
        only: a pattern of the names of calls.
        kernels: of the ceilings, by name of the call; others are found.

    Raises:
        RuntimeError: the process failed.
    """
    with tempfile.TemporaryDirectory() as directory:
        given, found = Path(directory, "kernels.json"), Path(directory, "found.jsonl")
        given.write_text(json.dumps(dict(kernels)))
        arguments = ["--only", only, "--child", str(given), str(found)]
        command = [sys.executable, "-c", BOOT, str(tree), str(ROOT), *arguments]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            raise RuntimeError(f"{tree}: was not measured, see above")
        return [Measured(**json.loads(line)) for line in found.read_text().splitlines()]


def child(only: str, given: Path, found: Path) -> None:
    """Measure the `cute_quant` of this process, and append each measurement to a file."""
    torch.manual_seed(0)
    kernels = json.loads(given.read_text())
    timing.warm_up()
    for case, _ in every_case():
        if not re.search(only, case.name):
            continue
        measured = measure(case, kernels.get(case.name))
        with found.open("a") as file:
            file.write(json.dumps(measured._asdict()) + "\n")
        seconds, name = measured.seconds * 1e6, measured.name
        print(f"  {name:44} {seconds:9.2f} us {measured.ratio:6.3f}  {measured.stream}", flush=True)


def read(path: Path) -> list[Measured]:
    """Return what a run wrote of its own tree."""
    lines = (json.loads(line) for line in path.read_text().splitlines())
    return [Measured(**line[HERE]) for line in lines if HERE in line]


def write(path: Path, machine: dict[str, Any], measured: Sequence[Measured]) -> None:
    """Write the measurements of this tree as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"machine": machine}, *({HERE: m._asdict()} for m in measured)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


# The table.


class Cell(NamedTuple):
    """A tree's times of a call, and their quartiles, the medians of its rounds."""

    seconds: float
    low: float
    high: float
    ratio: float


def cells(measured: Sequence[Measured]) -> dict[str, Cell]:
    """Return the medians of each call."""
    found: dict[str, Cell] = {}
    for name in dict.fromkeys(m.name for m in measured):
        rounds = [m for m in measured if m.name == name]
        values = ((m.seconds, m.low, m.high, m.ratio) for m in rounds)
        found[name] = Cell(*map(statistics.median, zip(*values, strict=True)))
    return found


def table(trees: Mapping[str, Mapping[str, Cell]], asked: Mapping[str, float]) -> Iterator[str]:
    """Yield the lines of the table.

    Args:
        trees: the times of calls by name, of each tree by its name, `HERE` among them.
        asked: by name of a call.
    """
    names = list(dict.fromkeys(name for found in trees.values() for name in found))
    width = max(map(len, names), default=0)
    others = [name for name in trees if name != HERE]
    header = [name[-WIDTH:].rjust(WIDTH) for name in (*trees, *(f"/ {name}" for name in others))]
    yield "  ".join([" " * width, " asked", *header])
    for name in names:
        words = [name.ljust(width), f"{asked[name]:6.2f}" if name in asked else " " * 6]
        for found in trees.values():
            text = ""
            if cell := found.get(name):
                missed = "*" if cell.ratio > asked.get(name, cell.ratio) else " "
                middle, low, high = (s * 1e6 for s in (cell.seconds, cell.low, cell.high))
                text = f"{middle:.2f} us ({low:.2f} to {high:.2f}) {cell.ratio:7.3f}{missed}"
            words.append(text.rjust(WIDTH))
        here = trees[HERE].get(name)
        for other in others:
            there = trees[other].get(name)
            text = f"{here.seconds / there.seconds:.3f}" if here and there else ""
            words.append(text.rjust(WIDTH))
        yield "  ".join(words)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.left",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--against",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="another tree, or a file that --output wrote",
    )
    add("--rounds", type=int, default=2, metavar="N", help="of each tree; default: %(default)s")
    add("--only", default="", metavar="PATTERN", help="calls whose names match")
    add("--output", type=Path, metavar="FILE", help="JSON lines: the machine, then the results")
    add("--commit", help="name of the measured version, where there is no git to ask")
    add("--child", type=Path, nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        sys.exit("bench.left: needs a CUDA GPU that has kernels")
    if options.child:
        child(options.only, *options.child)
        return
    machine = environment.describe("python -m bench.left", options.commit)
    print(f"{machine['gpu']}, {machine['commit']}", flush=True)
    paths = {path.name: path.resolve() for path in options.against}
    measured = {name: read(path) if path.is_file() else [] for name, path in paths.items()}
    trees = {name: path for name, path in paths.items() if path.is_dir()} | {HERE: ROOT}
    measured[HERE] = []
    kernels: dict[str, int] = {}
    for turn in range(options.rounds):
        for name, tree in trees.items():
            print(f"\n{name}, round {turn + 1} of {options.rounds}", flush=True)
            found = run_tree(tree, options.only, kernels)
            measured[name] += found
            kernels |= {m.name: m.kernel for m in found}
    if options.output:
        write(options.output, machine, measured[HERE])
    asked = {case.name: most for case, most in every_case() if most is not None}
    print()
    print(*table({name: cells(found) for name, found in measured.items()}, asked), sep="\n")


if __name__ == "__main__":
    main()
