"""Try launches of the operations that end with the quantizer.

    python -m bench.tune_stages [--rows M,...] [--columns K,...] [--launch plain|pdl]

Prints a table for each operation and k: times over those of the ceiling, for each M and on
average, the best average first. What the public call launches at an M is marked by a star.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Sequence

import torch

from bench import environment
from bench.names import LAUNCHES, PDL, STREAM
from bench.problem import UE8M0
from bench.run import first_line
from bench.shapes import (
    RMS_NORM_QUANTIZE,
    SILU_MUL_QUANTIZE,
    STAGE_COLUMNS,
    Operation,
    positive_numbers,
)
from bench.stage_problem import FLOAT32_ERROR, StageProblem
from bench.stage_providers import Ceiling, StageSpec, bind_spec, default_spec, norm_spec
from cute_quant.contract.dtypes import ceil_div
from cute_quant.kernels.config import (
    DEFAULT_TILE,
    MAX_GRID_Y,
    Domain,
    RmsNormSpec,
    SiluMulSpec,
    Tile,
)
from cute_quant.kernels.heuristics import MAX_WARPS
from cute_quant.lab import timing

ROWS = (16, 256, 4096, 16384)
ROW_WARPS = (1, 2, 4, 8)
ROWS_PER_THREAD = (1, 2)
VALUES_PER_THREAD = (8, 16)
TILES_PER_THREAD = (1, 2, 4)
REPLAYS = 8


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune_stages",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    for name, default in (("--rows", ROWS), ("--columns", STAGE_COLUMNS)):
        text = ",".join(map(str, default))
        add(name, type=positive_numbers, default=default, metavar="N,...", help=f"default: {text}")
    add("--launch", choices=LAUNCHES, default=PDL, help="default: %(default)s")
    options = parser.parse_args(arguments)
    bad = [k for k in options.columns if k % (DEFAULT_TILE.values_per_thread * 2)]
    if bad:
        parser.error(f"--columns: expected multiples of 32, got {bad}")
    return options


def candidates(operation: Operation, mn: int, k: int, pdl: bool) -> Iterator[StageSpec]:
    """Yield the specs of an operation that can be launched for a shape."""
    for row_warps in ROW_WARPS:
        if operation is SILU_MUL_QUANTIZE:
            for values, rows in itertools.product(VALUES_PER_THREAD, ROWS_PER_THREAD):
                tile = Tile(values, row_warps, rows)
                batched = ceil_div(UE8M0.scale_rows(mn), tile.rows) > MAX_GRID_Y
                yield SiluMulSpec(torch.bfloat16, UE8M0, tile, Domain(batched=batched), pdl=pdl)
            continue
        columns = ceil_div(k, DEFAULT_TILE.columns)
        tile = Tile(row_warps=row_warps)
        for tiles in TILES_PER_THREAD:
            warps = ceil_div(columns, tiles)
            if tiles > columns:
                continue
            bounds = {1 << (warps - 1).bit_length()}
            if tiles == 1:
                # One kernel for every k, whose threads can have fewer registers.
                bounds.add(MAX_WARPS)
            for max_warps in sorted(bounds):
                if max_warps * row_warps <= MAX_WARPS:
                    yield norm_spec(tile, tiles, max_warps, pdl)


def describe(spec: StageSpec) -> str:
    text = f"row_warps={spec.tile.row_warps}"
    if isinstance(spec, RmsNormSpec):
        return f"{text}, tiles_per_thread={spec.tiles_per_thread}, max_warps={spec.max_warps}"
    values, rows = spec.tile.values_per_thread, spec.tile.rows_per_thread
    return f"values_per_thread={values}, {text}, rows_per_thread={rows}"


def ratios(operation: Operation, mn: int, k: int, pdl: bool, ceiling: Ceiling) -> dict[str, float]:
    """Return times of the default and of all candidates over the ceiling's, NaN for wrong ones."""
    problem = StageProblem(mn, k)
    launches = timing.launch_count(operation.bytes_moved(mn, k))
    graphs = {STREAM: timing.capture(ceiling.calls(problem), launches)}
    wrong = {}
    default = default_spec(operation, mn, k, pdl)
    for spec in dict.fromkeys((default, *candidates(operation, mn, k, pdl))):
        name = describe(spec)
        problem.buffers[-1].poison()
        bind_spec(spec, problem.buffers[-1])()
        check = problem.check(operation, len(problem.buffers) - 1, FLOAT32_ERROR)
        if check.difference:
            print(f"wrong: {operation.name}, {name}, at {mn} x {k}: {check.difference}", flush=True)
            wrong[name] = float("nan")
            continue
        calls = [bind_spec(spec, buffer) for buffer in problem.buffers]
        graphs[name] = timing.capture(calls, launches)
    measured = timing.measure(graphs, REPLAYS)
    stream = measured.pop(STREAM).median
    return {name: t.median / stream for name, t in measured.items()} | wrong


def table(
    found: dict[int, dict[str, float]],  # M -> candidate -> ratio
    defaults: dict[int, str],
) -> Iterator[str]:
    """Yield a line for each candidate, the best average first.

    Candidates that are wrong or were not tried for some M come last.
    """
    names = dict.fromkeys(name for column in found.values() for name in column)
    nan = float("nan")
    means = {n: statistics.fmean(column.get(n, nan) for column in found.values()) for n in names}
    width = max(map(len, names))
    yield f"{'':{width}}" + "".join(f"{f'M={mn}':>9} " for mn in found) + f"{'mean':>8}"
    for name in sorted(names, key=lambda n: (means[n] != means[n], means[n])):
        cells = (
            f"{column.get(name, nan):9.3f}{'*' if defaults[mn] == name else ' '}"
            for mn, column in found.items()
        )
        yield f"{name:{width}}" + "".join(cells) + f"{means[name]:8.3f}"


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        sys.exit("bench.tune_stages: needs a CUDA GPU of compute capability 9.0, 10.0 or 10.3")
    torch.manual_seed(0)
    start = time.perf_counter()
    machine = environment.describe("python -m bench.tune_stages", None)
    print(f"{machine['gpu']}, {machine['commit']}, {options.launch}", flush=True)
    pdl = options.launch == PDL
    timing.warm_up()
    for operation in (SILU_MUL_QUANTIZE, RMS_NORM_QUANTIZE):
        try:
            ceiling = Ceiling(operation, options.launch)
        except RuntimeError as error:
            sys.exit(f"bench.tune_stages: {first_line(error)}")
        for k in options.columns:
            found, defaults = {}, {}
            for mn in options.rows:
                found[mn] = ratios(operation, mn, k, pdl, ceiling)
                defaults[mn] = describe(default_spec(operation, mn, k, pdl))
                torch.cuda.empty_cache()
            print(f"\n{operation.name}, k = {k}, over the ceiling")
            print(*table(found, defaults), sep="\n", flush=True)
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
