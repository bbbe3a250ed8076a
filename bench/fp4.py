"""Measure what quantizes to FP4 and back, beside a kernel that only moves the bytes.

    python -m bench.fp4 [--vllm FILE] [--rows M,...] [--columns K] [--output FILE]

The first table has `quantize` to each format, the second `dequantize` and `fake_quantize` of NVFP4
at the shapes of vLLM's tests, beside vLLM's Triton kernels where FILE is its module
``nvfp4_emulation_utils.py``. Times are of launches in CUDA graphs over rotating buffers, ours and
those of the ceiling programmatic dependents of each other. Outputs are compared with the reference
before they are timed, vLLM's with ours.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from bench import environment
from bench.cases import Case, Makers, Run, require, run, streaming
from bench.masked import poison, random, sample
from bench.shapes import MAIN_COLUMN, VLLM_FP4_SHAPES, positive_numbers
from cute_quant import MXFP4, NVFP4, Format, bind, dequantize, fake_quantize, quantize

ROWS = (64, 512, 1024, 4096, 16384, 32768)
DEVICE = "cuda"
ROW_MAJOR_NVFP4 = NVFP4.replace(scale_layout="row_major")
FORMATS = {
    "NVFP4": NVFP4,
    "NVFP4 row-major": ROW_MAJOR_NVFP4,
    "NVFP4 per row": NVFP4.replace(row_scale=True),
    "MXFP4": MXFP4,
    "MXFP4 row-major": MXFP4.replace(scale_layout="row_major"),
}
ENCODE_SCALE = 64.0


def encode_scale() -> torch.Tensor:
    return torch.full((), ENCODE_SCALE, device=DEVICE)


def upper_scales(fmt: Format) -> dict[str, Any]:
    return {} if fmt.row_scale or not fmt.upper_scale else {"encode_scale": encode_scale()}


def bytes_of(fmt: Format, m: int, k: int) -> int:
    """Return the bytes of values and scales."""
    return m * fmt.value_columns(k) + m * fmt.groups(k)


def quantizing(fmt: Format, m: int, k: int) -> Run:
    """Return a launch of `quantize`."""
    x, given = random(m, k), upper_scales(fmt)
    launch = bind(x, fmt, **given)
    poison(*launch.results)
    launch()
    rows = sample(torch.ones(m, dtype=torch.bool, device=DEVICE))
    on_cpu = {name: t.cpu() for name, t in given.items()}
    expected = quantize(x[rows].cpu(), fmt, **on_cpu)[0].view(torch.uint8)
    require(torch.equal(launch.results[0].view(torch.uint8)[rows].cpu(), expected), str(fmt))
    return launch


def fake_quantizing(m: int, k: int) -> Run:
    """Return a launch of `fake_quantize`."""
    x, scale = random(m, k), encode_scale()
    y = torch.empty_like(x)
    launch = bind(x, ROW_MAJOR_NVFP4, encode_scale=scale, out=y, operation=fake_quantize)
    launch()
    expected = fake_quantize(x[:1].cpu(), ROW_MAJOR_NVFP4, encode_scale=scale.cpu())
    require(torch.equal(y[:1].cpu(), expected), "fake_quantize")
    return launch


def dequantizing(m: int, k: int) -> Run:
    """Return a launch of `dequantize`."""
    scale = encode_scale()
    q, sf = quantize(random(m, k), ROW_MAJOR_NVFP4, encode_scale=scale)
    launch = bind(q, sf, ROW_MAJOR_NVFP4, encode_scale=scale, operation=dequantize)
    launch()
    first = q.view(torch.uint8)[:1].cpu().view(q.dtype), sf.view(torch.uint8)[:1].cpu()
    expected = dequantize(
        first[0], first[1].view(sf.dtype), ROW_MAJOR_NVFP4, encode_scale=scale.cpu()
    )
    require(torch.equal(launch.results[:1].cpu(), expected), "dequantize")
    return launch


def quantize_cases(rows: tuple[int, ...], k: int) -> Iterator[Case]:
    """Yield a case for each format and number of rows."""
    for name, fmt in FORMATS.items():
        for m in rows:
            makers: Makers = {
                "cute_quant": functools.partial(quantizing, fmt, m, k),
                "stream": functools.partial(streaming, 8, 2, m * k // 16),
            }
            yield Case(f"quantize {name}", m, k, 2 * m * k + bytes_of(fmt, m, k), makers)


def vllm_cases(vllm: ModuleType | None) -> Iterator[Case]:
    """Yield cases at the shapes of vLLM's tests."""
    for m, k in sorted(VLLM_FP4_SHAPES, key=lambda shape: shape[0] * shape[1]):
        threads = m * k // 16
        fake: Makers = {
            "cute_quant": functools.partial(fake_quantizing, m, k),
            "stream": functools.partial(streaming, 8, 8, threads),
        }
        back: Makers = {
            "cute_quant": functools.partial(dequantizing, m, k),
            "stream": functools.partial(streaming, 2, 8, threads),
        }
        if vllm is not None:
            fake["vLLM"] = functools.partial(vllm_fake_quantizing, vllm, m, k)
            back["vLLM"] = functools.partial(vllm_dequantizing, vllm, m, k)
        yield Case("fake_quantize NVFP4", m, k, 4 * m * k, fake)
        nbytes = 2 * m * k + bytes_of(ROW_MAJOR_NVFP4, m, k)
        yield Case("dequantize NVFP4", m, k, nbytes, back)


def load_vllm(path: Path) -> ModuleType:
    """Execute vLLM's module alone: of the package it needs names only."""
    import triton
    import triton.language as tl

    e2m1 = SimpleNamespace(max=lambda: 6.0)
    stand_ins: dict[str, Any] = {
        "vllm": mock.Mock(),
        "vllm.platforms": SimpleNamespace(
            current_platform=SimpleNamespace(is_cuda_alike=lambda: True)
        ),
        "vllm.scalar_type": SimpleNamespace(scalar_types=SimpleNamespace(float4_e2m1f=e2m1)),
        "vllm.triton_utils": SimpleNamespace(tl=tl, triton=triton),
        "vllm.utils": mock.Mock(),
        "vllm.utils.torch_utils": mock.Mock(),
    }
    spec = importlib.util.spec_from_file_location("vllm_nvfp4", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, stand_ins):
        spec.loader.exec_module(module)
    return module


def vllm_fake_quantizing(vllm: ModuleType, m: int, k: int) -> Run:
    """Return a call of vLLM's quantization and back."""
    return functools.partial(vllm._triton_nvfp4_quant_dequant, random(m, k), encode_scale(), 16)


def vllm_dequantizing(vllm: ModuleType, m: int, k: int) -> Run:
    """Return a call of vLLM's dequantization, whose result is ours."""
    scale = encode_scale()
    q, sf = quantize(random(m, k), ROW_MAJOR_NVFP4, encode_scale=scale)
    call = functools.partial(
        vllm._triton_dequantize_nvfp4, q.view(torch.uint8), sf, 1 / scale, torch.bfloat16
    )
    ours = dequantize(q, sf, ROW_MAJOR_NVFP4, decode_scale=1 / scale)
    require(torch.equal(call(), ours), "vLLM's dequantization")
    return call


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fp4",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--vllm", type=Path, metavar="FILE", help="vLLM's nvfp4_emulation_utils.py")
    add("--rows", type=positive_numbers, default=ROWS, metavar="M,...", help="of quantize")
    add("--columns", type=int, default=MAIN_COLUMN, metavar="K", help="default: %(default)s")
    add("--output", type=Path, metavar="FILE", help="JSON lines: the machine, then the results")
    add("--commit", help="name of the measured version, where there is no git to ask")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        sys.exit("bench.fp4: needs a CUDA GPU that has kernels")
    torch.manual_seed(0)
    machine = environment.describe("python -m bench.fp4", options.commit)
    vllm = load_vllm(options.vllm) if options.vllm else None
    all_cases = (*quantize_cases(options.rows, options.columns), *vllm_cases(vllm))
    run(all_cases, machine, "vLLM", options.output)


if __name__ == "__main__":
    main()
