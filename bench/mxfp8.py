"""Measure `quantize` to MXFP8 beside FlashInfer's kernels in CuTe DSL.

    python -m bench.mxfp8 [--flashinfer WHEEL_OR_DIRECTORY] [--rows M,...] [--output FILE]

Scales are row-major, which FlashInfer names linear, and in blocks of 128x4. Its modules are read
from a wheel (``pip download --no-deps flashinfer-python``), or from a directory that has the
package, which does not have to be importable. All launches are programmatic dependents of each
other, on memory of their own. Outputs are compared before they are timed, FlashInfer's with ours.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import importlib
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from bench import environment
from bench.cases import Case, Makers, Run, require, run, streaming
from bench.fp4 import bytes_of, quantizing
from bench.masked import random
from bench.shapes import MAIN_COLUMN, positive_numbers
from cute_quant import MXFP8, Format, quantize
from cute_quant.contract import scale_storage
from cute_quant.contract.dtypes import align, ceil_div
from cute_quant.jit import lookup

ROWS = (1, 16, 64, 512, 1024, 4096, 16384, 32768)
FORMATS = {"MXFP8 row-major": MXFP8.replace(scale_layout="row_major"), "MXFP8 128x4": MXFP8}
PEER = "FlashInfer"

PACKAGES = ("", "cute_dsl", "quantization", "quantization.kernels")
"""Folders of the package whose modules are imported; their own code, which compiles, is not run."""
KERNELS = "flashinfer.quantization.kernels.mxfp8_quantize"


def unpacked(path: Path) -> Path:
    """Return the directory that has FlashInfer's package, of a wheel a temporary one."""
    if path.is_dir():
        return path
    directory = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    with zipfile.ZipFile(path) as wheel:
        parts = [f"flashinfer/{name.replace('.', '/')}/" for name in PACKAGES if name]
        members = [name for name in wheel.namelist() if name.startswith(tuple(parts))]
        wheel.extractall(directory, members)
    return directory


def load(path: Path) -> ModuleType:
    """Import FlashInfer's MXFP8 kernels alone: what logs and asks the GPU stands in.

    The stand-ins stay, for what the kernels import when they are traced.
    """
    root = unpacked(path) / "flashinfer"
    modules: dict[str, Any] = {}
    for name in PACKAGES:
        package = ModuleType(f"flashinfer.{name}".rstrip("."))
        package.__path__ = [str(root.joinpath(*name.split(".")))]
        modules[package.__name__] = package
    modules["flashinfer.api_logging"] = SimpleNamespace(flashinfer_api=lambda function: function)
    for name in ("flashinfer.jit", "flashinfer.jit.cute_dsl_core", "flashinfer.cute_dsl.utils"):
        modules[name] = mock.Mock()
    sys.modules.update(modules)
    return importlib.import_module(KERNELS)


def flashinfer_quantizing(kernels: ModuleType, fmt: Format, m: int, k: int) -> Run:
    """Return a launch of FlashInfer's kernel as its public function makes it, on memory of its own.

    A GPU of compute capability 10.7 has kernels that are not among these.
    """
    x = random(m, k)
    groups = k // fmt.group_size
    padded_m, padded_groups = align(m, fmt.block_rows or 1), align(groups, 4 if fmt.blocked else 1)
    q = torch.empty(m, k, dtype=torch.uint8, device=x.device)
    sf = torch.empty(padded_m * padded_groups, dtype=torch.uint8, device=x.device)
    ctas = lookup.multiprocessors(x.get_device()) * kernels._BLOCKS_PER_SM
    two_threads = m * groups >= kernels.MXFP8_2T_SF_THRESHOLD
    pdl = True
    sizes: tuple[int, ...]
    if fmt.blocked:
        kernel, rows = kernels._get_compiled_kernel_mxfp8_swizzled(
            "bf16", k, pdl, two_threads, kernels.SF_LAYOUT_128x4
        )
        sizes = m, padded_m, min(ceil_div(padded_m, rows), ctas)
    else:
        kernel, blocks = kernels._get_compiled_kernel_mxfp8_linear("bf16", k, pdl, two_threads)
        sizes = m * groups, min(ceil_div(m * groups, blocks), ctas)
    call = functools.partial(kernel, x, q, sf, *sizes)
    call()
    expected_q, expected_sf = quantize(x, fmt)
    theirs = sf.view(expected_sf.dtype).view(expected_sf.shape)
    same = torch.equal(q, expected_q.view(torch.uint8))
    scales = (scale_storage.read(t, fmt, m, k).view(torch.uint8) for t in (theirs, expected_sf))
    require(same and torch.equal(*scales), f"{PEER}'s {fmt}")
    return call


def cases(rows: tuple[int, ...], k: int, kernels: ModuleType | None) -> Iterator[Case]:
    """Yield a case for each layout and number of rows."""
    for name, fmt in FORMATS.items():
        for m in rows:
            makers: Makers = {
                "cute_quant": functools.partial(quantizing, fmt, m, k),
                "stream": functools.partial(streaming, 8, 4, m * k // 16),
            }
            if kernels is not None:
                makers[PEER] = functools.partial(flashinfer_quantizing, kernels, fmt, m, k)
            yield Case(f"quantize {name}", m, k, 2 * m * k + bytes_of(fmt, m, k), makers)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.mxfp8",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--flashinfer", type=Path, metavar="PATH", help="a wheel, or what has the package")
    add("--rows", type=positive_numbers, default=ROWS, metavar="M,...")
    add("--columns", type=int, default=MAIN_COLUMN, metavar="K", help="default: %(default)s")
    add("--output", type=Path, metavar="FILE", help="JSON lines: the machine, then the results")
    add("--commit", help="name of the measured version, where there is no git to ask")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        sys.exit("bench.mxfp8: needs a CUDA GPU that has kernels")
    torch.manual_seed(0)
    machine = environment.describe("python -m bench.mxfp8", options.commit)
    kernels = load(options.flashinfer) if options.flashinfer else None
    run(cases(options.rows, options.columns, kernels), machine, PEER, options.output)


if __name__ == "__main__":
    main()
