"""Measure weights in square blocks, beside a kernel that only moves the bytes.

    python -m bench.blocks [--deep-gemm FILE] [--rows N,...] [--columns K] [--output FILE]

The tables have `quantize_blocks` of bf16 weights contiguous along k and along n, and
`dequantize_blocks` and `requantize_blocks`. With FILE, DeepGEMM's ``utils/math.py``, its cast in
torch stands beside. Times are of launches in CUDA graphs over rotating buffers, ours and those of
the ceiling programmatic dependents of each other. Outputs are compared before they are timed: with
the reference on the CPU in the first and the last rows of blocks, DeepGEMM's with ours everywhere.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench import environment
from bench.cases import Case, Makers, Run, require, run, streaming
from bench.masked import poison, random
from bench.shapes import MAIN_COLUMN, positive_numbers
from cute_quant import (
    DEEP_GEMM,
    DEEP_GEMM_32,
    DEEP_GEMM_SM90,
    MXFP4,
    MXFP8,
    NVFP4,
    Format,
    bind,
    dequantize_blocks,
    quantize_blocks,
    requantize_blocks,
)

ROWS = (512, 2048, 4096, 7168, 18432)
DEVICE = "cuda"
BLOCK = 128
"""Rows of the largest block."""
FORMATS = {
    "DEEP_GEMM": DEEP_GEMM,
    "DEEP_GEMM_SM90": DEEP_GEMM_SM90,
    "DEEP_GEMM_32": DEEP_GEMM_32,
    "MXFP8": MXFP8,
    "MXFP4": MXFP4,
}
REQUANTIZED = {"DEEP_GEMM": DEEP_GEMM, "MXFP4": MXFP4, "NVFP4": NVFP4}
DEEP_GEMM_BITS = DEEP_GEMM_SM90.replace(min_scale="deepgemm", numerics="deepgemm")


def weights(n: int, k: int, along_n: bool) -> torch.Tensor:
    return random(k, n).mT if along_n else random(n, k)


def compare_ends(
    operation: Callable[..., Any], inputs: tuple[torch.Tensor, ...], q: torch.Tensor, fmt: Format
) -> None:
    """Compare values of the first and the last rows of blocks with the reference."""
    n = q.shape[0]
    for first in {0, (n - 1) // BLOCK * BLOCK}:
        rows = [slice(first, first + BLOCK), slice(first // BLOCK, first // BLOCK + 1)]
        on_cpu = [
            t.view(torch.uint8)[part].cpu().view(t.dtype)
            if t.dtype.itemsize == 1
            else t[part].cpu()
            for t, part in zip(inputs, rows, strict=False)
        ]
        expected = operation(*on_cpu)[0].view(torch.uint8)
        require(torch.equal(q.view(torch.uint8)[rows[0]].cpu(), expected), str(fmt))


def quantizing(fmt: Format, n: int, k: int, along_n: bool) -> Run:
    """Return a launch of `quantize_blocks`."""
    w = weights(n, k, along_n)
    launch = bind(w, fmt, operation=quantize_blocks)
    poison(*launch.results)
    launch()
    reference = functools.partial(quantize_blocks, fmt=fmt)
    compare_ends(lambda rows: reference(rows), (w,), launch.results[0], fmt)
    return launch


def dequantizing(n: int, k: int) -> Run:
    """Return a launch of `dequantize_blocks`."""
    q, sf = quantize_blocks(random(n, k), DEEP_GEMM_SM90)
    launch = bind(q, sf, DEEP_GEMM_SM90, operation=dequantize_blocks)
    launch()
    scales = sf.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:n, :k]
    require(torch.equal(launch.results, (q.float() * scales).bfloat16()), "dequantize_blocks")
    return launch


def requantizing(fmt: Format, n: int, k: int) -> Run:
    """Return a launch of `requantize_blocks`."""
    w8, w_sf = quantize_blocks(random(n, k), DEEP_GEMM_SM90)
    scale = torch.full((), 448.0, device=DEVICE)
    given: dict[str, Any] = {"encode_scale": scale} if fmt.upper_scale else {}
    launch = bind(w8, w_sf, fmt, operation=requantize_blocks, **given)
    poison(*launch.results)
    launch()
    on_cpu = {name: t.cpu() for name, t in given.items()}
    reference = functools.partial(requantize_blocks, fmt=fmt, **on_cpu)
    compare_ends(lambda *parts: reference(*parts), (w8, w_sf), launch.results[0], fmt)
    return launch


def deep_gemm_casting(math: ModuleType, n: int, k: int) -> Run:
    """Return a call of DeepGEMM's cast, whose result is ours."""
    w = random(n, k)
    call = functools.partial(math.per_block_cast_to_fp8, w, False)
    for theirs, ours in zip(call(), quantize_blocks(w, DEEP_GEMM_BITS), strict=True):
        require(torch.equal(theirs.view(torch.uint8), ours.view(torch.uint8)), "DeepGEMM's cast")
    return call


def load_math(path: Path) -> ModuleType:
    """Execute DeepGEMM's module alone: it needs torch only."""
    spec = importlib.util.spec_from_file_location("deep_gemm_math", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cases(rows: tuple[int, ...], k: int, math: ModuleType | None) -> Iterator[Case]:
    """Yield a case for each operation, format and number of rows; scales are not counted."""
    for n in rows:
        threads = n * k // 16
        for along_n in (False, True):
            for name, fmt in FORMATS.items():
                out = fmt.value_columns(16) // 4
                makers: Makers = {
                    "cute_quant": functools.partial(quantizing, fmt, n, k, along_n),
                    "stream": functools.partial(streaming, 8, out, threads),
                }
                if math is not None and fmt is DEEP_GEMM_SM90 and not along_n:
                    makers["DeepGEMM"] = functools.partial(deep_gemm_casting, math, n, k)
                layout = "along n" if along_n else "along k"
                nbytes = 2 * n * k + n * fmt.value_columns(k)
                yield Case(f"quantize {layout} {name}", n, k, nbytes, makers)
        for name, fmt in REQUANTIZED.items():
            makers = {
                "cute_quant": functools.partial(requantizing, fmt, n, k),
                "stream": functools.partial(streaming, 4, fmt.value_columns(16) // 4, threads),
            }
            nbytes = n * k + n * fmt.value_columns(k)
            yield Case(f"requantize {name}", n, k, nbytes, makers)
        makers = {
            "cute_quant": functools.partial(dequantizing, n, k),
            "stream": functools.partial(streaming, 4, 8, threads),
        }
        yield Case("dequantize DEEP_GEMM_SM90", n, k, 3 * n * k, makers)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.blocks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--deep-gemm", type=Path, metavar="FILE", help="DeepGEMM's utils/math.py")
    add("--rows", type=positive_numbers, default=ROWS, metavar="N,...", help="of the weights")
    add("--columns", type=int, default=MAIN_COLUMN, metavar="K", help="default: %(default)s")
    add("--output", type=Path, metavar="FILE", help="JSON lines: the machine, then the results")
    add("--commit", help="name of the measured version, where there is no git to ask")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        sys.exit("bench.blocks: needs a CUDA GPU that has kernels")
    torch.manual_seed(0)
    machine = environment.describe("python -m bench.blocks", options.commit)
    math = load_math(options.deep_gemm) if options.deep_gemm else None
    run(cases(options.rows, options.columns, math), machine, "DeepGEMM", options.output)


if __name__ == "__main__":
    main()
