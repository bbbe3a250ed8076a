"""Host time of a call: what the CPU spends before the GPU has work.

    python -m bench.host [--output FILE]

Batches of the functions are interleaved; each number is the median batch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench import environment, report
from bench.names import (
    EMPTY_LIKE,
    LAUNCH,
    NEG,
    NORM,
    NORM_OPERATOR,
    OPERATOR,
    QUANTIZE,
    QUANTIZE_OUT,
)
from bench.results import Results, machine_lines
from cute_quant import DEEP_GEMM, bind, quantize, rms_norm_quantize

SHAPE = (16, 7168)
CALLS = 100
BATCHES = 60
WARM_UP_BATCHES = 5


def measure() -> dict[str, float]:
    """Return the seconds of a call on a small input, whose kernels never hold the host up."""
    x = torch.randn(SHAPE, dtype=torch.bfloat16, device="cuda")
    out = quantize(x)
    residual, weight, new_sum = torch.randn_like(x), torch.ones_like(x[0]), torch.empty_like(x)
    operators, fmt = torch.ops.cute_quant, str(DEEP_GEMM)
    norm = operators.rms_norm_quantize_residual.default
    options = {"eps": 1e-6, "weight_offset": 0.0, "rounding": "fused"}
    functions: dict[str, Callable[[], object]] = {
        QUANTIZE_OUT: lambda: quantize(x, out=out),
        QUANTIZE: lambda: quantize(x),
        OPERATOR: lambda: operators.quantize.default(x, fmt),
        NORM: lambda: rms_norm_quantize(x, weight, eps=1e-6, residual=residual),
        NORM_OPERATOR: lambda: norm(x, weight, residual, new_sum, None, fmt, **options),
        LAUNCH: bind(x, out=out),
        NEG: lambda: torch.neg(x),
        EMPTY_LIKE: lambda: torch.empty_like(x),
    }
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(WARM_UP_BATCHES + BATCHES):
        for name, function in functions.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                function()
            elapsed = time.perf_counter() - start
            if i >= WARM_UP_BATCHES:
                seconds[name].append(elapsed / CALLS)
    torch.cuda.synchronize()
    return {name: statistics.median(values) for name, values in seconds.items()}


def lines(seconds: dict[str, float]) -> list[str]:
    """Return a small table."""
    return [f"host time of a call, x {SHAPE} bf16, median of {BATCHES} batches of {CALLS}"] + [
        f"  {name:55} {s * 1e6:6.2f} us  {s / seconds[NEG]:5.2f} x {NEG}"
        for name, s in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON lines")
    parser.add_argument("--commit", help="name of the measured version, where there is no git")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench.host: needs a CUDA GPU of compute capability 9.0, 10.0 or 10.3")
    results = Results(environment.describe("python -m bench.host", options.commit), host=measure())
    print(*machine_lines(results.machine), *lines(results.host), sep="\n")
    print(*report.verdicts(results), sep="\n")
    if options.output:
        results.write(options.output)


if __name__ == "__main__":
    main()
