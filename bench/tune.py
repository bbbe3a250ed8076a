"""Try launch shapes of an operation over rows and columns.

    python -m bench.tune [--only PATTERN] [--rows M,...] [--columns K,...] [--output FILE]

Prints a table for each operation and k: times over those of the ceiling, for each M and on
average, the best average first. What a call launches at an M is marked by a star. The last line has
the fastest shape of each M, for `cute_quant/kernels/heuristics.py`.

Calls are the public ones, with another launch shape in the place of what the heuristics choose.
Their results are compared with the reference before they are timed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench import calls, environment
from bench.calls import Case
from bench.shapes import (
    RMS_NORM_QUANTIZE,
    SILU_MUL_QUANTIZE,
    STAGE_COLUMNS,
    Operation,
    positive_numbers,
)
from cute_quant import DEEP_GEMM, MXFP8, NVFP4, ROWWISE_FP8, Format
from cute_quant.contract.dtypes import ceil_div
from cute_quant.dispatch import launch, plan
from cute_quant.kernels import heuristics
from cute_quant.kernels.config import DOWN, LANES, MAX_GRID_Y, ONE_ROW, Tile
from cute_quant.lab import timing

ROWS = (1, 16, 64, 256, 1024, 4096, 16384)
VALUES = (8, 16)
WARPS = (1, 2, 4, 8)
REPLAYS = 8

Fields = dict[str, Any]
"""Fields of a launch shape that replace what is chosen."""


def tiles_of_groups(k: int) -> Iterator[Fields]:
    """Yield shapes of kernels whose warps tile columns independently."""
    for values, warps, free in itertools.product(VALUES, WARPS, (False, True)):
        for rows, tiles in ((1, 1), (2, 1), (4, 1), (1, 2)):
            if k % (rows * values) == 0 and tiles * values * LANES <= k:
                tile = Tile(values, warps, rows, tiles_per_thread=tiles, low_latency=free)
                yield {"tile": tile}


def tiles_of_rows(k: int) -> Iterator[Fields]:
    """Yield shapes of CTAs that hold rows which are scaled as a whole."""
    for values, tiles, free in itertools.product(VALUES, (1, 2, 4, 8), (False, True)):
        tile = ONE_ROW._replace(values_per_thread=values, low_latency=free)
        tile = tile._replace(tiles_per_thread=tiles)
        warps = ceil_div(k, tiles * tile.columns)
        most = 1 << (warps - 1).bit_length()
        for max_warps in {most, heuristics.FEW_ROWS_WARPS, heuristics.MAX_WARPS}:
            if warps <= max_warps <= heuristics.MAX_WARPS:
                yield {"tile": tile, "max_warps": max_warps}


def tiles_of_norms(k: int) -> Iterator[Fields]:
    """Yield shapes of CTAs that normalize rows."""
    for values, row_warps, tiles, free in itertools.product(
        VALUES, WARPS, (1, 2, 4), (False, True)
    ):
        tile = ONE_ROW._replace(values_per_thread=values, low_latency=free)
        tile = tile._replace(row_warps=row_warps)
        warps = ceil_div(k, tiles * tile.columns)
        most = 1 << (warps - 1).bit_length()
        for max_warps in {most, heuristics.MAX_WARPS}:
            if warps <= max_warps and max_warps * row_warps <= heuristics.MAX_WARPS:
                yield {"tile": tile, "tiles_per_thread": tiles, "max_warps": max_warps}


def quantizing(fmt: Format) -> Callable[[int, int], Case]:
    return functools.partial(calls.quantizing_case, fmt)


def fused(operation: Operation) -> Callable[[int, int], Case]:
    return functools.partial(calls.stage_case, operation)


OPERATIONS: dict[str, tuple[Callable[[int, int], Case], Callable[[int], Iterator[Fields]]]] = {
    "quantize DEEP_GEMM": (quantizing(DEEP_GEMM), tiles_of_groups),
    "quantize MXFP8": (quantizing(MXFP8), tiles_of_groups),
    "quantize NVFP4": (quantizing(NVFP4), tiles_of_groups),
    "quantize ROWWISE_FP8": (quantizing(ROWWISE_FP8), tiles_of_rows),
    "quantize NVFP4 per row": (quantizing(NVFP4.replace(row_scale=True)), tiles_of_rows),
    SILU_MUL_QUANTIZE.name: (fused(SILU_MUL_QUANTIZE), tiles_of_groups),
    RMS_NORM_QUANTIZE.name: (fused(RMS_NORM_QUANTIZE), tiles_of_norms),
}
"""Cases of a number of rows and columns, and the shapes to be tried, by name."""


@contextlib.contextmanager
def launched_as(fields: Fields) -> Iterator[list[Fields]]:
    """Have calls take these fields of a launch shape, and yield what they would have taken."""
    choose, chosen = plan._launch_shape, []

    def shape(*size: Any, **options: Any) -> Any:
        found = choose(*size, **options)
        chosen.append({name: getattr(found, name) for name in fields})
        found = found._replace(**fields)
        if found.tile.cta_order != DOWN:
            found = found._replace(tall=ceil_div(size[1].mn, found.tile.rows) > MAX_GRID_Y)
        return found

    with (
        mock.patch.object(plan, "_launch_shape", shape),
        mock.patch.object(launch, "_plans", {}),
    ):
        yield chosen


def describe(fields: Fields) -> str:
    """Return the fields of a shape that differ from the defaults, and those of its tile."""
    words = []
    for name, value in fields.items():
        if isinstance(value, Tile):
            default = ONE_ROW if value.cta_order == DOWN else Tile()
            differing = (n for n in Tile._fields if getattr(value, n) != getattr(default, n))
            inner = ", ".join(f"{n}={getattr(value, n)}" for n in differing)
            words.append(f"{'ONE_ROW' if default is ONE_ROW else 'Tile'}({inner})")
        else:
            words.append(f"{name}={value}")
    return ", ".join(words)


def ratios(case: Case, shapes: Sequence[Fields]) -> tuple[dict[str, float], str]:
    """Return times over the ceiling's by shape, and the shape that a call takes by itself."""
    torch.cuda.empty_cache()
    graphs, default = {"": case.captured(case.ceiling().calls())}, ""
    make = case.maker()
    for fields in shapes:
        name = describe(fields)
        with launched_as(fields) as chosen:
            try:
                graphs[name] = case.capture(make)
            except (ValueError, RuntimeError) as error:
                print(f"  {case.name}: {name}: {str(error).splitlines()[0]}", flush=True)
        default = describe(chosen[0]) if chosen else default
    measured = timing.measure(graphs, REPLAYS)
    ceiling = measured.pop("").median
    return {name: t.median / ceiling for name, t in measured.items()}, default


def table(
    found: Mapping[int, Mapping[str, float]],  # M -> shape -> ratio
    defaults: Mapping[int, str],
) -> Iterator[str]:
    """Yield a line for each shape, the best average first, then the fastest shape of each M."""
    nan = float("nan")
    names = dict.fromkeys(name for column in found.values() for name in column)
    means = {n: statistics.fmean(column.get(n, nan) for column in found.values()) for n in names}
    width = max(map(len, names), default=0)
    yield f"{'':{width}}" + "".join(f"{f'M={mn}':>9} " for mn in found) + f"{'mean':>8}"
    for name in sorted(names, key=lambda n: (means[n] != means[n], means[n])):
        columns = (
            f"{column.get(name, nan):9.3f}{'*' if defaults[mn] == name else ' '}"
            for mn, column in found.items()
        )
        yield f"{name:{width}}" + "".join(columns) + f"{means[name]:8.3f}"
    fastest = {mn: min(column, key=column.__getitem__) for mn, column in found.items() if column}
    yield "fastest: " + "; ".join(f"{mn}: {name}" for mn, name in fastest.items())


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    for name, default in (("--rows", ROWS), ("--columns", STAGE_COLUMNS)):
        text = ",".join(map(str, default))
        add(name, type=positive_numbers, default=default, metavar="N,...", help=f"default: {text}")
    names = ", ".join(OPERATIONS)
    add("--only", default="", metavar="PATTERN", help=f"operations whose names match, of {names}")
    add("--output", type=Path, metavar="FILE", help="JSON lines: the machine, then the ratios")
    add("--commit", help="name of the measured version, where there is no git to ask")
    options = parser.parse_args(arguments)
    bad = [k for k in options.columns if k % LANES]
    if bad:
        parser.error(f"--columns: expected multiples of {LANES}, got {bad}")
    return options


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        sys.exit("bench.tune: needs a CUDA GPU that has kernels")
    torch.manual_seed(0)
    start = time.perf_counter()
    machine = environment.describe("python -m bench.tune", options.commit)
    print(f"{machine['gpu']}, {machine['commit']}", flush=True)
    lines: list[dict[str, Any]] = [{"machine": machine}]
    timing.warm_up()
    for name, (case_of, shapes_of) in OPERATIONS.items():
        if not re.search(options.only, name):
            continue
        for k in options.columns:
            found: dict[int, dict[str, float]] = {}
            defaults: dict[int, str] = {}
            for mn in options.rows:
                found[mn], defaults[mn] = ratios(case_of(mn, k), list(shapes_of(k)))
                line = {"name": name, "m": mn, "k": k, "default": defaults[mn], "ratios": found[mn]}
                lines.append(line)
            print(f"\n{name}, k = {k}, over the ceiling")
            print(*table(found, defaults), sep="\n", flush=True)
            if options.output:
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
