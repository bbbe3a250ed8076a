"""Measure the quantizers of gradients, beside a kernel that only moves the bytes.

    python -m bench.gradients [--rows M,...] [--columns K] [--output FILE]

The tables have `quantize` of bf16 rounding to nearest and stochastically, and
`silu_mul_backward_quantize` beside the same in torch, compiled, and then quantized. K is the number
of columns of results. Times are of launches in CUDA graphs over rotating buffers, ours and those of
the ceiling programmatic dependents of each other. What rounds stochastically is compared with the
reference on the CPU before it is timed, in the first rows.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from bench import environment
from bench.cases import Case, Makers, Run, require, run, streaming
from bench.ceiling import DEVICE, ELEMENTS
from bench.masked import poison, random
from bench.shapes import MAIN_COLUMN, positive_numbers
from cute_quant import (
    DEEP_GEMM_SM90,
    MXFP8,
    Format,
    bind,
    quantize,
    silu_mul_backward_quantize,
)

ROWS = (1, 64, 1024, 4096, 16384)
FIRST = 8
"""Rows that are compared."""
FORMATS = {
    "DEEP_GEMM_SM90": DEEP_GEMM_SM90,
    "e5m2": DEEP_GEMM_SM90.replace(values=torch.float8_e5m2),
    "MXFP8": MXFP8,
}


def quantizing(fmt: Format, m: int, k: int, stochastic: bool) -> Run:
    """Return a launch of `quantize`."""
    x = random(m, k)
    rng_state = torch.tensor([1, 2], device=DEVICE) if stochastic else None
    launch = bind(x, fmt, rng_state=rng_state)
    poison(*launch.results)
    launch()
    if rng_state is not None:
        rows = x[:FIRST].cpu()
        expected = quantize(rows, fmt, rng_state=rng_state.cpu())[0].view(torch.uint8)
        actual = launch.results[0][: len(rows)].view(torch.uint8).cpu()
        require(torch.equal(actual, expected), f"{fmt} rounded stochastically")
    return launch


def differentiating(fmt: Format, m: int, k: int, stochastic: bool) -> Run:
    """Return a launch of `silu_mul_backward_quantize`."""
    rng_state = torch.tensor([1, 2], device=DEVICE) if stochastic else None
    launch = bind(
        random(m, k // 2),
        random(m, k),
        fmt,
        rng_state=rng_state,
        operation=silu_mul_backward_quantize,
    )
    poison(*launch.results)
    launch()
    return launch


def gradients(grad: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """Return the gradients of gates and ups, in bfloat16."""
    gate, up = gate_up.float().chunk(2, -1)
    sigmoid, grad = torch.sigmoid(gate), grad.float()
    of_gates = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat((of_gates, grad * gate * sigmoid), -1).bfloat16()


def in_torch(fmt: Format, m: int, k: int) -> Run:
    """Return a call that computes gradients in a compiled kernel, and quantizes them in another."""
    grad, gate_up = random(m, k // 2), random(m, k)
    compiled = torch.compile(gradients, dynamic=False)
    return lambda: quantize(compiled(grad, gate_up), fmt)


def cases(rows: tuple[int, ...], k: int) -> Iterator[Case]:
    """Yield a case for each operation, format and number of rows; scales are not counted."""
    for m in rows:
        vectors = m * k // ELEMENTS
        for name, fmt in FORMATS.items():
            for stochastic in (False, True):
                rounding = "stochastic" if stochastic else "nearest"
                makers: Makers = {
                    "cute_quant": functools.partial(quantizing, fmt, m, k, stochastic),
                    "stream": functools.partial(streaming, 8, 4, vectors),
                }
                yield Case(f"quantize {rounding} {name}", m, k, 3 * m * k, makers)
        for stochastic in (False, True):
            rounding = "stochastic" if stochastic else "nearest"
            makers = {
                "cute_quant": functools.partial(differentiating, DEEP_GEMM_SM90, m, k, stochastic),
                "stream": functools.partial(streaming, 4, 4, vectors, loads=3),
            }
            if not stochastic:
                makers["torch"] = functools.partial(in_torch, DEEP_GEMM_SM90, m, k)
            yield Case(f"silu_mul_backward {rounding}", m, k, 4 * m * k, makers)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gradients",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--rows", type=positive_numbers, default=ROWS, metavar="M,...", help="of the results")
    add("--columns", type=int, default=MAIN_COLUMN, metavar="K", help="default: %(default)s")
    add("--output", type=Path, metavar="FILE", help="JSON lines: the machine, then the results")
    add("--commit", help="name of the measured version, where there is no git to ask")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench.gradients: needs a CUDA GPU that has kernels")
    torch.manual_seed(0)
    machine = environment.describe("python -m bench.gradients", options.commit)
    run(cases(options.rows, options.columns), machine, "torch", options.output)


if __name__ == "__main__":
    main()
