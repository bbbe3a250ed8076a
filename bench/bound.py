"""Estimate times of kernels, beside measured ones of an H100, and for a B200.

    python -m bench.bound [--against FILE]...

Prints, for each measured call, its time, the estimate of `bench.resources` and what binds first,
then Spearman's rank correlation and the relative errors. Only if they are within their limits does
it print estimates for a B200, where nothing was measured; if not, it exits with 1. Needs no GPU.

FILE has JSON lines: the machine, then a `Time` each. The default is what an H100 measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import resources
from bench.resources import MACHINES, Bound, Launch, Machine
from cute_quant import Format
from cute_quant.contract.dtypes import ceil_div
from cute_quant.dispatch import reachable
from cute_quant.dispatch.call_range import (
    DEQUANTIZE_BLOCKS,
    QUANTIZE_BLOCKS,
    REQUANTIZE_BLOCKS,
    CallRange,
)
from cute_quant.dispatch.plan import Gpu
from cute_quant.dispatch.reachable import Variant
from cute_quant.kernels.config import (
    BLOCK_TILE,
    BLOCK_WARPS,
    LANES,
    BlocksSpec,
    RmsNormSpec,
    Spec,
    launched_on,
)
from cute_quant.lab import timing
from cute_quant.lab.machine_code import machine_code

MEASURED = Path(__file__).parent / "results" / "h100-times.jsonl"

BLOCK_OPERATIONS = (QUANTIZE_BLOCKS, REQUANTIZE_BLOCKS, DEQUANTIZE_BLOCKS)

LEAST_KERNELS = 20
"""Different kernels that have to be among the measured ones."""
LEAST_CORRELATION = 0.95
MOST_ERROR = 0.10
"""Limits of the rank correlation and of the median relative error. They were written down before
the first estimate was compared."""


class Time(NamedTuple):
    """A measured call of bfloat16 rows or weights.

    Attributes:
        operation: as of a `CallRange`.
        fmt: of the results.
        m, k: rows and columns of the results.
        seconds: of a call.
        commit: that was measured.
        residual: whether the norm has one.
        stochastic: whether values are rounded by random numbers.
        along_n: whether weights are contiguous along n.
    """

    operation: str
    fmt: str
    m: int
    k: int
    seconds: float
    commit: str
    residual: bool = False
    stochastic: bool = False
    along_n: bool = False

    @property
    def name(self) -> str:
        options = ("residual", "stochastic", "along_n")
        words = [name.replace("_", " ") for name in options if getattr(self, name)]
        return f"{', '.join([self.operation, *words])} {self.fmt}"

    @property
    def nbytes(self) -> int:
        """Return the bytes that the call reads and writes; scales of blocks are next to none."""
        fmt = Format.parse(self.fmt)
        quantized = fmt.value_columns(self.k) * fmt.values.itemsize
        if not fmt.whole_row and self.operation not in BLOCK_OPERATIONS:
            quantized += fmt.groups(self.k) * fmt.scale_dtype.itemsize
        match self.operation:
            case "dequantize_blocks":
                row = quantized + 2 * self.k
            case "requantize_blocks":
                row = self.k + quantized
            case "silu_mul_quantize":
                row = 4 * self.k + quantized
            case "silu_mul_backward_quantize":
                row = 3 * self.k + quantized
            case _:
                row = 2 * self.k + quantized
        # The residual is read and written.
        return self.m * (row + 4 * self.k * self.residual)


def read(path: Path) -> list[Time]:
    """Return the times of a file."""
    lines = (json.loads(line) for line in path.read_text().splitlines())
    return [Time(**line["time"]) for line in lines if "time" in line]


def spec_of(time: Time, machine: Machine) -> Spec:
    """Return the spec of the kernel that a call takes on a GPU."""
    fmt = Format.parse(time.fmt)
    calls = CallRange(time.operation, fmt, torch.bfloat16, (time.k,), time.m)
    calls = calls._replace(stochastic=time.stochastic).with_upper_scale("encode_scale")
    variant = Variant(calls, time.k, residual=time.residual, along_n=time.along_n)
    spec = reachable.spec_of(variant, time.m, Gpu(machine.arch, machine.gpu.sms))
    return launched_on(spec, machine.arch)


def grid(spec: Spec, m: int, k: int) -> tuple[int, int]:
    """Return the CTAs of a launch for (m, k) results, and the warps of each."""
    if isinstance(spec, BlocksSpec):
        return ceil_div(m, BLOCK_TILE) * ceil_div(k, BLOCK_TILE), BLOCK_WARPS
    tile: Any = spec.tile  # type: ignore[union-attr]
    fmt = spec.fmt  # type: ignore[union-attr]
    rows = ceil_div(fmt.scale_rows(m), tile.rows)
    tiles = ceil_div(k, LANES * tile.values_per_thread)
    norm = isinstance(spec, RmsNormSpec)
    if norm or fmt.by_row:
        of_thread = (
            spec.tiles_per_thread if isinstance(spec, RmsNormSpec) else tile.tiles_per_thread
        )
        return rows, tile.row_warps * ceil_div(tiles, of_thread)
    columns = ceil_div(tiles, tile.column_warps * tile.tiles_per_thread)
    return rows * columns, tile.row_warps * tile.column_warps


def launch_of(time: Time, machine: Machine) -> tuple[Spec, Launch]:
    """Return the spec and the launch of a call on a GPU, as benchmarks measure it."""
    spec = spec_of(time, machine)
    ctas, warps = grid(spec, time.m, time.k)
    code = machine_code(spec, machine.arch)
    return spec, Launch(
        code, ctas, warps, time.nbytes, time.nbytes * timing.buffer_count(time.nbytes)
    )


class Estimate(NamedTuple):
    """A measured call and what bounds it."""

    time: Time
    spec: Spec
    bound: Bound

    @property
    def error(self) -> float:
        """Return how much longer than measured the estimate is, as a share."""
        return self.bound.estimate / self.time.seconds - 1


def estimates(times: Sequence[Time], machine: Machine) -> list[Estimate]:
    found = []
    for time in times:
        spec, launch = launch_of(time, machine)
        found.append(Estimate(time, spec, resources.bound(launch, machine)))
    return found


class Check(NamedTuple):
    """How close estimates are to measured times.

    Attributes:
        kernels: how many different ones there are.
        correlation: Spearman's, of all calls.
        median, largest: relative errors, without their signs.
    """

    kernels: int
    correlation: float
    median: float
    largest: float

    @property
    def passes(self) -> bool:
        return (
            self.kernels >= LEAST_KERNELS
            and self.correlation >= LEAST_CORRELATION
            and self.median <= MOST_ERROR
        )


def check(found: Sequence[Estimate]) -> Check:
    """Compare estimates with measured times."""
    errors = [abs(e.error) for e in found]
    correlation = resources.rank_correlation(
        [e.time.seconds for e in found], [e.bound.estimate for e in found]
    )
    kernels = len({e.spec for e in found})
    return Check(kernels, correlation, statistics.median(errors), max(errors))


def table(found: Sequence[Estimate], machine: Machine, *, measured: bool) -> Iterator[str]:
    """Yield the lines of a table, with measured times and errors or without."""
    width = max(len(e.time.name) for e in found)
    header = f"{'measured':>10} {'error':>6} " if measured else ""
    yield f"{machine.gpu.name:{width}} {'rows':>6} {header}{'estimate':>10}  bound by"
    for e in found:
        words = f"{e.time.seconds * 1e6:7.2f} us {e.error:+6.0%} " if measured else ""
        estimate = f"{e.bound.estimate * 1e6:7.2f} us"
        yield f"{e.time.name:{width}} {e.time.m:6} {words}{estimate}  {e.bound.first}"


def report(times: Sequence[Time]) -> tuple[list[str], bool]:
    """Return the lines of both tables, and whether the estimates are within their limits."""
    h100, b200 = MACHINES["sm_90a"], MACHINES["sm_100a"]
    found = estimates(times, h100)
    result = check(found)
    lines = [
        *table(found, h100, measured=True),
        "",
        f"{len(found)} calls of {result.kernels} kernels, at least {LEAST_KERNELS} asked",
        f"rank correlation {result.correlation:.3f}, at least {LEAST_CORRELATION} asked",
        f"relative error: median {result.median:.1%}, at most {MOST_ERROR:.0%} asked; "
        f"largest {result.largest:.0%}",
        "",
    ]
    if not result.passes:
        return [*lines, "Not within the limits: there are no estimates for other GPUs."], False
    lines += ["B200: estimate, not measured", ""]
    return [*lines, *table(estimates(times, b200), b200, measured=False)], True


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.bound",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--against", type=Path, action="append", metavar="FILE", help=f"default: {MEASURED.name}"
    )
    paths = parser.parse_args().against or [MEASURED]
    lines, passes = report([time for path in paths for time in read(path)])
    print(*lines, sep="\n")
    sys.exit(not passes)


if __name__ == "__main__":
    main()
