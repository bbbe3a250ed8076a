"""Measure `convert_scales`, beside a kernel that only moves the bytes.

    python -m bench.convert_scales [--rows N,...] [--columns K] [--output FILE]

Scales are those of (N, K) values. Where they are installed, DeepGEMM's
``get_mn_major_tma_aligned_packed_ue8m0_tensor`` and ``get_mn_major_tma_aligned_tensor``, which its
``transform_sf_into_required_layout`` calls, and FlashInfer's ``block_scale_interleave`` stand
beside. Times are of launches in CUDA graphs over rotating buffers, ours and those of the ceiling
programmatic dependents of each other. Results are compared before they are timed: ours with the
reference on the CPU, the peers' with ours.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from bench import environment
from bench.cases import Case, Makers, Run, require, run, streaming
from bench.masked import poison, random
from bench.shapes import MAIN_COLUMN, positive_numbers
from cute_quant import (
    DEEP_GEMM,
    DEEP_GEMM_SM90,
    GROUPWISE_FP8,
    MXFP8,
    NVFP4,
    Format,
    bind,
    convert_scales,
    quantize,
)

ROWS = (512, 4096, 32768, 131072)
VECTOR = 4
"""Scales of four groups, which a thread of the kernel loads at once."""
POWERS = GROUPWISE_FP8.replace(round_scale=True)
ROW_MAJOR = "row_major"


class Conversion(NamedTuple):
    """A conversion, and the function of a library that does the same, by module and name."""

    name: str
    fmt: Format
    to: Format
    peer: tuple[str, str] | None = None


CONVERSIONS = (
    Conversion(
        "float32 to packed words",
        POWERS,
        DEEP_GEMM,
        ("deep_gemm", "get_mn_major_tma_aligned_packed_ue8m0_tensor"),
    ),
    Conversion(
        "float32 to MN-major",
        GROUPWISE_FP8,
        DEEP_GEMM_SM90,
        ("deep_gemm", "get_mn_major_tma_aligned_tensor"),
    ),
    Conversion(
        "UE8M0 to 128x4",
        MXFP8.replace(scale_layout=ROW_MAJOR),
        MXFP8,
        ("flashinfer", "block_scale_interleave"),
    ),
    Conversion(
        "e4m3 to 128x4",
        NVFP4.replace(scale_layout=ROW_MAJOR),
        NVFP4,
        ("flashinfer", "block_scale_interleave"),
    ),
    Conversion("128x4 to UE8M0", MXFP8, MXFP8.replace(scale_layout=ROW_MAJOR)),
    Conversion("packed words to float32", DEEP_GEMM, POWERS),
)


def scales(fmt: Format, n: int, k: int) -> torch.Tensor:
    """Return the scales of random values."""
    x = random(n, k)
    upper = torch.full((), 448.0, device=x.device) if fmt.upper_scale else None
    return quantize(x, fmt, encode_scale=upper)[1]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(*(t.contiguous().view(torch.uint8).flatten().cpu() for t in (a, b)))


def converting(conversion: Conversion, n: int, k: int) -> Run:
    """Return a launch of `convert_scales`."""
    _, fmt, to, _ = conversion
    sf = scales(fmt, n, k)
    launch = bind(sf, fmt, to, (n, k), operation=convert_scales)
    poison(launch.results)
    launch()
    expected = convert_scales(sf.cpu(), fmt, to, (n, k))
    require(same_bits(launch.results, expected), conversion.name)
    return launch


def function_of(conversion: Conversion) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return the function of a library, None where it is not installed."""
    if conversion.peer is None:
        return None
    module, name = conversion.peer
    try:
        function: Callable[[torch.Tensor], torch.Tensor] = getattr(
            importlib.import_module(module), name
        )
    except (ImportError, AttributeError):
        return None
    return function


def of_peer(
    function: Callable[[torch.Tensor], torch.Tensor], conversion: Conversion, n: int, k: int
) -> Run:
    """Return a call of a library, whose result is ours."""
    _, fmt, to, _ = conversion
    sf = scales(fmt, n, k)
    given = sf.view(torch.uint8) if sf.element_size() == 1 else sf
    ours = convert_scales(sf, fmt, to, (n, k))
    require(same_bits(function(given), ours), f"{conversion.name} of {conversion.peer}")
    return functools.partial(function, given)


def cases(rows: tuple[int, ...], k: int) -> Iterator[Case]:
    """Yield a case for each conversion and number of rows; padding is not counted."""
    for n in rows:
        for conversion in CONVERSIONS:
            groups = conversion.fmt.groups(k)
            itemsizes = [
                1 if fmt.byte_scales else fmt.scale_dtype.itemsize
                for fmt in (conversion.fmt, conversion.to)
            ]
            # Bytes go to bytes in vectors, as words of four rows.
            wide = 1 if max(itemsizes) > 1 else VECTOR
            threads = n * groups // (VECTOR * wide)
            makers: Makers = {
                "cute_quant": functools.partial(converting, conversion, n, k),
                "stream": functools.partial(
                    streaming, itemsizes[0] * wide, itemsizes[1] * wide, threads
                ),
            }
            function = function_of(conversion)
            if function is not None:
                makers["peer"] = functools.partial(of_peer, function, conversion, n, k)
            yield Case(conversion.name, n, k, n * groups * sum(itemsizes), makers)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.convert_scales",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--rows", type=positive_numbers, default=ROWS, metavar="N,...", help="of the values")
    add("--columns", type=int, default=MAIN_COLUMN, metavar="K", help="default: %(default)s")
    add("--output", type=Path, metavar="FILE", help="JSON lines: the machine, then the results")
    add("--commit", help="name of the measured version, where there is no git to ask")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        sys.exit("bench.convert_scales: needs a CUDA GPU that has kernels")
    torch.manual_seed(0)
    machine = environment.describe("python -m bench.convert_scales", options.commit)
    run(cases(options.rows, options.columns), machine, "peer", options.output)


if __name__ == "__main__":
    main()
